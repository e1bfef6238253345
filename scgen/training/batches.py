"""A penalty on what z tells about the batch of a cell, among cells of the same component of the prior."""

import torch
from torch import Tensor
from torch.distributions import Distribution

from scgen.distributions import DiagonalNormal, GaussianMixture

#: The penalty rises from 0 to its full weight between these shares of the steps. Before, components have no meaning.
RISE = 0.1, 0.2
#: A batch's mean is of few cells in some components. Its difference is shrunk as if this many cells more had none.
SHRINKAGE = 30.0


class BatchPenalty:
    """How far apart the batches' means of z are within each component of a mixture prior, in nats per cell.

    The penalty is 1/2 E_n sum_k r_nk sum_d (m_ksd - m_kd)^2 / v_kd, with the probability r_nk that cell n is of
    component k, the variances v_k of the component, and the means m_ks and m_k of z over the component's cells of
    batch s, and of all batches. For Gaussians of these variances it is the information about the batch that z holds
    within components, to second order. Which component a cell is of is free: batches may have different shares of cell
    types, and a type that only one batch has is left alone.

    The means are over about the last epoch's cells. They are constants for the gradient.

    Parameters
    ----------
    n_batches
        Number of batches.
    n_steps
        Number of minibatches in an epoch.
    """

    def __init__(self, n_batches: int, n_steps: int):
        self.n_batches, self.kept = n_batches, 1 - 1 / n_steps
        self.cells: Tensor | None = None  # (batches, components): weighted numbers of cells
        self.sums: Tensor | None = None  # (batches, components, d): sums of z

    @staticmethod
    def applies(q: Distribution, p: Distribution) -> bool:
        """Return whether the prior is a mixture and the posterior a Gaussian, whose mean is at hand."""
        return isinstance(q, DiagonalNormal) and isinstance(p, GaussianMixture)

    def __call__(self, q: DiagonalNormal, p: GaussianMixture, batch: Tensor) -> Tensor:
        """Count a minibatch in, and return a scalar with the gradient of its penalty.

        Parameters
        ----------
        q, p
            The posteriors of n cells and the prior.
        batch
            (n,) codes.
        """
        z, components = q.mean, p.component_distribution
        with torch.no_grad():
            probabilities = (components.log_prob(z[:, None]) + p.mixture_distribution.logits).softmax(-1)  # (n, K)
            if self.cells is None:
                self.cells = z.new_zeros(self.n_batches, probabilities.shape[1])
                self.sums = z.new_zeros(*self.cells.shape, z.shape[1])
            self.cells.mul_(self.kept).index_add_(0, batch, probabilities)
            self.sums.mul_(self.kept).index_add_(0, batch, probabilities[..., None] * z[:, None])
            means = self.sums / self.cells.clamp(min=1e-6)[..., None]
            overall = self.sums.sum(0) / self.cells.sum(0).clamp(min=1e-6)[:, None]
            differences = (self.cells / (self.cells + SHRINKAGE))[..., None] * (means - overall)
            slopes = (probabilities[..., None] * (differences / components.variance)[batch]).sum(1)  # (n, d)
        return (slopes * z).sum(-1).mean()

    def state_dict(self) -> dict:
        """Return the means so far."""
        return {"cells": self.cells, "sums": self.sums}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned."""
        self.cells, self.sums = (None if state[name] is None else state[name].clone() for name in ("cells", "sums"))


def rise(progress: float) -> float:
    """Return the weight of the penalty, as a share of its full weight, after a share of the steps."""
    first, last = RISE
    return min(max((progress - first) / (last - first), 0.0), 1.0)
