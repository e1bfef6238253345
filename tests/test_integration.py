"""`integrate` and what Scanpy does with its result."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

import scgen
from scgen.integration import cluster, highly_variable


@pytest.fixture
def cells():
    return scgen.simulate_cells(n_cells=150, n_genes=40, n_batches=2, seed=5)


def quick(adata, key="batch", **options):
    return scgen.integrate(adata, key, max_epochs=2, progress=False, **options)


def test_in_place_and_nothing_else(cells):
    before = cells.copy()
    model = quick(cells)
    assert cells.obsm["X_scgen"].shape == (150, 10)
    assert cells.uns["scgen"]["integrate"]["key"] == ["batch"]
    assert isinstance(model, scgen.SCVI)
    assert (cells.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    pd.testing.assert_frame_equal(cells.var, before.var)
    assert set(cells.obsm) == set(before.obsm) | {"X_scgen"}
    assert set(cells.uns) == {"scgen", "simulation"}


def test_through_scanpy_and_files(cells, tmp_path):
    quick(cells)
    sc.pp.neighbors(cells, use_rep="X_scgen")
    sc.tl.leiden(cells, flavor="igraph", n_iterations=2, directed=False)
    sc.tl.umap(cells)
    cells.write_h5ad(tmp_path / "a.h5ad")
    cells.write_zarr(tmp_path / "a.zarr")
    for back in (anndata.read_h5ad(tmp_path / "a.h5ad"), anndata.read_zarr(tmp_path / "a.zarr")):
        np.testing.assert_array_equal(back.obsm["X_scgen"], cells.obsm["X_scgen"])
        assert list(back.uns["scgen"]["integrate"]["key"]) == ["batch"]


def test_cells_left_without_counts_are_listed_and_nan(cells):
    x = cells.X.toarray()
    x[[3, 77]] = 0
    cells.layers["counts"] = sparse.csr_matrix(x)
    with pytest.warns(UserWarning, match=r"2 cells have no counts.*cell_4, cell_78"):
        model = quick(cells, layer="counts")
    assert np.flatnonzero(np.isnan(cells.obsm["X_scgen"]).any(axis=1)).tolist() == [3, 77]
    assert model.adata.n_obs == 148
    cluster(cells)
    assert cells.obs["leiden_scgen"].isna().sum() == 2
    graph = cells.obsp["neighbors_scgen_connectivities"]
    assert graph.shape == (150, 150)
    assert graph[[3, 77]].nnz == 0
    assert np.isnan(cells.obsm["X_umap_scgen"][3]).all()
    sc.tl.leiden(cells, neighbors_key="neighbors_scgen", flavor="igraph", n_iterations=2, directed=False)


def test_several_columns(cells):
    cells.obs["donor"] = np.resize(["a", "b", "c"], 150)
    model = quick(cells, ["batch", "donor"], adjusted_basis="X_two")
    assert model.registry.n_categories == [2, 3]
    assert "X_two" in cells.obsm


def test_genes_are_chosen_within_batches(cells):
    model = quick(cells, n_top_genes=10)
    assert model.adata.n_vars == 10
    assert cells.n_vars == 40
    # The same genes as the documented scanpy call chooses.
    log = cells.copy()
    sc.pp.normalize_total(log, target_sum=1e4)
    sc.pp.log1p(log)
    sc.pp.highly_variable_genes(log, flavor="seurat", n_top_genes=10, batch_key="batch")
    assert model.registry.genes == log.var_names[log.var["highly_variable"]].tolist()
    # A batch of a few cells neither counts nor breaks it.
    batch = cells.obs["batch"].astype(str).to_numpy()
    batch[:2] = "tiny"
    assert len(highly_variable(cells.X, batch, 10)) == 10


def test_views_and_backed_files(cells, tmp_path):
    view = cells[10:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quick(view)
    assert view.obsm["X_scgen"].shape == (140, 10)
    cells.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    quick(backed)
    assert np.isfinite(backed.obsm["X_scgen"]).all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"key": "sample"}, ValueError, "no column of adata.obs"),
        ({"key": []}, ValueError, "key is empty"),
        ({"key": 3}, TypeError, "key"),
        ({"layer": "nope"}, ValueError, "no layer"),
        ({"n_top_genes": 0}, ValueError, "n_top_genes=0"),
    ],
)
def test_bad_calls_change_nothing(cells, options, error, words):
    before = cells.copy()
    with pytest.raises(error, match=words):
        quick(cells, **{"key": "batch"} | options)
    assert set(cells.obsm) == set(before.obsm)
    assert "scgen" not in cells.uns


def test_many_cells_have_neighbours():
    # Beyond 8,000 cells scanpy asks another library for neighbours.
    adata = anndata.AnnData(obsm={"X_scgen": np.random.default_rng(0).normal(size=(9000, 5)).astype(np.float32)})
    sc.pp.neighbors(adata, use_rep="X_scgen")
    assert adata.obsp["connectivities"].shape == (9000, 9000)
