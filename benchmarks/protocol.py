"""The protocol of every quality figure: which cells are held out, and how an embedding is scored.

- 20 % of the cells, stratified by batch, are the test cells; no model's ``train`` ever sees them. They and the
  genes are the same for all methods and seeds.
- total = 0.6 bio + 0.4 batch, the unscaled means of scib-metrics' ``Benchmarker`` defaults, over all cells but
  those of no known type; bio only over cells whose labels were not transferred from other cells.
- "fair batch" and "fair total" are of scores that differing shares of types cannot fool, and "scGraph" and "own
  neighbours" say what is distorted: see `benchmarks.fair`.
- SET@N are N cells of a set, drawn at random, or as many as it takes to have 25 cells of each batch, or all of it.
  SET+G has only its G most variable genes, of all cells; SET@N+G are both.
- Other sets than `SETS` have their labels, if any, in ``obs["cell_type"]``. Without labels, only iLISI and "own
  neighbours" are computed; with one batch, only "bio".
- The test ELBO is the mean over test cells at KL weight 1, over five draws of the latent noise. The marginal
  likelihood, of 100 draws, is over 1000 of the test cells only: the two do not compare with each other. Neither
  compares between the observed library, where both are of p(x | l), and the latent one.
"""

import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
from sklearn.model_selection import train_test_split

from benchmarks import fair

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

#: file -> (batch column, label column)
SETS = {
    "pbmc_10k_5k_cite": ("batch", "cell_type"),
    "kang_ctrl_8donors": ("batch", "cell_type"),
    "kang_ifnb_ctrl_stim": ("condition", "cell_type"),
    "pbmc_atlas_20batches": ("batch", "cell_type"),
}


def read(name: str) -> tuple[anndata.AnnData, np.ndarray, np.ndarray]:
    """Return the set, with a batch in ``obs["batch"]``, and the indices of its training and its test cells."""
    name, _, n_genes = name.partition("+")
    name, _, n = name.partition("@")
    adata = anndata.read_h5ad(DATA / f"{name}.h5ad")
    if name in SETS:
        adata.obs["batch"] = adata.obs[SETS[name][0]]
    elif "batch" not in adata.obs:
        adata.obs["batch"] = "all"
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    if n:
        adata = adata[some(adata.obs["batch"].to_numpy(), int(n))].copy()
    if n_genes:
        # scanpy's own call: a change of scgen must not change the genes on which it is compared with others.
        several = adata.obs["batch"].nunique() > 1
        log = sc.pp.log1p(sc.pp.normalize_total(anndata.AnnData(adata.X.copy(), obs=adata.obs), copy=True), copy=True)
        sc.pp.highly_variable_genes(log, n_top_genes=int(n_genes), batch_key="batch" if several else None)
        adata = adata[:, log.var["highly_variable"].to_numpy()].copy()
        adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
    train, test = train_test_split(
        np.arange(adata.n_obs), test_size=0.2, stratify=adata.obs["batch"].to_numpy(), random_state=0
    )
    return adata, np.sort(train), np.sort(test)


def some(batches: np.ndarray, n: int, fewest: int = 25) -> np.ndarray:
    """Return the indices of n cells drawn at random, with at least ``fewest`` of each batch, or all that it has."""
    order = np.random.default_rng(0).permutation(len(batches))
    rank = pd.Series(batches[order]).groupby(batches[order]).cumcount().to_numpy()
    first = np.flatnonzero(rank < fewest)
    others = np.flatnonzero(rank >= fewest)
    return np.sort(order[np.concatenate([first, others])[: max(n, len(first))]])


def few(test: np.ndarray, n: int = 1000) -> np.ndarray:
    """Return the test cells for questions that are too slow for all of them."""
    return np.sort(np.random.default_rng(0).permutation(test)[:n])


def scores(name: str, adata: anndata.AnnData, embedding: np.ndarray) -> dict[str, float]:
    """Return scib-metrics' default scores of one embedding of a set, those of `fair`, and the totals."""
    from scib_metrics.benchmark import BatchCorrection, BioConservation

    labels = SETS.get(re.split("[@+]", name)[0], (None, "cell_type"))[1]
    adata = anndata.AnnData(
        adata.X, obs=adata.obs, var=adata.var, obsm={"X_pre": fair.components(adata), "X_emb": np.asarray(embedding)}
    )
    if labels not in adata.obs:
        from scib_metrics import ilisi_knn
        from scib_metrics.nearest_neighbors import pynndescent

        neighbours = pynndescent(adata.obsm["X_emb"], n_neighbors=90, random_state=0)
        batches = adata.obs["batch"].astype(str).to_numpy()
        found = fair.distortion(adata, adata.obsm["X_emb"], np.full(adata.n_obs, "all"), batches)
        mixed = float(ilisi_knn(neighbours, adata.obs["batch"].cat.codes.to_numpy()))
        return {"iLISI": mixed, "own neighbours": found["own neighbours"]}
    adata = adata[~adata.obs[labels].astype(str).isin(["unassigned", "NA", "Excluded", "undetermined"])].copy()
    own = np.ones(adata.n_obs, dtype=bool)
    if "label_source" in adata.obs:
        own = ~adata.obs["label_source"].astype(str).str.startswith("transferred").to_numpy()
    types, batches = (adata.obs[column].astype(str).to_numpy() for column in (labels, "batch"))
    several = len(np.unique(batches)) > 1
    of_types = {"bio_conservation_metrics": BioConservation(isolated_labels=several), "batch_correction_metrics": None}
    rows = of_benchmarker("bio", adata[own].copy(), labels, of_types)
    if not several:
        return rows
    of_batches = {"bio_conservation_metrics": None, "batch_correction_metrics": BatchCorrection()}
    rows |= of_benchmarker("batch", adata, labels, of_batches)
    rows |= fair.batch_scores(adata.obsm["X_emb"], adata.obsm["X_pre"], types, batches)
    rows |= fair.distortion(adata, adata.obsm["X_emb"], types, batches)
    parts = [rows[part] for part in ("PCR within types", "CiLISI", "BRAS", "KBET", "Graph connectivity")]
    rows["fair batch"] = float(np.nanmean(parts))
    rows["total"] = 0.6 * rows["bio"] + 0.4 * rows["batch"]
    rows["fair total"] = 0.6 * rows["bio"] + 0.4 * rows["fair batch"]
    return rows


def of_benchmarker(kind: str, adata: anndata.AnnData, labels: str, metrics: dict) -> dict[str, float]:
    """Return scib-metrics' scores of ``obsm["X_emb"]``, and their mean under the name ``kind``."""
    from scib_metrics.benchmark import Benchmarker

    run = Benchmarker(
        adata,
        batch_key="batch",
        label_key=labels,
        embedding_obsm_keys=["X_emb"],
        pre_integrated_embedding_obsm_key="X_pre",
        n_jobs=2,
        progress_bar=False,
        **metrics,
    )
    run.benchmark()
    table = run.get_results(min_max_scale=False).drop(index="Metric Type")
    values = table.loc["X_emb"].drop(["Total", "Bio conservation", "Batch correction"], errors="ignore")
    found = {name: float(value) for name, value in values.items()}
    return found | {kind: float(np.mean(list(found.values())))}
