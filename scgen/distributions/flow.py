"""A Gaussian transformed by a flow."""

from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from scgen.distributions.gaussian import DiagonalNormal

#: Number of draws for mean and variance, in antithetic pairs, and number of them at a time.
N_DRAWS, AT_ONCE = 100, 20


class Flow(Protocol):
    """An invertible map of (..., n, d) with a context (n, C). The logarithms of determinants are (..., n)."""

    def __call__(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]: ...


class FlowDistribution(Distribution):
    """z = f(e) with e from a Gaussian: log q(z) = log q(e) - log |det df/de|.

    Mean and variance have no closed form. They are computed from 100 standard normal draws, in pairs of opposite sign.
    All cells and calls use the same draws, so results do not depend on the call or on the other cells.

    Parameters
    ----------
    base
        The Gaussian of e.
    flow, context
        f and its context, (n, C).

    Examples
    --------
    >>> import torch
    >>> from scgen.modules.flows import PlanarFlow
    >>> q = FlowDistribution(DiagonalNormal(torch.zeros(3, 2), torch.ones(3, 2)), PlanarFlow(2, 0), torch.zeros(3, 0))
    >>> z, log_q = q.rsample_and_log_prob((5,))
    >>> tuple(z.shape), tuple(log_q.shape)
    ((5, 3, 2), (5, 3))
    """

    arg_constraints = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: DiagonalNormal, flow: Flow, context: Tensor):
        self.base, self.flow, self.context = base, flow, context
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.rsample_and_log_prob(sample_shape)[0]

    def from_noise(self, noise: Tensor) -> Tensor:
        """Transform standard normal noise (..., n, d) into draws."""
        return self.flow(self.base.from_noise(noise), self.context)[0]

    def rsample_and_log_prob(self, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Return draws (*shape, n, d) that carry gradients, and their log-density (*shape, n)."""
        e, log_q = self.base.rsample_and_log_prob(shape)
        z, log_det = self.flow(e, self.context)
        return z, log_q - log_det

    def log_prob(self, value: Tensor) -> Tensor:
        e, log_det = self.flow.inverse(value, self.context)
        return self.base.log_prob(e) + log_det

    @property
    def mean(self) -> Tensor:
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        return self._moments()[1]

    def _moments(self) -> tuple[Tensor, Tensor]:
        mean = self.base.mean
        shape, same = (N_DRAWS // 2, *self.event_shape), torch.Generator().manual_seed(0)
        noise = torch.randn(shape, generator=same, dtype=torch.float32)
        noise = torch.cat([noise, -noise]).to(mean)[(slice(None), *[None] * len(self.batch_shape))]
        total = squares = 0.0
        for some in noise.split(AT_ONCE):
            from_base = self.from_noise(some) - mean  # without subtracting the mean, squares would lose digits
            total, squares = total + from_base.sum(0), squares + from_base.square().sum(0)
        shift = total / N_DRAWS
        return mean + shift, (squares / N_DRAWS - shift.square()).clamp(min=0)
