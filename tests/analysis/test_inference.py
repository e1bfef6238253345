"""Bounds, weights and units, against a linear-Gaussian model whose log p(x) is known, and against plain NumPy."""

import itertools

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import stats
from scipy.special import logsumexp
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import scgen
from scgen.analysis import inference
from scgen.distributions import DiagonalNormal
from scgen.modules.decoders import GaussianDecoder
from scgen.modules.priors import StandardNormalPrior
from scgen.modules.vae import VAE

D, SD = 2, 0.6


class LinearPosterior(nn.Module):
    """q(z | x) = N(a (x - b), diag v)."""

    def __init__(self, a, b, v):
        super().__init__()
        self.a, self.b, self.v = (torch.from_numpy(value) for value in (a, b, v))

    def forward(self, cells):
        mean = (cells.counts - self.b) @ self.a.T
        return DiagonalNormal(mean, self.v.expand(mean.shape))


class Linear:
    """x = W z + b + noise with W^T W diagonal, so that the posterior is; a model with these weights."""

    def __init__(self, exact: bool, n: int = 5):
        rng = np.random.default_rng(0)
        self.w = np.linalg.qr(rng.normal(size=(6, D)))[0] * [2.0, 0.7]
        self.b = rng.normal(size=6)
        # As float32 has them, since so the model reads them.
        x = (rng.normal(size=(n, D)) @ self.w.T + self.b + SD * rng.normal(size=(n, 6))).astype(np.float32)
        self.x = x.astype(float)
        precision = np.eye(D) + self.w.T @ self.w / SD**2
        self.a, self.v = np.linalg.solve(precision, self.w.T) / SD**2, np.diag(np.linalg.inv(precision)).copy()
        if not exact:
            self.a, self.v = 0.7 * self.a, 1.5 * self.v
        self.log_p = stats.multivariate_normal(self.b, self.w @ self.w.T + SD**2 * np.eye(6)).logpdf(self.x)
        self.model = self.with_weights(AnnData(x))

    def with_weights(self, adata: AnnData) -> scgen.SCVI:
        scgen.setup_anndata(adata, counts=False)
        model = scgen.SCVI(adata, gene_likelihood="normal", n_latent=D)
        decoder = GaussianDecoder(D, 1, 0, 6).double()
        with torch.no_grad():
            decoder.mean.weight.copy_(torch.from_numpy(self.w))
            decoder.mean.bias.copy_(torch.from_numpy(self.b))
            decoder.log_scale.fill_(np.log(SD - 1e-4))
        posterior = LinearPosterior(self.a, self.b, self.v)
        model.vae = VAE({"z": posterior}, {"z": StandardNormalPrior(D).double()}, decoder)
        model.trainings = [{}]  # as if trained
        return model

    def mean(self) -> np.ndarray:
        return (self.x - self.b) @ self.a.T

    def log_weights(self, noise: np.ndarray) -> np.ndarray:
        """Return the importance weights of draws made from standard normal noise (k, n, d)."""
        z = self.mean() + np.sqrt(self.v) * noise
        log_w = stats.norm(z @ self.w.T + self.b, SD).logpdf(self.x).sum(-1) + stats.norm.logpdf(z).sum(-1)
        return log_w - stats.norm(self.mean(), np.sqrt(self.v)).logpdf(z).sum(-1)


def test_the_exact_posterior_has_equal_weights():
    linear = Linear(exact=True)
    values, ess = linear.model.get_marginal_ll(n_mc_samples=75, return_ess=True)
    np.testing.assert_allclose(values, linear.log_p, rtol=1e-9)
    np.testing.assert_allclose(ess, 75, rtol=1e-9)


def test_another_posterior_has_the_weights_of_plain_numpy():
    linear = Linear(exact=False)
    values, ess = linear.model.get_marginal_ll(n_mc_samples=40, return_ess=True, seed=7)
    rng = torch.Generator().manual_seed(7)
    noise = torch.cat([torch.randn(k, 5, D, dtype=torch.float64, generator=rng) for k in (16, 16, 8)])  # 16 at once
    weights = np.exp(linear.log_weights(noise.numpy()))
    np.testing.assert_allclose(values, np.log(weights.mean(0)), rtol=1e-9)
    np.testing.assert_allclose(ess, weights.sum(0) ** 2 / (weights**2).sum(0), rtol=1e-9)
    assert (ess < 36).all()
    assert linear.model.get_marginal_ll(n_mc_samples=40, seed=7) == pytest.approx(values.mean())
    assert np.array_equal(linear.model.get_marginal_ll(n_mc_samples=40, seed=7, return_mean=False), values)


def test_bounds_rise_to_the_exact_marginal():
    linear = Linear(exact=False)

    def bound(k: int, n_seeds: int) -> tuple[np.ndarray, np.ndarray]:
        draws = [linear.model.get_marginal_ll(n_mc_samples=k, return_mean=False, seed=seed) for seed in range(n_seeds)]
        return np.mean(draws, axis=0), np.std(draws, axis=0) / n_seeds**0.5

    # E_q log p(x, z) / q(z), by the moments of q.
    mean, v = linear.mean(), linear.v
    residual = linear.x - linear.b - mean @ linear.w.T
    fit = -0.5 * ((residual**2).sum(1) + (linear.w**2 @ v).sum()) / SD**2 - 3 * np.log(2 * np.pi * SD**2)
    elbo = fit - 0.5 * (mean**2 + v - np.log(v) - 1).sum(1)
    # The mean of noisy bounds has an error; the two ends are exact.
    bounds = [(elbo, 0), bound(5, 300), bound(50, 100), (linear.log_p, 0)]
    for (lower, error), (upper, other) in itertools.pairwise(bounds):
        assert (lower < upper + 3 * np.hypot(error, other)).all()
    assert (bounds[1][0] > elbo).all()
    value, error = bound(1, 2000)
    assert (np.abs(value - elbo) < 4 * error).all()
    np.testing.assert_allclose(bound(5000, 4)[0], linear.log_p, atol=0.01)
    assert (linear.log_p - elbo > 0.05).all()  # or the test would show nothing


@pytest.mark.parametrize("likelihood", ["zinb", "poisson"])
def test_bounds_of_counts_rise_with_the_draws(cells, likelihood):
    model = scgen.SCVI(cells, n_latent=4, n_hidden=16, gene_likelihood=likelihood)
    model.train(20, accelerator="cpu", progress=False)
    elbo = np.mean([model.get_elbo(return_mean=False, seed=seed) for seed in range(20)], axis=0, dtype=float)
    bounds = {
        k: np.mean([model.get_marginal_ll(n_mc_samples=k, return_mean=False, seed=s) for s in range(20)], axis=0)
        for k in (1, 2, 5, 25)
    }
    for lower, upper in itertools.pairwise([elbo, *bounds.values()]):
        rise = upper - lower  # of each cell; over the cells they are independent
        assert rise.mean() > -3 * rise.std() / len(rise) ** 0.5
    same = bounds[1] - elbo
    assert abs(same.mean()) < 4 * same.std() / len(same) ** 0.5
    assert (bounds[25] - bounds[1]).mean() > 0.1


def test_many_draws_need_no_more_memory(trained, monkeypatch):
    largest = []
    original = VAE.log_weights

    def spy(self, cells, q, shape):
        largest.append(shape[0])
        return original(self, cells, q, shape)

    monkeypatch.setattr(VAE, "log_weights", spy)
    _, ess = trained.get_marginal_ll(indices=[0, 1], n_mc_samples=1000, return_ess=True)
    assert (max(largest), sum(largest)) == (16, 1000)
    assert ((ess >= 1) & (ess <= 1000)).all()


def test_effective_sizes_of_large_negative_weights():
    log_w = np.random.default_rng(0).normal(-5000, 3, (50, 4))
    parts = iter(torch.from_numpy(log_w).split(7))
    first, second = inference.log_sums(lambda shape: next(parts), 50, at_once=7)
    np.testing.assert_allclose(first, logsumexp(log_w, axis=0), rtol=1e-12)
    np.testing.assert_allclose(second, logsumexp(2 * log_w, axis=0), rtol=1e-12)


def test_units_are_what_numpy_says(cells):
    trained = scgen.SCVI(cells, n_latent=4, n_hidden=16, prior="normal")
    trained.train(3, accelerator="cpu", progress=False)
    mean, variance = (values.astype(float) for values in trained.get_latent_representation(return_dist=True))
    table = trained.active_units()
    np.testing.assert_allclose(table["variance"], mean.var(0), rtol=1e-6)
    np.testing.assert_allclose(table["kl"], 0.5 * (mean**2 + variance - np.log(variance) - 1).mean(0), rtol=1e-4)
    assert table["active"].tolist() == (mean.var(0) > 0.01).tolist()
    assert (table.index.name, table.index.tolist()) == ("latent", [0, 1, 2, 3])
    between = np.sort(mean.var(0))[1:3].mean()
    assert trained.active_units(threshold=between)["active"].sum() == 2
    some = trained.active_units(cells[10:30].copy(), indices=np.arange(15))
    np.testing.assert_allclose(some["variance"], mean[10:25].var(0), rtol=1e-3)


def test_units_that_the_data_do_not_need_are_inactive():
    linear = Linear(exact=True, n=4000)
    linear.w[:, 1] = 0  # the decoder reads one latent only: the posterior of the other is the prior
    linear.a[1], linear.v[1] = 0, 1
    table = linear.with_weights(linear.model.adata).active_units()
    assert table["active"].tolist() == [True, False]
    assert table["kl"][1] == pytest.approx(0, abs=1e-12)
    # Cov(E[z | x]) = 1 - v for the exact posterior of data from the model; KL on average half of log 1 / v.
    assert table["variance"][0] == pytest.approx(1 - linear.v[0], rel=0.1)
    assert table["kl"][0] == pytest.approx(-0.5 * np.log(linear.v[0]), rel=0.1)


def test_units_without_a_divergence_have_none(cells):
    model = scgen.SCVI(cells, n_latent=4, n_hidden=16)
    model.train(1, accelerator="cpu", progress=False)

    class Mixture(nn.Module):
        def forward(self, cells, posterior):
            parts = Independent(Normal(torch.zeros(3, 4), torch.ones(3, 4)), 1)
            return MixtureSameFamily(Categorical(torch.ones(3)), parts)

    model.vae.priors["z"] = Mixture()
    table = model.active_units()
    assert table["kl"].isna().all()
    np.testing.assert_allclose(table["variance"], model.get_latent_representation().var(0), rtol=1e-4)


@pytest.mark.parametrize("threshold", [-1, "0.1", np.nan, None])
def test_wrong_thresholds(trained, threshold):
    with pytest.raises((TypeError, ValueError), match="threshold"):
        trained.active_units(threshold=threshold)
