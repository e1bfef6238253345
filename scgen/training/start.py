"""Initial values that are computed from the training cells."""

import numpy as np
import torch
from torch import nn

from scgen.data.loader import CellLoader


@torch.no_grad()
def start_from_data(vae: nn.Module, loader: CellLoader) -> None:
    """Initialise the priors and the decoder from the training cells, if they have a method ``start_at`` or ``fit``.

    The decoder starts at the mean and variance of its target. In models with a library, the target is first divided by
    the library size of the cell.
    """
    if hasattr(vae.decoder, "start_at"):
        total, squares = 0.0, 0.0
        for cells in loader:
            # Changed in place, since new memory costs more than the sums.
            rate = vae.decoder.target(cells).to_dense().to(torch.float64, copy=True)
            if vae.has_library:
                rate /= cells.library.double().exp()
            total = total + rate.sum(0)
            squares = squares + rate.square_().sum(0)
        mean = total / len(loader.index)
        vae.decoder.start_at(mean, (squares / len(loader.index) - mean**2).clamp(min=0))
    if vae.has_library:
        # On the host, where sums are always in the same order.
        vae.priors["library"].fit(*(loader.columns[name][loader.index].cpu() for name in ("library", "batch")))
    for prior in vae.priors.values():
        if hasattr(prior, "start_at"):
            # Evenly spaced, because batches and types often follow each other in the data.
            n = prior.n_components
            few = loader.index[np.linspace(0, len(loader.index) - 1, n).round().astype(int)]
            prior.start_at(next(iter(loader.over(few, n))))
