"""The wrapped normal distribution against scipy's normal distribution and quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import kl_divergence

from scgen.distributions import CircularUniform, WrappedNormal
from scgen.seeding import seeded


def wrapped(mean: float, scale: float) -> WrappedNormal:
    return WrappedNormal(*(torch.tensor([value], dtype=torch.float64) for value in (mean, scale)))


def density(theta: float, mean: float, scale: float) -> float:
    """Return the sum over the turns, from its definition."""
    return stats.norm.pdf(theta + 2 * np.pi * np.arange(-30, 31), mean, scale).sum()


@pytest.mark.parametrize("scale", [0.02, 0.2, 1.0, 4.0])
@pytest.mark.parametrize("mean", [0.0, 1.0, 3.1, -9.0])
def test_density_is_the_sum_over_the_turns(mean, scale):
    theta = np.array([-3.0, -0.5, 0.0, 1.0, 3.0, 12.0])
    expected = [density(value, mean, scale) for value in theta]
    found = wrapped(mean, scale).log_prob(torch.from_numpy(theta)[:, None]).exp()
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-300)
    circle = torch.from_numpy(mean + np.linspace(-np.pi, np.pi, 10_001))
    total = integrate.trapezoid(wrapped(mean, scale).log_prob(circle[:, None]).exp(), circle)
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("scale", [0.02, 0.2, 0.5, 1.0, 2.0, 4.0])
def test_divergence_from_uniform_is_the_integral(scale):
    def integrand(theta):
        p = density(theta, 0.0, scale)
        return p * (np.log(p) + np.log(2 * np.pi)) if p > 0 else 0.0

    expected, _ = integrate.quad(integrand, -np.pi, np.pi, points=[0], epsabs=1e-12, limit=200)
    assert kl_divergence(wrapped(1.7, scale), CircularUniform()).item() == pytest.approx(expected, abs=2e-6)


def test_divergence_of_narrow_and_wide_angles():
    narrow = kl_divergence(wrapped(0.0, 0.2), CircularUniform()).item()
    assert narrow == pytest.approx(math.log(2 * math.pi) - 0.5 * math.log(2 * math.pi * math.e * 0.04), abs=1e-9)
    for scale in (6.0, 20.0, 1000.0):  # as good as uniform; a divergence below 0 would be sought in training
        assert kl_divergence(wrapped(0.0, scale), CircularUniform()).item() == pytest.approx(0, abs=1e-6)


def test_divergence_has_the_gradient_of_finite_differences():
    scale = torch.tensor([[0.3], [1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    mean = torch.zeros_like(scale)
    assert torch.autograd.gradcheck(lambda s: kl_divergence(WrappedNormal(mean, s), CircularUniform()), scale)


def test_draws():
    q, n = wrapped(1.0, 0.7), 100_000
    with seeded(0):
        theta, log_q = q.rsample_and_log_prob((n,))
    np.testing.assert_allclose(log_q, q.log_prob(theta))
    # E exp(i theta) = exp(i m - s^2 / 2)
    mean = np.exp(1j * theta.numpy()).mean()
    assert abs(mean - np.exp(1j - 0.7**2 / 2)) < 4 / np.sqrt(n)
    with seeded(0):
        even = CircularUniform().sample((n,))
    assert stats.kstest(even[:, 0].numpy(), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 0.01
    assert CircularUniform().log_prob(even).exp().mean().item() == pytest.approx(1 / (2 * np.pi))
