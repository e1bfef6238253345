"""Denoised expression from the decoder, under observed or other covariates, at draws of the latents."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from scgen.analysis.counterfactual import Asked, as_if
from scgen.arguments import (
    check_choice,
    check_draws,
    check_flag,
    check_memory,
    check_number,
    check_seed,
    set_fields,
    shown,
)
from scgen.data.cells import Cells
from scgen.data.loader import CellLoader
from scgen.modules.vae import VAE, question
from scgen.seeding import generator, seeded


@dataclass(frozen=True)
class Settings:
    """Arguments of `ExpressionModel.get_normalized_expression`."""

    asked: Asked
    library_size: float | str
    n_samples: int
    return_mean: bool
    weights: str
    seed: int
    return_numpy: bool = False
    sparse_below: float | None = None

    def __post_init__(self):
        plain = {"n_samples": check_draws("n_samples", self.n_samples), "seed": check_seed(self.seed)}
        if not isinstance(self.library_size, str):
            takes = 'a positive number or "latent"'
            plain["library_size"] = check_number("library_size", self.library_size, takes, above=0)
        elif self.library_size != "latent":
            raise ValueError(f'library_size={shown(self.library_size)}; it takes a positive number or "latent".')
        for name in ("return_mean", "return_numpy"):
            plain[name] = check_flag(name, getattr(self, name))
        check_choice("weights", self.weights, ("uniform", "importance"))
        if self.sparse_below is not None:
            takes = "a positive number, in the unit of the result"
            plain["sparse_below"] = check_number("sparse_below", self.sparse_below, takes, above=0)
        set_fields(self, plain)
        if self.weights == "importance" and self.n_samples < 2:
            raise ValueError('weights="importance" needs several draws, such as n_samples=100.')

    @property
    def averaged(self) -> bool:
        """Whether the result is one matrix: the mean over the draws, or the only draw."""
        return self.return_mean or self.n_samples == 1


@question
def answer(
    vae: VAE,
    loader: CellLoader,
    settings: Settings,
    names: pd.Index,
    out=None,
) -> pd.DataFrame | np.ndarray | sparse.csr_matrix | list[sparse.csr_matrix]:
    """Return E_q[l rho(z, s)], averaged over conditions; see `ExpressionModel.get_normalized_expression`.

    Parameters
    ----------
    vae, loader
        The model and the n cells.
    settings
        Which values to return.
    names
        Names of all cells in the loader's store.
    out
        Array to fill.
    """
    if settings.library_size != 1 and not vae.has_library:
        raise ValueError(
            f'gene_likelihood="normal" has no library size: library_size={settings.library_size!r} is for counts.'
        )
    sparse_below = settings.sparse_below
    if sparse_below is not None:
        _check_sparse(vae, out)
    shape = (len(loader.index), len(settings.asked.genes))
    shape = shape if settings.averaged else (settings.n_samples, *shape)
    if out is not None:
        _check_out(out, shape)
    elif sparse_below is None:
        fewer = "Use return_mean=True, fewer cells or fewer genes, or pass out=numpy.memmap(...)."
        check_memory("n_samples", settings.n_samples, 4 * math.prod(shape), fewer)
    if settings.weights == "importance":  # all draws of a minibatch are in memory: z, l and their densities
        n_bytes = 32 * settings.n_samples * min(loader.batch_size, len(loader.index))
        check_memory("n_samples", settings.n_samples, n_bytes, "Choose fewer, or a smaller batch_size.")
    with seeded(settings.seed):
        blocks = _blocks(vae, loader, settings)
        if sparse_below is not None:
            return _sparse(blocks, sparse_below)
        # NumPy asks for large pages: the first write to the memory took half of the time without them.
        target = torch.from_numpy(np.empty(shape, np.float32)) if out is None else out
        # The result is large, so each block is written once instead of being added to zeros.
        for draw, rows, values in blocks:
            target[rows if settings.averaged else (draw, rows)] = values if out is None else values.numpy()
    if out is not None:
        return out
    if settings.return_numpy or not settings.averaged:
        return target.numpy()
    return pd.DataFrame(target.numpy(), index=names[loader.index], columns=settings.asked.genes, copy=False)


def _check_out(out, shape: tuple[int, ...]) -> None:
    """Raise an error if blocks of float32 cannot be assigned to ``out``."""
    takes = (
        f"it takes an array of shape {shape} of floats of at least 32 bits: numpy.memmap, an h5py dataset, a zarr array"
    )
    if not all(hasattr(out, name) for name in ("shape", "dtype", "__setitem__")):
        raise TypeError(f"out is a {type(out).__name__}, without shape, dtype or assignment to slices; {takes}.")
    if tuple(out.shape) != shape or getattr(out.dtype, "kind", None) != "f" or out.dtype.itemsize < 4:
        raise ValueError(f"out has shape {tuple(out.shape)} and dtype {out.dtype}; {takes}.")
    first = tuple(min(1, n) for n in shape)
    try:
        out[tuple(slice(n) for n in first)] = np.zeros(first, np.float32)
    except Exception as error:
        raise ValueError(f"out cannot be written to ({error}); {takes}, opened for writing.") from error


def _check_sparse(vae: VAE, out) -> None:
    """Raise ValueError if the result cannot be sparse."""
    if out is not None:
        raise ValueError("out= is dense, but sparse_below= returns a new sparse matrix: give only one of them.")
    if not vae.has_library:
        raise ValueError('gene_likelihood="normal" has negative values; sparse_below= is only for counts.')


def _sparse(blocks: Iterator[tuple[int, slice, Tensor]], below: float) -> sparse.csr_matrix | list[sparse.csr_matrix]:
    """Build a CSR matrix for each draw from blocks, without the values below ``below``."""
    parts: dict[int, list[sparse.csr_matrix]] = {}
    for draw, _, values in blocks:
        parts.setdefault(draw, []).append(sparse.csr_matrix(values.masked_fill(values < below, 0).numpy()))
    matrices = [sparse.vstack(of_draw, format="csr") for of_draw in parts.values()]
    return matrices[0] if len(matrices) == 1 else matrices


def _blocks(vae: VAE, loader: CellLoader, settings: Settings) -> Iterator[tuple[int, slice, Tensor]]:
    """Iterate over (draw, rows, values (n, genes)) of minibatches; the draw is 0 for a mean over the draws."""
    factor = 1 / len(settings.asked.conditions)
    if settings.library_size != "latent":
        factor *= settings.library_size
    start = 0
    for cells in vae.minibatches(loader):
        mean = None
        rows = slice(start, start + len(cells))
        for draw, (latents, weight) in enumerate(_draws(vae, cells, settings)):
            values = _decoded(vae, cells, latents, settings, weight * factor)
            if settings.averaged:
                mean = values if mean is None else mean.add_(values)
            else:
                yield draw, rows, values.cpu()
        if settings.averaged:
            yield 0, rows, mean.cpu()
        start = rows.stop


def _decoded(vae: VAE, cells: Cells, latents: dict[str, Tensor], settings: Settings, factor: float | Tensor) -> Tensor:
    """Return the sum over conditions of rho times the factor, and times l if it is latent, (n, genes)."""
    total = None
    for condition in settings.asked.conditions:
        rho = settings.asked.of_genes(vae.decoder.expression(latents, as_if(cells, condition)))
        total = rho if total is None else total.add_(rho)
    if settings.library_size == "latent":
        factor = factor * vae.decoder.log_library(latents).exp()
    return total if isinstance(factor, float) and factor == 1 else total * factor


def _draws(vae: VAE, cells: Cells, settings: Settings) -> Iterator[tuple[dict[str, Tensor], float | Tensor]]:
    """Iterate over draws of the latents and the weight of each in the mean; the weight is 1 if there is no mean.

    The importance weights of a cell's draws are proportional to p(x, z, l) / q(z, l | x) and sum to 1. If the draws
    themselves are returned, as many are resampled with these probabilities (Rubin 1987).
    """
    share = 1 / settings.n_samples if settings.averaged else 1.0
    if settings.weights == "uniform":
        names = ("z", "library") if settings.library_size == "latent" else ("z",)
        q = {name: vae.posteriors[name](cells) for name in names}
        for _ in range(settings.n_samples):
            yield {name: q[name].rsample() for name in q}, share
        return
    q = vae.infer(cells)
    draws = [{name: q[name].rsample_and_log_prob() for name in q} for _ in range(settings.n_samples)]
    # Decode one draw at a time, which needs memory for cells x genes numbers only once.
    log_w = torch.stack([vae.log_weights_at(cells, q, drawn) for drawn in draws])
    weights = log_w.double().softmax(0)
    latents = {name: torch.stack([drawn[name][0] for drawn in draws]) for name in q}
    if settings.averaged:
        for i, weight in enumerate(weights.float()):
            yield {name: values[i] for name, values in latents.items()}, weight[:, None]
        return
    each = torch.arange(len(cells), device=vae.device)
    noise = generator(weights.device)
    for chosen in torch.multinomial(weights.T, settings.n_samples, replacement=True, generator=noise).T:
        yield {name: values[chosen, each] for name, values in latents.items()}, 1.0
