"""`integrate` and what Scanpy does with its result."""

import functools
import inspect
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy import sparse
from scipy.spatial.distance import pdist
from sklearn.neighbors import NearestNeighbors

import scgen
from scgen.reporting.report import uncorrected
from scgen.workflows.clustering import cluster
from scgen.workflows.integration import highly_variable, joined


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


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_a_batch_whose_cells_are_alike_chooses_no_genes(cells, form):
    batch = cells.obs["batch"].astype(str).to_numpy()
    x = cells.X.toarray()
    x[batch == "batch_1"] = 3
    cells.X = x if form == "dense" else sparse.csr_matrix(x)
    model = quick(cells, n_top_genes=10)
    # scanpy's choice in the other batch alone.
    log = cells[batch == "batch_2"].copy()
    sc.pp.normalize_total(log, target_sum=1e4)
    sc.pp.log1p(log)
    sc.pp.highly_variable_genes(log, flavor="seurat", n_top_genes=10)
    assert model.registry.genes == log.var_names[log.var["highly_variable"]].tolist()
    cells.X = np.full_like(x, 3)
    with pytest.raises(ValueError, match="no gene varies within any batch"):
        quick(cells, n_top_genes=10)


def test_it_says_where_fewer_genes_vary_than_are_asked_for(cells):
    x = cells.X.toarray()
    x[:, 10:] = 0
    x[:, 0] += 1  # no cell is without counts
    cells.X = x
    cells.obs["batch"] = "one"
    with pytest.warns(UserWarning, match="n_top_genes=20, but only 10 genes vary"):
        model = quick(cells, n_top_genes=20)
    assert model.registry.genes == cells.var_names[:10].tolist()


@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
def test_no_warning_about_our_own_copies_and_memory_that_is_only_read(cells, form):
    x = cells.X.toarray().astype(np.float32) if form == "dense" else getattr(cells.X.astype(np.float32), f"to{form}")()
    for part in [x] if form == "dense" else [x.data, x.indices, x.indptr]:
        part.setflags(write=False)
    cells.X = x
    assert not (cells.X if form == "dense" else cells.X.data).flags.writeable
    torch.set_warn_always(True)  # else torch warns once a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Said once a process, where our stores leave it unsaid; and of scanpy and anndata to themselves.
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            warnings.filterwarnings("ignore", category=FutureWarning, module="scanpy|anndata")
            warnings.filterwarnings("ignore", "The 'future.infer_string' option is deprecated")
            for n_top_genes in (None, 10):
                model = quick(cells, n_top_genes=n_top_genes)
                cluster(cells)
                uncorrected(model)
                model.get_normalized_expression()
                model.get_elbo()
                model.differential_expression("cell_type")
                model.posterior_predictive_sample()
    finally:
        torch.set_warn_always(False)


def test_columns_of_the_users_adata_are_found(cells):
    x = cells.X.toarray()
    x[[3, 77]] = 0
    cells.layers["counts"] = sparse.csr_matrix(x)
    sc.pp.log1p(cells)
    with pytest.warns(UserWarning, match="2 cells have no counts"):
        model = quick(cells, layer="counts", n_top_genes=20)
    cells.obs["leiden"] = pd.Categorical(np.resize(["0", "1", "2"], 150))
    table = model.differential_expression("leiden", key_added="rank_genes_groups")
    # By hand: the same model, asked about the same cells with the column among their own.
    kept = np.setdiff1d(np.arange(150), [3, 77])
    by_hand = cells[kept, model.registry.genes].copy()
    pd.testing.assert_frame_equal(table, model.differential_expression("leiden", adata=by_hand))
    mean = x[kept][:, cells.var_names.get_indexer(table["group1"].index)][cells.obs["leiden"].to_numpy()[kept] == "0"]
    rows = (table["group1"] == "0").to_numpy()
    np.testing.assert_allclose(table["raw_mean1"][rows], mean.mean(axis=0)[rows], rtol=1e-5)
    assert "names" in cells.uns["rank_genes_groups"]
    assert sc.get.rank_genes_groups_df(cells, "0").shape[0] == 20
    with pytest.raises(ValueError, match=r"not a column of adata.obs \(it has: .*leiden"):
        model.differential_expression("ledien")
    reference = model.query(by_hand)
    assert set(reference.transfer_labels("leiden")["label"]) <= {"0", "1", "2", "unknown"}


@pytest.mark.parametrize("change", ["fewer", "renamed", "reordered"])
def test_it_says_where_the_users_cells_have_changed(cells, change):
    model = quick(cells)
    cells.obs["leiden"] = np.resize(["0", "1", "2"], 150)
    if change == "fewer":
        cells._inplace_subset_obs(np.arange(150) != 5)
    elif change == "renamed":
        cells.obs_names = [f"other_{name}" for name in cells.obs_names]
    else:
        cells._inplace_subset_obs(np.arange(150)[::-1])
    with pytest.raises(ValueError, match=r"has changed since.*adata="):
        model.differential_expression("leiden")
    assert len(model.differential_expression("leiden", adata=cells)) == 3 * 40


def test_nothing_else_is_taken_for_an_earlier_embedding(cells):
    cells.obsm["X_scgen"] = mine = np.ones((150, 2))
    with pytest.raises(ValueError, match=r'obsm\["X_scgen"\] exists.*adjusted_basis='):
        quick(cells)
    assert cells.obsm["X_scgen"] is mine
    assert "scgen" not in cells.uns
    for basis in ("X_one", "X_two", "X_one"):
        quick(cells, adjusted_basis=basis)
    assert cells.obsm["X_scgen"] is mine


def test_it_takes_all_that_set_up_model_and_training_take():
    ours = inspect.signature(scgen.integrate).parameters
    others = {"self", "batch_key", "on_epoch", "spatial_key", "section_key"}  # SCVI reads no positions
    for function in (scgen.setup_anndata, scgen.SCVI, scgen.SCVI.train):
        assert inspect.signature(function).parameters.keys() - others <= ours.keys()
    # Every default is written once: where it is one of the model or the training, None stands for it here.
    defaults = {name for name, parameter in ours.items() if parameter.default is not None}
    assert defaults == {"adata", "key", "n_models", "adjusted_basis", "counts", "tune", "seed", "progress"}


def test_what_is_given_is_what_by_hand_would_be(cells, tmp_path):
    rng = np.random.default_rng(0)
    cells.obs["donor"], cells.obs["age"] = rng.choice(["a", "b"], 150), rng.normal(size=150)
    cells.obs["size"] = rng.uniform(1, 2, 150)
    data = {"labels_key": "cell_type", "size_factor_key": "size", "categorical_covariate_keys": ["donor"],
            "continuous_covariate_keys": ["age"]}  # fmt: skip
    made = {"n_latent": 4, "n_hidden": 16, "prior": "mog", "posterior": "planar", "dispersion": "gene-label"}
    training = {
        "batch_size": 32,
        "train_size": 0.8,
        "kl_start": 2.0,
        "batch_penalty": 5.0,
        "early_stopping": False,
        "learning_rate": 0.01,
    }
    other = cells.copy()
    quick(cells, **data, **made, **training)
    scgen.setup_anndata(other, batch_key="batch", **data)
    by_hand = scgen.SCVI(other, **made)
    by_hand.train(max_epochs=2, progress=False, **training)
    np.testing.assert_array_equal(cells.obsm["X_scgen"], by_hand.get_latent_representation())
    cells.write_h5ad(tmp_path / "a.h5ad")
    told = anndata.read_h5ad(tmp_path / "a.h5ad").uns["scgen"]["integrate"]
    assert (told["prior"], told["kl_start"], list(told["continuous_covariate_keys"])) == ("mog", 2.0, ["age"])


def test_joined_embeddings_that_differ_by_a_rotation_and_a_scale_keep_the_distances():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(40, 4)) * [3, 1, 0.5, 0.1]
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    # The variances are 1 and 25 times z's, so 13 times on average.
    np.testing.assert_allclose(pdist(joined([z, 5 * z @ turn + 7])) ** 2, 13 * pdist(z) ** 2, rtol=1e-4)
    assert joined([z]) is z
    assert joined([z[:3], z[:3]]).shape == (3, 3)
    assert np.isfinite(joined([z, np.zeros_like(z)])).all()


def test_the_models_that_are_joined_are_those_of_the_next_seeds(cells):
    made, training = {"n_latent": 3, "n_hidden": 16, "prior": "mog"}, {"kl_start": 2.0, "batch_size": 64}
    model = quick(cells, n_models=2, **made, **training, seed=4)
    scgen.setup_anndata(cells, batch_key="batch")
    z = []
    for seed in (4, 5):
        by_hand = scgen.SCVI(cells, **made, seed=seed)
        by_hand.train(max_epochs=2, progress=False, **training, seed=seed)
        z.append(by_hand.get_latent_representation())
    np.testing.assert_array_equal(model.get_latent_representation(), z[0])
    # The best approximation of rank 3, of both at the same variance.
    together = np.hstack([(one - one.mean(0)) / np.sqrt(one.var(0).sum()) for one in z])
    u, s, _ = np.linalg.svd(together, full_matrices=False)
    ratio = pdist(cells.obsm["X_scgen"]) / pdist(u[:, :3] * s[:3])
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=1e-3)
    assert cells.uns["scgen"]["integrate"]["n_models"] == 2


def test_a_seed_of_a_small_type_does_not_wrap(cells):
    quick(cells, n_models=3, seed=np.uint8(255))
    assert cells.uns["scgen"]["integrate"]["n_models"] == 3


def test_several_models_depend_less_on_the_seed():
    cells = scgen.simulate_cells(n_cells=200, n_genes=40, n_batches=2, seed=0)

    def near(seed, n_models):
        scgen.integrate(cells, "batch", n_models=n_models, seed=seed, max_epochs=20, progress=False)
        return NearestNeighbors(n_neighbors=15).fit(cells.obsm["X_scgen"]).kneighbors(return_distance=False)

    def shared(n_models):
        pairs = zip(near(0, n_models), near(10, n_models), strict=True)
        return np.mean([len(np.intersect1d(one, other)) / 15 for one, other in pairs])

    assert shared(3) > shared(1) + 0.05


@pytest.mark.parametrize(("last", "when", "n"), [(3, "at once", 2), (1, "later", 1), (2, "later", 2)])
def test_after_an_interrupt_the_models_so_far_are_joined(cells, monkeypatch, last, when, n):
    train, n_calls = scgen.SCVI.train, []

    def interrupt(row):
        raise KeyboardInterrupt

    @functools.wraps(train)  # its parameters are looked at
    def interrupted(self, *args, **options):
        n_calls.append(1)
        if len(n_calls) < last:
            train(self, *args, **options)
        elif when == "later":  # the first epoch is done
            train(self, *args, **options, on_epoch=interrupt)
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(scgen.SCVI, "train", interrupted)
    quick(cells, n_models=5)
    assert len(n_calls) == last
    assert cells.uns["scgen"]["integrate"]["n_models"] == n
    assert cells.obsm["X_scgen"].shape == (150, 10)


def test_a_model_whose_training_fails_is_left_out(cells, monkeypatch):
    train = scgen.SCVI.train

    @functools.wraps(train)
    def failing(self, *args, **options):
        if self.arguments.seed == 1:
            raise FloatingPointError("the loss is not finite")
        train(self, *args, **options)

    monkeypatch.setattr(scgen.SCVI, "train", failing)
    with pytest.warns(UserWarning, match="seed 1 is left out.*not finite"):
        quick(cells, n_models=3)
    assert cells.uns["scgen"]["integrate"]["n_models"] == 2


def test_the_chosen_settings_are_those_of_all_models():
    cells = scgen.simulate_cells(n_cells=300, n_genes=30, n_batches=2, seed=0)
    quick(cells, tune={"small": {"n_latent": 3}}, n_models=2)
    assert cells.obsm["X_scgen"].shape == (300, 3)
    assert cells.uns["scgen"]["integrate"]["n_models"] == 2


def test_values_that_are_no_counts(cells):
    cells.X = np.random.default_rng(0).normal(size=cells.shape).astype(np.float32)
    cells.X[3] = 0  # a cell of mean values, which is none without counts
    quick(cells, counts=False, gene_likelihood="normal")
    assert np.isfinite(cells.obsm["X_scgen"]).all()
    with pytest.raises(ValueError, match="counts=False"):
        quick(cells, counts=False, gene_likelihood="normal", n_top_genes=5)


def test_tune_chooses():
    cells = scgen.simulate_cells(n_cells=300, n_genes=30, n_batches=2, seed=0)
    model = quick(cells, tune={"small": {"n_latent": 3}, "large": {"n_latent": 12}}, n_top_genes=20)
    told = cells.uns["scgen"]["integrate"]
    assert cells.obsm["X_scgen"].shape == (300, {"small": 3, "large": 12}[told["tuned"]])
    assert model.arguments.n_latent == told["n_latent"]
    with pytest.raises(ValueError, match="Leave out batch_size, n_latent"):
        quick(cells, tune=True, n_latent=3, batch_size=20)


def test_other_names_of_the_genes_are_known(cells):
    cells.var["ensembl"] = [f"ENSG{i}" for i in range(40)]
    model = quick(cells, n_top_genes=20)
    other = cells.copy()
    other.var_names = other.var["ensembl"].astype(str)
    query = model.query(other)
    np.testing.assert_array_equal(query.get_latent_representation(), cells.obsm["X_scgen"])


def test_values_of_the_model_as_a_layer(cells):
    x = cells.X.toarray()
    x[3] = 0
    cells.X = x
    with pytest.warns(UserWarning, match="1 cell has no counts"):
        model = quick(cells, n_top_genes=20)
    values = model.get_normalized_expression()
    cells.layers["scgen"] = values.reindex(index=cells.obs_names, columns=cells.var_names).to_numpy()
    # Found by name, one by one.
    for cell, gene in (("cell_1", model.registry.genes[0]), ("cell_150", model.registry.genes[-1])):
        assert cells[cell, gene].layers["scgen"].item() == values.loc[cell, gene]
    assert np.isnan(cells.layers["scgen"]).sum() == 150 * 40 - 149 * 20


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
        ({"key": "sample"}, ValueError, "not a column of adata.obs"),
        ({"key": []}, ValueError, "key is empty"),
        ({"key": 3}, TypeError, "key"),
        ({"layer": "nope"}, ValueError, "not a layer"),
        ({"n_top_genes": 0}, ValueError, "n_top_genes=0"),
        ({"n_models": 0}, ValueError, "n_models=0"),
        ({"n_models": 2, "seed": 2**63 - 1}, ValueError, "seed="),
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
    z = np.random.default_rng(0).normal(size=(9000, 5)).astype(np.float32)
    adata = anndata.AnnData(shape=(9000, 0), obsm={"X_scgen": z})
    sc.pp.neighbors(adata, use_rep="X_scgen")
    assert adata.obsp["connectivities"].shape == (9000, 9000)


@pytest.mark.parametrize("record", [5, {"written": 5}])
def test_a_record_that_is_none_of_ours_is_refused(record):
    cells = scgen.simulate_cells(n_cells=60, n_genes=20, n_batches=2, seed=0)
    cells.uns["scgen"] = {"integrate": record}
    with pytest.raises(ValueError, match=r'uns\["scgen"\]\["integrate"\] holds .*5.* del adata'):
        scgen.integrate(cells, "batch", max_epochs=1, progress=False)
    assert cells.uns["scgen"] == {"integrate": record}
