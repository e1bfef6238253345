"""Differential expression, against rank tests, brute force, bootstraps of known variance, and simulated truth."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from matplotlib import pyplot
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score
from torch import nn

import scgen
from scgen.analysis import differential_expression as de
from scgen.analysis.comparisons import Comparison
from scgen.analysis.group_counts import GroupCounts, counts_of
from scgen.data.loader import CellLoader
from scgen.data.stores import MemoryStore
from scgen.distributions import PointMass
from scgen.modules.priors import StandardNormalPrior
from scgen.modules.vae import VAE

ALL = Comparison("a", "b", [0], [1])


class Known(nn.Module):
    """A decoder whose rho is what the cells' counts are, times the batch's number + 1; z is of no effect."""

    def expression(self, latents, cells):
        return cells.counts * (cells.batch[:, None] + 1)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, cells):
        return PointMass(torch.zeros(len(cells), 2))


def known(values: np.ndarray, batch_size: int = 50) -> tuple[VAE, CellLoader]:
    n = len(values)
    columns = {
        "library": torch.zeros(n, 1),
        "batch": torch.zeros(n, dtype=torch.int64),
        "labels": torch.zeros(n, dtype=torch.int64),
        "categorical": torch.zeros(n, 0, dtype=torch.int64),
        "continuous": torch.zeros(n, 0),
    }
    store = MemoryStore(values.astype(np.float32))
    return VAE({"z": Encoder()}, {"z": StandardNormalPrior(2)}, Known()), CellLoader(store, columns, None, batch_size)


def test_draws_of_means_are_a_bayesian_bootstrap():
    rng = np.random.default_rng(0)
    values, group = rng.gamma(2, 1, (130, 3)), rng.integers(0, 2, 130)
    means = de.group_means(*known(values), group, None, 4000, seed=0)
    for code in range(2):
        x = values[group == code]
        # Weights Dirichlet(1, ..., 1): mean and variance are those of the sample, the latter over n + 1 (Rubin 1981).
        np.testing.assert_allclose(means[code].mean(0), x.mean(0), atol=5 * x.std(0).max() / (len(x) * 4000) ** 0.5)
        np.testing.assert_allclose(means[code].var(0), x.var(0) / (len(x) + 1), rtol=0.15)


def test_batches_are_averaged_over():
    values, group = np.full((40, 2), 3.0), np.repeat([0, 1], 20)
    # Of batches 0, 1, 2 the decoder makes 3, 6, 9.
    np.testing.assert_allclose(de.group_means(*known(values), group, [0, 1, 2], 50, seed=0), 6.0, rtol=0.2)
    means = de.group_means(*known(values), group, [0, 1, 2], 4000, seed=0).mean(1)
    np.testing.assert_allclose(means, 6.0, rtol=0.01)
    np.testing.assert_allclose(de.group_means(*known(values), group, [2], 50, seed=0), 9.0, rtol=1e-6)


def test_cells_that_win_are_those_of_a_rank_test():
    rng = np.random.default_rng(1)
    group = rng.permutation(np.repeat([0, 1, 2], [60, 90, 50]))
    values = rng.normal(size=(200, 4)) + 5 + group[:, None] * np.array([0.0, 0.3, -1, 3])
    both = [ALL, Comparison("a", "rest", [0], [1, 2])]
    wins, means = de.cell_wins(*known(values, 200), group, np.array([60, 90, 50]), both, None, seed=0)
    for row, one in zip(wins, both, strict=True):
        a, b = values[group == 0], values[np.isin(group, one.groups2)]
        expected = stats.mannwhitneyu(a, b).statistic / (len(a) * len(b))
        np.testing.assert_allclose(row, expected, atol=5 * 0.5 / (4 * 4 * 200) ** 0.5)
    np.testing.assert_allclose(means, [values[group == code].mean(0) for code in range(3)], rtol=1e-5)
    # Group 2 was sampled from a million cells: the rest is hardly anything else.
    wins, _ = de.cell_wins(*known(values, 200), group, np.array([60, 90, 10**6]), both, None, seed=0)
    a, b = values[group == 0], values[group == 2]
    np.testing.assert_allclose(wins[1], stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)), atol=0.05)


def test_cells_are_compared_within_a_batch():
    values, group = np.repeat([[1.2], [1.0]], 30, axis=0), np.repeat([0, 1], 30)
    wins, _ = de.cell_wins(*known(values, 60), group, np.array([30, 30]), [ALL], list(range(5)), seed=0)
    assert wins.tolist() == [[1.0]]  # whatever the batches add to both


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_array])
def test_counts_are_summed_by_group(form):
    rng = np.random.default_rng(0)
    x, group = rng.poisson(0.7, (50, 6)), rng.integers(-1, 3, 50)
    x[3] = 0
    counts = counts_of(MemoryStore(form(x)), group, 3)
    table = pd.DataFrame(x).groupby(group)
    shares = pd.DataFrame(x / np.maximum(x.sum(1, keepdims=True), 1)).groupby(group)
    np.testing.assert_array_equal(counts.n_cells, table.size().drop(-1))
    np.testing.assert_array_equal(counts.total, table.sum().drop(-1))
    np.testing.assert_array_equal(counts.non_zero, pd.DataFrame(x > 0).groupby(group).sum().drop(-1))
    np.testing.assert_allclose(counts.share, shares.sum().drop(-1))
    union = counts.union([0, 2])
    np.testing.assert_allclose(union.means()["share"], shares.obj[np.isin(group, [0, 2])].mean())
    table = de.raw(counts, Comparison("a", "b", [0, 2], [1]))
    np.testing.assert_allclose(table["raw_normalized_mean1"], shares.obj[np.isin(group, [0, 2])].mean())
    np.testing.assert_allclose(table["raw_mean2"], x[group == 1].mean(0))
    np.testing.assert_allclose(table["non_zeros_proportion2"], (x[group == 1] > 0).mean(0))


@pytest.mark.parametrize("theta", [np.inf, 0.5])
def test_relative_error_is_that_of_repeated_experiments(theta):
    rng = np.random.default_rng(0)
    n_cells, mu = 400, np.array([0.1, 0.5, 4.0, 500.0])
    shape = (300, n_cells, 4)
    rate = np.broadcast_to(mu, shape) if theta == np.inf else rng.gamma(theta, mu / theta, shape)
    x = rng.poisson(rate)
    x[..., 3] += 100_000 - x.sum(-1)  # equal libraries
    codes = np.repeat([0, 1], 200)  # two strata of one kind are one
    found = [counts_of(MemoryStore(one), codes, 2).relative_error()[:3] for one in x[:20]]
    means = x.mean(1)[:, :3]
    np.testing.assert_allclose(np.mean(found, 0), means.var(0) / means.mean(0) ** 2, rtol=0.3)


def test_little_is_known_of_few_counts_and_cells():
    def error(x):
        return counts_of(MemoryStore(np.array(x)), np.zeros(len(x), int), 1).relative_error()

    assert error([[0, 5], [0, 7], [0, 6], [0, 5]])[0] == 2  # never seen
    np.testing.assert_allclose(error([[40, 60]] * 3), 1)  # three cells that agree, by chance
    np.testing.assert_allclose(error([[40, 60]] * 50)[0], 1 / 2000.5)  # as certain as Poisson counts at most


def test_groups_of_a_union_are_strata():
    # Groups that differ are not taken for noise: the error of their union's mean is that within them.
    x = np.repeat([[10, 90], [90, 10]], 50, axis=0) + np.tile([[1, -1], [-1, 1]], (50, 1))
    errors = [
        counts_of(MemoryStore(x), c, n).relative_error()
        for c, n in ((np.repeat([0, 1], 50), 2), (np.zeros(100, int), 1))
    ]
    assert (errors[0] < errors[1] / 5).all()


def test_posteriors_are_as_wide_as_experiments_differ():
    # rho known exactly, 60 cells of a group: how much does the log ratio of means vary, and how much is it said to?
    rng = np.random.default_rng(0)
    said, seen = [], []
    for seed in range(60):
        rho = np.column_stack([rng.gamma(2, 1, (120, 20)), np.full(120, 60.0)])
        x = rng.poisson(rho * 50)
        group = np.repeat([0, 1], 60)
        counts = counts_of(MemoryStore(x), group, 2)
        table = de.change(
            de.group_means(*known(rho), group, None, 300, seed), counts, ALL, 0.25, 0.05, np.random.default_rng(seed)
        )
        said.append(table["lfc_std"][:20])
        seen.append(table["lfc_mean"][:20])
    assert np.mean(said) == pytest.approx(np.std(seen), rel=0.15)


def test_groups_of_a_union_weigh_by_their_cells():
    means = np.array([[[1.0]], [[4.0]], [[2.0]]]).repeat(400, axis=1)
    total = np.array([[900_000.0], [100_000], [500_000]])
    counts = GroupCounts(
        np.array([900, 100, 500]), total, total, np.array([[900.0], [100], [500]]), np.array([[900.0], [100], [500]])
    )
    table = de.change(means, counts, Comparison("a", "b", [0, 1], [2]), 0.25, 0.05, np.random.default_rng(0))
    assert (table["scale1"][0], table["scale2"][0]) == (pytest.approx(1.3), pytest.approx(2.0))


def test_pseudocounts():
    rng = np.random.default_rng(0)
    means = rng.gamma(2, 1, (2, 1, 30)).repeat(200, axis=1)
    total = np.full((2, 30), 50.0)
    counts = GroupCounts(np.array([10, 10]), total, total > 0, total / 1500, (total / 1500) ** 2)
    counts.total[1] *= 2
    arguments = (ALL, 0.25, 0.05, np.random.default_rng(0))
    # All seen: one count in the smaller group, 1 of 1500, in the unit of the means.
    expected = means[:, 0].sum(1).mean() / 1500
    assert de.change(means, counts, *arguments)["pseudocounts"][0] == pytest.approx(expected)
    counts.total[:, :11] = counts.share[:, :11] = 0
    counts.total[1, 10] = 1  # seen in one of them
    larger = np.sort(means[:, 0, :10].max(0))
    expected = larger[8] + 0.1 * (larger[9] - larger[8])  # of ten, the 0.9 quantile
    assert de.change(means, counts, *arguments)["pseudocounts"][0] == pytest.approx(expected)


def test_the_largest_set_within_the_target_is_called():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, target = rng.beta(2, 0.5, 8), rng.uniform(0.01, 0.3)
        sets = (c for n in range(9) for c in itertools.combinations(range(8), n))
        largest = max((c for c in sets if not c or (1 - p[list(c)]).mean() <= target), key=len)
        assert de.called(p, target).sum() == len(largest)
        assert (1 - p[de.called(p, target)]).sum() <= target * len(largest) + 1e-12


def truth_of(adata):
    """Return the mean share of each gene, each cell in every batch in turn, by type: (types, G)."""
    log_rho, offsets = np.log(adata.layers["true_scale"]), adata.varm["batch_offset"].T
    alone = log_rho - offsets[adata.obs["batch"].cat.codes]
    shares = sum(np.exp(one - np.logaddexp.reduce(one, 1, keepdims=True)) for one in (alone + o for o in offsets))
    return pd.DataFrame(shares / len(offsets)).groupby(adata.obs["cell_type"].to_numpy()).mean()


@pytest.fixture(scope="module")
def simulated():
    adata = scgen.simulate_cells(1200, 300, n_batches=2, n_types=3, type_effect=0.3, seed=0)
    adata.X[:, 299] = 0  # and a gene that nobody sees
    adata.X.eliminate_zeros()
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata)
    model.train(progress=False)
    return adata, model


@pytest.mark.parametrize("mode", ["change", "vanilla"])
def test_simulated_truth_is_found(simulated, mode):
    adata, model = simulated
    table = model.differential_expression("cell_type", "type_1", "type_2", mode=mode)
    assert sorted(table.index) == sorted(adata.var_names)
    truth = truth_of(adata)
    lfc = pd.Series(np.log2(truth.loc["type_1"] / truth.loc["type_2"]).to_numpy(), adata.var_names)[table.index]
    differs = lfc.abs() > 0.25
    if mode == "vanilla":
        assert stats.spearmanr(table["bayes_factor"], lfc).statistic > 0.9
        assert table["bayes_factor"].is_monotonic_decreasing
        return
    assert roc_auc_score(differs, table["proba_de"]) > 0.85
    assert np.corrcoef(table["lfc_mean"], lfc)[0, 1] > 0.9
    called = table["is_de_fdr_0.05"]
    false = (called & ~differs).sum()
    assert called.sum() > 30
    assert false <= 0.05 * called.sum() + 2 * (0.05 * called.sum()) ** 0.5
    unseen = table.loc["gene_300"]
    assert (unseen["raw_mean1"], unseen["raw_mean2"], unseen["is_de_fdr_0.05"]) == (0, 0, False)
    assert unseen["pseudocounts"] == pytest.approx(max(unseen["scale1"], unseen["scale2"]))


def test_all_groups_in_one_call_are_each_against_the_rest(simulated):
    adata, model = simulated
    together = model.differential_expression("cell_type")
    for name in adata.obs["cell_type"].cat.categories:
        mine = (adata.obs["cell_type"] == name).to_numpy()
        alone = model.differential_expression(idx1=mine)
        table = together[together["group1"] == name].loc[alone.index]
        exact = ["raw_mean1", "raw_mean2", "non_zeros_proportion1", "raw_normalized_mean2"]
        np.testing.assert_allclose(table[exact], alone[exact], rtol=1e-9)
        np.testing.assert_allclose(table["raw_mean1"], adata[mine, table.index].X.toarray().mean(0), rtol=1e-5)
        assert np.corrcoef(table["lfc_mean"], alone["lfc_mean"])[0, 1] > 0.97
        assert (table["group2"] == "rest").all()
    several = model.differential_expression("cell_type", ["type_1", "type_3"], "type_2")
    assert several["comparison"].unique().tolist() == ["type_1 vs type_2", "type_3 vs type_2"]


def test_halves_of_a_type_do_not_differ(simulated):
    adata, model = simulated
    rows = np.flatnonzero(adata.obs["cell_type"] == "type_2")
    for seed in range(5):
        halves = np.array_split(np.random.default_rng(seed).permutation(rows), 2)
        assert not model.differential_expression(idx1=halves[0], idx2=halves[1], seed=seed)["is_de_fdr_0.05"].any()


def test_a_gene_of_which_little_is_known_is_not_called():
    # Of ten cells each: one count of the first gene in all, and a second gene that is well known.
    total, share = np.array([[1, 90_000], [0, 90_000]]), np.array([[1e-4, 9.9], [0, 9.9]])
    counts = GroupCounts(np.array([10, 10]), total, total > 0, share, share**2 / 10 + 1e-9)
    means = np.tile([[[4e-3, 0.1]], [[1e-3, 0.1]]], (1, 500, 1))
    table = de.change(means, counts, ALL, 0.25, 0.05, np.random.default_rng(0))
    assert table["lfc_median"][0] > 1
    assert table["proba_de"][0] < 0.95
    assert table["proba_de"][1] < 0.5


def test_one_cell_is_no_group_to_call_genes_of(simulated):
    adata, model = simulated
    rows = np.flatnonzero(adata.obs["cell_type"] == "type_2")
    for seed in range(3):
        assert model.differential_expression(idx1=rows[[seed]], idx2=rows[10:], seed=seed)["is_de_fdr_0.05"].sum() == 0
    labels = np.array(["many"] * adata.n_obs, object)
    labels[:2] = "rare 1", "rare 2"
    rare = adata.copy()
    rare.obs["kind"] = labels
    table = model.differential_expression("kind", "rare 1", "rare 2", adata=rare, mode="vanilla")
    assert np.isfinite(table.select_dtypes("number")).all().all()
    assert table["bayes_factor"].abs().max() < 3


def test_batches_differ_if_they_are_not_averaged_over(simulated):
    adata, model = simulated
    with pytest.raises(ValueError, match="batch_correction=False"):
        model.differential_expression("batch")
    own = model.differential_expression("batch", "batch_1", "batch_2", batch_correction=False)
    truth = (
        pd.DataFrame(adata.layers["true_scale"], columns=adata.var_names).groupby(adata.obs["batch"].to_numpy()).mean()
    )
    lfc = np.log2(truth.loc["batch_1"] / truth.loc["batch_2"])[own.index]
    assert np.corrcoef(own["lfc_mean"], lfc)[0, 1] > 0.9


def test_means_of_few_cells_vary_more(simulated):
    def spread(n_cells):
        runs = (simulated[1].differential_expression("cell_type", "type_1", n_cells=n_cells, seed=s) for s in range(4))
        scales = np.array([run.sort_index()["scale1"] for run in runs])
        return np.median(scales.std(0) / scales.mean(0))

    assert spread(10) > 3 * spread(500)


def test_of_equally_sure_genes_the_higher_come_first(simulated):
    table = simulated[1].differential_expression("cell_type", "type_1")
    assert table["bayes_factor"].is_monotonic_decreasing
    surest = table[table["bayes_factor"] == table["bayes_factor"].max()]
    assert len(surest) > 2
    assert surest["lfc_mean"].is_monotonic_decreasing


def test_cells_are_sampled_of_each_group():
    group = np.random.default_rng(0).integers(-1, 3, 1000)
    rows = de.sample(group, 100, seed=0)
    assert np.bincount(group[rows]).tolist() == [100, 100, 100]
    assert len(np.unique(rows)) == 300
    assert len(de.sample(group, 10**6, seed=0)) == (group >= 0).sum()


def test_seeds_and_cells_of_a_file(simulated, tmp_path):
    adata, model = simulated
    table = model.differential_expression("cell_type", "type_1", seed=3)
    pd.testing.assert_frame_equal(table, model.differential_expression("cell_type", "type_1", seed=3))
    assert not table.equals(model.differential_expression("cell_type", "type_1", seed=4))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = sc.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    pd.testing.assert_frame_equal(table, model.differential_expression("cell_type", "type_1", adata=backed, seed=3))


def test_scanpy_reads_the_copy(simulated, tmp_path):
    adata, model = simulated
    before = set(adata.uns)
    table = model.differential_expression("cell_type")
    assert set(adata.uns) == before  # nothing is written unasked
    copy = adata.copy()
    model.differential_expression("cell_type", adata=copy, key_added="rank_genes_groups")
    copy.write_h5ad(tmp_path / "cells.h5ad")
    copy = sc.read_h5ad(tmp_path / "cells.h5ad")
    read = sc.get.rank_genes_groups_df(copy, "type_2").set_index("names")
    mine = table[table["group1"] == "type_2"].loc[read.index]
    np.testing.assert_allclose(read["pvals"], mine["proba_not_de"])
    np.testing.assert_allclose(read["logfoldchanges"], mine["lfc_mean"])
    assert (read["pvals_adj"] <= 0.05).tolist() == mine["is_de_fdr_0.05"].tolist()


def ranked(table: pd.DataFrame, adata) -> pd.DataFrame:
    """Return what Scanpy reads of the first group, after checks that hold in each mode."""
    copy = adata.copy()
    copy.uns["rank_genes_groups"] = de.as_scanpy(table, "cell_type")
    read = sc.get.rank_genes_groups_df(copy, "type_1")
    assert read["scores"].is_monotonic_decreasing
    higher, lower = read[read["scores"] > 0], read[read["scores"] <= 0]
    assert len(higher) > 10
    assert len(lower) > 10
    assert higher["pvals"].is_monotonic_increasing
    assert lower["pvals"].is_monotonic_decreasing
    # Scanpy draws a group's first genes by name, at their scores.
    (axes,) = sc.pl.rank_genes_groups(copy, groups=["type_1"], n_genes=20, show=False)
    assert [text.get_text() for text in axes.texts] == read["names"][:20].tolist()
    np.testing.assert_allclose([text.get_position()[1] for text in axes.texts], read["scores"][:20])
    pyplot.close("all")
    return read.set_index("names").join(table[table["group1"] == "type_1"])


def test_scores_of_fold_changes_rank(simulated):
    read = ranked(simulated[1].differential_expression("cell_type"), simulated[0])
    assert (read["scores"] * read["lfc_mean"] >= 0).all()
    # Scanpy's own scores and p-values are related so.
    told = read[read["pvals"] > 0]
    assert len(told) > 20
    np.testing.assert_allclose(2 * stats.norm.sf(told["scores"].abs()), told["pvals"], atol=1e-12)
    surest = read[read["pvals"] == 0]
    assert len(surest) > 20
    assert not surest["scores"].duplicated().any()
    assert surest["scores"].abs().min() > told["scores"].abs().max()
    # Far beyond what draws can show, a score is a z score of the draws' mean and standard deviation.
    far = surest[surest["scores"].abs() > 7]
    assert len(far) > 5
    z = (far["lfc_mean"].abs() - 0.25) / far["lfc_std"]
    np.testing.assert_allclose(far["scores"].abs(), z, rtol=0.01)


def test_scores_of_wins_rank(simulated):
    read = ranked(simulated[1].differential_expression("cell_type", mode="vanilla"), simulated[0])
    assert (np.sign(read["scores"]) == np.sign(read["proba_m1"] - 0.5)).all()
    told, surest = read[read["pvals"] > 0], read[read["pvals"] == 0]
    np.testing.assert_allclose(told["scores"], told["bayes_factor"])
    assert not surest["scores"].duplicated().any()


def test_scores_where_every_cell_wins():
    wins = np.array([1.0, 0.5, 1, 0, 0.9, 0])
    scale1 = np.array([4.0, 1, 2, 1, 1, 1])
    scale2 = np.array([1.0, 1, 1, 2, 1, 8])
    factor = np.log(np.clip(wins, 0.01, 0.99) / (1 - np.clip(wins, 0.01, 0.99)))
    columns = {"proba_m1": wins, "proba_m2": 1 - wins, "bayes_factor": factor, "scale1": scale1, "scale2": scale2}
    table = pd.DataFrame(columns, index=list("abcdef")).assign(group1="one", group2="rest")
    written = de.as_scanpy(table, "kind")
    assert written["names"]["one"].tolist() == ["a", "c", "e", "b", "d", "f"]
    limit = np.log(99)
    np.testing.assert_allclose(written["scores"]["one"], [limit + 2, limit + 1, np.log(9), 0, -limit - 1, -limit - 3])


def test_a_copy_is_not_written_over_something_else(simulated):
    adata, model = simulated
    copy = adata.copy()
    copy.uns["mine"] = {"precious": 1}
    for key in ("scgen", "mine", "a/b", "", True):
        with pytest.raises((TypeError, ValueError), match=r"key_added|adata.uns"):
            model.differential_expression("cell_type", adata=copy, key_added=key)


@pytest.mark.parametrize("values", [np.arange(1200.0), np.array(["1"] * 600 + [1] * 600, object)])
def test_columns_that_are_not_of_groups(simulated, values):
    adata = simulated[0].copy()
    adata.obs["odd"] = pd.Categorical(values)
    with pytest.raises(ValueError, match="names of groups"):
        simulated[1].differential_expression("odd", adata=adata)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either groupby= or idx1="),
        ({"groupby": "cell_type", "idx1": [0]}, "give either groupby= or idx1="),
        ({"idx1": [0], "group1": "type_1"}, "give either groupby= or idx1="),
        ({"idx2": [0]}, "give either groupby= or idx1="),
        ({"group1": "type_1"}, "give either groupby= or idx1="),
        ({"idx1": []}, "idx1 is empty"),
        ({"groupby": "cell_type", "delta": "1"}, "delta='1'"),
        ({"groupby": "cell_type", "seed": None}, "seed=None"),
        ({"groupby": "cell_type", "batch_correction": "batch_1"}, "takes True or False"),
        ({"idx1": [0], "key_added": "rank_genes_groups"}, "use groupby="),
        ({"groupby": "celltype"}, 'not a column of adata.obs .it has: batch, cell_type.*Did you mean "cell_type"'),
        ({"groupby": "cell_type", "group1": "B"}, "'B' is not a group .* type_1, type_2"),
        ({"groupby": "cell_type", "group1": 0}, "'0' is not a group"),
        ({"groupby": ["cell_type"]}, "not a column of adata.obs"),
        ({"groupby": "cell_type", "group1": "type_1", "group2": "type_1"}, "Name two groups"),
        ({"idx1": [0, 1], "idx2": [1, 2]}, "share 1 cell;"),
        ({"idx1": [True] * 120}, "there is nothing to compare"),
        ({"idx1": [120]}, "idx1: .* out of bounds"),
        ({"groupby": "cell_type", "mode": "changes"}, '"change" or "vanilla"'),
        ({"groupby": "cell_type", "delta": -1}, "delta=-1"),
        ({"groupby": "cell_type", "fdr_target": 5}, "fdr_target=5"),
        ({"groupby": "cell_type", "n_samples": 1}, "n_samples=1"),
        ({"groupby": "cell_type", "n_cells": 0.5}, "n_cells=0.5"),
    ],
)
def test_bad_input(trained, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        trained.differential_expression(**arguments)
