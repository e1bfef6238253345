"""The parameters of the likelihood give, in SciPy, the likelihood that the model reports."""

import numpy as np
import pytest
from scipy import special, stats

import scgen


def model_with_donors(likelihood, dispersion="gene", size_factor_key=None, **arguments) -> scgen.SCVI:
    adata = scgen.simulate_cells(n_cells=90, n_genes=15, n_batches=2, n_types=3, seed=1)
    adata.obs["donor"] = np.resize(["a", "b", "c"], 90)
    adata.obs["factor"] = np.random.default_rng(0).uniform(0.5, 2, 90)
    scgen.setup_anndata(
        adata,
        batch_key="batch",
        labels_key="cell_type",
        size_factor_key=size_factor_key,
        categorical_covariate_keys=["donor"],
    )
    model = scgen.SCVI(adata, n_latent=3, n_hidden=16, gene_likelihood=likelihood, dispersion=dispersion, **arguments)
    model.train(5, accelerator="cpu", progress=False)
    return model


NAMES = {
    "zinb": {"mean", "dispersions", "dropout"},
    "nb": {"mean", "dispersions"},
    "poisson": {"mean"},
    "normal": {"mean", "scale"},
}


def log_p(likelihood: str, x: np.ndarray, parameters: dict[str, np.ndarray]) -> np.ndarray:
    """Return log p(x) of each cell, by SciPy."""
    parameters = {name: values.astype(float) for name, values in parameters.items()}
    mean = parameters["mean"]
    if likelihood == "normal":
        return stats.norm.logpdf(x, mean, parameters["scale"]).sum(-1)
    if likelihood == "poisson":
        return stats.poisson.logpmf(x, mean).sum(-1)
    theta = parameters["dispersions"]
    values = stats.nbinom.logpmf(x, theta, theta / (theta + mean))
    if likelihood == "zinb":
        pi = parameters["dropout"]
        values = np.where(x == 0, np.log(pi + (1 - pi) * np.exp(values)), np.log1p(-pi) + values)
    return values.sum(-1)


@pytest.mark.parametrize(
    ("likelihood", "size_factor_key"),
    [("zinb", None), ("nb", None), ("poisson", None), ("normal", None), ("zinb", "factor"), ("poisson", "factor")],
)
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
def test_they_give_the_reconstruction_error(likelihood, dispersion, size_factor_key):
    model = model_with_donors(likelihood, dispersion, size_factor_key)
    x = model.adata.X.toarray()
    for batch_size in (1024, 30):
        parameters = model.get_likelihood_parameters(batch_size=batch_size)
        assert set(parameters) == NAMES[likelihood]
        assert {values.shape for values in parameters.values()} == {(90, 15)}
        assert {values.dtype for values in parameters.values()} == {np.dtype(np.float32)}
        error = model.get_reconstruction_error(return_mean=False, batch_size=batch_size)
        np.testing.assert_allclose(-log_p(likelihood, x, parameters), error, rtol=1e-4)
    indices = [5, -2, 17]
    parameters = model.get_likelihood_parameters(indices=indices, seed=3)
    error = model.get_reconstruction_error(indices=indices, seed=3, return_mean=False)
    np.testing.assert_allclose(-log_p(likelihood, x[indices], parameters), error, rtol=1e-4)


@pytest.mark.parametrize("likelihood", ["zinb", "normal"])
def test_draws_genes_and_means(likelihood):
    model = model_with_donors(likelihood)
    genes = ["gene_12", "gene_2"]
    draws = model.get_likelihood_parameters(n_samples=6, batch_size=50)
    means = model.get_likelihood_parameters(n_samples=6, give_mean=True, batch_size=50)
    some = model.get_likelihood_parameters(n_samples=6, give_mean=True, batch_size=50, gene_list=genes)
    for name in NAMES[likelihood]:
        assert draws[name].shape == (6, 90, 15)
        np.testing.assert_allclose(means[name], draws[name].astype(float).mean(0), rtol=1e-5)
        assert np.array_equal(some[name], means[name][:, [11, 1]])
    assert draws["mean"].std(0).min() > 0
    # With so many draws as with one, the next ones are others.
    assert not np.allclose(draws["mean"][0], draws["mean"][1])


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson", "normal"])
def test_at_the_means_of_the_latents(likelihood):
    """Dispersions of genes do not depend on z; the mean is l rho at the means of q, found by another way."""
    model = model_with_donors(likelihood)
    found = model.get_likelihood_parameters(n_samples=None)
    again = model.get_likelihood_parameters(n_samples=None, seed=7)
    for name in found:
        assert np.array_equal(found[name], again[name])
    state = {name: values.double().numpy() for name, values in model.vae.decoder.state_dict().items()}
    z = model.get_latent_representation().astype(float)
    h = z @ state["mlp.layers.0.linear.weight"].T + state["mlp.layers.0.linear.bias"]
    h += state["mlp.layers.0.rows.0"][model.adata.obs["batch"].cat.codes]
    h += state["mlp.layers.0.rows.1"][model.adata.obs["donor"].map({"a": 0, "b": 1, "c": 2})]
    h = (h - state["mlp.norms.0.running_mean"]) / np.sqrt(state["mlp.norms.0.running_var"] + 1e-3)
    h = np.maximum(h * state["mlp.norms.0.weight"] + state["mlp.norms.0.bias"], 0)
    if likelihood == "normal":
        np.testing.assert_allclose(found["mean"], h @ state["mean.weight"].T + state["mean.bias"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found["scale"][3], np.exp(state["log_scale"]) + 1e-4, rtol=1e-5)
        return
    from scgen.analysis import inference

    log_library, _ = inference.latent(model.vae, model._loader(None, None, 1024), "library")
    rho = special.softmax(h @ state["scale.weight"].T + state["scale.bias"], 1)
    np.testing.assert_allclose(found["mean"], np.exp(log_library.astype(float)) * rho, rtol=1e-4)
    if likelihood != "poisson":
        np.testing.assert_allclose(found["dispersions"][3], np.exp(state["dispersion.log_theta"]), rtol=1e-5)
    if likelihood == "zinb":
        pi = special.expit(h @ state["zi_logits.weight"].T + state["zi_logits.bias"])
        np.testing.assert_allclose(found["dropout"], pi, rtol=1e-4)


def test_other_batches_and_covariates():
    model = model_with_donors("zinb", "gene-batch")
    ask = {"n_samples": None}
    of_batch = [model.get_likelihood_parameters(batch=name, **ask) for name in ("batch_1", "batch_2")]
    both = model.get_likelihood_parameters(batch="average", **ask)
    own = model.get_likelihood_parameters(**ask)
    second = (model.adata.obs["batch"] == "batch_2").to_numpy()
    theta = np.exp(model.vae.decoder.dispersion.log_theta.detach().numpy())
    for i, name in enumerate(("batch_1", "batch_2")):
        assert np.allclose(of_batch[i]["dispersions"], theta[i], rtol=1e-5), name
    for name in NAMES["zinb"]:
        np.testing.assert_allclose(both[name], (of_batch[0][name] + of_batch[1][name]) / 2, rtol=1e-5)
        np.testing.assert_allclose(
            own[name], np.where(second[:, None], of_batch[1][name], of_batch[0][name]), rtol=1e-5
        )
    fixed = model.get_likelihood_parameters(covariates={"donor": "b"}, **ask)["mean"]
    is_b = (model.adata.obs["donor"] == "b").to_numpy()
    np.testing.assert_allclose(fixed[is_b], own["mean"][is_b], rtol=1e-5)
    assert not np.allclose(fixed[~is_b], own["mean"][~is_b], rtol=1e-3)
    for wrong in ({"n_samples": 0}, {"n_samples": 1.5}, {"gene_list": ["x"]}, {"covariates": {"donor": "z"}}):
        with pytest.raises(ValueError, match=r"n_samples|genes|donor"):
            model.get_likelihood_parameters(**wrong)
    with pytest.raises(TypeError, match="it takes a list"):
        model.get_likelihood_parameters(gene_list="gene_1")
