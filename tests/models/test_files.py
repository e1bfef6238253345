"""Saved models come back bit for bit, with these cells or others; what does not describe a model is refused."""

import json
import os
import tracemalloc

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import scgen
from scgen import storage
from scgen.storage import ModelFileError


@pytest.fixture
def folder(trained, tmp_path):
    trained.save(tmp_path / "model")
    return tmp_path / "model"


#: What of model.json is the model's; the rest is the storage's own.
FIELDS = ("class", "arguments", "registry", "versions", "history", "data")


def edit(folder, change=lambda description: None, change_tensors=lambda tensors: None):
    """Change description or tensors as one could who knows how to save them, so that no checksum tells."""
    description, tensors = storage.read(folder)
    description = {key: description[key] for key in FIELDS}
    change(description)
    change_tensors(tensors)
    storage.write(folder, description, tensors, overwrite=True)


def answers(model, adata=None):
    """Return all sorts of answers of a model."""
    mean, variance = model.get_latent_representation(adata, return_dist=True)
    found = {"mean": mean, "variance": variance, "elbo": model.get_elbo(adata, return_mean=False)}
    found["expression"] = model.get_normalized_expression(adata, return_numpy=True)
    found["drawn"] = model.posterior_predictive_sample(adata).toarray()
    found["prior"] = np.asarray(model.sample_prior(20).obsm["z"])
    if model.vae.has_library:
        found["library"] = model.get_latent_library_size(adata)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.isfinite(values).all()
        assert found[name].tobytes() == values.tobytes(), name


@given(
    likelihood=st.sampled_from(["zinb", "nb", "poisson", "normal"]),
    dispersion=st.sampled_from(["gene", "gene-batch", "gene-label", "gene-cell"]),
    covariates=st.sets(st.sampled_from(["batch", "labels", "donor", "share", "size"])),
    n_layers=st.integers(1, 2),
    observed=st.booleans(),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_round_trip(tmp_path_factory, likelihood, dispersion, covariates, n_layers, observed):
    assume(not (likelihood == "normal" and "size" in covariates))  # refused
    adata = scgen.simulate_cells(n_cells=40, n_genes=12, seed=3)
    adata.obs["donor"] = pd.Categorical(["d1", "d2"] * 20)
    adata.obs["share"] = np.linspace(0, 1, 40)
    adata.obs["size"] = np.linspace(0.5, 2, 40)
    scgen.setup_anndata(
        adata,
        batch_key="batch" if "batch" in covariates else None,
        labels_key="cell_type" if "labels" in covariates or dispersion == "gene-label" else None,
        categorical_covariate_keys=["donor"] if "donor" in covariates else None,
        continuous_covariate_keys=["share"] if "share" in covariates else None,
        size_factor_key="size" if "size" in covariates else None,
    )
    options = {"n_layers": n_layers, "use_observed_lib_size": observed, "n_latent": 3, "n_hidden": 8}
    model = scgen.SCVI(adata, gene_likelihood=likelihood, dispersion=dispersion, **options)
    model.train(max_epochs=1, accelerator="cpu", progress=False)
    folder = tmp_path_factory.mktemp("model")
    model.save(folder)
    loaded = scgen.SCVI.load(folder, adata)
    assert_same(answers(loaded), answers(model))
    assert repr(loaded) == repr(model)
    assert loaded.registry == model.registry
    pd.testing.assert_frame_equal(loaded.history, model.history)


def test_weights_alone(folder, trained, cells):
    loaded = scgen.SCVI.load(folder)
    with pytest.raises(ValueError, match="loaded without cells: pass adata="):
        loaded.get_latent_representation()
    assert_same(answers(loaded, cells), answers(trained))


def test_an_untrained_model(cells, tmp_path):
    model = scgen.SCVI(cells, n_hidden=8)
    model.save(tmp_path / "model")
    loaded = scgen.SCVI.load(tmp_path / "model", cells)
    assert not loaded.is_trained
    for name, tensor in model.vae.state_dict().items():
        assert torch.equal(loaded.vae.state_dict()[name], tensor)
    for one in (model, loaded):
        one.train(max_epochs=2, accelerator="cpu", progress=False)
    assert_same(answers(loaded), answers(model))


def test_nothing_is_replaced_unasked(trained, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        trained.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    trained.save(folder, overwrite=True)


def test_cells_that_were_not_set_up(folder, trained, cells):
    bare = cells.copy()
    del bare.uns["scgen"]
    before = bare.copy()
    assert_same(answers(scgen.SCVI.load(folder, bare)), answers(trained))
    assert "scgen" not in bare.uns
    pd.testing.assert_frame_equal(bare.obs, before.obs)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_models_of_cells_read_from_a_file(cells, tmp_path, suffix):
    # Files give NumPy's strings and booleans back, which JSON does not take.
    adata = cells.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.obs["n"] = np.arange(120)
    scgen.setup_anndata(
        adata,
        layer="counts",
        batch_key="batch",
        categorical_covariate_keys=["cell_type"],
        continuous_covariate_keys=["n"],
    )
    getattr(adata, f"write_{suffix}")(tmp_path / "cells")
    read = getattr(anndata, f"read_{suffix}")(tmp_path / "cells")
    model = scgen.SCVI(read, n_hidden=8)
    model.train(max_epochs=1, accelerator="cpu", progress=False)
    model.save(tmp_path / "model")
    assert_same(answers(scgen.SCVI.load(tmp_path / "model", adata)), answers(model))


@pytest.mark.parametrize(
    "argument", [{"seed": np.int64(3)}, {"use_observed_lib_size": np.bool_(True)}, {"dropout_rate": np.float64(0.2)}]
)
def test_numpy_arguments(cells, tmp_path, argument):
    model = scgen.SCVI(cells, n_hidden=8, **argument)
    model.save(tmp_path / "model")
    assert scgen.SCVI.load(tmp_path / "model").arguments == model.arguments


def test_a_numpy_boolean_in_the_setup(cells, tmp_path):
    # anndata 0.11 reads True from a file as one.
    adata = cells.copy()
    scgen.setup_anndata(adata, batch_key="batch", counts=np.True_)
    scgen.SCVI(adata, n_hidden=8).save(tmp_path / "model")
    assert scgen.SCVI.load(tmp_path / "model").registry.setup.counts is True


# Other cells


def test_other_order_of_the_genes(folder, trained, cells):
    other = cells[:, np.random.default_rng(0).permutation(30)].copy()
    assert_same(answers(scgen.SCVI.load(folder, other)), answers(trained))


def test_more_genes(folder, trained, cells):
    # Not even counts, as the counts of proteins or fractions kept beside the genes may be: they are not read.
    extra = anndata.AnnData(np.full((120, 5), -0.5, np.float32), obs=cells.obs[[]])
    extra.var_names = [f"other_{i}" for i in range(5)]
    both = anndata.concat([extra, cells], axis=1, merge="same")
    both.obs = cells.obs
    assert_same(answers(scgen.SCVI.load(folder, both)), answers(trained))


def test_cells_on_disk(folder, trained, cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert_same(answers(scgen.SCVI.load(folder, backed)), answers(trained))


def test_missing_genes(folder, cells):
    with pytest.raises(ValueError, match=r"adata.var_names lacks 2 of the model's 30 genes \(first: gene_4, gene_9;"):
        scgen.SCVI.load(folder, cells[:, ~cells.var_names.isin(["gene_4", "gene_9"])].copy())


def test_some_cells_in_another_order(folder, trained, cells):
    rows = np.random.default_rng(0).permutation(120)[:70]
    loaded = scgen.SCVI.load(folder, cells[rows].copy())
    # Not bit for bit: matrix products of 70 rows and of 120 may add in another order.
    np.testing.assert_allclose(
        loaded.get_latent_representation(), trained.get_latent_representation()[rows], rtol=1e-4, atol=1e-5
    )


def test_unknown_batch(folder, cells):
    other = cells.copy()
    other.obs["batch"] = other.obs["batch"].cat.rename_categories({"batch_2": "batch_9"})
    with pytest.raises(ValueError, match=r'obs\["batch"\] has values that the model has not seen in training: batch_9'):
        scgen.SCVI.load(folder, other)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda a: a.obs.__delitem__("batch"), 'batch_key="batch" is not a column'),
        (lambda a: a.X.data.__setitem__(3, 0.5), "not an integer"),
        (lambda a: a.X.data.__setitem__(3, np.nan), "NaN or infinite"),
        (lambda a: setattr(a, "var_names", ["gene_1"] * 2 + a.var_names[2:].tolist()), "gene_2"),
    ],
    ids=["no batch", "fractions", "NaN", "genes twice"],
)
def test_cells_that_do_not_fit(folder, cells, damage, words):
    other = cells.copy()
    damage(other)
    with pytest.raises(ValueError, match=words) as error:
        scgen.SCVI.load(folder, other)
    # The cells are to blame, not the file.
    assert not isinstance(error.value, ModelFileError)


def test_no_anndata(folder, cells):
    with pytest.raises(TypeError, match="DataFrame, not an AnnData"):
        scgen.SCVI.load(folder, cells.to_df())


# Going on


def test_the_split_comes_back_for_the_same_cells_only(folder, trained, cells):
    same = scgen.SCVI.load(folder, cells.copy())
    np.testing.assert_array_equal(same.train_indices, trained.train_indices)
    np.testing.assert_array_equal(same.validation_indices, trained.validation_indices)
    renamed, changed = cells.copy(), cells.copy()
    renamed.obs_names = renamed.obs_names + "x"
    changed.X.data[0] += 1
    for other in (cells[::-1].copy(), cells[:100].copy(), renamed, changed):
        loaded = scgen.SCVI.load(folder, other)
        assert loaded.train_indices is None
        assert loaded.validation_indices is None


def test_the_split_outlives_a_copy_without_cells(folder, trained, cells, tmp_path):
    scgen.SCVI.load(folder).save(tmp_path / "copy")
    np.testing.assert_array_equal(scgen.SCVI.load(tmp_path / "copy", cells).train_indices, trained.train_indices)


def test_training_goes_on(folder, trained, cells):
    loaded = scgen.SCVI.load(folder, cells)
    before = loaded.get_elbo()
    loaded.train(max_epochs=20, early_stopping=False, accelerator="cpu", progress=False)
    assert loaded.history.index.tolist() == list(range(1, 3 + 20 + 1))
    pd.testing.assert_frame_equal(loaded.history.iloc[:3], trained.history)
    np.testing.assert_array_equal(loaded.train_indices, trained.train_indices)
    assert loaded.get_elbo() > before
    loaded.save(folder, overwrite=True)
    assert_same(answers(scgen.SCVI.load(folder, cells)), answers(loaded))


def test_training_on_other_cells_goes_on_from_the_weights(folder, cells):
    loaded = scgen.SCVI.load(folder, cells[:80].copy())
    before = {name: tensor.detach().clone() for name, tensor in loaded.vae.named_parameters()}
    # At this rate a step moves nothing that can be seen; only a fresh start would.
    loaded.train(max_epochs=1, learning_rate=1e-12, accelerator="cpu", progress=False)
    for name, tensor in loaded.vae.named_parameters():
        torch.testing.assert_close(tensor.detach(), before[name], rtol=0, atol=1e-6, msg=name)


def test_gradients_and_modes(folder):
    vae = scgen.SCVI.load(folder).vae
    assert not vae.training
    assert all(parameter.requires_grad for parameter in vae.parameters())
    assert {tensor.device.type for tensor in [*vae.parameters(), *vae.buffers()]} == {"cpu"}


def test_crash_between_weights_and_description(folder, trained, cells, monkeypatch):
    expected = trained.get_latent_representation()
    other = scgen.SCVI.load(folder, cells)
    other.train(max_epochs=1, accelerator="cpu", progress=False)
    real, calls = os.replace, iter(range(2))

    def replace(*paths):
        if next(calls):
            raise KeyboardInterrupt
        real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            other.save(folder, overwrite=True)
    np.testing.assert_array_equal(scgen.SCVI.load(folder, cells).get_latent_representation(), expected)


# Damage


def setting(*path, to):
    """Return a change of one field, deep in the description; None takes it out."""

    def change(description):
        for key in path[:-1]:
            description = description[key]
        if to is None:
            del description[path[-1]]
        else:
            description[path[-1]] = to

    return change


DESCRIPTIONS = {
    "other class": (setting("class", to="SCANVI"), ["holds a 'SCANVI', not a SCVI"]),
    "wider": (setting("arguments", "n_hidden", to=17), ["weights and arguments disagree about", "decoder."]),
    "huge": (setting("arguments", "n_hidden", to=10**5), ["weights and arguments disagree about"]),
    "too huge": (setting("arguments", "n_hidden", to=10**9), ["n_hidden=1000000000"]),
    "deeper": (setting("arguments", "n_layers", to=2), ["weights and arguments disagree about", "layers.1"]),
    "very deep": (setting("arguments", "n_layers", to=5000), ["n_layers=5000"]),
    "other likelihood": (setting("arguments", "gene_likelihood", to="nb"), ["disagree about", "zi_logits"]),
    "no likelihood": (
        setting("arguments", "gene_likelihood", to="cauchy"),
        ["='cauchy'", '"zinb", "nb"'],
    ),
    "likelihood a list": (setting("arguments", "gene_likelihood", to=["nb"]), ["gene_likelihood=['nb']"]),
    "unknown argument": (setting("arguments", "n_heads", to=8), ["n_heads"]),
    "missing argument": (setting("arguments", "n_latent", to=None), ["n_latent"]),
    "no seed": (setting("arguments", "seed", to=None), ["seed"]),
    "seed a text": (setting("arguments", "seed", to="zero"), ["model.json"]),
    "seed too large": (setting("arguments", "seed", to=10**30), ["model.json"]),
    "width a text": (setting("arguments", "n_hidden", to="16"), ["n_hidden='16'"]),
    "arguments a list": (setting("arguments", to=[1, 2]), ["model.json"]),
    "a batch less": (setting("registry", "categories", "batch", to=["batch_1"]), ["disagree about"]),
    "a gene less": (lambda d: d["registry"]["genes"].pop(), ["disagree about"]),
    "a gene twice": (lambda d: d["registry"]["genes"].__setitem__(0, "gene_2"), ["unique names"]),
    "a gene a number": (lambda d: d["registry"]["genes"].__setitem__(0, 7), ["unique names"]),
    "genes a text": (setting("registry", "genes", to="abc"), ["model.json"]),
    "a batch twice": (setting("registry", "categories", "batch", to=["batch_1", "batch_1"]), ["unique"]),
    "no batches": (lambda d: d["registry"]["categories"].pop("batch"), ["model.json"]),
    "categories a list": (setting("registry", "categories", to=["batch"]), ["model.json"]),
    "unknown setup": (setting("registry", "setup", "modality", to="rna"), ["modality"]),
    "setup a text": (setting("registry", "setup", to="batch"), ["model.json"]),
    "batch key a number": (setting("registry", "setup", "batch_key", to=3), ["model.json"]),
    "a column without scaling": (
        setting("registry", "setup", "continuous_covariate_keys", to=["age"]),
        ["categories or scaling"],
    ),
    "scaling without a column": (setting("registry", "scaling", to={"age": [0.0, 1.0]}), ["categories or scaling"]),
    "trainings a dictionary": (setting("trainings", to={}), ["trainings is not a list"]),
    "scaling a number": (setting("registry", "scaling", to={"age": 3}), ["model.json"]),
    "history uneven": (lambda d: d["history"]["epoch"].pop(), ["model.json"]),
    "history a text": (setting("history", to="long"), ["model.json"]),
    "no class": (setting("class", to=None), ["holds a None, not a SCVI"]),
    **{f"no {key}": (setting(key, to=None), ["model.json"]) for key in ("arguments", "registry", "history", "data")},
}


@pytest.mark.parametrize("with_cells", [True, False], ids=["with cells", "alone"])
@pytest.mark.parametrize(("change", "words"), DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_wrong_descriptions_are_refused(folder, cells, change, words, with_cells):
    edit(folder, change)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError) as error:
            scgen.SCVI.load(folder, cells if with_cells else None)
        megabytes = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    for word in words:
        assert word in str(error.value)
    # A description may claim any size; only the weights' own is ever built.
    assert megabytes < 50


SILENT = {
    "genes in another order": lambda d: d["registry"]["genes"].reverse(),
    "batches in another order": lambda d: d["registry"]["categories"]["batch"].reverse(),
    "a gene renamed": lambda d: d["registry"]["genes"].__setitem__(0, "gene_31"),
    "the layer": setting("registry", "setup", "layer", to="counts"),
    "encoders' dropout": setting("arguments", "dropout_rate", to=0.9),
}


@pytest.mark.parametrize("change", SILENT.values(), ids=SILENT)
def test_alterations_that_fit_the_weights_are_refused_too(folder, change):
    # Every one of these would give wrong answers, now or after more training, and no shape tells.
    description = json.loads((folder / "model.json").read_text())
    change(description)
    (folder / "model.json").write_text(json.dumps(description, indent=1))
    with pytest.raises(ModelFileError, match=r"model\.json"):
        scgen.SCVI.load(folder)


def test_a_huge_model_claims_no_memory(folder):
    # What tracemalloc does not see, torch's own memory: 10**5 hidden units twice over would be 40 GB.
    resident = pytest.importorskip("resource").getrusage
    edit(folder, lambda d: d["arguments"].update(n_hidden=10**5, n_layers=2))
    before = resident(0).ru_maxrss
    with pytest.raises(ModelFileError, match="disagree"):
        scgen.SCVI.load(folder)
    assert resident(0).ru_maxrss - before < 200 * 1024


WEIGHTS = {
    "one less": lambda t: t.pop("vae.decoder.scale.bias"),
    "one more": lambda t: t.update({"vae.more": torch.ones(3)}),
    "other shape": lambda t: t.update({"vae.decoder.scale.bias": torch.ones(31)}),
    "transposed": lambda t: t.update({"vae.decoder.scale.weight": torch.ones(16, 30)}),
    "doubles": lambda t: t.update({"vae.decoder.scale.bias": torch.ones(30, dtype=torch.float64)}),
    "integers": lambda t: t.update({"vae.decoder.scale.bias": torch.ones(30, dtype=torch.int64)}),
    "all gone": lambda t: t.clear(),
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
def test_wrong_weights_are_refused(folder, change):
    edit(folder, change_tensors=change)
    with pytest.raises(ModelFileError, match=r"model\.json does not describe a model that scgen can build"):
        scgen.SCVI.load(folder)


SPLITS = {
    "out of range": lambda t: t["train_indices"].__setitem__(0, 120),
    "half gone": lambda t: t.pop("validation_indices"),
    "fractions": lambda t: t.update(train_indices=t["train_indices"] + 0.5),
}


@pytest.mark.parametrize("change", SPLITS.values(), ids=SPLITS)
def test_wrong_splits_are_refused(folder, cells, change):
    edit(folder, change_tensors=change)
    with pytest.raises(ModelFileError):
        scgen.SCVI.load(folder, cells)
