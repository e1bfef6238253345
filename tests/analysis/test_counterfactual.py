"""Expression under another batch, category or number than the cells' own."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

import scgen
from scgen.analysis.counterfactual import Condition, as_if


def with_covariates(adata):
    rng = np.random.default_rng(0)
    adata.obs["donor"] = pd.Categorical(np.resize(["a", "b", "c"], adata.n_obs))
    adata.obs["age"] = rng.uniform(20, 60, adata.n_obs)
    adata.obs["depth"] = rng.normal(size=adata.n_obs)
    scgen.setup_anndata(
        adata,
        batch_key="batch",
        labels_key="cell_type",
        categorical_covariate_keys=["donor", "stage"] if "stage" in adata.obs else ["donor"],
        continuous_covariate_keys=["age", "depth"],
    )
    return adata


@pytest.fixture(scope="module")
def adata():
    adata = scgen.simulate_cells(n_cells=120, n_genes=20, n_batches=2, seed=3)
    adata.obs["stage"] = np.resize(["early", "late", "late", "early"], 120)
    return with_covariates(adata)


@pytest.fixture(scope="module")
def model(adata):
    model = scgen.SCVI(adata, n_latent=3, n_hidden=16, n_layers=2)
    model.train(4, accelerator="cpu", progress=False)
    return model


def z_of(model) -> np.ndarray:
    """Return the draw of z with seed 0, all cells in one minibatch."""
    mean, variance = model.get_latent_representation(return_dist=True)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return mean + np.sqrt(variance) * torch.randn(mean.shape).numpy()


def decoded(model, z, categories, numbers=()) -> np.ndarray:
    """Return rho in plain NumPy: each layer sees [z, one-hots, standardised numbers]."""
    weights = {name: value.double().numpy() for name, value in model.vae.decoder.state_dict().items()}
    h = z.astype(float)
    for layer in range(model.arguments.n_layers):
        at = f"mlp.layers.{layer}."
        h = h @ weights[at + "linear.weight"].T + weights[at + "linear.bias"]
        for i, codes in enumerate(categories):
            h += weights[f"{at}rows.{i}"][codes]
        if numbers:
            h += np.stack(numbers, 1) @ weights[at + "slopes"]
        norm = {key: weights[f"mlp.norms.{layer}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
        h = (h - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3) * norm["weight"] + norm["bias"]
        h = np.maximum(h, 0)
    odds = np.exp(h @ weights["scale.weight"].T + weights["scale.bias"])
    return odds / odds.sum(1, keepdims=True)


def of_covariates(adata, **changed) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return codes and standardised numbers, some of them changed for all cells; None is the mean."""
    obs = adata.obs
    codes = {
        name: obs[name].astype("category").cat.codes.to_numpy().astype(int) for name in ("batch", "donor", "stage")
    }
    numbers = {name: obs[name].to_numpy() for name in ("age", "depth")}
    new = {name: np.full(len(obs), numbers[name].mean() if value is None else value) for name, value in changed.items()}
    standardised = [(new.get(name, own) - own.mean()) / own.std() for name, own in numbers.items()]
    return [new.get(name, own) for name, own in codes.items()], standardised


@pytest.mark.parametrize(
    ("batch", "covariates", "codes"),
    [
        ("observed", None, {}),
        ("average", None, {"batch": [0, 1]}),
        (["batch_2"], {"donor": "b"}, {"batch": [1], "donor": [1]}),
        ("observed", {"donor": ["c", "a"], "age": 40}, {"donor": [2, 0], "age": [40.0]}),
        ("average", {"age": 33.5, "donor": "average"}, {"batch": [0, 1], "donor": [0, 1, 2], "age": [33.5]}),
        ("batch_1", {"stage": "average", "depth": "average"}, {"batch": [0], "stage": [0, 1], "depth": [None]}),
        ("observed", {"age": [20, 60.0], "depth": np.float32(0.5)}, {"age": [20, 60], "depth": [0.5]}),
        ("observed", {"donor": "observed", "age": None, "stage": "late"}, {"stage": [1]}),
    ],
)
def test_every_covariate_can_be_fixed_or_averaged(adata, model, batch, covariates, codes):
    z = z_of(model)
    expected = [
        decoded(model, z, *of_covariates(adata, **dict(zip(codes, values, strict=True))))
        for values in itertools.product(*codes.values())
    ]
    found = model.get_normalized_expression(batch=batch, covariates=covariates)
    np.testing.assert_allclose(found, np.mean(expected, 0), rtol=1e-4)
    if codes:
        assert not np.allclose(found, model.get_normalized_expression(), rtol=1e-3)
    scaled = model.get_normalized_expression(batch=batch, covariates=covariates, library_size=1e4)
    np.testing.assert_allclose(scaled, 1e4 * np.mean(expected, 0), rtol=1e-4)


def test_fixing_is_asking_about_cells_that_have_it():
    """Without covariates in the encoder, and with observed libraries, other covariates change the decoder alone."""
    adata = with_covariates(scgen.simulate_cells(n_cells=120, n_genes=20, n_batches=2, seed=3))
    model = scgen.SCVI(adata, n_latent=3, n_hidden=16, encode_covariates=False, use_observed_lib_size=True)
    model.train(2, accelerator="cpu", progress=False)
    changed = adata.copy()
    changed.obs["donor"], changed.obs["age"] = "c", 25.0
    asked = {"covariates": {"donor": "c", "age": 25.0}}
    fixed, others = model.posterior_predictive_sample(**asked), model.posterior_predictive_sample(changed)
    assert (fixed != others).nnz == 0
    assert (fixed != model.posterior_predictive_sample()).nnz > 0
    for options in ({}, {"library_size": "latent"}, {"n_samples": 3, "return_mean": False}):
        ours = model.get_normalized_expression(return_numpy=True, **asked, **options)
        assert np.array_equal(ours, model.get_normalized_expression(changed, return_numpy=True, **options))
    for name, values in model.get_likelihood_parameters(**asked).items():
        assert np.array_equal(values, model.get_likelihood_parameters(changed)[name])
    asked |= {"correlation_type": "pearson", "n_samples": 3}
    np.testing.assert_allclose(
        model.get_feature_correlation_matrix(**asked),
        model.get_feature_correlation_matrix(changed, correlation_type="pearson", n_samples=3),
        atol=1e-6,
    )


def test_the_cells_are_left_as_they_are(model):
    (cells,) = model._loader(None, None, 1000)
    before = (cells.batch.clone(), cells.categorical.clone(), cells.continuous.clone())
    others = as_if(cells, Condition(1, {1: 0}, {0: 2.5}))
    assert all(
        torch.equal(*pair) for pair in zip(before, (cells.batch, cells.categorical, cells.continuous), strict=True)
    )
    assert (others.batch == 1).all()
    assert (others.categorical[:, 1] == 0).all()
    assert (others.continuous[:, 0] == 2.5).all()
    assert torch.equal(others.categorical[:, 0], cells.categorical[:, 0])
    assert torch.equal(others.continuous[:, 1], cells.continuous[:, 1])
    assert as_if(cells, Condition()) is cells


def test_a_known_effect_of_a_covariate_is_recovered():
    """Treatment multiplies the rates of five genes by 3, of five others by 1/3, alike in two batches and two types."""
    rng = np.random.default_rng(0)
    n, n_genes = 1200, 50
    effect = np.ones(n_genes)
    effect[:5], effect[5:10] = 3, 1 / 3
    adata = scgen.simulate_cells(n_cells=n, n_genes=n_genes, n_batches=2, n_types=2, seed=2)  # for its table of cells
    batch, kind = (adata.obs[key].cat.codes.to_numpy() for key in ("batch", "cell_type"))
    treated = rng.random(n) < 0.5
    rate = rng.gamma(2, 1, (2, n_genes))[kind] * rng.lognormal(0, 0.3, (2, n_genes))[batch]
    rate = np.where(treated[:, None], rate * effect, rate)
    rate /= rate.sum(1, keepdims=True)
    adata.X = rng.poisson(rng.lognormal(7, 0.3, (n, 1)) * rate).astype(np.float32)
    adata.obs["treatment"] = np.where(treated, "drug", "none")
    scgen.setup_anndata(adata, batch_key="batch", categorical_covariate_keys=["treatment"])
    model = scgen.SCVI(adata, n_latent=4, n_hidden=64)
    model.train(60, accelerator="cpu", progress=False)
    drug, none = (
        np.log2(model.get_normalized_expression(batch="average", covariates={"treatment": name}, return_numpy=True))
        for name in ("drug", "none")
    )
    change = (drug - none).mean(0)
    change -= np.median(change)  # shares sum to 1: what is not affected changes with the sum
    assert np.abs(change - np.log2(effect)).max() < 0.3
    # As observed, the effect stays in: it is what sets the treated cells apart.
    observed = np.log2(model.get_normalized_expression(return_numpy=True))
    assert (observed[treated].mean(0) - observed[~treated].mean(0))[:5].min() > 1
    fixed = drug[treated].mean(0) - drug[~treated].mean(0)
    assert np.abs(fixed[:10]).max() < 0.4


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"covariates": "donor"}, TypeError, r"covariates='donor'.*\{\"donor\": \"average\"\}"),
        ({"covariates": {"doner": "a"}}, ValueError, r"doner.*donor, stage, age, depth.*Did you mean \"donor\""),
        ({"covariates": {"batch": "batch_1"}}, ValueError, "use batch="),
        ({"covariates": {"cell_type": "type_1"}}, ValueError, "is not a covariate"),
        ({"covariates": {"donor": "d"}}, ValueError, r"donor.*'d' is unknown.*a, b, c"),
        ({"covariates": {"stage": ["late", "earl"]}}, ValueError, r"'earl'.*Did you mean \"early\""),
        ({"covariates": {"donor": []}}, ValueError, "empty list"),
        ({"covariates": {"age": "old"}}, TypeError, r"covariates\['age'\]='old'; it takes a number"),
        ({"covariates": {"age": float("nan")}}, ValueError, "takes a number"),
        ({"covariates": {"age": True}}, TypeError, "takes a number"),
        ({"covariates": {"age": 1e300}}, ValueError, "takes a number"),
        ({"covariates": {"age": []}}, ValueError, "takes a number"),
        ({"gene_list": []}, ValueError, "gene_list is an empty list.*gene_1, gene_2"),
        ({"gene_list": iter(["gene_1", "gene21"])}, ValueError, "no genes gene21.*Did you mean"),
        ({"gene_list": "gene_1"}, TypeError, r"gene_list=\['gene_1'\]"),
        ({"gene_list": 5}, TypeError, "gene_list=5; it takes a list"),
        ({"batch": "batch1"}, ValueError, r"batch: 'batch1'.*batch_1, batch_2.*Did you mean \"batch_1\""),
        ({"batch": "average", "transform_batch": "batch_1"}, ValueError, "mean the same"),
        (
            {"batch": "average", "covariates": {"donor": "average", "age": list(range(200))}},
            ValueError,
            r"2 \(batch\) x 3 \(donor\) x 200 \(age\) are 1,200",
        ),
    ],
)
def test_what_is_not_there_is_named(model, asked, error, words):
    with pytest.raises(error, match=words):
        model.get_normalized_expression(**asked)


def test_a_sample_has_one_value_of_each(model):
    for asked in ({"batch": "average"}, {"covariates": {"donor": ["a", "b"]}}, {"covariates": {"stage": "average"}}):
        with pytest.raises(ValueError, match="one value of each covariate"):
            model.posterior_predictive_sample(**asked)
    with pytest.raises(ValueError, match="n_samples"):
        model.posterior_predictive_sample(n_samples=0)


def test_without_covariates_there_are_none_to_name(trained):
    with pytest.raises(ValueError, match="it has: none"):
        trained.get_normalized_expression(covariates={"donor": "a"})
    single = trained.get_normalized_expression(batch="average", covariates={})
    both = trained.get_normalized_expression(batch=["batch_1", "batch_2"])
    assert single.equals(both)


def test_numbers_and_names_like_ours_are_categories_too():
    adata = scgen.simulate_cells(n_cells=60, n_genes=10, n_batches=2, seed=0)
    adata.obs["plate"] = np.resize([1, 2], 60)
    adata.obs["kind"] = np.resize(["average", "observed", "other"], 60)
    scgen.setup_anndata(adata, batch_key="batch", categorical_covariate_keys=["plate", "kind"])
    model = scgen.SCVI(adata, n_latent=2, n_hidden=8, encode_covariates=False)
    model.train(1, accelerator="cpu", progress=False)
    changed = adata.copy()
    changed.obs["plate"], changed.obs["kind"] = 2, "average"
    found = model.get_normalized_expression(covariates={"plate": 2, "kind": ["average"]}, return_numpy=True)
    assert np.array_equal(found, model.get_normalized_expression(changed, return_numpy=True))
    everything = model.get_normalized_expression(covariates={"kind": "average"}, return_numpy=True)
    names = ["average", "observed", "other"]
    each = [model.get_normalized_expression(covariates={"kind": [name]}, return_numpy=True) for name in names]
    np.testing.assert_allclose(everything, np.mean(each, 0), rtol=1e-5)


@pytest.mark.parametrize("batch_key", ["sample", None])
@pytest.mark.parametrize("values", [["x", "y"], [20.0, 60.0]])
def test_a_covariate_may_be_named_batch(batch_key, values):
    """Without covariates in the encoder, fixing one is asking about cells that have it."""
    adata = scgen.simulate_cells(n_cells=60, n_genes=10, n_batches=3, seed=0)
    adata.obs["sample"] = adata.obs["batch"]
    adata.obs["batch"] = np.resize(values, 60)
    kind = "categorical" if isinstance(values[0], str) else "continuous"
    scgen.setup_anndata(adata, batch_key=batch_key, **{f"{kind}_covariate_keys": ["batch"]})
    model = scgen.SCVI(adata, n_latent=2, n_hidden=8, encode_covariates=False, use_observed_lib_size=True)
    model.train(2, accelerator="cpu", progress=False)
    samples = [None, "batch_3"] if batch_key else [None]
    for sample in samples:
        changed = adata.copy()
        changed.obs["batch"] = values[1]
        if sample is not None:
            changed.obs["sample"] = sample
        ask = {"batch": sample, "covariates": {"batch": values[1]}}
        found = model.get_normalized_expression(return_numpy=True, **ask)
        assert np.array_equal(found, model.get_normalized_expression(changed, return_numpy=True))
        assert not np.allclose(found, model.get_normalized_expression(return_numpy=True), rtol=1e-3)
        assert (model.posterior_predictive_sample(**ask) != model.posterior_predictive_sample(changed)).nnz == 0


@pytest.mark.parametrize("kind", [list, tuple, iter, pd.Series, pd.Categorical, dict.fromkeys, np.array])
def test_any_list_is_one(model, kind):
    everything = model.get_normalized_expression()
    genes, batches, donors = ["gene_7", "gene_2"], ["batch_2", "batch_1"], ["c", "a"]
    assert model.get_normalized_expression(gene_list=kind(genes)).equals(everything[genes])
    for name, values in model.get_likelihood_parameters(gene_list=kind(genes)).items():
        assert np.array_equal(values, model.get_likelihood_parameters()[name][:, [6, 1]])
    expected = [
        decoded(model, z_of(model), *of_covariates(model.adata, batch=batch, donor=donor, age=age))
        for batch in (1, 0)
        for donor in (2, 0)
        for age in (25, 50)
    ]
    asked = {"batch": kind(batches), "covariates": {"donor": kind(donors), "age": kind([25.0, 50.0])}}
    np.testing.assert_allclose(model.get_normalized_expression(**asked), np.mean(expected, 0), rtol=1e-4)


def test_an_array_without_axes_is_a_value(model):
    found = model.get_normalized_expression(
        batch=np.array("batch_2"), covariates={"donor": np.array("b"), "age": np.array(33.5)}
    )
    expected = decoded(model, z_of(model), *of_covariates(model.adata, batch=1, donor=1, age=33.5))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_one_factor_may_have_any_number_of_values():
    """More batches than combinations are allowed: a mean over them alone is what it costs."""
    adata = scgen.simulate_cells(n_cells=2020, n_genes=6, n_batches=1, seed=0)
    adata.obs["well"] = np.repeat([f"w{i:04}" for i in range(1010)], 2)
    with pytest.warns(UserWarning, match="fewer than 10 cells"):
        scgen.setup_anndata(adata, batch_key="well")
    model = scgen.SCVI(adata, n_latent=2, n_hidden=4)
    model.train(1, accelerator="cpu", progress=False)
    z = z_of(model)[:3]
    expected = np.mean([decoded(model, z, [np.full(3, code)]) for code in range(1010)], 0)
    found = model.get_normalized_expression(batch="average", batch_size=2020)[:3]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
