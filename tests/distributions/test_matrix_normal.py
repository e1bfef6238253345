"""The matrix-variate normal distribution against scipy's, and against an explicit Kronecker covariance."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal, kl_divergence

from scgen.distributions import DiagonalNormal, MatrixNormal
from scgen.seeding import seeded

N_MAPS, M, N = 2, 3, 4


@pytest.fixture(scope="module")
def parts():
    rng = np.random.default_rng(0)
    rows, columns = (np.tril(rng.normal(0, 0.5, (N_MAPS, d, d)), -1) for d in (M, N))
    rows += np.apply_along_axis(np.diag, 1, rng.uniform(0.3, 2, (N_MAPS, M)))
    columns += np.apply_along_axis(np.diag, 1, rng.uniform(0.3, 2, (N_MAPS, N)))
    return rng.standard_normal((N_MAPS, M, N)), rows, columns


@pytest.fixture(scope="module")
def maps(parts):
    return MatrixNormal(*(torch.from_numpy(part) for part in parts))


@pytest.fixture(scope="module")
def generic(parts):
    """Return the same as one Gaussian over all values, with its whole covariance."""
    mean, rows, columns = parts
    blocks = [torch.from_numpy(np.kron(a @ a.T, b @ b.T)) for a, b in zip(rows, columns, strict=True)]
    return MultivariateNormal(torch.from_numpy(mean.ravel()), torch.block_diag(*blocks))


def test_density_is_that_of_scipy(parts, maps):
    x = np.random.default_rng(1).standard_normal((5, N_MAPS, M, N))
    expected = sum(
        stats.matrix_normal(mean, a @ a.T, b @ b.T).logpdf(x[:, k])
        for k, (mean, a, b) in enumerate(zip(*parts, strict=True))
    )
    np.testing.assert_allclose(maps.log_prob(torch.from_numpy(x).flatten(-3)), expected, rtol=1e-9)


def test_density_of_its_draws_and_divergence_are_those_of_the_whole_covariance(maps, generic):
    with seeded(0):
        draws, log_q = maps.rsample_and_log_prob((7,))
    np.testing.assert_allclose(log_q, generic.log_prob(draws), rtol=1e-9)
    np.testing.assert_allclose(maps.log_prob(draws), log_q, rtol=1e-9)
    rng = np.random.default_rng(2)
    mean, variance = torch.from_numpy(rng.standard_normal(24)), torch.from_numpy(rng.uniform(0.5, 2, 24))
    expected = kl_divergence(generic, MultivariateNormal(mean, torch.diag(variance)))
    np.testing.assert_allclose(kl_divergence(maps, DiagonalNormal(mean, variance)), expected, rtol=1e-9)
    np.testing.assert_allclose(maps.variance, generic.variance, rtol=1e-9)


def test_covariance_of_draws_is_the_kronecker_product(maps, generic):
    n = 200_000
    with seeded(0):
        draws = maps.rsample((n,))
    error = np.cov(draws.numpy(), rowvar=False) - generic.covariance_matrix.numpy()
    # The variance of a sample covariance of Gaussians is (s_ii s_jj + s_ij^2) / n.
    s = generic.covariance_matrix.numpy()
    standard = np.sqrt((np.outer(s.diagonal(), s.diagonal()) + s**2) / n)
    assert np.abs(error / standard).max() < 4.5  # of 300 values
    np.testing.assert_allclose(draws.mean(0), generic.mean, atol=4.5 * np.sqrt(s.diagonal().max() / n))


def test_a_scale_may_be_in_either_factor(parts, maps):
    mean, rows, columns = (torch.from_numpy(part) for part in parts)
    other = MatrixNormal(mean, 3 * rows, columns / 3)
    x = torch.ones(24, dtype=torch.float64)
    np.testing.assert_allclose(other.log_prob(x), maps.log_prob(x), rtol=1e-9)


def test_gradients(parts):
    mean, rows, columns = (torch.from_numpy(part).requires_grad_() for part in parts)
    prior = DiagonalNormal(torch.zeros(24, dtype=torch.float64), torch.ones(24, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda a, b, c: kl_divergence(MatrixNormal(a, b.tril(), c.tril()), prior), (mean, rows, columns)
    )
