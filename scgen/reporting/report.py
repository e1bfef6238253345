"""What an integration did: maps before and after, the training curve, and scores."""

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scgen import plots
from scgen.data.counts import matrix_of
from scgen.evaluation.scores import integration_scores
from scgen.models.base import Model
from scgen.workflows.clustering import add_umap

#: Scores are computed on at most so many cells, drawn at random.
MAX_SCORED_CELLS = 20_000
#: The names of the files that `draw` and `scores` write.
PICTURES, SCORES = ("umap.png", "training.png"), ("scores.csv", "scores.png")
#: Each batch has a panel of its own on the map if there are at most so many.
FEW_BATCHES = 6


def draw(
    model: Model, adata: AnnData, before: np.ndarray, folder: Path, colours: list[str], *, suffix: str = "scgen"
) -> list[Path]:
    """Draw the maps before and after, coloured by columns of obs, and the training curve; return the files' paths.

    Leiden clusters are drawn only on the map after, because they were found there. If there are few batches, each has a
    panel of its own.

    Parameters
    ----------
    model, adata
        The model, and what `integrate` and `cluster` made of the cells.
    before
        What `uncorrected` returned for the model.
    folder
        Where to write.
    colours
        Columns of obs, the one of the batches first.
    suffix
        End of the names of the embedding and its UMAP in ``adata.obsm``, and of the clusters in ``adata.obs``.
    """
    kept = np.flatnonzero(np.isfinite(adata.obsm[f"X_{suffix}"]).all(axis=1))
    xy = np.full((adata.n_obs, 2), np.nan, np.float32)
    uncorrected_cells = AnnData(obs=pd.DataFrame(index=adata.obs_names[kept]), obsm={"X_pca": before})
    add_umap(uncorrected_cells, "X_pca", "neighbors_pca", seed=0)
    xy[kept] = uncorrected_cells.obsm["X_umap"]
    maps = {"uncorrected (PCA)": xy, "scgen": adata.obsm[f"X_umap_{suffix}"]}
    paths = [folder / name for name in PICTURES]
    n_batches = adata.obs[colours[0]].nunique()
    plots.scatters(
        maps,
        {key: adata.obs[key] for key in colours},
        last_map_only=[key for key in colours if key == f"leiden_{suffix}"],
        split_by=colours[0] if 2 <= n_batches <= FEW_BATCHES else None,
        save=paths[0],
    )
    plots.history(model, save=paths[1])
    return paths


def scores(
    adata: AnnData, before: np.ndarray, folder: Path, *, batch_key: str, labels_key: str, suffix: str = "scgen"
) -> pd.DataFrame:
    """Return the scores of uncorrected PCA and of the embedding, and write them; see `integration_scores`."""
    embedding = np.asarray(adata.obsm[f"X_{suffix}"])
    kept = np.flatnonzero(np.isfinite(embedding).all(axis=1))
    after, obs = embedding[kept], adata.obs.iloc[kept]
    labelled = np.flatnonzero(obs[labels_key].notna())
    chosen = np.sort(np.random.default_rng(0).permutation(labelled)[:MAX_SCORED_CELLS])
    table = integration_scores(
        {"uncorrected PCA": before[chosen], "scgen": after[chosen]},
        obs[batch_key].iloc[chosen],
        obs[labels_key].iloc[chosen],
        before[chosen],
    )
    table.to_csv(folder / SCORES[0], float_format="%.4f")
    plots.scores(table, save=folder / SCORES[1])
    return table


def uncorrected(model: Model, n_components: int = 30) -> np.ndarray:
    """Return the principal components of the model's cells and genes, log-normalised."""
    import scanpy as sc

    values = matrix_of(model.adata, model.registry.setup)
    copy = AnnData(values.astype(np.float32))  # astype copies: the counts stay as they are
    sc.pp.normalize_total(copy, target_sum=1e4)
    sc.pp.log1p(copy)
    if min(copy.shape) < 2:  # there is nothing to reduce
        return np.asarray(copy.X.toarray() if sparse.issparse(copy.X) else copy.X)
    sc.pp.pca(copy, n_comps=min(n_components, min(copy.shape) - 1), random_state=0)
    return copy.obsm["X_pca"]
