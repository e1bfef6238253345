"""Cells drawn from the model: with all that it reads of cells, so that it can be asked about them."""

from itertools import zip_longest

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import scgen
from scgen.analysis.counterfactual import Condition
from scgen.analysis.sampling import replicates


def model_with_covariates(batch_column="batch", likelihood="nb", **changed) -> scgen.SCVI:
    """Return a model that reads a layer, labels and three covariates, one of them of numbers in a unit of its own."""
    adata = scgen.simulate_cells(n_cells=150, n_genes=20, n_batches=3, n_types=2, seed=3)
    adata.layers["counts"], adata.X = adata.X, None
    adata.obs = adata.obs.rename(columns={"batch": batch_column})
    adata.obs["plate"] = np.resize([1, 2], 150)
    adata.obs["donor"] = pd.Categorical(np.resize(["a", "b", "c"], 150), categories=["c", "a", "b"])
    adata.obs["age"] = np.linspace(20, 60, 150)
    adata.obs["factor"] = np.linspace(0.5, 2, 150)
    setup = {
        "layer": "counts",
        "batch_key": batch_column,
        "labels_key": "cell_type",
        "categorical_covariate_keys": ["plate", "donor"],
        "continuous_covariate_keys": ["age"],
    }
    scgen.setup_anndata(adata, **(setup | changed))
    dispersion = "gene-label" if likelihood == "nb" else "gene"
    model = scgen.SCVI(adata, n_latent=3, n_hidden=16, gene_likelihood=likelihood, dispersion=dispersion)
    model.train(4, accelerator="cpu", progress=False)
    return model


def log_p_by_hand(model, sample) -> np.ndarray:
    """Return log p(x | z, l, s) of nb in plain NumPy, with s read from the sample's own columns, and its z and l."""
    w = {name: value.double().numpy() for name, value in model.vae.decoder.state_dict().items()}
    own, obs = model.adata.obs, sample.obs
    h = np.asarray(sample.obsm["z"], float) @ w["mlp.layers.0.linear.weight"].T + w["mlp.layers.0.linear.bias"]
    batch_key = model.registry.setup.batch_key
    for i, (key, order) in enumerate({batch_key: None, "plate": ["1", "2"], "donor": ["c", "a", "b"]}.items()):
        order = order or sorted(own[key].unique())
        h += w[f"mlp.layers.0.rows.{i}"][[order.index(value) for value in obs[key]]]
    age = (obs["age"].to_numpy() - own["age"].mean()) / own["age"].std(ddof=0)
    h += age[:, None] @ w["mlp.layers.0.slopes"]
    norm = {key: w[f"mlp.norms.0.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
    h = np.maximum((h - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3) * norm["weight"] + norm["bias"], 0)
    f = h @ w["scale.weight"].T + w["scale.bias"]
    mu = sample.obsm["library"] * np.exp(f - np.logaddexp.reduce(f, 1, keepdims=True))
    theta = np.exp(w["dispersion.log_theta"][[["type_1", "type_2"].index(value) for value in obs["cell_type"]]])
    return stats.nbinom.logpmf(sample.X.toarray(), theta, theta / (theta + mu)).sum(1)


@pytest.mark.parametrize("batch_key", ["batch", "library"])
def test_a_sample_can_be_asked_about(batch_key):
    model = model_with_covariates(batch_key)
    sample = model.sample_prior(300)
    assert np.isfinite(model.get_elbo(sample))
    assert set(sample.obs) == {batch_key, "cell_type", "plate", "donor", "age", "library"}
    assert (sample.layers["counts"] != sample.X).nnz == 0
    assert set(sample.obs[batch_key]) == {"batch_1", "batch_2", "batch_3"}
    assert (sample.obs["age"] == model.adata.obs["age"].mean()).all()
    log_l = np.log(sample.obsm["library"][:, 0])
    if batch_key == "batch":
        np.testing.assert_array_equal(sample.obs["library"], sample.obsm["library"][:, 0])
    # Counts are those of the columns: with the columns of other cells, they are far less likely.
    log_p = log_p_by_hand(model, sample)
    shuffled = sample.copy()
    shuffled.obs = sample.obs.sample(frac=1, random_state=0).set_index(sample.obs_names)
    assert log_p.mean() > log_p_by_hand(model, shuffled).mean()
    # What the model says of them, at their own z and l, is what NumPy does.
    (cells,) = model._loader(sample, None, 1000)
    latents = {"z": torch.from_numpy(sample.obsm["z"]), "library": torch.from_numpy(log_l[:, None])}
    with torch.inference_mode():
        ours = model.vae.decoder(latents, cells).log_prob(cells.counts.to_dense())
    np.testing.assert_allclose(ours, log_p, rtol=1e-4)


@pytest.mark.parametrize("likelihood", ["zinb", "poisson", "normal"])
def test_samples_of_every_likelihood(likelihood):
    model = model_with_covariates(likelihood=likelihood, counts=likelihood != "normal")
    sample = model.sample_prior(50)
    assert np.isfinite(model.get_elbo(sample))
    assert ("library" in sample.obsm) == ("library" in sample.obs) == (likelihood != "normal")


def test_size_factors_are_samples_too():
    model = model_with_covariates(size_factor_key="factor")
    sample = model.sample_prior(50)
    np.testing.assert_allclose(model.get_latent_library_size(sample), sample.obsm["library"], rtol=1e-5)
    assert np.isfinite(model.get_elbo(sample))


def test_without_a_batch_there_is_no_column_of_it():
    model = model_with_covariates(batch_key=None, categorical_covariate_keys=["plate", "donor", "batch"])
    sample = model.sample_prior(60)
    assert set(sample.obs["batch"]) == {"batch_1", "batch_2", "batch_3"}
    assert np.isfinite(model.get_elbo(sample))


def test_covariates_of_a_sample_are_those_asked_for():
    model = model_with_covariates()
    sample = model.sample_prior(400, "batch_3", covariates={"donor": "b", "age": 55, "plate": 2}, seed=1)
    for key, value in {"batch": "batch_3", "donor": "b", "plate": "2"}.items():
        assert (sample.obs[key] == value).all()
    np.testing.assert_allclose(sample.obs["age"], 55, rtol=1e-6)
    others = sample.copy()
    others.obs["donor"], others.obs["age"], others.obs["batch"] = "a", 25.0, "batch_1"
    # Counts are those of the columns: of others, they are less likely.
    assert log_p_by_hand(model, sample).mean() > log_p_by_hand(model, others).mean()
    with pytest.raises(ValueError, match="one value of each covariate"):
        model.sample_prior(10, covariates={"donor": "average"})
    with pytest.raises(ValueError, match="is not a covariate"):
        model.sample_prior(10, covariates={"cell_type": "type_1"})


def test_replicates_leave_the_global_generator_alone(trained):
    """Even while they are being iterated over, and two of them by turns."""
    state = torch.get_rng_state()

    def those_of(seed):
        return replicates(trained.vae, trained._loader(None, None, 50), Condition(), 2, seed)

    alone = [[x for _, _, x in those_of(seed)] for seed in (0, 1)]
    turns = [[], []]
    for both in zip_longest(those_of(0), those_of(1)):
        for drawn, (_, _, x) in zip(turns, both, strict=True):
            drawn.append(x)
            assert torch.equal(torch.get_rng_state(), state)
    for drawn, expected in zip(turns, alone, strict=True):
        assert all(torch.equal(*pair) for pair in zip(drawn, expected, strict=True))
    # Each is drawn anew.
    assert len({tuple(x[0].tolist()) for x in alone[0] + alone[1]}) > 1
