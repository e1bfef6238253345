"""Binomial thinning, against scipy's distributions, brute force with hand-set weights, quadrature, and a baseline."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse, stats
from scipy.special import logsumexp, softmax
from torch import nn

import scgen
from scgen.analysis.thinning import held_out_log_likelihood, thinned
from scgen.data.cells import Cells
from scgen.data.loader import CellLoader
from scgen.data.stores import MemoryStore
from scgen.distributions import CellCounts, DiagonalNormal, PointMass
from scgen.modules.decoders import CountDecoder, Dispersion
from scgen.modules.posteriors import ObservedLibrary
from scgen.modules.priors import LibraryPrior, StandardNormalPrior
from scgen.modules.vae import VAE

N_GENES, N_LATENT, N_HIDDEN = 5, 2, 3


def cells_of(counts: np.ndarray) -> Cells:
    x, none = torch.tensor(counts, dtype=torch.float32), torch.zeros(len(counts), 0)
    zeros = torch.zeros(len(counts), dtype=torch.int64)
    return Cells(
        counts=x,
        library=x.sum(1, keepdim=True).log(),
        batch=zeros,
        labels=zeros,
        categorical=none.long(),
        continuous=none,
        index=zeros,
    )


def pooled_p(counts: np.ndarray, distribution) -> float:
    """Return the p-value of a chi-squared test of counts against a distribution of scipy, rare values pooled."""
    edges = np.unique(distribution.ppf(np.linspace(0.001, 0.999, 60)))
    observed = np.bincount(np.searchsorted(edges, counts), minlength=len(edges) + 1)
    expected = np.diff(np.r_[0, distribution.cdf(edges), 1]) * len(counts)
    kept = expected > 5
    observed, expected = (np.r_[part[kept], part[~kept].sum()] for part in (observed, expected))
    return stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("held_out", [0.1, 0.7])
@pytest.mark.parametrize("as_sparse", [True, False])
def test_split_counts_have_the_marginals_of_thinned_ones(held_out, as_sparse):
    rng = np.random.default_rng(1)
    mu, theta = np.array([0.2, 3.0, 40.0]), np.array([1.0, 0.5, 4.0])
    x = stats.nbinom(theta, theta / (theta + mu)).rvs((20_000, 3), random_state=rng)
    cells = cells_of(x)
    if as_sparse:
        cells = replace(cells, counts=cells.counts.to_sparse_csr())
    kept, rest = thinned(cells, held_out, False, np.random.default_rng(0))
    a, b = kept.counts.numpy(), rest.numpy()
    assert np.array_equal(a + b, x)
    assert (a >= 0).all()
    assert (b >= 0).all()
    assert np.array_equal(a, a.round())
    n, share = x.sum(0), b.sum(0) / x.sum(0)
    assert (np.abs(share - held_out) < 4 * (held_out * (1 - held_out) / n) ** 0.5).all()
    for gene in range(3):
        for part, of in ((a, 1 - held_out), (b, held_out)):
            mean = of * mu[gene]
            assert pooled_p(part[:, gene], stats.nbinom(theta[gene], theta[gene] / (theta[gene] + mean))) > 1e-3
    of_five = b[x[:, 1] == 5, 1]
    assert pooled_p(of_five, stats.binom(5, held_out)) > 1e-3
    np.testing.assert_allclose(kept.library[:, 0], np.log(np.maximum(a.sum(1), 1)), rtol=1e-6)
    assert torch.equal(kept.batch, cells.batch)


def test_size_factors_are_thinned_too():
    cells = cells_of(np.full((3, 4), 9))
    kept, _ = thinned(cells, 0.25, True, np.random.default_rng(0))
    np.testing.assert_allclose(kept.library.exp(), 36 * 0.75, rtol=1e-6)


def test_scaled_counts_are_thinned_counts():
    # The sum over what was there of P(x) Binomial(y; x, share).
    log = torch.log
    one = torch.ones(1)
    counts = CellCounts(torch.zeros(1, 1), one * 0, log(one * 4)[None], log(one * 2), torch.zeros(1, 1), one * -0.8)
    share, x = 0.3, np.arange(400)
    pi = 1 / (1 + np.exp(0.8))
    p = (1 - pi) * stats.nbinom(2, 2 / (2 + 4)).pmf(x) + pi * (x == 0)
    for y in range(6):
        expected = np.log((p * stats.binom(x, share).pmf(y)).sum())
        assert counts.scaled(share).log_prob(torch.tensor([[float(y)]])).item() == pytest.approx(expected, rel=1e-5)


class FromCounts(nn.Module):
    """z = A log(1 + x), without doubt."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(N_LATENT, N_GENES))

    def forward(self, cells):
        return PointMass(torch.log1p(cells.counts.to_dense()) @ self.a.T)


class Fixed(nn.Module):
    """q = N(mean, variance), the library's about the total."""

    def __init__(self, mean: float, variance: float, about_total: bool):
        super().__init__()
        self.mean, self.variance, self.about_total = mean, variance, about_total

    def forward(self, cells):
        mean = torch.full((len(cells), 1), self.mean) + self.about_total * cells.library
        return DiagonalNormal(mean, torch.full((len(cells), 1), self.variance))


def hand_made(n_latent: int, normalised: bool, likelihood: str = "nb", **posteriors: nn.Module) -> VAE:
    theta = None if likelihood == "poisson" else Dispersion("gene", N_GENES, 1, 1, N_HIDDEN)
    decoder = CountDecoder(likelihood, theta, n_latent, N_HIDDEN, 1, N_GENES, normalised=normalised)
    return VAE(posteriors, {"z": StandardNormalPrior(n_latent), "library": LibraryPrior(1)}, decoder).eval()


def log_p(
    vae: VAE, z: np.ndarray, library: np.ndarray, kept: np.ndarray, rest: np.ndarray, held_out: float
) -> np.ndarray:
    """Return log p(rest | kept, z, l) by NumPy and scipy alone, from the decoder's weights.

    A gene's rate in the kept counts is Gamma(theta, mean l rho) beforehand, and Gamma(theta + kept) once they are seen.
    """
    weights = {name: value.detach().numpy().astype(float) for name, value in vae.decoder.state_dict().items()}
    h = z @ weights["mlp.layers.0.linear.weight"].T + weights["mlp.layers.0.linear.bias"]
    h = np.maximum(h / (1 + 1e-3) ** 0.5, 0)  # batch normalisation of untouched statistics
    logits = h @ weights["scale.weight"].T + weights["scale.bias"]
    rho = softmax(logits, -1) if vae.decoder.normalised else np.log1p(np.exp(logits))
    mu, factor = library[..., None] * rho, held_out / (1 - held_out)
    if vae.decoder.dispersion is None:
        return stats.poisson(mu * factor).logpmf(rest).sum(-1)
    theta = np.exp(weights["dispersion.log_theta"])
    if vae.decoder.zi_logits is None:
        inverse = theta / mu + 1
        return stats.nbinom(theta + kept, inverse / (inverse + factor)).logpmf(rest).sum(-1)
    pi = 1 / (1 + np.exp(-(h @ weights["zi_logits.weight"].T + weights["zi_logits.bias"])))
    return by_quadrature(mu, theta, pi, kept, rest, factor).sum(-1)


def by_quadrature(mu, theta, pi, kept, rest, factor) -> np.ndarray:
    """Return log p(rest | kept) where both are Poisson given a rate, Gamma, and a gene that is off in both, or in none.

    By the trapezoidal rule over the logarithm of the rate, by which all falls off fast.
    """
    log_rate = np.linspace(-120, 8, 2561).reshape(-1, *np.ones(kept.ndim, int))
    rate, step = np.exp(log_rate), 128 / 2560
    density = stats.gamma(theta, scale=mu / theta).pdf(rate) * rate * step * stats.poisson(rate).pmf(kept)
    both = density * stats.poisson(rate * factor).pmf(rest)
    p_both = (1 - pi) * both.sum(0) + pi * (kept + rest == 0)
    return np.log(p_both / ((1 - pi) * density.sum(0) + pi * (kept == 0)))


def test_quadrature_is_the_gamma_posterior_where_no_gene_is_off():
    # A rate of mean 40 and shape .5, once 31 were seen, has shape 31.5 and inverse scale .5 / 40 + 1.
    mu, kept, rest = np.array([40.0]), np.array([31]), np.array([6])
    exact = stats.nbinom(31.5, 1.0125 / (1.0125 + 1 / 9)).logpmf(6)
    assert exact == pytest.approx(-2.5913, abs=1e-4)
    assert by_quadrature(mu, 0.5, 0.0, kept, rest, 1 / 9)[0] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("held_out", [0.1, 0.6])
@pytest.mark.parametrize("size_factors", [False, True])
@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zinb"])
def test_the_value_is_brute_force(held_out, size_factors, likelihood):
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(1, 3, (40, N_GENES)))
    x[:10] = np.eye(10, N_GENES, dtype=int) + np.eye(10, N_GENES, -5, dtype=int)  # cells of one count
    x[10:, 0] += 1
    adata = AnnData(sparse.csr_matrix(x.astype(np.float32)))
    factor = adata.obs["factor"] = rng.gamma(3, 5, 40)
    scgen.setup_anndata(adata, size_factor_key="factor" if size_factors else None)
    model = scgen.SCVI(adata, gene_likelihood=likelihood)
    torch.manual_seed(0)
    model.vae = hand_made(N_LATENT, not size_factors, likelihood, z=FromCounts(), library=ObservedLibrary())
    model.trainings = [{}]  # as if trained

    kept = np.random.default_rng(5).binomial(x, 1 - held_out)
    assert (kept.sum(1) == 0).any()
    z = np.log1p(kept) @ model.vae.posteriors["z"].a.detach().numpy().T
    library = factor * (1 - held_out) if size_factors else np.maximum(kept.sum(1), 1)
    expected = log_p(model.vae, z, np.asarray(library), kept, x - kept, held_out)
    values = model.get_thinned_ll(held_out=held_out, n_samples=3, return_mean=False, batch_size=7, seed=5)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    assert model.get_thinned_ll(held_out=held_out, n_samples=3, seed=5) == pytest.approx(expected.mean(), rel=1e-4)


def test_likelihoods_are_averaged_over_the_posterior():
    x, held_out, n_samples = np.array([[3, 0, 8, 1, 40], [1, 1, 0, 2, 0]]), 0.4, 40_000
    torch.manual_seed(1)
    vae = hand_made(1, True, z=Fixed(0.3, 1.5, False), library=Fixed(0.2, 0.3, True))
    columns = {name: getattr(cells_of(x), name) for name in ("library", "batch", "labels", "categorical", "continuous")}
    loader = CellLoader(MemoryStore(x.astype(np.float32)), columns)
    values = held_out_log_likelihood(vae, loader, False, held_out, n_samples, seed=2)
    kept = np.random.default_rng(2).binomial(x, 1 - held_out)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z, residual = (part.ravel() for part in np.meshgrid(0.3 + 1.5**0.5 * nodes, 0.2 + 0.3**0.5 * nodes, indexing="ij"))
    log_weights = np.log(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    for value, a, b in zip(values, kept, x - kept, strict=True):
        log_library = np.maximum(np.log(a.sum()) + residual, 0)  # decoders know no library below one count
        at_nodes = log_p(vae, z[:, None], np.exp(log_library), a, b, held_out)
        exact = logsumexp(at_nodes + log_weights)
        relative_variance = np.expm1(logsumexp(2 * at_nodes + log_weights) - 2 * exact)
        assert abs(value - exact) < 4 * (relative_variance / n_samples) ** 0.5 + 1e-4


def test_a_trained_model_predicts_the_held_out_counts():
    adata = scgen.simulate_cells(800, 60, n_batches=2, mean_library=500, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    values = {}
    for name, epochs, rate in (("untrained", 1, 1e-9), ("trained", 50, 2e-2)):
        model = scgen.SCVI(adata)
        model.train(epochs, learning_rate=rate, accelerator="cpu", progress=False)
        values[name] = model.get_thinned_ll(held_out=0.2, return_mean=False, seed=3)
    x = adata.X.toarray().astype(int)
    kept = np.random.default_rng(3).binomial(x, 0.8)
    rates = kept.sum(1, keepdims=True) * kept.sum(0) / kept.sum() * 0.2 / 0.8
    values["Poisson"] = stats.poisson(rates).logpmf(x - kept).sum(1)
    for baseline in ("untrained", "Poisson"):
        rise = values["trained"] - values[baseline]
        assert rise.mean() > 5 * rise.std() / 800**0.5
        assert rise.mean() > 1


def test_the_true_likelihood_wins():
    # theta .5 at hundreds of counts a gene: the kept counts tell the rate of each gene far better than z and l do.
    rng = np.random.default_rng(0)
    rho = rng.dirichlet(np.ones(10), 3)[rng.integers(3, size=1500)]
    rate = rng.gamma(0.5, 2, rho.shape) * rho * rng.lognormal(np.log(2000), 0.3, (1500, 1))
    adata = AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    scgen.setup_anndata(adata)
    values = {}
    for likelihood in ("nb", "poisson"):
        model = scgen.SCVI(adata, gene_likelihood=likelihood)
        model.train(60, accelerator="cpu", progress=False)
        values[likelihood] = model.get_thinned_ll(indices=model.validation_indices, n_samples=50, return_mean=False)
    rise = values["nb"] - values["poisson"]
    assert rise.mean() > 5 * rise.std() / len(rise) ** 0.5


def test_noise_is_the_seeds(trained):
    values = trained.get_thinned_ll(return_mean=False, n_samples=400)
    torch.manual_seed(99)
    assert np.array_equal(trained.get_thinned_ll(return_mean=False, n_samples=400), values)
    assert not np.allclose(trained.get_thinned_ll(return_mean=False, n_samples=400, seed=1), values, rtol=0.01)
    # Other minibatches draw other latents for the same split.
    other = trained.get_thinned_ll(return_mean=False, n_samples=400, batch_size=13)
    np.testing.assert_allclose(other, values, atol=2)
    assert trained.get_thinned_ll(indices=[3, 4], n_samples=2, return_mean=False).shape == (2,)


def test_all_models_of_counts_get_the_same_split(cells, monkeypatch):
    splits = []
    original = CellCounts.log_prob

    def spy(self, value):
        splits.append(value)
        return original(self, value)

    for arguments in ({"gene_likelihood": "poisson"}, {"use_observed_lib_size": True, "dispersion": "gene-cell"}):
        model = scgen.SCVI(cells, n_latent=3, n_hidden=8, **arguments)
        model.train(1, accelerator="cpu", progress=False)
        monkeypatch.setattr(CellCounts, "log_prob", spy)
        assert np.isfinite(model.get_thinned_ll(n_samples=5, batch_size=len(cells)))
        monkeypatch.undo()
    poisson, other = splits[:2], splits[2:]  # of all counts, and of the kept ones
    assert all(torch.equal(*same) for same in zip(poisson, other, strict=True))
    assert not torch.equal(*poisson)


@pytest.mark.parametrize("held_out", [0, 1, -0.1, 1.5, "0.1", np.nan, True])
def test_wrong_shares(trained, held_out):
    with pytest.raises((TypeError, ValueError), match="held_out"):
        trained.get_thinned_ll(held_out=held_out)


def test_what_cannot_be_thinned(trained, cells):
    with pytest.raises(ValueError, match="n_samples=0"):
        trained.get_thinned_ll(n_samples=0)
    with pytest.raises(RuntimeError, match=r"model\.train"):
        scgen.SCVI(cells).get_thinned_ll()
    normal = scgen.SCVI(cells, gene_likelihood="normal")
    normal.train(1, accelerator="cpu", progress=False)
    with pytest.raises(ValueError, match="only counts can be thinned"):
        normal.get_thinned_ll()
