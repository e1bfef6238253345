"""Expression as the decoder sees it: denoised, under the observed batch or another one."""

import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real

import numpy as np
import pandas as pd
import torch

from scgen.data.cells import Cells
from scgen.data.loader import CellLoader
from scgen.modules.vae import VAE
from scgen.training import seeded


def check(genes: list[str], gene_list: Sequence[str] | None, library_size: float | str, n_samples: int) -> None:
    """Raise TypeError or ValueError where arguments of `Model.get_normalized_expression` are out of their range."""
    if isinstance(gene_list, str):
        raise TypeError(f"gene_list={gene_list!r} is a string where a list belongs: gene_list=[{gene_list!r}].")
    unknown = pd.Index([] if gene_list is None else gene_list).difference(pd.Index(genes))
    if len(unknown):
        raise ValueError(f"the model has no genes {', '.join(unknown[:5])} (it has {', '.join(genes[:5])}, ...).")
    if library_size != "latent" and not (isinstance(library_size, Real) and 0 < library_size < math.inf):
        raise ValueError(f'library_size={library_size!r}; it takes a positive number or "latent".')
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}; it takes a whole number from 1.")


def in_batch(cells: Cells, batch: int | None) -> Cells:
    """Return the cells as if they came from another batch; None leaves them in their own."""
    return cells if batch is None else replace(cells, batch=torch.full_like(cells.batch, batch))


@torch.inference_mode()
def normalized_expression(
    vae: VAE,
    loader: CellLoader,
    batches: Sequence[int | None],
    library_size: float | str,
    genes: np.ndarray | None,
    n_samples: int,
    return_mean: bool,
    seed: int,
) -> np.ndarray:
    """Return E_q[l rho(z, s)], averaged over the given batches s; each cell's own where s is None.

    Parameters
    ----------
    vae, loader
        The model and the n cells.
    batches
        Codes, or None.
    library_size
        The common l, or "latent" for each cell's own.
    genes
        Columns to keep; None for all.
    n_samples
        Draws of z from q.
    return_mean, seed
        Whether to average over the draws; the seed of the draws.

    Returns
    -------
    (n, genes), or (n_samples, n, genes) without the mean; float32.
    """
    vae.eval()
    keep = 1 if return_mean else n_samples
    columns = slice(None) if genes is None else torch.from_numpy(genes).to(vae.device)
    latent_library = "library" in vae.posteriors and library_size == "latent"
    factor = 1 / (len(batches) * (n_samples // keep))
    if "library" in vae.posteriors and not latent_library:
        factor *= library_size
    result, start = None, 0
    with seeded(seed):
        for cells in loader:
            cells = cells.to(vae.device)
            q = {name: vae.posteriors[name](cells) for name in (("z", "library") if latent_library else ("z",))}
            rows = slice(start, start + len(cells))
            for draw in range(n_samples):
                latents = {name: q[name].rsample() for name in q}
                for i, batch in enumerate(batches):
                    values = vae.decoder.expression(latents, in_batch(cells, batch))[:, columns]
                    if latent_library:
                        values = values * vae.decoder.log_library(latents).exp()
                    if factor != 1:
                        values = values * factor
                    values = values.cpu()
                    if result is None:
                        # NumPy's, which asks for large pages: half of the time went into its first touch.
                        result = torch.from_numpy(np.empty((keep, len(loader.index), values.shape[1]), np.float32))
                    # What comes first is written, not added to zeros: the result is large, and so is its traffic.
                    result[draw % keep, rows] = values if draw < keep and i == 0 else result[draw % keep, rows] + values
            start += len(cells)
    return (result[0] if return_mean else result).numpy()
