"""Questions look again at the cells that they are about, and at no others."""

import copy
import gc
import pickle
import weakref

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

import scgen
from scgen.data import findings
from scgen.data.snapshot import Snapshot
from scgen.data.stores import open_store, totals
from scgen.models import loaders

N, G = 120, 30
FORMS = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "dense": lambda x: x.toarray(),
}
SETUP = {"batch_key": "batch", "categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}


def cells_of(form="csr"):
    adata = scgen.simulate_cells(n_cells=N, n_genes=G, n_batches=2, seed=0)
    rng = np.random.default_rng(0)
    adata.obs["donor"] = rng.choice(["d1", "d2"], N)
    adata.obs["age"] = rng.normal(50, 10, N)
    adata.X = FORMS[form](adata.X)
    return adata


def trained_on(adata, **setup):
    scgen.setup_anndata(adata, **SETUP | setup)
    model = scgen.SCVI(adata, n_hidden=16)
    model.train(max_epochs=2, accelerator="cpu", progress=False)
    return model


def one_value(adata, cell):
    if sparse.issparse(adata.X):
        adata.X.data[
            adata.X.indptr[cell] if adata.X.format == "csr" else np.flatnonzero(adata.X.indices == cell)[0]
        ] += 1
    else:
        adata.X[cell, 0] += 1


def moved(adata, cell):
    """Leave the cell's sum as it is, and make a count negative, or one that is no whole number."""
    dense = adata.X.toarray() if sparse.issparse(adata.X) else adata.X
    dense = dense.astype(np.float32)
    dense[cell, :3] += (1.5, -3, 1.5)
    adata.X = dense if isinstance(adata.X, np.ndarray) else type(adata.X)(dense)


def moved_in_place(adata, cell):
    """One gene has a count more, another one less."""
    if sparse.issparse(adata.X):
        entries = adata.X.indices == cell if adata.X.format == "csc" else slice(*adata.X.indptr[cell : cell + 2])
        places, values = np.arange(adata.X.nnz)[entries], adata.X.data
    else:
        places, values = np.arange(G), adata.X[cell]
    more, less = next((a, b) for a in places for b in places if a != b and values[b] != values[a] + 1)
    values[more] += 1
    values[less] -= 1


def doubled(adata, cell):
    adata.X *= 2


def doubled_in_place(adata, cell):
    values = adata.X.data if sparse.issparse(adata.X) else adata.X
    values *= 2


def normalised(adata, cell):
    adata.X = sparse.csr_matrix(adata.X) if isinstance(adata.X, sparse.sparray) else adata.X  # as scanpy needs it
    sc.pp.normalize_total(adata, target_sum=10)


def logged(adata, cell):
    adata.X = sparse.csr_matrix(adata.X) if isinstance(adata.X, sparse.sparray) else adata.X
    sc.pp.log1p(adata)


def other_batch(adata, cell):
    batch = adata.obs["batch"].astype(str).to_numpy(copy=True)
    batch[cell] = "batch_1" if batch[cell] == "batch_2" else "batch_2"
    adata.obs["batch"] = batch


def other_donor_in_place(adata, cell):
    adata.obs.loc[adata.obs_names[cell], "donor"] = "d1" if adata.obs["donor"].iloc[cell] == "d2" else "d2"


def other_age(adata, cell):
    adata.obs.loc[adata.obs_names[cell], "age"] += 1


def renamed(adata, cell):
    names = adata.obs_names.to_numpy(copy=True)
    names[cell] = "another"
    adata.obs_names = names


CHANGES = (
    one_value,
    moved,
    moved_in_place,
    doubled,
    doubled_in_place,
    normalised,
    logged,
    other_batch,
    other_donor_in_place,
    other_age,
    renamed,
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_cell_that_is_asked_about_is_noticed(change, form):
    adata = cells_of(form)
    model = trained_on(adata)
    for _ in range(2):
        for indices in (None, [7], [3, 7]):
            model.get_latent_representation(indices=indices)
    change(adata, 7)
    for indices in ([7], [3, 7], np.arange(N) == 7, None):
        with pytest.raises(ValueError, match="has changed since"):
            model.get_latent_representation(indices=indices)


@pytest.mark.parametrize("form", FORMS)
def test_answers_about_other_cells_go_on(form):
    adata = cells_of(form)
    model = trained_on(adata)
    before = model.get_latent_representation()
    one_value(adata, 7)
    np.testing.assert_allclose(
        model.get_latent_representation(indices=[3, 100]), before[[3, 100]], rtol=1e-4, atol=1e-5
    )


def test_replaced_by_the_same(monkeypatch):
    """New objects with the values of before are the same cells, and are remembered again."""
    adata = cells_of()
    model = trained_on(adata)
    before = model.get_latent_representation()
    adata.X, adata.obs_names, adata.obs["batch"] = (
        adata.X.copy(),
        adata.obs_names.to_numpy(),
        adata.obs["batch"].astype(str),
    )
    np.testing.assert_array_equal(model.get_latent_representation(), before)
    monkeypatch.setattr(Snapshot, "fingerprint", None)
    np.testing.assert_array_equal(model.get_latent_representation(), before)


@pytest.mark.parametrize("genes", [slice(None), slice(None, None, -1)])
@pytest.mark.parametrize("form", FORMS)
def test_other_cells_are_checked_once(form, genes, monkeypatch):
    model = trained_on(cells_of(form))
    other = cells_of(form)[:, genes].copy()
    before = model.get_latent_representation(other)
    monkeypatch.setattr(findings, "_values", None)  # which would fail if values were looked at again
    np.testing.assert_allclose(model.get_latent_representation(other), before, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        model.get_latent_representation(other, indices=[9, 2]), before[[9, 2]], rtol=1e-4, atol=1e-5
    )
    monkeypatch.undo()
    one_value(other, 2)
    changed = model.get_latent_representation(other, indices=[2])
    assert not np.allclose(changed, before[[2]], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(changed, model.get_latent_representation(other.copy(), indices=[2]))


@pytest.mark.parametrize("form", FORMS)
def test_other_cells_that_become_unfit_are_refused(form):
    model = trained_on(cells_of(form))
    other = cells_of(form)
    model.get_latent_representation(other)
    other.X = other.X.astype(np.float64) * 1.5
    for indices in (None, [5]):
        with pytest.raises(ValueError, match="not integers"):
            model.get_latent_representation(other, indices=indices)
    other = cells_of(form)
    model.get_latent_representation(other)
    values = other.X.data if sparse.issparse(other.X) else other.X[5]
    first = other.X.indptr[5] if getattr(other.X, "format", "") == "csr" else 0
    values[first : first + 3] += np.array(
        [-500, 0, 500], values.dtype
    )  # the sum of the cell stays, where it is by rows
    with pytest.raises(ValueError, match="negative"):
        model.get_latent_representation(other, indices=None)
    other = cells_of(form)
    model.get_latent_representation(other)
    (other.X.data if sparse.issparse(other.X) else other.X)[...] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.get_latent_representation(other, indices=[5])
    other = cells_of(form)
    model.get_latent_representation(other)
    other.obs["batch"] = "batch_9"
    with pytest.raises(ValueError, match="batch_9"):
        model.get_latent_representation(other, indices=[5])
    del other.obs["batch"]
    with pytest.raises(ValueError, match="batch"):
        model.get_latent_representation(other, indices=[5])


def test_own_values_that_are_no_counts_in_another_form_are_the_same():
    """Their sums are rounded otherwise, some on the other side of what a fingerprint rounds to."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2000, 40)).round(4)
    adata = anndata.AnnData(values)
    scgen.setup_anndata(adata, counts=False)
    model = scgen.SCVI(adata, gene_likelihood="normal", n_hidden=16)
    model.train(max_epochs=1, accelerator="cpu", progress=False)
    adata.X = sparse.csr_matrix(values)
    before = (values @ np.ones(40)).round(3)
    assert (before != totals(open_store(adata.X)).round(3)).any()  # else nothing is tested
    model.get_latent_representation()


def test_a_missing_column_of_the_models_own_cells():
    adata = cells_of()
    model = trained_on(adata)
    del adata.obs["donor"]
    for indices in ([0], None):
        with pytest.raises(ValueError, match=r'adata\.obs has 0 columns named "donor"'):
            model.get_latent_representation(indices=indices)


def test_files_are_read_where_they_are_asked_about(tmp_path, monkeypatch):
    cells_of().write_h5ad(tmp_path / "cells.h5ad")
    adata = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    model = trained_on(adata)
    before = model.get_latent_representation()
    read = []
    rows = type(adata.X).__getitem__
    monkeypatch.setattr(type(adata.X), "__getitem__", lambda self, index: read.append(index) or rows(self, index))
    np.testing.assert_allclose(model.get_latent_representation(indices=[5]), before[[5]], rtol=1e-4, atol=1e-5)
    assert [np.asarray(index).tolist() for index in read] == [[5], [5]]


@pytest.mark.parametrize("form", FORMS)
def test_few_rows_of_any_form_are_those_of_the_matrix(form):
    matrix = cells_of(form).X
    dense = matrix.toarray() if sparse.issparse(matrix) else matrix
    for rows in (np.array([5]), np.array([9, 2, 9]), np.arange(10)):
        for columns in (None, np.array([4, 0, 29])):
            store = open_store(matrix, columns, rows)
            expected = (dense if columns is None else dense[:, columns])[rows]
            np.testing.assert_array_equal(store.rows(rows).numpy(), expected)
            np.testing.assert_array_equal(totals(store, rows), expected.sum(1, dtype=float))


def test_a_damaged_row_that_is_asked_about_is_refused():
    adata = cells_of()
    model = trained_on(adata)
    model.get_latent_representation()
    index = adata.X.indptr[7]
    for damage in (2**30, -1):
        kept, adata.X.indices[index] = adata.X.indices[index], damage
        with pytest.raises(ValueError, match="damaged sparse matrix"):
            model.get_latent_representation(indices=[7])
        adata.X.indices[index] = kept
    kept, adata.X.indptr[8] = adata.X.indptr[8], 10**6
    for cell in (7, 8):
        with pytest.raises(ValueError, match="damaged sparse matrix"):
            model.get_latent_representation(indices=[cell])
    adata.X.indptr[8] = kept
    model.get_latent_representation(indices=[7])


def test_what_was_seen_is_no_part_of_the_model():
    adata, other = cells_of(), cells_of()
    model = trained_on(adata)
    before = model.get_latent_representation(other)
    for made in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        np.testing.assert_array_equal(made.get_latent_representation(other), before)
        np.testing.assert_array_equal(made.get_latent_representation(), model.get_latent_representation())
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    kept = weakref.ref(model)
    assert kept() in loaders._SEEN
    del model, made
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(("column", "values", "told"), [
    ("batch", [["b"]] * N, "cannot be categories"),
    ("age", [["b"]] * N, "not numbers"),
    ("age", ["old"] * N, "not numbers"),
])  # fmt: skip
def test_columns_that_become_of_another_kind(column, values, told):
    adata, other = cells_of(), cells_of()
    model = trained_on(adata)
    for cells in (adata, other):
        model.get_latent_representation(cells)
        cells.obs[column] = pd.Series(values, index=cells.obs_names, dtype=object)
        for indices in ([3], None):
            with pytest.raises(ValueError, match=told) as error:
                model.get_latent_representation(cells, indices=indices)
            assert f'adata.obs["{column}"]' in str(error.value)
