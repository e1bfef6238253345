"""What an integration did: maps before and after, the training curve, and scores."""

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from scgen import plots
from scgen.analysis.scores import integration_scores
from scgen.data.counts import matrix_of
from scgen.models.base import Model

#: Scores are computed on at most so many cells, drawn at random.
MAX_SCORED_CELLS = 20_000
#: The names of what `draw` and `scores` write.
PICTURES, SCORES = ("umap.png", "training.png"), "scores.csv"


def draw(
    model: Model, adata: AnnData, before: np.ndarray, folder: Path, colours: list[str], *, suffix: str = "scgen"
) -> list[Path]:
    """Draw the maps before and after, coloured by columns of obs, and the training curve; return the files' paths.

    Parameters
    ----------
    model, adata
        The model, and what `integrate` and `cluster` made of the cells.
    before
        `uncorrected` of the model.
    folder
        Where to write.
    colours
        Columns of obs.
    suffix
        Ends the names of the embedding and its UMAP in ``adata.obsm``.
    """
    kept = np.flatnonzero(np.isfinite(adata.obsm[f"X_{suffix}"]).all(axis=1))
    xy = np.full((adata.n_obs, 2), np.nan, np.float32)
    xy[kept] = _umap_of(before)
    maps = {"uncorrected (PCA)": xy, "scgen": adata.obsm[f"X_umap_{suffix}"]}
    paths = [folder / name for name in PICTURES]
    plots.scatters(paths[0], maps, {key: adata.obs[key] for key in colours})
    plots.training_curve(paths[1], model.history)
    return paths


def scores(
    adata: AnnData, before: np.ndarray, folder: Path, *, batch_key: str, labels_key: str, suffix: str = "scgen"
) -> pd.DataFrame:
    """Return, and write, the scores of uncorrected PCA and of the embedding; see `integration_scores`."""
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
    table.to_csv(folder / SCORES, float_format="%.4f")
    return table


def uncorrected(model: Model, n_components: int = 30) -> np.ndarray:
    """Return the principal components of the model's cells and genes, log-normalised."""
    import scanpy as sc

    values = matrix_of(model.adata, model.registry.setup.layer)
    copy = AnnData(values.astype(np.float32))  # astype copies: the counts stay as they are
    sc.pp.normalize_total(copy, target_sum=1e4)
    sc.pp.log1p(copy)
    sc.pp.pca(copy, n_comps=min(n_components, min(copy.shape) - 1), random_state=0)
    return copy.obsm["X_pca"]


def _umap_of(embedding: np.ndarray) -> np.ndarray:
    import scanpy as sc

    copy = AnnData(obsm={"X_emb": embedding}, obs=pd.DataFrame(index=np.arange(len(embedding)).astype(str)))
    sc.pp.neighbors(copy, n_neighbors=min(15, len(embedding)), use_rep="X_emb", random_state=0)
    sc.tl.umap(copy, random_state=0, init_pos="spectral" if len(embedding) > 10 else "random")
    return copy.obsm["X_umap"]
