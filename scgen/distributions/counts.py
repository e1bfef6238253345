"""Distributions of counts, parametrised by logarithms: Poisson, negative binomial, zero-inflated negative binomial."""

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from scgen.kernels import dispatch, reference
from scgen.seeding import generator

# A Gamma draw above this makes torch's Poisson sampler return negative numbers or hang.
_MAX_RATE = 1e8


class _Counts(Distribution):
    """Base class of the count distributions: a mean before zero inflation, ``mu``, and Poisson noise."""

    arg_constraints = {}
    support = constraints.nonnegative_integer

    def __init__(self, log_mu: Tensor, *others: Tensor):
        self.log_mu = log_mu
        shape = torch.broadcast_shapes(log_mu.shape, *(other.shape for other in others))
        super().__init__(batch_shape=shape, validate_args=False)

    @property
    def mu(self) -> Tensor:
        return self.log_mu.exp()

    @property
    def mean(self) -> Tensor:
        return self.mu


def _poisson_draws(rate: Tensor) -> Tensor:
    return torch.poisson(rate.clamp(max=_MAX_RATE), generator=generator(rate.device))


class Poisson(_Counts):
    """Poisson distribution with mean mu.

    Parameters
    ----------
    log_mu
        Logarithm of the mean, (..., G).

    Examples
    --------
    >>> import torch
    >>> round(Poisson(torch.zeros(1)).log_prob(torch.tensor([0.0])).item(), 6)
    -1.0
    """

    @property
    def variance(self) -> Tensor:
        return self.mu

    def log_prob(self, value: Tensor) -> Tensor:
        return reference.poisson_log_prob(value, self.log_mu)

    @torch.no_grad()
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return _poisson_draws(self.mu.expand(self._extended_shape(sample_shape)))


class NegativeBinomial(_Counts):
    r"""Negative binomial with mean mu and inverse dispersion theta: variance mu + mu^2 / theta.

    It is a Poisson whose rate is Gamma(shape theta, mean mu). As theta goes to infinity, it becomes the Poisson.

    Parameters
    ----------
    log_mu
        Logarithm of the mean, (..., G).
    log_theta
        Logarithm of the inverse dispersion, (G,) or (..., G).

    Examples
    --------
    >>> import math, torch
    >>> nb = NegativeBinomial(torch.tensor([math.log(4.0)]), torch.tensor([math.log(2.0)]))
    >>> round(nb.log_prob(torch.tensor([0.0])).item(), 5), round(nb.variance.item(), 4)
    (-2.19722, 12.0)
    """

    def __init__(self, log_mu: Tensor, log_theta: Tensor):
        self.log_theta = log_theta
        super().__init__(log_mu, log_theta)

    @property
    def theta(self) -> Tensor:
        return self.log_theta.exp()

    @property
    def variance(self) -> Tensor:
        return self.mu + self.mu**2 / self.theta

    def log_prob(self, value: Tensor) -> Tensor:
        return reference.negative_binomial_log_prob(value, self.log_mu, self.log_theta)

    @torch.no_grad()
    def sample_rate(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draw the Gamma rate of the Poisson, without zero inflation.

        Values below the smallest normal number are 0.
        """
        theta = self.theta.expand(self._extended_shape(sample_shape))
        gamma = torch._standard_gamma(theta, generator=generator(theta.device))
        # torch raises smaller draws to that number. Multiplied by mu / theta, their ranks would be those of mu / theta.
        gamma = gamma.masked_fill(gamma <= torch.finfo(gamma.dtype).tiny, 0)
        return gamma * (self.log_mu - self.log_theta).exp()

    @torch.no_grad()
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return _poisson_draws(self.sample_rate(sample_shape))


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """Negative binomial in which a share pi = sigmoid(zi_logits) is replaced by zeros.

    Mean (1 - pi) mu, variance (1 - pi) mu (1 + mu / theta + pi mu). ``mu`` is the mean before the replacement.

    Parameters
    ----------
    log_mu, log_theta
        As in `NegativeBinomial`.
    zi_logits
        Log odds of an additional zero, (..., G).

    Examples
    --------
    >>> import math, torch
    >>> log = lambda value: torch.tensor([math.log(value)])
    >>> zinb = ZeroInflatedNegativeBinomial(log(4.0), log(2.0), log(0.7 / 0.3))
    >>> round(zinb.log_prob(torch.tensor([0.0])).item(), 5), round(zinb.mean.item(), 4)
    (-0.31015, 1.2)
    """

    def __init__(self, log_mu: Tensor, log_theta: Tensor, zi_logits: Tensor):
        self.zi_logits = zi_logits
        super().__init__(log_mu, log_theta)

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(-self.zi_logits) * self.mu

    @property
    def variance(self) -> Tensor:
        pi = torch.sigmoid(self.zi_logits)
        return self.mean * (1 + self.mu / self.theta + pi * self.mu)

    def log_prob(self, value: Tensor) -> Tensor:
        return reference.zero_inflated_negative_binomial_log_prob(value, self.log_mu, self.log_theta, self.zi_logits)

    @torch.no_grad()
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        counts = super().sample(sample_shape)
        shares = torch.sigmoid(-self.zi_logits).expand(counts.shape)
        kept = torch.bernoulli(shares, generator=generator(shares.device))
        return counts * kept


class CellCounts(Distribution):
    """Counts of all genes of a cell, independent given their means mu = l softmax(logits + bias).

    One draw is a whole cell. `log_prob` sums over the genes without arrays of the parameters in memory.

    Parameters
    ----------
    logits, bias
        (..., n, G) and (G,).
    log_library
        log l, (..., n, 1).
    log_theta
        As in `NegativeBinomial`; None makes the counts Poisson.
    zi_logits, zi_bias
        (..., n, G) and (G,); their sum is that of `ZeroInflatedNegativeBinomial`. None means no zero inflation.
    normalised
        Whether to apply the softmax. False uses logits + bias as log(mu / l).

    Examples
    --------
    >>> import torch
    >>> cells = CellCounts(torch.zeros(3, 2), torch.zeros(2), torch.zeros(3, 1))
    >>> cells.log_prob(torch.zeros(3, 2))
    tensor([-1., -1., -1.])
    """

    arg_constraints = {}
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(
        self,
        logits: Tensor,
        bias: Tensor,
        log_library: Tensor,
        log_theta: Tensor | None = None,
        zi_logits: Tensor | None = None,
        zi_bias: Tensor | None = None,
        normalised: bool = True,
    ):
        self.parameters = logits, bias, log_library, log_theta, zi_logits, zi_bias, normalised
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def scaled(self, factor: float) -> "CellCounts":
        """Return the distribution for the same cells at ``factor`` times their library size.

        A factor below 1 describes the counts that remain if each count is kept with probability ``factor``. Theta and
        the zero inflation do not change.
        """
        logits, bias, log_library, *others = self.parameters
        return CellCounts(logits, bias, log_library + math.log(factor), *others)

    @property
    def base_dist(self) -> Poisson | NegativeBinomial | ZeroInflatedNegativeBinomial:
        """The distribution of each gene, over (..., n, G)."""
        logits, bias, log_library, log_theta, zi_logits, zi_bias, normalised = self.parameters
        log_mu = reference.log_mean(logits, bias, log_library, normalised)
        if log_theta is None:
            return Poisson(log_mu)
        if zi_logits is None:
            return NegativeBinomial(log_mu, log_theta)
        return ZeroInflatedNegativeBinomial(log_mu, log_theta, zi_logits + zi_bias)

    @property
    def mean(self) -> Tensor:
        return self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        return self.base_dist.variance

    def log_prob(self, value: Tensor) -> Tensor:
        return dispatch.cells_log_prob(value, *self.parameters)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.base_dist.sample(sample_shape)
