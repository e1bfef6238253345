"""Correlations of genes against SciPy's of the values that they are of, and against their limits."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats

import scgen
from scgen.analysis.correlation import Moments


def model_with_likelihood(likelihood, **arguments) -> scgen.SCVI:
    adata = scgen.simulate_cells(n_cells=150, n_genes=12, n_batches=2, n_types=3, seed=1)
    scgen.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
    model = scgen.SCVI(adata, n_latent=3, n_hidden=16, gene_likelihood=likelihood, **arguments)
    model.train(20, accelerator="cpu", progress=False)
    return model


@pytest.fixture(scope="module")
def negative_binomial() -> scgen.SCVI:
    return model_with_likelihood("nb")


OF_VALUES = {
    "pearson": lambda values: np.corrcoef(values, rowvar=False),
    "spearman": lambda values: stats.spearmanr(values).statistic,
}


@pytest.mark.parametrize("likelihood", ["poisson", "normal"])
@pytest.mark.parametrize("kind", ["pearson", "spearman"])
@pytest.mark.parametrize("batch", ["observed", ["batch_1", "batch_2"]])
def test_of_values_without_noise_it_is_scipys(likelihood, kind, batch):
    """These are the draws of `get_normalized_expression` with the same seed, in blocks of 40 cells or all at once."""
    model = model_with_likelihood(likelihood)
    expected = []
    for one in [batch] if batch == "observed" else batch:
        draws = model.get_normalized_expression(batch=one, n_samples=4, return_mean=False, batch_size=40)
        expected.append(OF_VALUES[kind](draws.astype(float).reshape(-1, 12)))
    ask = {"batch": batch, "correlation_type": kind, "n_samples": 4, "batch_size": 40}
    found = model.get_feature_correlation_matrix(**ask)
    np.testing.assert_allclose(found, np.mean(expected, 0), atol=1e-5)
    assert found.index.tolist() == found.columns.tolist() == model.adata.var_names.tolist()
    genes = ["gene_9", "gene_3", "gene_4"]
    some = model.get_feature_correlation_matrix(gene_list=genes, **ask)
    np.testing.assert_allclose(some, found.loc[genes, genes], atol=1e-6)


@pytest.mark.parametrize("dispersion", ["gene", "gene-cell", "gene-batch"])
@pytest.mark.parametrize("likelihood", ["zinb", "nb"])
def test_gamma_noise_is_that_of_the_dispersions(likelihood, dispersion):
    """Noise of variance rho^2 / theta, independent, adds E[rho^2 / theta] to variances and nothing to covariances."""
    model = model_with_likelihood(likelihood, dispersion=dispersion, use_observed_lib_size=True)
    with torch.no_grad():  # so that no few draws decide
        decoder = model.vae.decoder.dispersion
        (decoder.head.bias if dispersion == "gene-cell" else decoder.log_theta).add_(1.5)
    ask = {"batch": "batch_2", "n_samples": 300}
    rho = model.get_normalized_expression(return_mean=False, **ask).astype(float)
    theta = model.get_likelihood_parameters(**ask)["dispersions"]  # at the same draws of z
    covariance = np.cov(rho.reshape(-1, 12), rowvar=False) + np.diag((rho**2 / theta).mean((0, 1)))
    deviation = np.sqrt(covariance.diagonal())
    found = model.get_feature_correlation_matrix(correlation_type="pearson", **ask).to_numpy()
    np.testing.assert_allclose(found, covariance / np.outer(deviation, deviation), atol=0.03)
    assert np.abs(found - np.corrcoef(rho.reshape(-1, 12), rowvar=False)).max() > 0.15


def test_spearman_of_noisy_values(negative_binomial):
    """The values are drawn anew in plain NumPy: Gamma about the draws of rho."""
    rng = np.random.default_rng(0)
    rho = negative_binomial.get_normalized_expression(n_samples=100, return_mean=False).astype(float)
    theta = negative_binomial.get_likelihood_parameters(n_samples=None)["dispersions"].astype(float)
    expected = stats.spearmanr(rng.gamma(theta, rho / theta).reshape(-1, 12)).statistic
    found = negative_binomial.get_feature_correlation_matrix(n_samples=100)
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert np.abs(expected - np.eye(12)).max() > 0.15


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
@pytest.mark.parametrize("likelihood", ["zinb", "nb"])
def test_noise_does_not_depend_on_the_genes_asked_for(likelihood, kind):
    model = model_with_likelihood(likelihood, dispersion="gene-cell")
    everything = model.get_feature_correlation_matrix(correlation_type=kind)
    genes = ["gene_9", "gene_3", "gene_9"]
    found = model.get_feature_correlation_matrix(gene_list=genes, correlation_type=kind)
    np.testing.assert_allclose(found, everything.loc[genes, genes], atol=1e-6)
    assert found.iloc[0, 2] == pytest.approx(1, abs=1e-6)  # a gene with itself


@pytest.mark.parametrize("theta", [0.003, 0.001])
def test_spearman_of_rates_that_underflow(negative_binomial, theta):
    """Most rates are far below what float32 holds; their logarithms, of Gamma(theta + 1) U^(1 / theta), are not."""
    model, rng = copy.deepcopy(negative_binomial), np.random.default_rng(0)
    with torch.no_grad():
        model.vae.decoder.dispersion.log_theta.fill_(np.log(theta))
    rho = model.get_normalized_expression(n_samples=100, return_mean=False).astype(float).reshape(-1, 12)
    log_gamma = np.log(rng.gamma(theta + 1, 1, rho.shape)) + np.log(rng.random(rho.shape)) / theta
    expected = stats.spearmanr(log_gamma + np.log(rho / theta)).statistic
    found = model.get_feature_correlation_matrix(n_samples=100)
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert np.abs(stats.spearmanr(rho).statistic - expected).max() > 0.4  # what comes out if ties rank by rho


def test_moments_keep_their_digits():
    """A mean of a million deviations would leave nothing of a sum of squares in float32, and little in float64."""
    rng = np.random.default_rng(0)
    rows = 1e6 + rng.multivariate_normal([0, 0, 0], [[1, 0.5, 0], [0.5, 1, -0.3], [0, -0.3, 1]], 1000)
    moments = Moments(3)
    for block in np.array_split(rows, [1, 10, 500]):
        moments.add(block)
    np.testing.assert_allclose(moments.correlation(), np.corrcoef(rows, rowvar=False), atol=1e-9)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e8 / 3])
def test_equal_values_have_no_correlation(constant):
    rows = np.random.default_rng(0).normal(size=(1000, 3))
    rows[:, 1] = constant
    moments = Moments(3)
    for block in np.array_split(rows, 7):
        moments.add(block)
    found = moments.correlation()
    assert np.isnan(found[1]).all()
    assert np.isnan(found[:, 1]).all()
    assert found[0, 2] == pytest.approx(stats.pearsonr(rows[:, 0], rows[:, 2]).statistic, abs=1e-12)


def test_what_does_not_vary_correlates_with_nothing():
    model = model_with_likelihood("poisson")
    with torch.no_grad():
        model.vae.decoder.scale.bias[2] = -200.0  # a rate that underflows
    for kind in OF_VALUES:
        found = model.get_feature_correlation_matrix(correlation_type=kind).to_numpy()
        assert np.isnan(found[2]).all()
        assert np.isnan(found[:, 2]).all()
        assert np.isfinite(np.delete(np.delete(found, 2, 0), 2, 1)).all()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"correlation_type": "kendall"}, 'choose "spearman" or "pearson"'),
        ({"n_samples": 0}, "n_samples=0"),
        ({"n_samples": 1, "indices": [3]}, "two values"),
        ({"batch": "batch_3"}, "batch_3.*batch_1"),
        ({"gene_list": ["gene_99"]}, "gene_99"),
    ],
)
def test_wrong_arguments(negative_binomial, asked, words):
    with pytest.raises(ValueError, match=words):
        negative_binomial.get_feature_correlation_matrix(**asked)
