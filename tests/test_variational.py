"""What the tutorial on variational inference computes with: closed forms, SciPy, quadrature, scikit-learn."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.special import logsumexp
from sklearn.decomposition import FactorAnalysis

from scgen.distributions import DiagonalNormal
from scgen.modules.flows import InverseAutoregressiveFlow, PlanarFlow

SPEC = importlib.util.spec_from_file_location("variational", Path(__file__).parents[1] / "tutorials" / "variational.py")
variational = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(variational)


def some(n: int = 4, n_genes: int = 5, n_latent: int = 2):
    """Return a linear model with random weights, cells, and the model's W, b and Psi's diagonal in NumPy."""
    torch.manual_seed(0)
    vae = variational.linear_vae(n_genes, n_latent)
    with torch.no_grad():
        vae.decoder.log_scale.normal_(0, 0.3)
        vae.posteriors["z"].log_variance.normal_()
    cells = variational.cells_of(np.random.default_rng(0).normal(0, 1.5, (n, n_genes)))
    w, b, log_scale = (
        value.detach().numpy() for value in (vae.decoder.mean.weight, vae.decoder.mean.bias, vae.decoder.log_scale)
    )
    return vae, cells, w, b, (np.exp(log_scale) + 1e-4) ** 2


def posterior_of(w, b, psi, x) -> tuple[np.ndarray, np.ndarray]:
    """Return means and covariance of p(z | x) by conditioning the joint Gaussian of z and x."""
    gain = w.T @ np.linalg.inv(w @ w.T + np.diag(psi))
    return (x - b) @ gain.T, np.eye(w.shape[1]) - gain @ w


@torch.no_grad()
def test_the_marginal_and_the_posterior_are_those_of_the_joint_gaussian():
    vae, cells, w, b, psi = some()
    x = cells.counts.numpy()
    expected = stats.multivariate_normal(b, w @ w.T + np.diag(psi)).logpdf(x)
    np.testing.assert_allclose(variational.marginal(vae, cells).log_prob(cells.counts), expected, rtol=1e-12)
    mean, covariance = posterior_of(w, b, psi, x)
    found = variational.exact_posterior(vae, cells)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(found.covariance_matrix[0], covariance, rtol=1e-10)


@torch.no_grad()
def test_elbo_and_gap_by_quadrature():
    vae, cells, w, b, psi = some()
    q = vae.infer(cells)["z"]
    # Gauss-Hermite rules are exact for what is quadratic in z, as all logarithms here are.
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    noise = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    weights = np.outer(weights, weights).ravel() / (2 * math.pi)
    means, covariance = posterior_of(w, b, psi, cells.counts.numpy())
    for i, x in enumerate(cells.counts.numpy()):
        m, sd = q.mean[i].numpy(), q.variance[i].sqrt().numpy()
        z = m + sd * noise
        log_q = stats.norm(m, sd).logpdf(z).sum(1)
        joint = stats.norm(z @ w.T + b, np.sqrt(psi)).logpdf(x).sum(1) + stats.norm.logpdf(z).sum(1)
        assert variational.exact_elbo(vae, cells)[i].item() == pytest.approx(weights @ (joint - log_q), rel=1e-10)
        expected = weights @ (log_q - stats.multivariate_normal(means[i], covariance).logpdf(z))
        assert variational.gap(vae, cells)[i].item() == pytest.approx(expected, rel=1e-10)


@torch.no_grad()
def test_the_likelihood_is_elbo_plus_gap():
    vae, cells, w, b, psi = some()
    log_p = stats.multivariate_normal(b, w @ w.T + np.diag(psi)).logpdf(cells.counts.numpy())
    np.testing.assert_allclose(variational.exact_elbo(vae, cells) + variational.gap(vae, cells), log_p, rtol=1e-12)
    draws = vae(cells, (20_000,)).value
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - variational.exact_elbo(vae, cells)).abs() < 4 * error).all()


def test_turns():
    assert variational.turns(2, 5) == [("encoder",), ("encoder",), ("decoder",), ("decoder",), ("encoder",)]


def test_a_turn_comes_to_the_best_for_what_the_other_is():
    vae, cells, w, b, psi = some(n=40)
    x = cells.counts.numpy()
    before = [parameter.detach().clone() for parameter in vae.decoder.parameters()]
    values = variational.fit(vae, cells, [("encoder",)] * 800, rate=0.05)
    assert all(torch.equal(*pair) for pair in zip(before, vae.decoder.parameters(), strict=True))
    # The best independent Gaussian has the posterior's means, and the variances that its precisions leave.
    _, covariance = posterior_of(w, b, psi, x)
    v = 1 / np.diag(np.linalg.inv(covariance))
    log_p = stats.multivariate_normal(b, w @ w.T + np.diag(psi)).logpdf(x).mean()
    best = log_p - 0.5 * (np.linalg.slogdet(covariance)[1] - np.log(v).sum())
    assert values[-1] == pytest.approx(best, abs=2e-3)
    assert values[-1] <= best + 1e-12
    # The other way round: a regression on the draws, whose second moments are known.
    q = vae.infer(cells)["z"]
    m, v = q.mean.detach().numpy(), q.variance[0].detach().numpy()
    after = variational.fit(vae, cells, [("decoder",)] * 800, rate=0.05)
    assert torch.equal(vae.infer(cells)["z"].mean, q.mean)
    design = np.column_stack([m, np.ones(len(m))])
    second = design.T @ design / len(m) + np.diag([*v, 0])
    coefficients = np.linalg.solve(second, design.T @ x / len(m)).T
    psi = ((x - design @ coefficients.T) ** 2).mean(0) + coefficients[:, :-1] ** 2 @ v
    kl = 0.5 * (m**2 + v - np.log(v) - 1).sum(1).mean()
    best = -0.5 * (np.log(2 * math.pi * psi) + 1).sum() - kl
    assert after[-1] == pytest.approx(best, abs=5e-3)
    assert after[-1] <= best + 1e-12


def test_together_is_the_maximum_likelihood():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2)) @ rng.normal(size=(2, 6)) + rng.uniform(0.5, 1, 6) * rng.normal(size=(200, 6))
    best = FactorAnalysis(2, tol=1e-8, max_iter=10_000, svd_method="lapack").fit(x).score(x)
    torch.manual_seed(0)
    vae, cells = variational.linear_vae(6, 2), variational.cells_of(x)
    values = variational.fit(vae, cells, [("encoder", "decoder")] * 1000, rate=0.03)
    assert best - 0.02 < values[-1] < best
    assert values[0] < best - 1


@pytest.mark.parametrize("d", [1, 3])
def test_variances_of_gradients(d):
    def square(z):
        return z.square().sum(-1)

    torch.manual_seed(0)
    n, mean = 200_000, torch.ones(d, dtype=torch.float64)
    # |z|^2 = z_1^2 + r, r noncentral chi-squared; moments of the first component's estimate by quadrature over z_1.
    rest = stats.ncx2(d - 1, d - 1).stats() if d > 1 else (0.0, 0.0)
    first, second = float(rest[0]), float(rest[1] + rest[0] ** 2)

    def moment(power: int, baseline: float) -> float:
        def at(e):
            f, r = (1 + e) ** 2 - baseline, (1.0, first, second)
            return stats.norm.pdf(e) * e**power * sum(math.comb(power, j) * f ** (power - j) * r[j] for j in range(3))

        return integrate.quad(at, -12, 12)[0]

    baseline = integrate.quad(lambda e: stats.norm.pdf(e) * e**2 * ((1 + e) ** 2 + first), -12, 12)[0]
    found = variational.gradients(square, mean, n)
    expected = {"reparametrised": 4.0, "score": moment(2, 0) - 4}
    assert found["score"].shape == (n, d)
    assert variational.best_baseline(square, mean, n) == pytest.approx(baseline, rel=0.03)
    with_baseline = variational.gradients(square, mean, n, baseline)["score"]
    for draws, variance in (
        *((found[name], expected[name]) for name in expected),
        (with_baseline, moment(2, baseline) - 4),
    ):
        assert abs(draws[:, 0].mean().item() - 2) < 4 * (variance / n) ** 0.5
        assert draws[:, 0].var().item() == pytest.approx(variance, rel=0.06)
    assert moment(1, baseline) == pytest.approx(2)
    if d == 1:  # from the moments of a Gaussian, by hand
        assert (moment(2, 0) - 4, moment(2, baseline) - 4) == pytest.approx((30, 14))


def test_naive_monte_carlo_is_the_mean_likelihood_of_draws_from_the_prior():
    vae, cells, w, b, psi = some()
    x = cells.counts.numpy()
    torch.manual_seed(3)
    estimate, ess = variational.log_marginal(vae, cells, variational.prior_of(vae, cells), 100)
    torch.manual_seed(3)
    z = torch.randn(100, 4, 2, dtype=torch.float64).numpy()
    log_w = stats.norm(z @ w.T + b, np.sqrt(psi)).logpdf(x).sum(-1)
    np.testing.assert_allclose(estimate, logsumexp(log_w, axis=0) - np.log(100), rtol=1e-10)
    weights = np.exp(log_w)
    np.testing.assert_allclose(ess, weights.sum(0) ** 2 / (weights**2).sum(0), rtol=1e-10)


def test_estimates_come_to_the_exact_value_and_sizes_to_their_limit():
    torch.manual_seed(0)
    vae, cells, w, b, psi = some(n_latent=1)
    x, n = cells.counts.numpy(), 100_000
    exact = stats.multivariate_normal(b, w @ w.T + np.diag(psi)).logpdf(x)
    mean, covariance = posterior_of(w, b, psi, x)
    sd = covariance[0, 0] ** 0.5
    for wider, shift in ((1.0, 0.0), (2.0, 0.0), (1.5, 0.8)):
        q = DiagonalNormal(torch.from_numpy(mean + shift * sd), torch.full((4, 1), wider * sd**2).double())
        estimate, ess = variational.log_marginal(vae, cells, q, n)
        # 1 / E_q (p / q)^2, in units of the posterior's deviation
        density = stats.norm(shift, wider**0.5).pdf
        limit = 1 / integrate.quad(lambda z, density=density: stats.norm.pdf(z) ** 2 / density(z), -10, 10)[0]
        np.testing.assert_allclose(ess / n, limit, rtol=0.05)
        error = (max(1 / limit - 1, 0) / n) ** 0.5  # of the mean weight, relative to it
        np.testing.assert_allclose(estimate, exact, atol=4 * error + 1e-9)
        if not shift:
            assert limit == pytest.approx((2 * wider - 1) ** 0.5 / wider)  # as the tutorial has it
    estimate, ess = variational.log_marginal(vae, cells, variational.prior_of(vae, cells), n)
    np.testing.assert_allclose(estimate, exact, atol=0.1)


def test_the_ring_and_its_normaliser():
    def energy(y, x):
        ring = ((math.hypot(x, y) - 2) / 0.4) ** 2 / 2
        sides = math.exp(-(((x - 2) / 0.6) ** 2) / 2) + math.exp(-(((x + 2) / 0.6) ** 2) / 2)
        box = sum(max(0, abs(value) - 4) ** 2 for value in (x, y)) / (2 * 0.25**2)
        return ring - math.log(sides) + box

    for point in ((2.0, 0.0), (0.3, -1.7), (-4.5, 5.0)):
        found = variational.ring(torch.tensor(point, dtype=torch.float64)).item()
        assert found == pytest.approx(energy(point[1], point[0]), rel=1e-12)
    by_scipy, _ = integrate.dblquad(lambda y, x: math.exp(-energy(y, x)), -6, 6, -6, 6, epsabs=1e-6)
    assert variational.log_normaliser(variational.ring) == pytest.approx(math.log(by_scipy), abs=1e-5)
    gaussian = variational.log_normaliser(lambda z: 0.5 * (z - 0.3).square().sum(-1), reach=8)
    assert gaussian == pytest.approx(math.log(2 * math.pi), abs=1e-9)


def test_a_gaussian_target_is_met_without_a_flow():
    center, variance = torch.tensor([1.0, -0.5]), torch.tensor([0.25, 2.0])
    torch.manual_seed(0)
    q = variational.bend(None, lambda z: 0.5 * ((z - center).square() / variance).sum(-1), 1.0, 0.05, 600, 50)
    torch.testing.assert_close(q.mean.detach(), center[None], atol=0.02, rtol=0)
    torch.testing.assert_close(q.variance.detach(), variance[None], rtol=0.05, atol=0)


@pytest.mark.parametrize("flow", [None, PlanarFlow, InverseAutoregressiveFlow])
def test_free_energy_is_what_quadrature_says(flow):
    torch.manual_seed(0)
    q = variational.bend(flow and flow(2, 0, n_steps=3), variational.ring, 1.0, 0.02, 60, 100)
    points, area = variational.grid(400, 12)
    density = variational.density(q, points)
    assert density.sum() * area == pytest.approx(1, abs=2e-3)
    inside = density > 0
    energy = variational.ring(points).numpy()[inside]
    by_grid = area * (density[inside] * (np.log(density[inside]) + energy)).sum()
    with torch.no_grad():
        draws = variational.free_energies(q, variational.ring, 50_000)
    assert abs(draws.mean().item() - by_grid) < 4 * draws.std().item() / len(draws) ** 0.5 + 0.01
    assert draws.mean() > -variational.log_normaliser(variational.ring)  # the divergence is not negative
