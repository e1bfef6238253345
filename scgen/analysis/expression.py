"""Expression as the decoder sees it: denoised, under the observed batch or another one."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from scgen.data.cells import Cells
from scgen.data.loader import CellLoader
from scgen.modules.vae import VAE
from scgen.training import seeded


def in_batch(cells: Cells, batch: int | None) -> Cells:
    """Return the cells as if they came from another batch; None leaves them in their own."""
    return cells if batch is None else replace(cells, batch=torch.full_like(cells.batch, batch))


@torch.inference_mode()
def normalized_expression(
    vae: VAE,
    loader: CellLoader,
    batches: Sequence[int | None],
    library_size: float | str,
    genes: np.ndarray,
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
        Columns to keep.
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
    result = np.zeros((keep, len(loader.index), len(genes)), np.float32)
    columns = torch.from_numpy(genes).to(vae.device)
    start = 0
    with seeded(seed):
        for cells in loader:
            cells = cells.to(vae.device)
            q = vae.infer(cells)
            rows = slice(start, start + len(cells))
            for draw in range(n_samples):
                latents = {name: q[name].rsample_and_log_prob()[0] for name in q}
                if "library" in q and library_size != "latent":
                    latents["library"] = torch.zeros_like(latents["library"])
                for batch in batches:
                    likelihood = vae.decoder(latents, in_batch(cells, batch))
                    values = (likelihood.mu if "library" in q else likelihood.mean)[:, columns]
                    result[draw % keep, rows] += values.cpu().numpy()
            start += len(cells)
    result /= len(batches) * (n_samples // keep)
    if "library" in vae.posteriors and library_size != "latent":
        result *= library_size
    return result[0] if return_mean else result
