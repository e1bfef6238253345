"""Cells mapped onto a reference: whatever the order and names of genes, of unseen batches, with genes missing."""

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

import scgen
from scgen.analysis import query as analysis
from scgen.data.genes import identifiers, matched, places_of
from scgen.storage import ModelFileError


@pytest.fixture(scope="module")
def simulated():
    adata = scgen.simulate_cells(n_cells=1500, n_genes=120, n_batches=4, n_types=4, seed=3)
    adata.var["ensembl"] = [f"ENSG{i:05}" for i in range(adata.n_vars)]
    adata.var["kind"] = "coding"
    rng = np.random.default_rng(0)
    adata.obs["chemistry"] = rng.choice(["v2", "v3"], adata.n_obs)
    adata.obs["age"] = rng.integers(20, 80, adata.n_obs) / 2
    return adata


@pytest.fixture(scope="module")
def reference(simulated):
    """A model of three of four batches."""
    adata = simulated[simulated.obs["batch"] != "batch_4"].copy()
    scgen.setup_anndata(adata, batch_key="batch", categorical_covariate_keys=["chemistry"])
    model = scgen.SCVI(adata, n_latent=6, n_hidden=32)
    model.train(25, accelerator="cpu", progress=False)
    return model


@pytest.fixture
def new(simulated):
    return simulated[simulated.obs["batch"] == "batch_4"].copy()


def accuracy(query, cells) -> float:
    found = query.transfer_labels("cell_type", unknown_below=0.0)["label"]
    return (found.to_numpy() == cells.obs["cell_type"].astype(str).to_numpy()).mean()


def test_an_unseen_batch_is_mapped_at_once_and_nothing_of_the_reference_changes(reference, new):
    weights = {name: weight.clone() for name, weight in reference.vae.state_dict().items()}
    before, uns = reference.get_latent_representation(), dict(new.uns)
    query = reference.query(new)
    assert accuracy(query, new) > 0.9
    assert query.model.registry.known == {"batch": 3}
    assert query.model.registry.batches == ["batch_1", "batch_2", "batch_3", "batch_4"]
    assert repr(query).endswith("new in batch: batch_4")
    both = anndata.concat([new, reference.adata[:5]])
    assert "; taken for the reference's own in batch: batch_" in repr(reference.query(both))
    assert dict(new.uns) == uns
    assert all(torch.equal(weight, weights[name]) for name, weight in reference.vae.state_dict().items())
    np.testing.assert_array_equal(reference.get_latent_representation(), before)


def test_at_first_a_new_batch_is_the_mean_of_the_known_ones(reference, new):
    rows = reference.query(new).model.vae.state_dict()
    for name, weight in reference.vae.state_dict().items():
        if name.endswith("rows.0"):
            np.testing.assert_array_equal(rows[name][:3], weight)
            np.testing.assert_allclose(rows[name][3], weight.numpy().mean(0), rtol=1e-5, atol=1e-7)
    prior = reference.query(new).model.vae.priors["library"]
    totals = np.log(np.asarray(new.X.sum(1)).ravel())
    assert abs(float(prior.mean[3]) - totals.mean()) < 0.1  # its own cells', shrunk by ten of the pool's


def test_genes_in_another_order_more_of_them_or_other_names_change_no_bit(reference, new):
    expected = reference.query(new).get_latent_representation()
    rng = np.random.default_rng(0)
    shuffled = new[:, rng.permutation(new.n_vars)].copy()
    unknown = anndata.AnnData(rng.poisson(1.0, (new.n_obs, 50)).astype(np.float32), obs=new.obs[[]])
    unknown.var_names = [f"other_{i}" for i in range(50)]
    more = anndata.concat([unknown, new], axis=1)
    more.obs = new.obs
    ensembl = new.copy()
    ensembl.var_names = ensembl.var.pop("ensembl")
    in_a_column = shuffled.copy()
    in_a_column.var["symbol"] = in_a_column.var_names.astype("category")
    del in_a_column.var["ensembl"]
    in_a_column.var_names = [f"probe_{i}" for i in range(new.n_vars)]
    for cells, by in (
        (shuffled, "their names in adata.var_names"),
        (more, "their names in adata.var_names"),
        (ensembl, "their ensembl in adata.var_names"),
        (in_a_column, 'their names in adata.var["symbol"]'),
    ):
        query = reference.query(cells)
        assert query.matched_by == by
        assert query.overlap == 1
        np.testing.assert_array_equal(query.get_latent_representation(), expected)


def test_identifiers_match_by_hand():
    var = pd.DataFrame({"symbol": ["A", "B", None, "B"], "n": [1, 2, 3, 4]}, index=["x1", "x2", "x3", "x4"])
    adata = anndata.AnnData(np.zeros((1, 4)), var=var)
    assert identifiers(var) == {}  # a name is there twice, another is missing
    assert matched(["x4", "y", "x1"], {}, adata) == (["x4", None, "x1"], "their names in adata.var_names")
    assert matched(["gene"] * 3, {"id": ["x2", "x9", "x3"]}, adata)[0] == ["x2", None, "x3"]
    assert matched(["y"], {}, adata) == ([None], "nothing")


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_missing_genes_cost_little_and_less_than_zeros_do(reference, new, share):
    rng = np.random.default_rng(1)
    kept = rng.random(new.n_vars) >= share
    query = reference.query(new[:, kept].copy())
    assert query.overlap == kept.mean()
    whole = reference.query(new).get_latent_representation()
    zeros = new.copy()
    zeros.X = zeros.X.toarray() * kept
    off = [
        np.square(z - whole).sum(1).mean()
        for z in (query.get_latent_representation(), reference.query(zeros).get_latent_representation())
    ]
    assert off[0] < 0.75 * off[1]
    assert accuracy(query, new) > accuracy(reference.query(new), new) - 0.04


def test_what_is_asked_of_cells_with_missing_genes_is_of_the_genes_they_have(reference, new):
    """The likelihood of a few genes is a sum over these: by scipy, with the share of each among them."""
    from scipy.stats import nbinom

    few = new[:, 10:60].copy()
    model = reference.query(few, min_overlap=0.3).model
    assert model.registry.genes == few.var_names.tolist()
    expression = model.get_normalized_expression(return_numpy=True)
    assert expression.shape == few.shape
    np.testing.assert_allclose(expression.sum(1), 1, rtol=1e-5)
    (cells,) = model._loader(None, None, 1000)
    with torch.no_grad():
        q = model.vae.infer(cells)
        latents = {name: q[name].mean for name in q}
        # All genes' shares, from the reference's own decoder; those of the measured ones, given that they are these.
        replaced = cells.batch * 0
        rho = reference.vae.decoder.expression(latents, replace(cells, batch=replaced))[:, 10:60].double()
        mu = (latents["library"].double().exp() * rho / rho.sum(1, keepdim=True)).numpy()
        theta = reference.vae.decoder.dispersion.log_theta[10:60].double().exp().numpy()
        hidden = reference.vae.decoder.mlp(latents["z"], replace(cells, batch=replaced))
        pi = reference.vae.decoder.zi_logits(hidden)[:, 10:60].double().sigmoid().numpy()
        found = model.vae.decoder(latents, replace(cells, batch=replaced)).log_prob(cells.counts)
    x = few.X.toarray()
    p = (1 - pi) * nbinom.pmf(x, theta, theta / (theta + mu)) + pi * (x == 0)
    np.testing.assert_allclose(found, np.log(p).sum(1), rtol=1e-4)
    sample = model.posterior_predictive_sample()
    assert sample.shape == few.shape
    assert set(model.differential_expression("cell_type", "type_1", "type_2").index) == set(few.var_names)


def test_the_library_of_a_network_that_finds_it_by_itself_is_of_the_measured_genes(simulated, new):
    adata = simulated[simulated.obs["batch"] != "batch_4"].copy()
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, n_hidden=32, library_residual=False)
    model.train(40, accelerator="cpu", progress=False)
    few = new[:, :80].copy()
    ratio = model.query(few).model.get_latent_library_size()[:, 0] / few.X.sum(1).A1
    assert 0.7 < np.median(ratio) < 1.4


def test_training_moves_the_new_batch_and_leaves_the_reference_where_it_is(reference, simulated, new):
    shifted = new.copy()
    shifted.X = new.X.copy()
    shifted.X[:, :30] = new.X[:, :30].multiply(3)  # an effect of the batch that no known one has
    before = reference.get_latent_representation()
    query = reference.query(shifted)
    weights = {name: weight.clone() for name, weight in query.model.vae.state_dict().items()}
    truth = shifted.X[:, :30].sum() / shifted.X.sum()
    elbo, share = query.model.get_elbo(), query.model.get_normalized_expression(return_numpy=True)[:, :30].sum(1).mean()
    query.train(progress=False)
    after = query.model.get_normalized_expression(return_numpy=True)[:, :30].sum(1).mean()
    assert share + 0.02 < after < truth  # as far as rows of a hidden layer reach
    assert query.model.get_elbo() > elbo + 3
    for name, weight in query.model.vae.state_dict().items():
        kept = weight[:3] if name.endswith("rows.0") else weight
        assert torch.equal(kept, weights[name][: len(kept)] if name.endswith("rows.0") else weights[name]), name
        if name.endswith("rows.0"):
            assert not torch.equal(weight[3], weights[name][3]), name
    np.testing.assert_array_equal(query.model.get_latent_representation(reference.adata), before)
    np.testing.assert_array_equal(reference.get_latent_representation(), before)
    assert all(weight.requires_grad for weight in query.model.vae.parameters())


def test_every_table_of_a_new_category_is_learned(simulated, new):
    adata = simulated[simulated.obs["batch"] != "batch_4"].copy()
    setup = {"batch_key": "batch", "categorical_covariate_keys": ["chemistry"], "continuous_covariate_keys": ["age"]}
    scgen.setup_anndata(adata, **setup)
    model = scgen.SCVI(adata, n_hidden=16, dispersion="gene-batch", n_layers=2)
    model.train(3, accelerator="cpu", progress=False)
    new.obs["chemistry"] = np.where(new.obs["chemistry"] == "v2", "v2", "v4")
    query = model.query(new)
    assert query.model.registry.known == {"batch": 3, "chemistry": 2}
    before = {name: weight.clone() for name, weight in query.model.vae.named_parameters()}
    query.train(2, progress=False)
    moved = {name for name, weight in query.model.vae.named_parameters() if not torch.equal(weight, before[name])}
    expected = {name for name in before if "rows." in name or name.endswith("log_theta")}
    assert moved == expected
    assert (
        len(expected) == 11
    )  # two tables in two layers of z's encoder and of the decoder, in the library's one; theta
    for name in moved:
        known = 3 if name.endswith(("rows.0", "log_theta")) else 2
        after = dict(query.model.vae.named_parameters())[name]
        assert torch.equal(after[:known], before[name][:known])


def test_a_reference_of_one_batch_takes_new_ones(simulated, new):
    for batch_key, cells in ((None, simulated), ("batch", simulated[simulated.obs["batch"] == "batch_1"])):
        adata = cells[:400].copy()
        scgen.setup_anndata(adata, batch_key=batch_key)
        model = scgen.SCVI(adata, n_hidden=16)
        model.train(5, accelerator="cpu", progress=False)
        query = model.query(new, batch_key="batch")
        assert len(query.model.registry.batches) == 2
        own = model.query(new) if batch_key is None else None
        if own is not None:  # without a batch's effect at first
            np.testing.assert_allclose(
                own.get_latent_representation(), query.get_latent_representation(), rtol=1e-4, atol=1e-5
            )
            with pytest.raises(ValueError, match="nothing to train"):
                own.train()
        query.train(2, progress=False)


def test_cells_of_a_type_that_the_reference_has_not_seen_stand_out(simulated):
    adata = simulated.copy()
    novel = (adata.obs["cell_type"] == "type_2").to_numpy()
    held_out = ~novel & (np.random.default_rng(0).random(adata.n_obs) < 0.3)
    known = adata[~novel & ~held_out].copy()
    scgen.setup_anndata(known, batch_key="batch")
    model = scgen.SCVI(known, n_hidden=32)
    model.train(25, accelerator="cpu", progress=False, train_size=0.7)
    cells = adata[novel | held_out].copy()
    table = model.query(cells).typicality()
    assert table.index.equals(cells.obs_names)
    unseen = novel[novel | held_out]
    assert roc_auc_score(unseen, -table["typicality"]) > 0.9
    assert roc_auc_score(unseen, table["distance"]) > 0.9


def test_cells_like_the_reference_are_as_typical_as_chance_has_it(reference, simulated):
    """The reference's own process makes them, from other seeds: their shares are even, however few they are."""
    for n, tolerance, train_size in ((300, 0.08, 0.7), (12, 0.25, 0.7), (300, 0.08, 0.9)):
        rest = simulated[simulated.obs["batch"] != "batch_4"]
        held = np.random.default_rng(n).choice(rest.n_obs, n, replace=False)
        adata = rest[np.setdiff1d(np.arange(rest.n_obs), held)].copy()
        scgen.setup_anndata(adata, batch_key="batch")
        model = scgen.SCVI(adata, n_latent=6, n_hidden=32)
        model.train(25, accelerator="cpu", progress=False, train_size=train_size)
        cells = rest[np.sort(held)].copy()
        share = model.query(cells).typicality()["typicality"].to_numpy()
        assert abs(share.mean() - 0.5) < tolerance
        n_compared = len(model.validation_indices)
        assert (share < 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 * (1 / n + 1 / n_compared))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_an_unseen_type_stands_out_in_an_unseen_batch_with_genes_missing(simulated, share):
    novel = (simulated.obs["cell_type"] == "type_2").to_numpy()
    new = (simulated.obs["batch"] == "batch_4").to_numpy()
    known = simulated[~novel & ~new].copy()
    scgen.setup_anndata(known, batch_key="batch")
    model = scgen.SCVI(known, n_hidden=32)
    model.train(40, accelerator="cpu", progress=False, train_size=0.7)
    kept = np.random.default_rng(0).random(simulated.n_vars) >= share
    cells = simulated[new, kept].copy()
    query = model.query(cells)
    query.train(progress=False)
    table, unseen = query.typicality(), novel[new]
    assert roc_auc_score(unseen, -table["typicality"]) > 0.8
    assert roc_auc_score(unseen, -table["density"]) > 0.75
    assert (table["typicality"][~unseen] < 0.05).mean() < 0.15


def test_columns_of_typicality_say_which_way():
    rng = np.random.default_rng(0)

    def cells(n, elbo, z):
        return analysis.Described(
            z + rng.normal(size=(n, 2)), rng.normal(size=n), elbo + rng.normal(size=n), rng.normal(size=(n, 6))
        )

    known, train_z = cells(400, 0, 0), rng.normal(size=(1000, 2))

    def compared(new):
        n = len(new.z)
        return analysis._compared(new, known, train_z, np.full(n, -1), np.arange(n) % 2, 3)

    table = compared(cells(50, -5, 0))
    assert table["elbo"].mean() < -3
    assert abs(table["density"].mean()) < 1
    assert np.median(table["typicality"]) < 0.05
    table = compared(cells(50, 0, 6))
    assert table["density"].max() < -1
    assert abs(table["elbo"].mean()) < 0.5
    table = compared(cells(400, 0, 0))
    assert abs(table["typicality"].mean() - 0.5) < 0.05
    assert not table["new_batch"].any()


def of_another_protocol(adata, genes, depth, seed):
    """Return the cells as a protocol would see them that is `depth` as deep and differs by a factor for each gene."""
    rng = np.random.default_rng(seed)
    factor = depth * np.exp(rng.normal(0, genes, adata.n_vars))
    adata = adata.copy()
    adata.X = rng.poisson(adata.X.toarray() * factor).astype(np.float32)
    adata.X[adata.X.sum(1) == 0, 0] = 1
    return adata


@pytest.fixture(scope="module")
def without_type_2():
    """A model of four of five types and two of three batches, and the cells of the third, as another protocol sees."""
    adata = scgen.simulate_cells(n_cells=2400, n_genes=150, n_batches=3, n_types=5, seed=5)
    novel, new = adata.obs["cell_type"] == "type_2", adata.obs["batch"] == "batch_3"
    known = adata[~novel & ~new].copy()
    known.obs["kit"] = "v2"
    scgen.setup_anndata(known, batch_key="batch", categorical_covariate_keys=["kit"])
    model = scgen.SCVI(known, n_hidden=32)
    model.train(40, accelerator="cpu", progress=False, train_size=0.7)
    new = of_another_protocol(adata[new], 0.8, 0.4, 0)
    new.obs["kit"] = "v2"
    return model, new


@pytest.mark.parametrize("trained", [False, True])
def test_known_types_by_another_protocol_are_typical_of_their_batch(without_type_2, trained):
    model, new = without_type_2
    known = new[new.obs["cell_type"] != "type_2"].copy()
    query = model.query(known)
    if trained:
        query.train(progress=False)
    table = query.typicality()
    assert table["new_batch"].all()
    assert (table["typicality"] < 0.05).mean() < 0.15
    assert abs(table["typicality"].median() - 0.5) < 0.1
    assert query.transfer_labels("cell_type")["label"].astype(str).eq(known.obs["cell_type"].astype(str)).mean() > 0.8


def test_an_unseen_type_stands_out_among_the_cells_of_another_protocol(without_type_2):
    model, new = without_type_2
    unseen = (new.obs["cell_type"] == "type_2").to_numpy()
    table = model.query(new).typicality()
    assert roc_auc_score(unseen, -table["typicality"]) > 0.8
    assert (table["typicality"][~unseen] < 0.05).mean() < 0.15
    assert (table["typicality"][unseen] < 0.05).mean() > 2 * (table["typicality"][~unseen] < 0.05).mean()


def test_a_new_batch_of_few_cells_is_not_calibrated(without_type_2):
    model, new = without_type_2
    few = anndata.concat([new[new.obs["cell_type"] != "type_2"][:30], model.adata[:100]])
    with pytest.warns(UserWarning, match=r"typicality of 30 of 130 cells is not calibrated \(NaN\)"):
        table = model.query(few).typicality()
    assert table["new_batch"].tolist() == [True] * 30 + [False] * 100
    assert table["typicality"][:30].isna().all()
    assert table["typicality"][30:].between(0, 1).all()
    assert np.isfinite(table["distance"]).all()


def test_a_new_value_of_a_covariate_is_a_new_batch(without_type_2):
    model, new = without_type_2
    known = new[new.obs["cell_type"] != "type_2"].copy()
    known.obs["batch"] = "batch_1"
    known.obs["kit"] = np.where(np.arange(known.n_obs) < 200, "v3", "v4")
    query = model.query(known)
    table = query.typicality()
    assert query._new_batch().tolist() == [0] * 200 + [1] * (known.n_obs - 200)
    assert table["new_batch"].all()
    assert (table["typicality"] < 0.05).mean() < 0.15


def test_distances_from_the_bulk_are_those_from_its_mean_and_covariance():
    """A fifth of the rows lie far off: the others' own mean and covariance are found, by scipy."""
    from scipy.spatial.distance import cdist

    rng = np.random.default_rng(0)
    values = rng.multivariate_normal([1, 2, 3], np.diag([1, 4, 9]), 400)
    values[:80] = rng.normal(40, 3, (80, 3))
    rest = values[80:]
    expected = cdist(values, rest.mean(0, keepdims=True), "mahalanobis", VI=np.linalg.inv(np.cov(rest.T)))[:, 0]
    np.testing.assert_allclose(analysis._from_bulk(values), expected)


def test_held_out_counts_of_cells_with_missing_genes_are_not_read(reference, new, monkeypatch):
    """What the encoder reads is of the kept counts, and of what is expected of the other genes given these alone."""
    model = reference.query(new[:, :90].copy()).model
    (cells,) = model._loader(None, None, 1000)
    counts = cells.counts.to_dense()
    kept = torch.from_numpy(np.random.default_rng(0).binomial(counts.numpy().astype(int), 0.5)).float()
    with torch.inference_mode():
        by_hand = model.vae.impute(replace(cells, counts=kept, library=kept.sum(1, keepdim=True).log()))
        of_all = model.vae.impute(replace(cells, counts=kept, library=cells.library))
    read, infer = [], model.vae.infer
    monkeypatch.setattr(model.vae, "infer", lambda cells: read.append(cells) or infer(cells))
    values = model.get_thinned_ll(held_out=0.5, n_samples=5, return_mean=False, batch_size=1000)
    (what,) = read
    assert torch.equal(what.counts, kept)
    assert torch.equal(what.encoder_input[:, :90], kept)
    np.testing.assert_allclose(what.encoder_input[:, 90:], by_hand.encoder_input[:, 90:], rtol=1e-4)
    for leak in (cells, of_all):  # the tolerance would notice them
        assert not np.allclose(what.encoder_input[:, 90:], leak.encoder_input[:, 90:], rtol=0.1)
    assert np.isfinite(values).all()


def test_a_name_that_two_genes_share_names_none(simulated, new):
    adata = simulated[simulated.obs["batch"] != "batch_4"].copy()
    adata.var["symbol"] = [f"S{i}" for i in range(adata.n_vars)]
    adata.var.loc["gene_2", "symbol"] = "S0"
    adata.var["terms"] = [["a", "b"]] * adata.n_vars  # no text: not read
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, n_hidden=16)
    model.train(2, accelerator="cpu", progress=False)
    assert set(model.registry.gene_ids) == {"ensembl", "symbol"}
    new.var_names = [f"S{i}" for i in range(new.n_vars)]
    del new.var["ensembl"]
    query = model.query(new)
    assert query.model.registry.missing == ["gene_1", "gene_2"]
    assert "S0" not in query.model.registry.genes


def test_numbers_for_names_come_after_identifiers():
    adata = anndata.AnnData(np.zeros((1, 3)), var=pd.DataFrame({"symbol": ["C", "B", "A"]}, index=["0", "1", "2"]))
    found, by = matched(["0", "1", "2"], {"symbol": ["A", "B", "C"]}, adata)
    assert (found, by) == (["2", "1", "0"], 'their symbol in adata.var["symbol"]')


def test_a_reference_trained_again_is_noticed(simulated, new):
    adata = simulated[simulated.obs["batch"] != "batch_4"].copy()
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, n_hidden=16)
    model.train(2, accelerator="cpu", progress=False)
    query = model.query(new)
    model.train(1, accelerator="cpu", progress=False)
    for ask in (query.typicality, lambda: query.transfer_labels("cell_type")):
        with pytest.raises(ValueError, match="trained again since the query"):
            ask()


def test_labels_alone_are_nothing_to_train(simulated):
    adata = simulated[simulated.obs["batch"] != "batch_4"].copy()
    scgen.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
    model = scgen.SCVI(adata, n_hidden=16, dispersion="gene-label", gene_likelihood="nb")
    model.train(2, accelerator="cpu", progress=False)
    cells = adata[:200].copy()
    cells.obs["cell_type"] = np.where(np.arange(200) < 50, "new", cells.obs["cell_type"].astype(str))
    query = model.query(cells)
    before = {name: weight.clone() for name, weight in query.model.vae.named_parameters()}
    query.train(2, progress=False)
    moved = [name for name, weight in query.model.vae.named_parameters() if not torch.equal(weight, before[name])]
    assert moved == ["decoder.dispersion.log_theta"]
    with pytest.raises(ValueError, match="nothing to train"):
        model.query(adata[:200].copy()).train()


def test_distances_without_oneself_are_those_from_the_others():
    rng = np.random.default_rng(0)
    known = rng.normal(size=(40, 6))
    inverse = [np.linalg.inv(np.cov(np.delete(known, i, 0).T)) for i in range(40)]
    centred = [known[i] - np.delete(known, i, 0).mean(0) for i in range(40)]
    expected = [np.sqrt(c @ v @ c) for c, v in zip(centred, inverse, strict=True)]
    np.testing.assert_allclose(analysis._without_self(analysis._mahalanobis(known, known), 40), expected)


def test_distances_and_windows_by_hand():
    rng = np.random.default_rng(0)
    known = rng.multivariate_normal([1, 2], [[2, 0.5], [0.5, 1]], 500)
    values = rng.normal(size=(5, 2))
    inverse = np.linalg.inv(np.cov(known.T))
    expected = [np.sqrt((v - known.mean(0)) @ inverse @ (v - known.mean(0))) for v in values]
    np.testing.assert_allclose(analysis._mahalanobis(values, known), expected)
    # Values that depend on the place are compared with those at the same place.
    place = rng.uniform(0, 10, 3000)
    depends = 5 * place + rng.normal(size=3000)
    at = np.array([2.0, 5.0, 8.0])
    found = analysis._against(at, 5 * at + 2, place, depends)
    np.testing.assert_allclose(found, 2, atol=0.9)  # the window is 0.67 wide, which the line crosses


def test_labels_agree_with_those_of_scikit_learn(reference, new):
    query = reference.query(new)
    z, labels = reference.get_latent_representation(), reference.adata.obs["cell_type"].astype(str)

    def gaussian(distance):
        return np.exp(-((distance / distance.mean(1, keepdims=True)) ** 2))

    oracle = KNeighborsClassifier(15, weights=gaussian).fit(z, labels)
    votes = oracle.predict_proba(query.get_latent_representation())
    table = query.transfer_labels("cell_type", unknown_below=0.8)
    np.testing.assert_allclose(table["share"], votes.max(1), rtol=1e-5)
    expected = np.where(votes.max(1) < 0.8, "unknown", oracle.classes_[votes.argmax(1)])
    assert (table["label"].astype(str).to_numpy() == expected).all()


def test_a_query_model_is_saved_and_loaded(reference, new, tmp_path):
    query = reference.query(new[:, 20:].copy())
    query.train(2, progress=False)
    query.model.save(tmp_path)
    loaded = scgen.SCVI.load(tmp_path, query.model.adata)
    np.testing.assert_array_equal(loaded.get_latent_representation(), query.get_latent_representation())
    assert loaded.registry == query.model.registry


def answers(query) -> dict[str, np.ndarray]:
    """Return what a query says; another process runs this function, too."""
    labels, typical = query.transfer_labels("cell_type"), query.typicality()
    return {
        "z": query.get_latent_representation(),
        "bound": query.model.get_elbo(return_mean=False),
        "expression": query.model.get_normalized_expression(return_numpy=True),
        "label": labels["label"].to_numpy(str),
        "share": labels["share"].to_numpy(),
        "told": np.array(str(query)),
        **{name: typical[name].to_numpy() for name in typical},
    }


LATER = """
import sys
from pathlib import Path
import anndata, numpy as np, scgen

{}
folder = Path(sys.argv[1])
reference = scgen.SCVI.load(folder / "reference", anndata.read_h5ad(folder / "reference.h5ad"))
new = anndata.read_h5ad(folder / "new.h5ad")
for name in ("mapped", "trained"):
    np.savez(folder / name, **answers(reference.load_query(folder / name, new)))
"""


def test_a_saved_query_has_the_same_answers_in_another_process(reference, new, tmp_path):
    new = new[:, 20:].copy()
    reference.save(tmp_path / "reference")
    reference.adata.write_h5ad(tmp_path / "reference.h5ad")
    new.write_h5ad(tmp_path / "new.h5ad")
    expected = {}
    for name in ("mapped", "trained"):
        query = reference.query(new)
        if name == "trained":
            query.train(3, accelerator="cpu", progress=False)
        query.save(tmp_path / name)
        expected[name] = answers(query)
    command = [sys.executable, "-c", LATER.format(inspect.getsource(answers)), str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(scgen.__file__).parents[1])
    for name in ("mapped", "trained"):
        found = np.load(tmp_path / f"{name}.npz", allow_pickle=False)
        assert found.keys() == expected[name].keys()
        for key, values in expected[name].items():
            assert np.array_equal(found[key], values, equal_nan=values.dtype.kind == "f"), (name, key)
    assert not np.array_equal(expected["mapped"]["bound"], expected["trained"]["bound"])


def test_a_saved_query_goes_on_training_as_it_would_have(reference, new, tmp_path):
    query = reference.query(new)
    query.train(2, accelerator="cpu", progress=False)
    query.save(tmp_path)
    loaded = reference.load_query(tmp_path, new)
    assert loaded.model.registry == query.model.registry
    assert (loaded.overlap, loaded.matched_by, loaded.n_trainings) == (
        query.overlap,
        query.matched_by,
        query.n_trainings,
    )
    for one in (query, loaded):
        one.train(2, accelerator="cpu", seed=1, progress=False)
    assert np.array_equal(loaded.get_latent_representation(), query.get_latent_representation())
    pd.testing.assert_frame_equal(
        loaded.model.history.drop(columns="seconds"), query.model.history.drop(columns="seconds")
    )


def test_a_saved_query_is_of_its_own_reference(reference, new, tmp_path):
    query = reference.query(new)
    query.save(tmp_path / "query")
    with pytest.raises(FileExistsError, match="already holds a model"):
        query.save(tmp_path / "query")
    query.save(tmp_path / "query", overwrite=True)
    other = scgen.SCVI(reference.adata, n_latent=6, n_hidden=32)
    with pytest.raises(RuntimeError, match="untrained"):
        other.load_query(tmp_path / "query", new)
    other.train(1, accelerator="cpu", progress=False)
    with pytest.raises(ValueError, match="a query of another reference"):
        other.load_query(tmp_path / "query", new)
    # Of a reference that was trained again since.
    stale = other.query(new)
    stale.save(tmp_path / "stale")
    other.train(1, accelerator="cpu", progress=False)
    with pytest.raises(ValueError, match="before it was trained again"):
        other.load_query(tmp_path / "stale", new)
    with pytest.raises(ValueError, match="the reference was trained again since"):
        stale.save(tmp_path / "stale", overwrite=True)
    # A model is no query, but the model of a query is a model.
    reference.save(tmp_path / "reference")
    with pytest.raises(ModelFileError, match="holds a model, not a query"):
        reference.load_query(tmp_path / "reference", new)
    loaded = scgen.SCVI.load(tmp_path / "query", new)
    assert np.array_equal(loaded.get_latent_representation(), query.get_latent_representation())


def test_a_loaded_reference_knows_its_identifiers(reference, new, tmp_path):
    reference.save(tmp_path)
    loaded = scgen.SCVI.load(tmp_path)
    new.var_names = new.var["ensembl"].to_numpy()
    query = loaded.query(new)
    np.testing.assert_array_equal(query.get_latent_representation(), reference.query(new).get_latent_representation())
    for ask in (query.typicality, lambda: query.transfer_labels("cell_type")):
        with pytest.raises(ValueError, match="loaded without cells"):
            ask()


def test_what_cannot_be_mapped_is_refused_with_reasons(reference, new):
    with pytest.raises(ValueError, match=r"adata has 10 of the model's 120 genes .* min_overlap=0.5 asks for a larger"):
        reference.query(new[:, :10].copy())
    reference.query(new[:, :10].copy(), min_overlap=0.05)
    other = new.copy()
    other.var_names = [f"probe_{i}" for i in range(new.n_vars)]
    del other.var["ensembl"]
    with pytest.raises(ValueError, match=r"has none of the model's 120 genes \(gene_1, .*\(probe_0, "):
        reference.query(other, min_overlap=0)
    with pytest.raises(ValueError, match="min_overlap=2"):
        reference.query(new, min_overlap=2)
    with pytest.raises(TypeError, match="not an AnnData"):
        reference.query(new.X)
    without = new.copy()
    del without.obs["batch"]
    with pytest.raises(ValueError, match='batch_key="batch" is not a column'):
        reference.query(without)
    without.obs["sample"] = "s1"
    assert reference.query(without, batch_key="sample").model.registry.batches[-1] == "s1"
    fractions = new.copy()
    fractions.X = fractions.X * 0.5
    with pytest.raises(ValueError, match="not integers"):
        reference.query(fractions)
    query = reference.query(new)
    with pytest.raises(ValueError, match='Did you mean "cell_type"'):
        query.transfer_labels("celltype")
    with pytest.raises(ValueError, match="unknown_below=5; it takes a share"):
        query.transfer_labels("cell_type", unknown_below=5)
    with pytest.raises(ValueError, match="n_neighbors=0"):
        query.transfer_labels("cell_type", n_neighbors=0)
    with pytest.raises(ValueError, match="holds no labels"):
        query.transfer_labels("age")
    with pytest.raises(ValueError, match="model of a query"):
        query.model.query(new)
    with pytest.raises(RuntimeError, match="untrained"):
        scgen.SCVI(reference.adata).query(new)


@pytest.mark.parametrize("renamed", [0, 2])
def test_genes_named_in_the_refusal_have_no_match(reference, new, renamed):
    there = new[:, :119].copy()
    del there.var["ensembl"]
    names = [f"probe_{i}" for i in range(renamed)]
    there.var_names = [*names, *there.var_names[renamed:]]
    with pytest.raises(ValueError, match=f"has {119 - renamed} of the model's 120 genes") as refused:
        reference.query(there, min_overlap=1.0)
    lacking = [gene for gene in reference.registry.genes if gene not in set(there.var_names)]
    assert f"({', '.join(lacking)})." in str(refused.value)
    told = [part in str(refused.value) for part in ("without a match (probe_0, probe_1)", "rename them")]
    assert told == [renamed > 0] * 2


@pytest.mark.parametrize(
    "ask",
    [
        lambda reference, adata: reference.query(adata, batch_key="5"),
        lambda reference, adata: reference.query(adata).model.differential_expression("5"),
        lambda _, adata: scgen.setup_anndata(adata, batch_key="5"),
        lambda _, adata: scgen.setup_anndata(adata, categorical_covariate_keys=["5"]),
    ],
)
def test_a_column_named_by_a_number_is_to_be_renamed(reference, new, ask):
    new.obs[5] = new.obs["batch"].astype(str).to_numpy()
    with pytest.raises(ValueError, match="The name of the column 5 is not a string") as refused:
        ask(reference, new)
    assert "Did you mean" not in str(refused.value)
    assert "adata.obs = adata.obs.rename(columns=str)." in str(refused.value)
    new.obs = new.obs.rename(columns=str)  # as the message says
    assert reference.query(new, batch_key="5").model.registry.setup.batch_key == "5"


def test_normalised_values_need_all_genes(simulated, new):
    adata = simulated[simulated.obs["batch"] != "batch_4"].copy()
    adata.X = np.log1p(adata.X.toarray())
    new.X = np.log1p(new.X.toarray())
    scgen.setup_anndata(adata, batch_key="batch", counts=False)
    model = scgen.SCVI(adata, gene_likelihood="normal", n_hidden=16)
    model.train(3, accelerator="cpu", progress=False)
    with pytest.raises(ValueError, match="adata lacks 1 of the model's "):
        model.query(new[:, 1:].copy())
    query = model.query(new)
    query.train(2, progress=False)
    assert len(query.typicality()) == len(new)


def versions(adata, version):
    """Return the cells with identifiers of Ensembl, of a version, for names."""
    adata = adata.copy()
    adata.var_names = [f"ENSG{i:011d}.{version}" for i in range(adata.n_vars)]
    del adata.var["ensembl"]
    return adata


def test_identifiers_that_differ_by_a_version_are_matched_with_a_note(simulated, new):
    adata = versions(simulated[simulated.obs["batch"] != "batch_4"], 12)
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, n_hidden=16)
    model.train(2, accelerator="cpu", progress=False)
    other = versions(new, 13)
    query = model.query(other)
    assert query.overlap == 1
    assert query.matched_by == "their names in adata.var_names, without their versions"
    np.testing.assert_array_equal(
        query.get_latent_representation(), model.query(versions(new, 12)).get_latent_representation()
    )
    # The same of questions about cells of known batches, which a warning tells.
    same = adata[:50].copy()
    expected = model.get_latent_representation(same)
    same.var_names = [name.replace(".12", ".13") for name in same.var_names]
    with pytest.warns(UserWarning, match=r"120 of the model's 120 genes matched .* without their") as caught:
        np.testing.assert_allclose(model.get_latent_representation(same), expected, rtol=1e-4, atol=1e-5)
    assert len(caught) == 1
    same.var_names = [name.partition(".")[0] for name in same.var_names]
    with pytest.warns(UserWarning, match="without their versions"):
        np.testing.assert_allclose(model.get_latent_representation(same), expected, rtol=1e-4, atol=1e-5)


def test_versions_are_left_out_only_where_this_is_unambiguous():
    names = pd.Index(
        ["ENSG00000000001.2", "ENSG00000000002.1", "ENSG00000000002.2", "RP11-34P13.7", "ENSG00000000005.9"]
    )
    genes = ["ENSG00000000001.1", "ENSG00000000002.3", "RP11-34P13.6", "ENSG00000000005.9", "ENSG00000000007.1"]
    places, n = places_of(genes, names)
    assert (places.tolist(), n) == ([0, -1, -1, 4, -1], 1)
    # Of two of the model's genes that differ by the version neither is found by the other's.
    places, n = places_of(["ENSG00000000001.1", "ENSG00000000001.2"], names)
    assert (places.tolist(), n) == ([-1, 0], 0)
    adata = anndata.AnnData(np.zeros((1, len(names))), var=pd.DataFrame(index=names))
    found, by = matched(genes, {}, adata)
    assert found == ["ENSG00000000001.2", None, None, "ENSG00000000005.9", None]
    assert by == "their names in adata.var_names, without their versions"
    # Where this finds no more, names stand as they are.
    assert matched(["ENSG00000000005.9"], {}, adata) == (["ENSG00000000005.9"], "their names in adata.var_names")
