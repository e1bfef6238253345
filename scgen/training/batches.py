"""A penalty on what z tells about the batch of a cell, among cells of the same component of the prior."""

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import one_hot

from scgen.distributions import DiagonalNormal, GaussianMixture

#: The penalty rises from 0 to its full weight between these shares of the steps. Before, components have no meaning.
RISE = 0.1, 0.2
#: A batch has few cells in some components. Its mean there is shrunk as if this many cells more had the mean of all.
SHRINKAGE = 30.0


class BatchPenalty:
    """How far apart the batches' means of z are within each component of a mixture prior, in nats per cell.

    Over N cells, it is 1/(2 N) sum_n sum_k r_nk sum_d (m_ksd - m_kd)^2 / v_kd, where s is the batch of cell n, r_nk is
    the probability that the cell is of component k, v_k the variances of the component, and m_ks and m_k the means of z
    over the component's cells of batch s, and of all batches. r and v are constants for the gradient. The part of cell
    n is then sum_k r_nk (m_ks - m_k) / v_k. In it, m_ks - m_k is multiplied by n_ks / (n_ks + 30), where n_ks are the
    component's cells of batch s.

    For Gaussians of these variances, it is the information about the batch that z holds within components, to second
    order. Batches may have different shares of the components. So a cell type that only one batch has is left alone if
    it has a component of its own. If it shares one with another type, it is drawn towards that type.

    The means are over the cells of about an epoch, or those since the start of the penalty if these are fewer.

    Parameters
    ----------
    n_batches
        Number of batches S.
    n_steps
        Number of minibatches in an epoch.
    """

    def __init__(self, n_batches: int, n_steps: int):
        self.n_batches, self.kept = n_batches, 1 - 1 / n_steps
        # Of no cells yet. Then n_ks, (S, K), and n_ks m_ks, (S, K, d).
        self.cells = self.sums = torch.zeros(())

    @staticmethod
    def applies(q: Distribution, p: Distribution) -> bool:
        """Return whether the prior has several components, and the posterior is a Gaussian, whose mean is at hand."""
        return (
            isinstance(q, DiagonalNormal) and isinstance(p, GaussianMixture) and len(p.component_distribution.mean) > 1
        )

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
            r = (components.log_prob(z[:, None]) + p.mixture_distribution.logits).softmax(-1)  # (n, K)
            # A product, because a GPU adds up by index in a random order.
            of_batch = one_hot(batch, self.n_batches).to(z).T  # (S, n)
            sums = of_batch @ (r[..., None] * z[:, None]).flatten(1)
            self.cells = self.kept * self.cells + of_batch @ r
            self.sums = self.kept * self.sums + sums.unflatten(1, (r.shape[1], -1))
            means = self.sums / self.cells.clamp(min=1e-6)[..., None]
            overall = self.sums.sum(0) / self.cells.sum(0).clamp(min=1e-6)[:, None]
            differences = (self.cells / (self.cells + SHRINKAGE))[..., None] * (means - overall)
            slopes = (r[..., None] * (differences / components.variance)[batch]).sum(1)  # (n, d)
        return (slopes * z).sum(-1).mean()

    def state_dict(self) -> dict:
        """Return the sums so far."""
        return {"cells": self.cells, "sums": self.sums}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Take over what `state_dict` returned."""
        self.cells, self.sums = (state[name].to(device, copy=True) for name in ("cells", "sums"))


def rise(progress: float) -> float:
    """Return the weight of the penalty, as a share of its full weight, after a share of the steps."""
    first, last = RISE
    return min(max((progress - first) / (last - first), 0.0), 1.0)
