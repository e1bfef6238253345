"""The parts of the evidence lower bound (ELBO), per cell."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Distribution

from scgen.distributions import PointMass


@dataclass(frozen=True)
class Elbo:
    """log p(x) >= log_likelihood - sum of kl, in nats per cell.

    Attributes
    ----------
    log_likelihood
        (..., n): log p(x | latents) at the draws.
    kl
        KL(q || p) of each latent, by name, (n,) or (..., n), in closed form or at the draws.
    weighted
        Whether the draws along the first axis are importance samples. If so, ``kl`` is at the draws, and the bound is
        the logarithm of the mean weight exp(log_likelihood - sum of kl).
    distributions
        q and p of each latent, by name.
    """

    log_likelihood: Tensor
    kl: dict[str, Tensor]
    weighted: bool = False
    distributions: dict[str, tuple[Distribution, Distribution]] = field(default_factory=dict)

    @cached_property
    def value(self) -> Tensor:
        """The bound, (..., n)."""
        return self._bound(1.0)

    def loss(self, kl_weight: float = 1.0) -> Tensor:
        """Return the mean negative bound, a scalar. The KL of each latent but the library is weighted."""
        return -(self.value if kl_weight == 1 else self._bound(kl_weight)).mean()

    def _bound(self, kl_weight: float) -> Tensor:
        kl = sum(kl_weight * kl if name != "library" and kl_weight != 1 else kl for name, kl in self.kl.items())
        bound = self.log_likelihood - kl
        return bound.logsumexp(0) - math.log(len(bound)) if self.weighted else bound


def draw_and_kl(
    q: Distribution, p: Distribution, shape: tuple[int, ...], closed_form: bool = True
) -> tuple[Tensor, Tensor]:
    """Return draws of q, (*shape, n, d), and KL(q || p), in closed form if torch knows one, otherwise at the draws.

    Without ``closed_form``, the KL is always at the draws, except that of an observed latent, which is 0.
    """
    if closed_form or isinstance(q, PointMass):
        try:
            kl = torch.distributions.kl_divergence(q, p)
        except NotImplementedError:
            pass
        else:
            return q.rsample(shape), kl
    draws, log_q = q.rsample_and_log_prob(shape)
    return draws, log_q - p.log_prob(draws)
