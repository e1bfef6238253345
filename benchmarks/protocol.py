"""The protocol of every quality figure: which cells are held out, and how an embedding is scored.

- 20 % of the cells, stratified by batch, are the test cells; no model's ``train`` ever sees them. They and the
  genes are the same for all methods and seeds.
- total = 0.6 bio + 0.4 batch, the unscaled means of scib-metrics' ``Benchmarker`` defaults, over all cells but
  ``unassigned``; bio only over cells whose labels were not transferred from other cells.
- The test ELBO is the mean over test cells at KL weight 1, over five draws of the latent noise. The marginal
  likelihood, of 100 draws, is over 1000 of the test cells only: the two do not compare with each other. Neither
  compares between the observed library, where both are of p(x | l), and the latent one.
"""

from pathlib import Path

import anndata
import numpy as np
import scanpy as sc
from sklearn.model_selection import train_test_split

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
    adata = anndata.read_h5ad(DATA / f"{name}.h5ad")
    if name in SETS:
        adata.obs["batch"] = adata.obs[SETS[name][0]]
    elif "batch" not in adata.obs:
        adata.obs["batch"] = "all"
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    train, test = train_test_split(
        np.arange(adata.n_obs), test_size=0.2, stratify=adata.obs["batch"].to_numpy(), random_state=0
    )
    return adata, np.sort(train), np.sort(test)


def few(test: np.ndarray, n: int = 1000) -> np.ndarray:
    """Return the test cells for questions that are too slow for all of them."""
    return np.sort(np.random.default_rng(0).permutation(test)[:n])


def pca(adata: anndata.AnnData) -> np.ndarray:
    """Return the uncorrected embedding: 30 components of the log-normalised counts."""
    copy = anndata.AnnData(adata.X.copy())
    sc.pp.normalize_total(copy, target_sum=1e4)
    sc.pp.log1p(copy)
    sc.pp.pca(copy, n_comps=30, random_state=0)
    return copy.obsm["X_pca"]


def scores(name: str, adata: anndata.AnnData, embedding: np.ndarray) -> dict[str, float]:
    """Return scib-metrics' default scores of one embedding of a set, and bio, batch and total."""
    from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation

    labels = SETS[name][1]
    adata = anndata.AnnData(
        adata.X, obs=adata.obs, var=adata.var, obsm={"X_pre": pca(adata), "X_emb": np.asarray(embedding)}
    )
    adata = adata[~adata.obs[labels].astype(str).isin(["unassigned", "NA", "Excluded"])].copy()
    own = np.ones(adata.n_obs, dtype=bool)
    if "label_source" in adata.obs:
        own = ~adata.obs["label_source"].astype(str).str.startswith("transferred").to_numpy()
    rows = {}
    for kind, subset, metrics in (
        ("bio", adata[own].copy(), {"bio_conservation_metrics": BioConservation(), "batch_correction_metrics": None}),
        ("batch", adata, {"bio_conservation_metrics": None, "batch_correction_metrics": BatchCorrection()}),
    ):
        run = Benchmarker(
            subset,
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
        rows |= {name: float(value) for name, value in values.items()}
        rows[kind] = float(np.mean([float(value) for value in values]))
    rows["total"] = 0.6 * rows["bio"] + 0.4 * rows["batch"]
    return rows
