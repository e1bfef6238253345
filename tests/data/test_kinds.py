"""Arrays, tables and names of kinds that are not read are refused by name, with the call that helps."""

from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scgen
from scgen.data import findings, registry
from scgen.data.stores import unreadable

N, G = 80, 20


@pytest.fixture
def adata():
    return scgen.simulate_cells(n_cells=N, n_genes=G, n_batches=2, n_types=2, seed=0)


@pytest.fixture(scope="module")
def model():
    adata = scgen.simulate_cells(n_cells=N, n_genes=G, n_batches=2, n_types=2, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    made = scgen.SCVI(adata, n_hidden=8)
    made.train(max_epochs=1, accelerator="cpu", progress=False)
    return made


def calls(adata, model, tmp_path, **where):
    """Return the calls that take cells."""
    model.save(tmp_path / "model", overwrite=True)
    return {
        "setup": lambda: scgen.setup_anndata(adata, batch_key="batch", **where),
        "integrate": lambda: scgen.integrate(adata, "batch", **where),
        "question": lambda: model.get_latent_representation(adata),
        "query": lambda: model.query(adata),
        "load": lambda: scgen.SCVI.load(tmp_path / "model", adata),
    }


# Arrays


def stand_in(module, name="Array"):
    """Return an object of a class that another package would have."""
    return type(name, (), {"__module__": module, "shape": (N, G), "dtype": np.dtype("float32")})()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("dask.array.core", "is a dask.Array, .*adata = adata.to_memory()"),
        ("cupy", "is a cupy.Array, .*adata.X = adata.X.get()"),
        ("cupyx.scipy.sparse._csr", "is a cupyx.Array, .*adata.X = adata.X.get()"),
        ("torch", "is a torch.Array, .*adata.X = adata.X.numpy"),
        ("xarray.core.dataarray", "is a xarray.Array, .*adata.X = adata.X.to_numpy()"),
        ("another.package", "is a another.Array, .*adata.X = numpy.asarray"),
    ],
)
def test_arrays_of_other_packages_are_refused_by_name(adata, model, tmp_path, monkeypatch, module, words):
    for where in (findings, registry):
        monkeypatch.setattr(where, "matrix_of", lambda adata, layer: stand_in(module))
    for call in calls(adata, model, tmp_path).values():
        with pytest.raises(ValueError, match=f"adata.X {words}"):
            call()
    table = scgen.check(adata, batch_key="batch")
    assert table["level"].tolist() == ["error"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_dask(adata, model, tmp_path, form):
    dask = pytest.importorskip("dask.array")
    dense = adata.X.toarray()
    adata.X = dask.from_array(form(dense), chunks=(50, G), asarray=False)
    for call in calls(adata, model, tmp_path).values():
        with pytest.raises(ValueError, match=r"adata\.X is a dask\.Array.*adata = adata\.to_memory\(\)"):
            call()
    adata = adata.to_memory()
    np.testing.assert_allclose(
        model.get_latent_representation(adata), model.get_latent_representation(), rtol=1e-4, atol=1e-5
    )
    adata.layers["lazy"] = dask.from_array(dense, chunks=(50, G))
    adata.X = adata.X * 1.3
    with pytest.raises(ValueError, match="not integers"):  # the layer is not looked into
        scgen.setup_anndata(adata)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_a_lazily_read_file(adata, model, tmp_path, suffix):
    pytest.importorskip("dask.array")
    pytest.importorskip("xarray")
    getattr(adata, f"write_{suffix}")(tmp_path / f"cells.{suffix}")
    lazy = anndata.experimental.read_lazy(tmp_path / f"cells.{suffix}")
    for call in (*calls(lazy, model, tmp_path).values(), lambda: scgen.check(lazy)):
        with pytest.raises(TypeError, match=r"read lazily.*adata = adata\.to_memory\(\)"):
            call()
    lazy.to_memory()


@pytest.mark.filterwarnings("ignore")
def test_mudata(adata, model, tmp_path):
    mudata = pytest.importorskip("mudata")
    for call in calls(mudata.MuData({"rna": adata}), model, tmp_path).values():
        with pytest.raises(TypeError, match=r'is a MuData, not an AnnData: pass .*\(rna\), mdata\["rna"\]'):
            call()


def test_containers_of_several_tables(model, tmp_path):
    for name, words in (("mod", 'modalities (first, second): mdata["first"]'), ("tables", 'sdata.tables["first"]')):
        holder = SimpleNamespace(**{name: {"first": None, "second": None}})
        for call in calls(holder, model, tmp_path).values():
            with pytest.raises(TypeError) as refused:
                call()
            assert words in str(refused.value)


@pytest.mark.parametrize("layer", [None, "counts"])
def test_masked_arrays(adata, layer):
    x = adata.X.toarray()
    where = "adata.X" if layer is None else 'adata.layers["counts"]'
    for mask, masked in ((x > 3, True), (np.zeros_like(x, bool), False)):
        values = np.ma.masked_array(x, mask=mask)
        if layer is None:
            adata.X = values
        else:
            adata.layers[layer] = values
        if masked:
            with pytest.raises(ValueError, match="masked values") as refused:
                scgen.setup_anndata(adata, layer=layer)
            assert f"{where} is a masked array with masked values. Fill them: {where} = {where}.filled(0)." in str(
                refused.value
            )
        else:
            scgen.setup_anndata(adata, layer=layer)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_long_doubles(form):
    """Of 400 x 50, so that a compiled kernel would be taken for other dtypes."""
    adata = scgen.simulate_cells(n_cells=400, n_genes=50, n_batches=2, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    known = scgen.SCVI(adata, n_hidden=8, seed=0)
    known.train(max_epochs=1, accelerator="cpu", progress=False)
    expected = known.get_latent_representation()
    adata.X = form(adata.X.toarray().astype(np.longdouble))
    np.testing.assert_allclose(known.get_latent_representation(), expected, rtol=1e-4, atol=1e-5)
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, n_hidden=8, seed=0)
    assert model.fingerprint == known.fingerprint
    model.train(max_epochs=1, accelerator="cpu", progress=False)
    for indices in (None, [3]):
        assert np.isfinite(model.get_latent_representation(indices=indices)).all()
    assert np.isfinite(model.get_elbo(return_mean=False)).all()


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])
def test_sparse_half_precision(adata, tmp_path, form):
    """scipy makes no such matrix, but files hold them, and values may be replaced."""
    adata.X = form(adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "a") as file:
        values = file["X/data"][:]
        del file["X/data"]
        file["X/data"] = values.astype(np.float16)
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"adata\.X is a sparse matrix of float16.* Write the file with float32"):
        scgen.setup_anndata(backed)
    adata.X.data = adata.X.data.astype(np.float16)
    with pytest.raises(ValueError, match=r"of float16.* adata\.X\.data = adata\.X\.data\.astype\(\"float32\"\)"):
        scgen.setup_anndata(adata)
    adata.X.data = adata.X.data.astype("float32")
    scgen.setup_anndata(adata)


def test_what_is_read():
    for matrix in (np.ones((2, 2)), sparse.csr_matrix(np.ones((2, 2))), sparse.csc_array(np.ones((2, 2)))):
        assert unreadable(matrix, "adata.X") is None


def test_own_cells_that_become_another_kind(adata, model, monkeypatch):
    monkeypatch.setattr(registry, "matrix_of", lambda adata, layer: stand_in("dask.array.core"))
    with pytest.raises(ValueError, match=r"adata\.X is a dask\.Array"):
        model.get_latent_representation()
    monkeypatch.setattr(registry, "matrix_of", lambda adata, layer: None)
    with pytest.raises(ValueError, match=r"adata\.X is no longer there"):
        model.get_latent_representation()


# Columns


class Unhashable:
    __hash__ = None


@pytest.mark.parametrize(
    "value", [[1, 2], {"a": 1}, {1}, np.ones(2), Unhashable()], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("role", ["batch_key", "labels_key", "categorical_covariate_keys"])
def test_columns_of_what_cannot_be_categories(adata, model, value, role):
    column = pd.Series(["a"] * N, index=adata.obs_names, dtype=object)
    for i in range(5, N):
        column.iat[i] = value
    adata.obs["c"] = column
    arguments = {role: ["c"] if role.endswith("keys") else "c"}
    words = rf'adata\.obs\["c"\] holds values that cannot be categories \(a {type(value).__name__} at cell_6\)'
    with pytest.raises(ValueError, match=words):
        scgen.setup_anndata(adata, **arguments)
    assert scgen.check(adata, **arguments)["level"].tolist() == ["error"]
    with pytest.raises(ValueError, match=r"obs\['c'\] holds a "):
        model.differential_expression("c", adata=adata)


def test_two_columns_of_one_name(adata, model):
    adata.obs = pd.concat([adata.obs, adata.obs[["cell_type"]]], axis=1)
    with pytest.raises(ValueError, match="2 columns named 'cell_type'"):
        model.differential_expression("cell_type", adata=adata)
    scgen.setup_anndata(adata, batch_key="batch")
    made = scgen.SCVI(adata, n_hidden=8)
    made.train(max_epochs=1, accelerator="cpu", progress=False)
    with pytest.raises(ValueError, match='2 columns named "cell_type"'):
        made.query(model.adata).transfer_labels("cell_type")


@pytest.mark.parametrize("role", ["continuous_covariate_keys", "size_factor_key"])
def test_complex_numbers_lose_no_part(adata, role):
    adata.obs["c"] = np.arange(1, N + 1) * 1j + 1
    with pytest.raises(ValueError, match=r'adata\.obs\["c"\] is not numeric \(dtype complex128\)'):
        scgen.setup_anndata(adata, **{role: ["c"] if role.endswith("keys") else "c"})


@pytest.mark.parametrize("values", [np.arange(N) % 2 == 0, pd.array(np.arange(N) % 2 == 0, dtype="boolean")])
def test_a_covariate_of_booleans(adata, values):
    adata.obs["c"] = values
    with pytest.raises(ValueError, match=r'adata\.obs\["c"\] = adata\.obs\["c"\]\.astype\(float\)'):
        scgen.setup_anndata(adata, continuous_covariate_keys=["c"])
    adata.obs["c"] = adata.obs["c"].astype(float)
    scgen.setup_anndata(adata, continuous_covariate_keys=["c"])


# Names


BAD_NAMES = {
    "integers": (pd.Index(np.arange(N)), "are not all strings (one is 0)", ".astype(str)"),
    "one missing": (  # None, but of pandas 3 NaN
        pd.Index([*map(str, range(N - 1)), None]),
        f"are not all strings (one is {pd.Index(['a', None])[1]!r})",
        ".astype(str)",
    ),
    "pairs": (pd.MultiIndex.from_arrays([["a"] * N, range(N)]), "are a MultiIndex", '"_".join(map(str, name))'),
    "days": (pd.date_range("2020", periods=N), "are not all strings (one is Timestamp(", ".astype(str)"),
}


@pytest.mark.parametrize("axis", ["obs", "var"])
@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_strings(model, tmp_path, name, axis):
    adata = model.adata.copy()
    index, words, fix = BAD_NAMES[name]
    getattr(adata, axis).index = (
        index[: adata.shape[axis == "var"]] if name != "one missing" else index[-adata.shape[axis == "var"] :]
    )
    for call, run in calls(adata, model, tmp_path).items():
        if axis == "var" and call in ("question", "query", "load"):
            continue  # refused for what genes are missing
        with pytest.raises(ValueError, match="names are") as refused:
            run()
        assert f"adata.{axis}_names {words}" in str(refused.value)
        assert fix in str(refused.value)


@pytest.mark.parametrize(
    "index", [pd.Index([f"c{i}" for i in range(N)], dtype="string"), pd.CategoricalIndex([f"c{i}" for i in range(N)])]
)
def test_names_of_any_dtype_for_strings(adata, index):
    adata.obs_names = index
    scgen.setup_anndata(adata)
    scgen.SCVI(adata, n_hidden=8)


# The record


@pytest.mark.parametrize("held", [5, "x", None, [1], np.arange(3)])
def test_a_record_that_is_none(adata, held):
    adata.uns["scgen"] = held
    for call in (
        lambda: scgen.SCVI(adata),
        lambda: scgen.setup_anndata(adata),
        lambda: scgen.integrate(adata, "batch"),
    ):
        with pytest.raises(
            ValueError, match=r'adata\.uns\["scgen"\] holds .* not from scgen: del adata\.uns\["scgen"\]'
        ):
            call()
    adata.uns["scgen"] = {"setup": held}
    with pytest.raises(ValueError, match=r'uns\["scgen"\]\["setup"\] (holds|is missing)'):
        scgen.SCVI(adata)
