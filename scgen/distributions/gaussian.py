"""Distributions of latents: a Gaussian with independent components, a mixture of these, and an observed value."""

import math

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily, Normal, constraints, register_kl

from scgen.seeding import generator, standard_normal


class DiagonalNormal(Distribution):
    """Gaussian with independent components.

    Parameters
    ----------
    mean, variance
        (..., d) each; the last axis is one draw.

    Examples
    --------
    >>> import torch
    >>> q = DiagonalNormal(torch.zeros(3, 2), torch.ones(3, 2))
    >>> z, log_q = q.rsample_and_log_prob((5,))
    >>> tuple(z.shape), tuple(log_q.shape)
    ((5, 3, 2), (5, 3))
    """

    arg_constraints = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mean: Tensor, variance: Tensor):
        self._mean, self._variance = mean, variance
        shape = mean.shape if mean.shape == variance.shape else torch.broadcast_shapes(mean.shape, variance.shape)
        super().__init__(shape[:-1], shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def variance(self) -> Tensor:
        return self._variance

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.from_noise(self._noise(sample_shape))

    def from_noise(self, noise: Tensor) -> Tensor:
        """Transform standard normal noise (..., d) into draws."""
        return torch.addcmul(self._mean, self._variance.sqrt(), noise)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_density((value - self._mean).square() / self._variance)

    def rsample_and_log_prob(self, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Return draws (*shape, ..., d) that carry gradients, and their log-density (*shape, ...)."""
        noise = self._noise(shape)
        return self.from_noise(noise), self._log_density(noise.square())

    def _noise(self, sample_shape: tuple[int, ...]) -> Tensor:
        return standard_normal(torch.Size(sample_shape) + self._batch_shape + self._event_shape, self._mean)

    def _log_density(self, squares: Tensor) -> Tensor:
        """Return the log-density at a squared distance from the mean, in standard deviations."""
        return -0.5 * (squares + self._variance.log() + math.log(2 * math.pi)).sum(-1)


@register_kl(DiagonalNormal, DiagonalNormal)
def _kl_of_gaussians(q: DiagonalNormal, p: DiagonalNormal) -> Tensor:
    ratio = q.variance / p.variance
    terms = ratio - ratio.log() + (q.mean - p.mean).square() / p.variance
    return 0.5 * (terms.sum(-1) - terms.shape[-1])


class GaussianMixture(MixtureSameFamily):
    """Mixture of K Gaussians with weights softmax(logits).

    Parameters
    ----------
    logits
        (K,) unnormalised logarithms of the weights.
    components
        The Gaussians, with a mean and a variance of (K, d) each.

    Examples
    --------
    >>> import torch
    >>> p = GaussianMixture(torch.zeros(2), DiagonalNormal(torch.zeros(2, 3), torch.ones(2, 3)))
    >>> p.sample((5,)).shape, p.log_prob(torch.zeros(5, 3)).shape
    (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(self, logits: Tensor, components: DiagonalNormal):
        super().__init__(Categorical(logits=logits, validate_args=False), components, validate_args=False)

    @torch.no_grad()
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        weights = self.mixture_distribution.probs
        n = math.prod(sample_shape)
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator(weights.device))
        draws = self.component_distribution.rsample(sample_shape)  # (*sample_shape, K, d)
        index = chosen.reshape(*sample_shape, 1, 1).expand(*sample_shape, 1, draws.shape[-1])
        return draws.gather(-2, index).squeeze(-2)


class SeededNormal(Normal):
    """torch's normal distribution, with samples from scgen's random generator.

    Examples
    --------
    >>> import torch
    >>> SeededNormal(torch.zeros(3), torch.ones(3)).sample((5,)).shape
    torch.Size([5, 3])
    """

    @torch.no_grad()
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        mean = self.loc.expand(self._extended_shape(sample_shape))
        return torch.normal(mean, self.scale.expand(mean.shape), generator=generator(mean.device))


class PointMass(Distribution):
    """An observed latent. Every draw is ``value``, (..., d), and the KL divergence to any prior is defined as 0.

    Examples
    --------
    >>> import torch
    >>> PointMass(torch.ones(3, 1)).rsample_and_log_prob((5,))[0].shape
    torch.Size([5, 3, 1])
    """

    arg_constraints = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, value: Tensor):
        self.value = value
        super().__init__(value.shape[:-1], value.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.value

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.value)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.value.expand(*sample_shape, *self.value.shape)

    def from_noise(self, noise: Tensor) -> Tensor:
        """Return ``value``, whatever the noise (..., d)."""
        return self.value.expand(noise.shape)

    def rsample_and_log_prob(self, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Return ``value`` repeated, and zeros."""
        sample = self.rsample(shape)
        return sample, sample.new_zeros(sample.shape[:-1])


@register_kl(PointMass, Distribution)
def _kl_of_an_observed_latent(q: PointMass, p: Distribution) -> Tensor:
    return q.value.new_zeros(q.value.shape[:-1])
