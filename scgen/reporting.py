"""What an integration did: maps before and after, the training curve, and scores."""

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from scgen import plots
from scgen.analysis.scores import integration_scores
from scgen.models.base import Model

#: Scores are computed on at most so many cells, drawn at random.
MAX_SCORED_CELLS = 20_000


def draw(
    model: Model, adata: AnnData, folder: Path, *, batch_key: str, labels_key: str | None, basis: str, umap: str
) -> list[Path]:
    """Draw ``umap.png``, before and after by batch, label and cluster, and ``training.png``; return their paths."""
    kept = np.flatnonzero(np.isfinite(adata.obsm[basis]).all(axis=1))
    before = np.full((adata.n_obs, 2), np.nan, np.float32)
    before[kept] = _umap_of(uncorrected(model))
    maps = {"uncorrected (PCA)": before, "scgen": adata.obsm[umap]}
    colours = {key: adata.obs[key] for key in (batch_key, labels_key) if key is not None}
    paths = [folder / "umap.png", folder / "training.png"]
    plots.scatters(paths[0], maps, colours)
    plots.training_curve(paths[1], model.history)
    return paths


def scores(model: Model, adata: AnnData, *, batch_key: str, labels_key: str, basis: str) -> pd.DataFrame:
    """Return the scores of uncorrected PCA and of the embedding; see `integration_scores`."""
    kept = np.flatnonzero(np.isfinite(adata.obsm[basis]).all(axis=1))
    before, after, obs = uncorrected(model), np.asarray(adata.obsm[basis])[kept], adata.obs.iloc[kept]
    labelled = np.flatnonzero(obs[labels_key].notna())
    chosen = np.sort(np.random.default_rng(0).permutation(labelled)[:MAX_SCORED_CELLS])
    return integration_scores(
        {"uncorrected PCA": before[chosen], "scgen": after[chosen]},
        obs[batch_key].iloc[chosen],
        obs[labels_key].iloc[chosen],
        before[chosen],
    )


def uncorrected(model: Model, n_components: int = 30) -> np.ndarray:
    """Return the principal components of the model's cells and genes, log-normalised."""
    import scanpy as sc

    copy = AnnData(model.adata.X.astype(np.float32))
    sc.pp.normalize_total(copy, target_sum=1e4)
    sc.pp.log1p(copy)
    sc.pp.pca(copy, n_comps=min(n_components, min(copy.shape) - 1), random_state=0)
    return copy.obsm["X_pca"]


def _umap_of(embedding: np.ndarray) -> np.ndarray:
    import scanpy as sc

    copy = AnnData(obsm={"X_emb": embedding}, obs=pd.DataFrame(index=np.arange(len(embedding)).astype(str)))
    sc.pp.neighbors(copy, n_neighbors=min(15, len(embedding)), use_rep="X_emb", random_state=0)
    sc.tl.umap(copy, random_state=0)
    return copy.obsm["X_umap"]
