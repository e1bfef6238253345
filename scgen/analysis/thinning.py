"""Held-out likelihood by binomial thinning: what the kept counts of a cell say of those that were held out."""

import math
from dataclasses import replace
from functools import partial
from numbers import Real

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from scgen.analysis.inference import log_sums
from scgen.data.cells import Cells
from scgen.data.checks import check_whole
from scgen.data.loader import CellLoader
from scgen.modules.vae import VAE
from scgen.training import seeded


@torch.inference_mode()
def held_out_log_likelihood(
    vae: VAE, loader: CellLoader, size_factors: bool, held_out: float, n_samples: int, seed: int
) -> np.ndarray:
    """Return log of the mean of p(x_rest | z, l, s) over draws of z, l ~ q(. | x_kept, s) for each cell, (n,).

    Parameters
    ----------
    vae, loader
        The model and the cells.
    size_factors
        Whether the cells' library is a factor from outside, instead of the total of their counts.
    held_out, n_samples, seed
        As in `Model.get_thinned_ll`.
    """
    if "library" not in vae.posteriors:
        raise ValueError('gene_likelihood="normal" is not one of counts, and only counts can be thinned.')
    if not (isinstance(held_out, Real) and 0 < held_out < 1):
        raise ValueError(f"held_out={held_out!r}; it takes a share above 0 and below 1.")
    check_whole("n_samples", n_samples, 1)
    vae.eval()
    # Of its own: the same cells are split alike, whatever the model, its draws and the minibatches are.
    rng, results = np.random.default_rng(seed), []
    with seeded(seed):
        for cells in loader:
            kept, rest = thinned(cells, held_out, size_factors, rng)
            kept = kept if loader.complete is None else loader.complete(kept)  # anew, of what is kept alone
            kept, rest = kept.to(vae.device), rest.to(vae.device)
            draw = partial(_log_likelihoods, vae, kept, rest, held_out / (1 - held_out), vae.infer(kept))
            results.append((log_sums(draw, n_samples)[0] - math.log(n_samples)).cpu().numpy())
    return np.concatenate(results)


def thinned(cells: Cells, held_out: float, size_factors: bool, rng: np.random.Generator) -> tuple[Cells, Tensor]:
    """Return the cells with the counts that are kept and the library of these alone, and the other counts, (n, G).

    A cell of which nothing is kept gets a library of one count, the least that decoders know.
    """
    counts = cells.counts.to_dense().cpu()
    kept = torch.from_numpy(rng.binomial(counts.numpy().astype(np.int64), 1 - held_out)).to(counts.dtype)
    if size_factors:
        library = cells.library + math.log1p(-held_out)
    else:
        library = kept.sum(1, keepdim=True).clamp(min=1).log()
    return replace(cells, counts=kept, library=library, completed=None), counts - kept


def _log_likelihoods(
    vae: VAE, kept: Cells, rest: Tensor, factor: float, q: dict[str, Distribution], shape: tuple[int, ...]
) -> Tensor:
    """Return log p(rest | z, factor l, s) at draws of z and l from q, (*shape, n)."""
    latents = {name: q[name].rsample(shape) for name in q}
    return vae.decoder(latents, kept).scaled(factor).log_prob(rest)
