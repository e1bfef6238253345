"""Differential expression: which genes differ between groups of cells, by how much, and how certain this is.

Cells are sampled and decoded once for all comparisons. rho is the decoder's share of each gene. Groups are compared by
draws of the mean of rho over their cells (`group_means`), or cell by cell (`cell_wins`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import special
from torch import Tensor

from scgen.analysis.comparisons import Comparison
from scgen.analysis.counterfactual import Condition, as_if
from scgen.analysis.group_counts import GroupCounts, counts_of
from scgen.arguments import check_choice, check_draws, check_memory, check_number, check_seed, check_whole, set_fields
from scgen.data.loader import CellLoader
from scgen.modules.vae import VAE, question
from scgen.seeding import seeded

#: Each sampled cell is decoded at least this many times, and at least once for each batch to average over.
DECODED = 4

#: Number of pairs drawn for each sampled cell and each decoding, in mode "vanilla".
PAIRS = 4


@question
def _scales(
    vae: VAE, loader: CellLoader, batches: Sequence[int] | None, seed: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Iterate over (first cell, number of the draw, rho (n, G)) of minibatches, for `n_draws` draws of z from q.

    For each draw, all cells are decoded in each of the batches in turn. All cells that are compared thus share a batch.
    """
    start, noise = 0, seeded(seed)
    for cells in vae.minibatches(loader):
        q = vae.posteriors["z"](cells)
        for draw in range(n_draws(batches)):
            with noise:
                z = {"z": q.rsample()}
            for batch in batches or [None]:
                yield start, draw, vae.decoder.expression(z, as_if(cells, Condition(batch))).cpu()
        start += len(cells)


def n_draws(batches: Sequence[int] | None) -> int:
    """Return the smallest number of draws of z that decodes a cell `DECODED` times, once per draw and batch."""
    return -(-DECODED // len(batches or [None]))


def group_means(
    vae: VAE, loader: CellLoader, group: np.ndarray, batches: Sequence[int] | None, n_samples: int, seed: int
) -> np.ndarray:
    """Return draws of the mean of rho over the cells of each group, (K, n_samples, G).

    A draw weights the cells at random (Bayesian bootstrap, Rubin 1981) and uses one of the draws of each cell's z. The
    draws show how uncertain the group's mean is, given these cells.

    Parameters
    ----------
    vae, loader
        The model, and the cells sampled from the groups.
    group
        Group codes of these cells, from 0 to K - 1.
    batches
        Codes of the batches to average over; None leaves each cell in its own.
    n_samples, seed
        Number of draws, and their seed.
    """
    rng = np.random.default_rng(seed)
    n_groups, last = group.max() + 1, None
    sums, totals = None, torch.zeros(n_groups, n_samples, dtype=torch.float32)
    for start, draw, rho in _scales(vae, loader, batches, seed):
        if sums is None:
            sums = torch.zeros(n_groups, n_samples, rho.shape[1], dtype=rho.dtype)
        if start != last:
            weights = torch.from_numpy(rng.standard_exponential((n_samples, len(rho)), dtype=np.float32))
            chosen, last = torch.from_numpy(rng.integers(n_draws(batches), size=weights.shape)), start
        weighted = weights * (chosen == draw)
        codes = group[start : start + len(rho)]
        for code in np.unique(codes):
            members = np.flatnonzero(codes == code)
            sums[code].addmm_(weighted[:, members], rho[members])
            totals[code] += weighted[:, members].sum(1)
    return (sums / totals[..., None]).numpy()


def cell_wins(
    vae: VAE,
    loader: CellLoader,
    group: np.ndarray,
    sizes: np.ndarray,
    comparisons: Sequence[Comparison],
    batches: Sequence[int] | None,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return P(rho_a >= rho_b) for cells a, b of the two sides of each comparison, (C, G), and mean rho, (K, G).

    The loader has all cells in one minibatch. ``sizes`` (K,) are the numbers of cells that the groups have without
    sampling. Other parameters are those of `group_means`.
    """
    rng = np.random.default_rng(seed)
    wins = means = n_decoded = 0
    n_sampled = np.bincount(group)
    members = np.eye(len(sizes))[group].T / n_sampled[:, None]

    def shares(groups: list[int]) -> np.ndarray:
        p = np.where(np.isin(group, groups), (sizes / n_sampled)[group], 0)
        return p / p.sum()

    drawn_by = [(shares(one.groups1), shares(one.groups2)) for one in comparisons]
    for _, _, rho in _scales(vae, loader, batches, seed):
        values, won = rho.numpy(), []
        for both in drawn_by:
            first, second = (rng.choice(len(group), PAIRS * len(group), p=p) for p in both)
            won.append((values[first] >= values[second]).mean(0))
        wins, means, n_decoded = wins + np.array(won), means + members @ values, n_decoded + 1
    return wins / n_decoded, means / n_decoded


def called(probability: np.ndarray, fdr_target: float) -> np.ndarray:
    """Return the largest set of genes, (G,) bool, whose mean of 1 - probability is at most the target.

    Examples
    --------
    >>> called(np.array([0.99, 0.2, 0.9, 0.95]), 0.06).tolist()
    [True, False, True, True]
    """
    order = np.argsort(-probability, kind="stable")
    n_called = np.searchsorted(running_error(probability[order]), fdr_target, side="right")
    result = np.zeros(len(probability), bool)
    result[order[:n_called]] = True
    return result


def running_error(probability: np.ndarray) -> np.ndarray:
    """Return the running mean of 1 - probability, for probabilities in decreasing order."""
    return np.cumsum(1 - probability) / np.arange(1, len(probability) + 1)


def bayes_factor(probability: np.ndarray, n_draws: int) -> np.ndarray:
    """Return log p / (1 - p) for shares p of draws; 0 and 1 are moved by half a draw to keep it finite.

    Examples
    --------
    >>> bayes_factor(np.array([0.0, 0.5, 1.0]), 500).round(2).tolist()
    [-6.91, 0.0, 6.91]
    """
    p = np.clip(probability, 0.5 / n_draws, 1 - 0.5 / n_draws)
    return np.log(p) - np.log1p(-p)


def change(
    means: np.ndarray,
    counts: GroupCounts,
    comparison: Comparison,
    delta: float,
    fdr_target: float,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return the columns of mode "change", which compare the log2 ratio of the two sides' mean rho with delta.

    The decoder's weights are a point estimate, so the draws vary less than the uncertainty of the counts. Each draw is
    therefore multiplied by a Gamma variable with mean 1. Its variance raises that of the draws to the squared standard
    error of the counts.

    Parameters
    ----------
    means, counts
        Results of `group_means`, and of `counts_of` for all cells of the groups.
    """
    unions = [counts.union(groups) for groups in (comparison.groups1, comparison.groups2)]
    draws = [_union_means(means, counts.n_cells, groups) for groups in (comparison.groups1, comparison.groups2)]
    scales = [of_one.mean(0) for of_one in draws]
    unseen = (unions[0].total.sum(0) == 0) & (unions[1].total.sum(0) == 0)
    if unseen.any():
        pseudocount = np.quantile(np.maximum(*scales)[unseen], 0.9)
    else:  # one count in the smaller of the unions; size factors have another unit than shares, which sum to 1
        pseudocount = np.mean([scale.sum() for scale in scales]) / min(union.total.sum() for union in unions)
    logs = []
    for of_one, scale, union in zip(draws, scales, unions, strict=True):
        missing = np.maximum(union.relative_error() - of_one.var(0) / scale**2, 1e-12)
        logs.append(np.log2(of_one * rng.gamma(1 / missing, missing, of_one.shape) + pseudocount))
    lfc = logs[0] - logs[1]
    p = np.maximum((lfc > delta).mean(0), (lfc < -delta).mean(0))
    return pd.DataFrame(
        {
            "proba_de": p,
            "proba_not_de": 1 - p,
            "bayes_factor": bayes_factor(p, len(lfc)),
            "scale1": scales[0],
            "scale2": scales[1],
            "pseudocounts": pseudocount,
            "delta": delta,
            "lfc_mean": lfc.mean(0),
            "lfc_median": np.median(lfc, 0),
            "lfc_std": lfc.std(0),
            "lfc_min": lfc.min(0),
            "lfc_max": lfc.max(0),
            f"is_de_fdr_{fdr_target:g}": called(p, fdr_target),
        }
    )


def vanilla(
    wins: np.ndarray, means: np.ndarray, n_sampled: np.ndarray, n_cells: np.ndarray, one: Comparison
) -> pd.DataFrame:
    """Return the columns of mode "vanilla": P(rho_a >= rho_b) and its log odds.

    The log odds are limited by the number of sampled cells, not by the number of pairs, which is larger.
    """
    fewest = min(n_sampled[one.groups1].sum(), n_sampled[one.groups2].sum())
    return pd.DataFrame(
        {
            "proba_m1": wins,
            "proba_m2": 1 - wins,
            "bayes_factor": bayes_factor(wins, DECODED * fewest),
            "scale1": _union_means(means, n_cells, one.groups1),
            "scale2": _union_means(means, n_cells, one.groups2),
        }
    )


def raw(counts: GroupCounts, comparison: Comparison) -> pd.DataFrame:
    """Return statistics of the stored counts: means, shares of non-zero cells, means of counts / total."""
    columns = {}
    for i, groups in enumerate((comparison.groups1, comparison.groups2), 1):
        means = counts.union(groups).means()
        columns[f"raw_mean{i}"] = means["total"]
        columns[f"non_zeros_proportion{i}"] = means["non_zero"]
        columns[f"raw_normalized_mean{i}"] = means["share"]
    return pd.DataFrame(columns)


def _union_means(means: np.ndarray, n_cells: np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """Return the mean, or draws of it, over a union of groups, (..., G), weighted by their numbers of cells."""
    return np.tensordot((n_cells[groups] / n_cells[groups].sum()).astype(means.dtype), means[groups], 1)


@dataclass(frozen=True)
class Settings:
    """Settings of `ExpressionModel.differential_expression`."""

    mode: str
    delta: float
    fdr_target: float
    n_samples: int
    n_cells: int
    seed: int

    def __post_init__(self):
        plain = {
            "mode": check_choice("mode", self.mode, ("change", "vanilla")),
            "delta": check_number("delta", self.delta, "a log2 fold change from 0", least=0),
            "fdr_target": check_number("fdr_target", self.fdr_target, "a share between 0 and 1", above=0, below=1),
            "n_samples": check_draws("n_samples", self.n_samples, 10),
            "n_cells": check_whole("n_cells", self.n_cells, 10),
            "seed": check_seed(self.seed),
        }
        set_fields(self, plain)


def compare(
    vae: VAE,
    loader: CellLoader,
    genes: list[str],
    group: np.ndarray,
    comparisons: Sequence[Comparison],
    batches: Sequence[int] | None,
    settings: Settings,
) -> pd.DataFrame:
    """Return the table of `ExpressionModel.differential_expression`.

    Parameters
    ----------
    vae, loader, genes
        The model, a loader of all cells in order, and the names of the genes.
    group, comparisons
        Group codes of the cells, -1 for cells in no group, and the comparisons.
    batches
        As in `group_means`.

    Raises
    ------
    ValueError
        If the model is not a model of counts.
    """
    if not vae.has_library:
        raise ValueError('gene_likelihood="normal" has no shares of counts to compare.')
    n_bytes = 8 * settings.n_samples * (group.max() + 1) * len(genes)
    check_memory("n_samples", settings.n_samples, n_bytes, "Ask for fewer, or compare fewer groups.")
    counts, seed = counts_of(loader.store, group, group.max() + 1), settings.seed
    rows = sample(group, settings.n_cells, seed)
    codes, by_change = group[rows], settings.mode == "change"
    some = loader.over(rows, loader.batch_size if by_change else len(rows))
    if by_change:
        means = group_means(vae, some, codes, batches, settings.n_samples, seed)
    else:
        wins, means = cell_wins(vae, some, codes, counts.n_cells, comparisons, batches, seed)
    tables = []
    for i, one in enumerate(comparisons):
        if by_change:
            table = change(means, counts, one, settings.delta, settings.fdr_target, np.random.default_rng([seed, i]))
        else:
            table = vanilla(wins[i], means, np.bincount(codes), counts.n_cells, one)
        table = pd.concat([table, raw(counts, one)], axis=1).set_index(pd.Index(genes))
        # Many genes may be equally certain. Those that are higher in the first group come first.
        table = table.sort_values(["bayes_factor", "lfc_mean" if by_change else "scale1"], ascending=False)
        tables.append(table.assign(comparison=f"{one.name1} vs {one.name2}", group1=one.name1, group2=one.name2))
    return pd.concat(tables)


def as_scanpy(table: pd.DataFrame, groupby: str) -> dict:
    """Return a table of `ExpressionModel.differential_expression` in the form of ``scanpy.tl.rank_genes_groups``.

    As in Scanpy, the genes of a group are sorted by decreasing score. Genes that are higher in the group come first,
    the most certain at the top. Genes that are lower follow, the most certain at the end.
    """
    columns: dict[str, dict] = {name: {} for name in ("names", "scores", "logfoldchanges", "pvals", "pvals_adj")}
    for group, rows in table.groupby("group1", sort=False):
        if "proba_de" in rows:
            p, lfc = rows["proba_de"], rows["lfc_mean"]
            scores = _scores_of_change(rows)
        else:
            p, lfc = rows[["proba_m1", "proba_m2"]].max(axis=1), np.log2(rows["scale1"] / rows["scale2"])
            # If all cells of one group are above all cells of the other, the fold change ranks the genes.
            scores = rows["bayes_factor"] + np.where(p == 1, lfc, 0)
        falling = p.to_numpy().argsort(kind="stable")[::-1]
        error = np.empty(len(p))
        error[falling] = running_error(p.to_numpy()[falling])
        values = {"scores": scores, "logfoldchanges": lfc, "pvals": 1 - p, "pvals_adj": error}
        # Scores are equal if the same number of draws agree. The larger change then comes first.
        higher = lfc if "proba_de" in rows else rows["proba_m1"]
        order = np.lexsort((-lfc, -higher, -scores))
        columns["names"][group] = rows.index.to_numpy(object)[order]
        for name, of_all in values.items():
            columns[name][group] = np.asarray(of_all, np.float64)[order]
    arrays = {name: np.rec.fromarrays(list(of.values()), names=list(of)) for name, of in columns.items()}
    params = {"groupby": groupby, "reference": table["group2"].iloc[0], "method": "scgen", "use_raw": False}
    return {"params": params | {"layer": None, "corr_method": "posterior"}, **arrays}


def _scores_of_change(rows: pd.DataFrame) -> np.ndarray:
    """Return z scores that rank the genes of one comparison in mode "change", (G,), with the sign of the change.

    A score s relates to the probability of an error like a z score to its two-sided p-value: 1 - p = 2 (1 -
    Phi(abs(s))). If all draws agree, p is 1 and cannot rank genes. The score is then the distance of the mean change
    from ``delta``, in standard deviations.
    """
    error = 1 - rows["proba_de"]
    half_a_draw = special.expit(-rows["bayes_factor"]).min()  # if any gene has p = 1
    distance = (rows["lfc_mean"].abs() - rows["delta"]) / np.maximum(rows["lfc_std"], 1e-12)
    size = np.where(
        error > 0,
        -special.ndtri(error / 2),
        # A smooth maximum: above the largest score of other genes, and increasing with the distance.
        np.logaddexp(-special.ndtri(half_a_draw / 2), distance),
    )
    return np.where(rows["lfc_mean"] > 0, size, -size)


def sample(group: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Sample rows of at most ``most`` cells of each group, in random order, so that each minibatch has all groups."""
    order = np.random.default_rng(seed).permutation(np.flatnonzero(group >= 0))
    rank = pd.Series(group[order]).groupby(group[order]).cumcount().to_numpy()
    return order[rank < most]
