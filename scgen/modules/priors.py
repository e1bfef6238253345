"""Priors p(z) and p(log l | s)."""

import torch
from torch import Tensor, nn

from scgen.data.cells import Cells
from scgen.distributions import DiagonalNormal

#: Number of cells that the pooled library weighs in a batch's prior: small batches lean on it.
SHRINKAGE = 10.0


class StandardNormalPrior(nn.Module):
    """p(z) = N(0, I)."""

    def __init__(self, n_latent: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_latent))
        self.register_buffer("variance", torch.ones(n_latent))

    def forward(self, cells: Cells) -> DiagonalNormal:
        return DiagonalNormal(self.mean, self.variance)


class LibraryPrior(nn.Module):
    """p(log l | s) = N(m_s, v_s), fitted to the logarithms of the training cells' totals.

    Parameters
    ----------
    n_batches
        Number of batches B.
    """

    def __init__(self, n_batches: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_batches))
        self.register_buffer("variance", torch.ones(n_batches))

    def fit(self, library: Tensor, batch: Tensor) -> None:
        """Set mean and variance, each (n m_b + 10 m) / (n + 10): shrunk towards the pool of all cells.

        Parameters
        ----------
        library
            (N, 1) logarithms of the totals.
        batch
            (N,) codes; a batch without cells gets the pooled values.
        """
        library = library.double().flatten()
        n = torch.bincount(batch, minlength=len(self.mean)).double()

        def per_batch(values: Tensor) -> Tensor:
            sums = torch.zeros_like(n).index_add_(0, batch, values)
            return sums / n.clamp(min=1)

        def shrunk(values: Tensor, pool: Tensor) -> Tensor:
            return (n * values + SHRINKAGE * pool) / (n + SHRINKAGE)

        mean = per_batch(library)
        variance = per_batch((library - mean[batch]) ** 2)
        self.mean.copy_(shrunk(mean, library.mean()))
        self.variance.copy_(shrunk(variance, library.var(correction=0)).clamp(min=1e-4))

    def forward(self, cells: Cells) -> DiagonalNormal:
        return DiagonalNormal(self.mean[cells.batch, None], self.variance[cells.batch, None])
