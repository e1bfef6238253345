"""The evidence lower bound, per cell, in its parts."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Distribution


@dataclass(frozen=True)
class Elbo:
    """log p(x) >= log_likelihood - sum of kl, in nats per cell.

    Attributes
    ----------
    log_likelihood
        (..., n): log p(x | latents) at the draws.
    kl
        By latent, (n,) or (..., n): KL(q || p), in closed form or at the draws.
    """

    log_likelihood: Tensor
    kl: dict[str, Tensor]

    @cached_property
    def value(self) -> Tensor:
        """The bound itself, (..., n)."""
        return self.log_likelihood - sum(self.kl.values())

    def loss(self, kl_weight: float = 1.0) -> Tensor:
        """Return the mean negative bound, a scalar, with the KL of z weighted; the library's never is."""
        value = self.value if kl_weight == 1 else self.value + (1 - kl_weight) * self.kl["z"]
        return -value.mean()


def draw_and_kl(q: Distribution, p: Distribution, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return draws of q, (*shape, n, d), and KL(q || p): in closed form where torch knows one, else at the draws."""
    try:
        kl = torch.distributions.kl_divergence(q, p)
    except NotImplementedError:
        draws, log_q = q.rsample_and_log_prob(shape)
        return draws, log_q - p.log_prob(draws)
    return q.rsample(shape), kl
