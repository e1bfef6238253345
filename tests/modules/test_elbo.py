"""The bound and its divergences: closed forms, a linear-Gaussian model whose log p(x) is known, gradients."""

import itertools
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA, FactorAnalysis
from torch import nn

from scgen.data.cells import Cells
from scgen.distributions import DiagonalNormal, PointMass
from scgen.modules.decoders import GaussianDecoder
from scgen.modules.elbo import draw_and_kl
from scgen.modules.priors import StandardNormalPrior
from scgen.modules.vae import VAE


def cells_of(counts: torch.Tensor) -> Cells:
    n = len(counts)
    zeros = torch.zeros(n, dtype=torch.int64)
    none = torch.zeros(n, 0)
    return Cells(
        counts=counts,
        library=torch.zeros(n, 1),
        batch=zeros,
        labels=zeros,
        categorical=none.long(),
        continuous=none,
        index=torch.arange(n),
    )


def normal(mean, variance) -> DiagonalNormal:
    return DiagonalNormal(torch.tensor(mean, dtype=torch.float64), torch.tensor(variance, dtype=torch.float64))


def test_divergences():  # expected: sum(log(v_p / v) + (v + (m - m_p)^2) / v_p - 1) / 2, by mpmath
    q, p = normal([0.5, -1, 2], [0.25, 1.5, 0.04]), normal([0.0, 0, 0], [1.0, 1, 1])
    assert draw_and_kl(q, p, ())[1].item() == pytest.approx(4.119852538939963, rel=1e-9)
    q, p = normal([8.1], [0.05]), normal([8.44], [0.44])
    assert draw_and_kl(q, p, ())[1].item() == pytest.approx(0.7755576789238983, rel=1e-9)
    observed = PointMass(torch.ones(3, 1))
    assert draw_and_kl(observed, p, ())[1].tolist() == [0, 0, 0]


def test_divergence_without_a_closed_form_is_estimated():
    torch.manual_seed(0)
    q = normal([0.5, -1, 2], [0.25, 1.5, 0.04])
    # A mixture of one: nobody has a closed form for it, but it is a Gaussian.
    one = torch.distributions.Categorical(torch.ones(1, dtype=torch.float64))
    p = torch.distributions.MixtureSameFamily(one, normal([[0.0, 1, 1]], [[1.0, 2, 0.5]]))
    z, draws = draw_and_kl(q, p, (100_000,))
    assert (z.shape, draws.shape) == ((100_000, 3), (100_000,))
    m, v, m_p, v_p = map(np.array, ([0.5, -1, 2], [0.25, 1.5, 0.04], [0.0, 1, 1], [1.0, 2, 0.5]))
    exact = 0.5 * (np.log(v_p / v) + (v + (m - m_p) ** 2) / v_p - 1).sum()
    assert abs(draws.mean().item() - exact) < 4 * draws.std().item() / len(draws) ** 0.5


class LinearPosterior(nn.Module):
    """q(z | x) = N(a (x - b), v), for a model whose posterior is known."""

    def __init__(self, a, b, v):
        super().__init__()
        self.a, self.b, self.v = a, b, v

    def forward(self, cells):
        mean = (cells.counts - self.b) @ self.a.T
        return DiagonalNormal(mean, self.v.expand(mean.shape))


def linear_gaussian(exact_posterior: bool) -> tuple[VAE, Cells, np.ndarray]:
    """Return x = W z + b + noise in six dimensions, with W^T W diagonal, so that the posterior is; and log p(x)."""
    rng = np.random.default_rng(0)
    w = np.linalg.qr(rng.normal(size=(6, 2)))[0] * [2.0, 0.7]
    b, sd = rng.normal(size=6), 0.6
    x = rng.normal(size=(4, 2)) @ w.T + b + sd * rng.normal(size=(4, 6))
    decoder = GaussianDecoder(2, 1, 0, 6).double()
    with torch.no_grad():
        decoder.mean.weight.copy_(torch.from_numpy(w))
        decoder.mean.bias.copy_(torch.from_numpy(b))
        decoder.log_scale.fill_(np.log(sd - 1e-4))
    precision = np.eye(2) + w.T @ w / sd**2
    a, v = np.linalg.solve(precision, w.T) / sd**2, np.diag(np.linalg.inv(precision)).copy()
    if not exact_posterior:
        a, v = 0.7 * a, 1.5 * v
    posterior = LinearPosterior(*(torch.from_numpy(value) for value in (a, b, v)))
    log_p = stats.multivariate_normal(b, w @ w.T + sd**2 * np.eye(6)).logpdf(x)
    return VAE({"z": posterior}, {"z": StandardNormalPrior(2).double()}, decoder), cells_of(torch.from_numpy(x)), log_p


def test_bounds_approach_the_exact_marginal():
    torch.manual_seed(0)
    vae, cells, log_p = linear_gaussian(exact_posterior=False)
    with torch.no_grad():
        elbo = vae(cells, (20_000,)).value
        log_w = vae.log_weights(cells, vae.infer(cells), (100_000,))

    def bound(k: int) -> tuple[np.ndarray, np.ndarray]:
        groups = torch.logsumexp(log_w.reshape(-1, k, 4), dim=1) - np.log(k)
        return groups.mean(0).numpy(), (groups.std(0) / len(groups) ** 0.5).numpy()

    values = [(elbo.mean(0).numpy(), elbo.std(0).numpy() / 20_000**0.5), bound(5), bound(50), (log_p, np.zeros(4))]
    for (lower, error), (upper, other) in itertools.pairwise(values):
        assert (lower < upper + 3 * np.hypot(error, other)).all()
    np.testing.assert_allclose(bound(1)[0], values[0][0], atol=0.05)
    np.testing.assert_allclose(bound(5000)[0], log_p, atol=0.01)
    assert (log_p - values[0][0] > 0.05).all()  # the wrong posterior costs something, or the test shows nothing


def test_the_exact_posterior_leaves_no_gap():
    vae, cells, log_p = linear_gaussian(exact_posterior=True)
    with torch.no_grad():
        log_w = vae.log_weights(cells, vae.infer(cells), (200,))
    assert log_w.var(dim=0).max() < 1e-10
    np.testing.assert_allclose(log_w[0], log_p, rtol=1e-9)


@dataclass(frozen=True, kw_only=True)
class PlacedCells(Cells):
    coordinates: torch.Tensor


class PlaceDecoder(GaussianDecoder):
    """A decoder of where cells lie, not of their counts."""

    def target(self, cells):
        return cells.coordinates


class PlacePosterior(LinearPosterior):
    def forward(self, cells):
        return super().forward(replace(cells, counts=cells.coordinates))


def test_a_decoder_names_what_it_explains():
    vae, cells, log_p = linear_gaussian(exact_posterior=True)
    others = {field.name: getattr(cells, field.name) for field in fields(cells)} | {"counts": torch.zeros(4, 3)}
    placed = PlacedCells(**others, coordinates=cells.counts)
    q, decoder = vae.posteriors["z"], PlaceDecoder(2, 1, 0, 6).double()
    decoder.load_state_dict(vae.decoder.state_dict())
    vae = VAE({"z": PlacePosterior(q.a, q.b, q.v)}, dict(vae.priors), decoder)
    with torch.no_grad():
        log_w = vae.log_weights(placed, vae.infer(placed), (5,))
        bound = vae(placed, n_importance_samples=5).value
    np.testing.assert_allclose(log_w, np.tile(log_p, (5, 1)), rtol=1e-9)
    np.testing.assert_allclose(bound, log_p, rtol=1e-9)


def test_reparametrised_gradient():
    torch.manual_seed(0)
    n = 400_000
    mu = torch.ones(1, dtype=torch.float64, requires_grad=True)
    z, _ = DiagonalNormal(mu, torch.ones(1, dtype=torch.float64)).rsample_and_log_prob((n,))
    # d/dmu of z^2, draw by draw, by the chain rule through z; and by the score function.
    (by_draw,) = torch.autograd.grad((z**2).sum(), z)
    score = (z**2 * (z - mu)).detach()
    for gradient, variance in ((by_draw, 4.0), (score, 30.0)):
        assert abs(gradient.mean().item() - 2) < 4 * (variance / n) ** 0.5
        assert gradient.var().item() == pytest.approx(variance, rel=0.05)
    assert score.var() / by_draw.var() > 3


def test_gradient_of_the_bound_is_its_finite_difference():  # with common random numbers
    vae, cells, _ = linear_gaussian(exact_posterior=False)

    def bound(shift: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        vae.posteriors["z"].b = torch.zeros(6, dtype=torch.float64) + shift
        return vae(cells, (64,)).value.mean()

    assert torch.autograd.gradcheck(bound, torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True))


class LearnedPosterior(nn.Module):
    """q(z | x) = N(A x + c, diag v), with A, c and v learned."""

    def __init__(self, n_genes, n_latent):
        super().__init__()
        self.mean = nn.Linear(n_genes, n_latent)
        self.log_variance = nn.Parameter(torch.zeros(n_latent))

    def forward(self, cells):
        mean = self.mean(cells.counts)
        return DiagonalNormal(mean, self.log_variance.exp().expand(mean.shape))


@pytest.mark.parametrize("noise", ["of each gene", "the same"])
def test_a_linear_model_is_trained_to_the_maximum_likelihood(noise):
    rng = np.random.default_rng(0)
    sd = rng.uniform(0.5, 1.2, 6) if noise == "of each gene" else np.full(6, 0.8)
    x = (
        rng.normal(size=(400, 2)) @ (1.5 * rng.normal(size=(2, 6)))
        + rng.normal(size=6)
        + sd * rng.normal(size=(400, 6))
    )
    kind = FactorAnalysis if noise == "of each gene" else PCA
    best = kind(2).fit(x).score(x)
    assert kind(1).fit(x).score(x) < 1.03 * best  # negative, all of them: one latent would not do
    torch.manual_seed(0)
    decoder = GaussianDecoder(2, 1, 0, 6)
    vae = VAE({"z": LearnedPosterior(6, 2)}, {"z": StandardNormalPrior(2)}, decoder).double()
    cells = cells_of(torch.from_numpy(x))
    optimizer = torch.optim.Adam(vae.parameters(), 0.03)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        vae(cells).loss().backward()
        optimizer.step()
        slower.step()
    with torch.no_grad():
        elbo = vae(cells, (500,)).value.mean().item()
        w, b, psi = (
            decoder.mean.weight.numpy(),
            decoder.mean.bias.numpy(),
            (decoder.log_scale.exp() + 1e-4).numpy() ** 2,
        )
    log_p = stats.multivariate_normal(b, w @ w.T + np.diag(psi)).logpdf(x).mean()
    for value in (elbo, log_p):
        assert value == pytest.approx(best, rel=0.005)
    maximum = FactorAnalysis(2, tol=1e-8, max_iter=10_000, svd_method="lapack").fit(x).score(x)
    assert log_p < maximum + 1e-6
