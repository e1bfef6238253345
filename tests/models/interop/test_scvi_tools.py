"""Models that scvi-tools saved give scvi-tools' numbers here, and nothing in their files is ever run.

Where scvi-tools is installed (the extra named peers) models of every kind are made by it, saved, read, and compared in
float64 under the same noise; ``python tests/models/interop/test_scvi_tools.py cells.h5ad`` prints the table of
differences for a file. Two small models that each version made are kept in ``scvi_tools/``, with its answers, for where
scvi-tools is not installed; ``python tests/models/interop/test_scvi_tools.py keep`` makes those of the installed one.
"""

import contextlib
import itertools
import os
import pickle
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData
from torch.distributions import kl_divergence

import scgen
from scgen.cli import main
from scgen.storage import ModelFileError

KEPT = Path(__file__).parent / "scvi_tools"
LATENT, OBSERVED = KEPT / "latent-1.4.2", KEPT / "observed-1.4.2"
COVARIATES = {"categorical_covariate_keys": ["chemistry", "site"], "continuous_covariate_keys": ["age"]}


def with_covariates(adata: AnnData) -> AnnData:
    rng = np.random.default_rng(0)
    adata.obs["chemistry"] = rng.choice(["v2", "v3"], adata.n_obs)
    adata.obs["site"] = "one"  # a category of one value has no column there
    adata.obs["age"] = rng.integers(20, 80, adata.n_obs) / 4.0  # as good in float32
    return adata


def made_by_scvi_tools(adata: AnnData, folder: Path, setup: dict, max_epochs: int = 1, **arguments):
    """Train one of its models, save it and return it."""
    import scvi

    theirs = adata.copy()
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(theirs, batch_key="batch", labels_key="cell_type", **setup)
    model = scvi.model.SCVI(theirs, **arguments)
    model.train(
        max_epochs=max_epochs, batch_size=min(128, adata.n_obs // 3), enable_progress_bar=False, accelerator="cpu"
    )
    if max_epochs == 1:
        with torch.no_grad():  # its library is near one count, below which ours does not go; here near the totals
            model.module.l_encoder.mean_encoder.bias += 7
    model.save(folder, overwrite=True)
    return model


def differences(adata: AnnData, folder: Path, setup: dict, **arguments) -> dict[str, float]:
    """Return, for each answer, the largest difference relative to its largest or, of expression, own value."""
    model = made_by_scvi_tools(adata, folder, setup, **arguments)
    module = model.module.double().eval()
    ours = scgen.SCVI.from_scvi_tools(folder, adata)
    vae = ours.vae.double().eval()
    tensors = next(iter(model._make_data_loader(model.adata, batch_size=adata.n_obs)))
    tensors = {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}
    cells = next(iter(ours._loader(None, None, adata.n_obs)))
    double = {name: getattr(cells, name).double() for name in ("library", "continuous")}
    cells = replace(cells, counts=cells.counts.to_dense().double(), **double)
    cells.library[:] = cells.counts.sum(1, keepdim=True).log()
    for column, (key, (mean, sd)) in enumerate(ours.registry.scaling.items()):
        cells.continuous[:, column] = torch.from_numpy((adata.obs[key].to_numpy(float) - mean) / sd)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # else their one-hots leave float64
        inferred = module.inference(**module._get_inference_input(tensors))
        q = vae.infer(cells)
        noise = {name: torch.randn_like(q[name].mean) for name in q}
        inferred["z"] = inferred["qz"].loc + inferred["qz"].scale * noise["z"]
        if inferred["ql"] is not None:
            inferred["library"] = inferred["ql"].loc + inferred["ql"].scale * noise["library"]
        generated = module.generative(**module._get_generative_input(tensors, inferred))
        losses = module.loss(tensors, inferred, generated)

        draws = {name: q[name].mean + q[name].variance.sqrt() * noise[name] for name in q}
        kl = {name: kl_divergence(q[name], vae.prior(name, cells)) for name in q}
        pairs = {
            "latent mean": (q["z"].mean, inferred["qz"].loc),
            "latent variance": (q["z"].variance, inferred["qz"].variance),
            "library": (draws["library"], inferred["library"]),
            "log-likelihood": (
                vae.decoder(draws, cells).log_prob(cells.counts),
                -losses.reconstruction_loss["reconstruction_loss"],
            ),
            "KL of z": (kl["z"], losses.kl_local["kl_divergence_z"]),
            "KL of l": (kl["library"], losses.kl_local["kl_divergence_l"] * torch.ones(len(cells))),
        }
        rho, theirs = vae.decoder.expression(draws, cells), generated["px"].scale
        found = {"expression": float(((rho - theirs).abs() / theirs).max())}
    for name, (mine, its) in pairs.items():
        found[name] = float((mine - its).abs().max() / its.abs().max().clamp(min=1e-300))
    return found


CONFIGURATIONS = [
    {
        "gene_likelihood": likelihood,
        "dispersion": dispersion,
        "n_layers": n_layers,
        "use_observed_lib_size": observed,
        "encode_covariates": encoded,
    }
    for likelihood, dispersion, n_layers, observed, encoded in itertools.product(
        ("zinb", "nb", "poisson"),
        ("gene", "gene-batch", "gene-label", "gene-cell"),
        (1, 2, 3),
        (True, False),
        (True, False),
    )
    if likelihood != "poisson" or dispersion == "gene"
]


# One in five, which leaves every value of every option, and nearly every pair.
@pytest.mark.parametrize("arguments", CONFIGURATIONS[::5], ids=lambda arguments: "-".join(map(str, arguments.values())))
@pytest.mark.parametrize("setup", [{}, COVARIATES], ids=["batch", "covariates"])
def test_every_kind_of_model_gives_their_numbers(arguments, setup, tmp_path):
    pytest.importorskip("scvi", reason="scvi-tools is not installed (the extra named peers)")
    adata = with_covariates(scgen.simulate_cells(n_cells=200, n_genes=40, n_batches=3, seed=0))
    found = differences(adata, tmp_path, setup, **arguments)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("likelihood", ["zinb", "nb"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-cell"])
def test_parameters_and_correlations_are_theirs(likelihood, dispersion, tmp_path):
    """Both are means over draws, of other random numbers: they agree as far as these go."""
    pytest.importorskip("scvi", reason="scvi-tools is not installed (the extra named peers)")
    adata = scgen.simulate_cells(n_cells=150, n_genes=15, n_batches=2, seed=0)
    arguments = {"gene_likelihood": likelihood, "dispersion": dispersion, "encode_covariates": True}
    theirs = made_by_scvi_tools(adata, tmp_path, {}, 20, **arguments)
    with torch.no_grad():
        # Rates that differ between cells by far more than between draws, and by more than the noise about them.
        module = theirs.module
        module.decoder.px_scale_decoder[0].weight *= 5
        module.z_encoder.var_encoder.bias -= 4
        (module.decoder.px_r_decoder.bias if dispersion == "gene-cell" else module.px_r).add_(2)
    theirs.save(tmp_path, overwrite=True)
    ours = scgen.SCVI.from_scvi_tools(tmp_path, adata)

    found = ours.get_likelihood_parameters(n_samples=500, give_mean=True)
    expected = theirs.get_likelihood_parameters(n_samples=500, give_mean=True)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0.1, atol=0.01 * values.mean(), err_msg=name)

    for kind in ("pearson", "spearman"):
        for batch in ("batch_1", ["batch_1", "batch_2"]):
            asked = {"n_samples": 200, "correlation_type": kind}
            expected = theirs.get_feature_correlation_matrix(transform_batch=batch, **asked)
            found = ours.get_feature_correlation_matrix(batch=batch, **asked)
            assert found.index.equals(expected.index)
            np.testing.assert_allclose(found, expected, atol=0.04)
            assert np.abs(expected.to_numpy() - np.eye(15)).max() > 0.25


@pytest.mark.parametrize("folder", sorted(KEPT.iterdir()) if KEPT.exists() else [], ids=lambda path: path.name)
def test_kept_models_give_the_answers_kept(folder, tmp_path, capsys):
    stored = np.load(folder / "cells.npz", allow_pickle=False)
    adata = cells_of(stored)
    model = scgen.SCVI.from_scvi_tools(folder, adata)
    assert model.is_trained
    assert main(["convert", str(folder), "-o", str(tmp_path / "ours")]) == 0
    assert "wrote" in capsys.readouterr().out
    for one in (model, scgen.SCVI.load(tmp_path / "ours", adata)):
        mean, variance = one.get_latent_representation(return_dist=True)
        np.testing.assert_allclose(mean, stored["latent_mean"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance, stored["latent_variance"], rtol=1e-4, atol=1e-5)
        # From other noise than theirs: the means over many draws.
        elbo = [one.get_elbo(seed=seed) for seed in range(100)]
        error = np.hypot(np.std(elbo) / 10, stored["elbo"].std() / np.sqrt(len(stored["elbo"])))
        assert abs(np.mean(elbo) - stored["elbo"].mean()) < 4 * error + 1e-4
        expression = one.get_normalized_expression(batch="b", n_samples=500, return_numpy=True)
        np.testing.assert_allclose(expression, stored["expression"], rtol=0.1, atol=2e-3)


def test_conversion_without_cells_knows_no_library_prior_and_says_so(tmp_path):
    folder = OBSERVED
    adata = cells_of(np.load(folder / "cells.npz", allow_pickle=False))
    with pytest.raises(ValueError, match="has no library sizes"):
        scgen.SCVI.from_scvi_tools(folder).sample_prior(3)
    sample = scgen.SCVI.from_scvi_tools(folder, adata).sample_prior(500, "b")
    log_totals = np.log(np.asarray(adata[adata.obs["batch"] == "b"].X.sum(1)))
    assert abs(np.log(sample.obs["library"]).mean() - log_totals.mean()) < 0.2


def test_an_imported_model_goes_on_training():
    adata = cells_of(np.load(LATENT / "cells.npz", allow_pickle=False))
    model = scgen.SCVI.from_scvi_tools(LATENT, adata)
    before = model.get_elbo()
    model.train(20, progress=False, learning_rate=1e-3, kl_start=1.0)
    assert len(model.history) <= 20
    assert model.get_elbo() > before - 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model_name": "SCANVI"}, "it is a SCANVI"),
        ({"use_layer_norm": "both"}, "use_layer_norm='both'"),
        ({"latent_distribution": "ln"}, "latent_distribution='ln'"),
        ({"gene_likelihood": "normal"}, '"normal"'),
        ({"something_new": 3}, "something_new=3, which scgen does not know"),
        ({"n_hidden": 9}, "weights and arguments disagree"),
        ({"is_trained_": False}, "untrained"),
    ],
)
def test_what_has_no_equal_is_refused_by_name(wrong, message, tmp_path):
    content = torch.load(LATENT / "model.pt", weights_only=False)
    attributes = content["attr_dict"]
    attributes["history_"] = None
    for name, value in wrong.items():
        if name in attributes:
            attributes[name] = value
        elif name == "model_name":
            attributes["registry_"][name] = value
        else:
            attributes["init_params_"]["non_kwargs"][name] = value
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ModelFileError, match=message):
        scgen.SCVI.from_scvi_tools(tmp_path)


class Call:
    """What a pickle makes of it is the result of a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def archive(folder: Path, data: bytes) -> Path:
    """Write a file in the form of torch's, with this pickle in it, and the tensors of a true one."""
    with zipfile.ZipFile(LATENT / "model.pt") as true, zipfile.ZipFile(folder / "model.pt", "w") as false:
        for name in true.namelist():
            false.writestr(name, data if name.endswith("/data.pkl") else true.read(name))
    return folder


def pickle_of_true_model() -> bytes:
    with zipfile.ZipFile(LATENT / "model.pt") as true:
        return next(true.read(name) for name in true.namelist() if name.endswith("/data.pkl"))


@pytest.mark.parametrize("place", ["model_state_dict", "attr_dict", "var_names", "extra"])
@pytest.mark.parametrize("function", [os.system, eval, exec, shutil.rmtree], ids=lambda function: function.__name__)
def test_a_malicious_pickle_is_refused_by_name_and_runs_nothing(place, function, tmp_path):
    mark = tmp_path / "written"
    text = f"open({str(mark)!r}, 'w').write('x')" if function is not os.system else f"echo x > {mark}"
    call = Call(function, str(tmp_path / "kept") if function is shutil.rmtree else text)
    (tmp_path / "kept").mkdir()
    content = {"model_state_dict": {}, "attr_dict": {"history_": None}, "var_names": []} | {place: {"x": call}}
    folder = archive(tmp_path, pickle.dumps(content, protocol=2))
    named = f"{function.__module__}.{function.__name__}".replace("builtins", "__builtin__")
    with pytest.raises(ModelFileError, match=f"names {named}".replace(".", r"\.")):
        scgen.SCVI.from_scvi_tools(folder)
    assert not mark.exists()
    assert (tmp_path / "kept").exists()
    # The test itself can fail: read as pickles are, it does run.
    if function is os.system:
        pickle.loads(pickle.dumps(content, protocol=2))
        assert mark.exists()


def test_what_a_pickle_drops_again_is_refused_too(tmp_path):
    """The call's result never becomes part of the content: made, then popped off the pickle's stack."""
    mark = tmp_path / "written"
    call = pickle.dumps(Call(os.system, f"echo x > {mark}"), protocol=2)[2:-1]
    folder = archive(tmp_path, b"\x80\x02" + call + b"0" + pickle_of_true_model()[2:])
    with pytest.raises(ModelFileError, match=r"posix\.system"):
        scgen.SCVI.from_scvi_tools(folder)
    assert not mark.exists()


def test_in_the_history_names_are_inert(tmp_path):
    mark = tmp_path / "written"
    true = pickle_of_true_model()
    key = b"X\x08\x00\x00\x00history_"
    assert true.count(key) == 1
    after = true.index(key) + len(key)
    memo = 2 if true[after : after + 1] == b"q" else 5  # BINPUT or LONG_BINPUT
    call = pickle.dumps(Call(os.system, f"echo x > {mark}"), protocol=2)[2:-1].replace(b"q\x00", b"")
    call = b"cposix\nsystem\nX" + len(f"echo x > {mark}").to_bytes(4, "little") + f"echo x > {mark}".encode() + b"\x85R"
    # {"history_": the call's result}, then the true history under another name, which is dropped with it.
    folder = archive(tmp_path, true[: after + memo] + call + b"X\x05\x00\x00\x00other" + true[after + memo :])
    with pytest.raises(ModelFileError, match="pandas"):  # the true one is no longer where any name may be
        scgen.SCVI.from_scvi_tools(folder)
    history = Call(os.system, f"echo x > {mark}")
    content = {"attr_dict": {"history_": history, "registry_": {}}, "model_state_dict": {}, "var_names": []}
    with pytest.raises(ModelFileError, match="scvi_version"):  # read, and found to be no model
        scgen.SCVI.from_scvi_tools(archive(tmp_path, pickle.dumps(content, protocol=2)))
    assert not mark.exists()


@pytest.mark.parametrize("seed", range(200))
def test_damaged_files_are_refused_or_read_but_never_anything_else(seed, tmp_path):
    rng = np.random.default_rng(seed)
    data = bytearray(pickle_of_true_model())
    for place in rng.integers(len(data), size=rng.integers(1, 4)):
        data[place] = rng.integers(256)
    if seed % 4 == 0:
        data = data[: rng.integers(len(data))]
    with contextlib.suppress(ModelFileError):
        scgen.SCVI.from_scvi_tools(archive(tmp_path, bytes(data)))


def test_small_files_do_not_become_large(tmp_path):
    """References that double at every level, memory for places never used, tensors and arrays of repeated values."""
    doubled = []
    for _ in range(60):
        doubled = [doubled, doubled]
    content = {"attr_dict": {"history_": None}, "model_state_dict": {}, "var_names": doubled}
    with pytest.raises(ModelFileError, match="cannot be converted"):
        scgen.SCVI.from_scvi_tools(archive(tmp_path, pickle.dumps(content, protocol=2)))
    with pytest.raises(ModelFileError, match="beyond its own length"):
        scgen.SCVI.from_scvi_tools(archive(tmp_path, b"\x80\x02}r\x00\x00\x00\x10."))
    torch.save(
        {"attr_dict": {"history_": None}, "x": torch.zeros(4).as_strided((500, 1000), (0, 0))}, tmp_path / "model.pt"
    )
    with pytest.raises(ModelFileError, match="500000 values, but its storage has 4"):
        scgen.SCVI.from_scvi_tools(tmp_path)
    with zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("model/data.pkl", pickle.dumps({}))
    with pytest.raises(ModelFileError, match="compressed"):
        scgen.SCVI.from_scvi_tools(tmp_path)


def test_a_storage_is_no_tensor_that_a_pickle_could_change(tmp_path):
    true = pickle_of_true_model()
    after = true.index(b"Q") + 1  # BINPERSID: a storage lies on the stack; BUILD would call its __setstate__
    folder = archive(tmp_path, true[:after] + b"}b" + true[after:])
    scgen.SCVI.from_scvi_tools(folder)  # it is a record, which keeps the state and nothing more


def test_arrays_of_every_kind_come_back(tmp_path):
    from scgen.models.interop import pickles

    rng = np.random.default_rng(0)
    whole = torch.randn(4, 6)
    content = {
        "fortran": np.asfortranarray(rng.normal(size=(3, 4))),
        "big": rng.integers(9, size=(2, 3)).astype(">i4"),
        "text": np.array(["a", "bc"]),
        "objects": np.array(["a", None, 3], dtype=object),
        "scalar": np.float32(0.25),
        "part": whole[1:3, ::2],
        "transposed": whole.T,
        "again": whole,
        "bytes": b"\x00\xff",
        "dropped": os.system,
    }
    torch.save(content, tmp_path / "x.pt")
    found = pickles.read(tmp_path / "x.pt", ("dropped",))
    assert "dropped" not in found
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        elif name != "dropped":
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_covariates_are_standardised_and_labels_that_are_not_read_are_not_asked_for(tmp_path):
    adata = cells_of(np.load(LATENT / "cells.npz", allow_pickle=False))
    with_cells, without = (scgen.SCVI.from_scvi_tools(LATENT, cells) for cells in (adata, None))
    assert with_cells.registry.scaling == {"age": (adata.obs["age"].mean(), adata.obs["age"].std(ddof=0))}
    same = [model.get_latent_representation(adata) for model in (with_cells, without)]
    np.testing.assert_allclose(*same, rtol=1e-4, atol=1e-5)
    at_mean = without.get_normalized_expression(adata, covariates={"age": adata.obs["age"].mean()}, return_numpy=True)
    average = with_cells.get_normalized_expression(covariates={"age": "average"}, return_numpy=True)
    np.testing.assert_allclose(average, at_mean, rtol=1e-3, atol=1e-7)
    assert with_cells.registry.setup.labels_key == "cell_type"  # of which theta is
    observed = scgen.SCVI.from_scvi_tools(OBSERVED, adata)
    assert observed.registry.setup.labels_key is None
    del adata.obs["cell_type"]
    observed.query(adata)


def test_names_that_are_there_twice_are_refused(tmp_path):
    content = torch.load(LATENT / "model.pt", weights_only=False)
    content["attr_dict"]["history_"] = None
    content["var_names"][1] = content["var_names"][0]
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ModelFileError, match="unique names"):
        scgen.SCVI.from_scvi_tools(tmp_path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ModelFileError, match="found: no folder"):
        scgen.SCVI.from_scvi_tools(tmp_path / "nowhere")
    (tmp_path / "model.pt").write_bytes(b"no archive")
    with pytest.raises(ModelFileError, match="zip archive"):
        scgen.SCVI.from_scvi_tools(tmp_path)
    with pytest.raises(ModelFileError, match=r"p_model\.pt is not there \(found: model\.pt\)"):
        scgen.SCVI.from_scvi_tools(tmp_path, prefix="p_")


def cells_of(stored) -> AnnData:
    adata = AnnData(stored["counts"].astype(np.float32))
    adata.var_names = [f"gene_{i + 1}" for i in range(adata.n_vars)]
    for key in ("batch", "cell_type", "chemistry", "site", "age"):
        adata.obs[key] = stored[key]
    return adata


def keep() -> None:
    """Let scvi-tools make the models that are kept, and answer."""
    import scvi

    simulated = with_covariates(scgen.simulate_cells(60, 12, n_batches=2, n_types=2, seed=0))
    stored = {"counts": simulated.X.toarray().astype(np.int32)}
    stored["batch"] = np.where(simulated.obs["batch"] == "batch_1", "a", "b")
    stored |= {key: simulated.obs[key].to_numpy("U8") for key in ("cell_type", "chemistry", "site")}
    stored["age"] = simulated.obs["age"].to_numpy()
    adata = cells_of(stored)
    for name, setup, arguments in (
        ("latent", COVARIATES, {"n_layers": 2, "dispersion": "gene-label", "encode_covariates": True}),
        ("observed", {}, {"gene_likelihood": "nb"}),
    ):
        folder = KEPT / f"{name}-{scvi.__version__}"
        latent = {"use_observed_lib_size": name == "observed"}
        model = made_by_scvi_tools(adata, folder, setup, 300, n_latent=3, n_hidden=8, **latent, **arguments)
        mean, variance = model.get_latent_representation(return_dist=True)
        elbo = [float(model.get_elbo()) for _ in range(200)]
        expression = model.get_normalized_expression(transform_batch="b", n_samples=500, return_numpy=True)
        answers = {"latent_mean": mean, "latent_variance": variance, "elbo": elbo, "expression": expression}
        np.savez_compressed(folder / "cells.npz", **stored, **answers)


def table(path: str) -> None:
    """Print the largest relative differences over all configurations, for 400 cells of a file."""
    import tempfile

    import anndata
    import pandas as pd

    adata = anndata.read_h5ad(path)
    chosen = np.random.default_rng(0).choice(adata.n_obs, 400, replace=False)
    adata = with_covariates(adata[np.sort(chosen)].copy())
    rows = {}
    for arguments in CONFIGURATIONS:
        for name, setup in (("batch", {}), ("covariates", COVARIATES)):
            with tempfile.TemporaryDirectory() as folder:
                found = differences(adata, Path(folder), setup, **arguments)
            rows[(*arguments.values(), name)] = found
            print(*arguments.values(), name, f"{max(found.values()):.1e}", flush=True)
    result = pd.DataFrame(rows).T
    result.index.names = ["likelihood", "dispersion", "layers", "observed library", "encoded", "covariates"]
    for key in result.index.names:
        print(result.groupby(key).max().map("{:.1e}".format).to_string(), "\n")
    print(f"{len(result)} configurations; largest of all: {result.max().max():.1e}")


if __name__ == "__main__":
    keep() if sys.argv[1] == "keep" else table(sys.argv[1])
