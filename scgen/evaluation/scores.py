"""Measure with scib-metrics how well an embedding mixes batches and separates cell types."""

import math
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from anndata import AnnData


def integration_scores(
    embeddings: Mapping[str, np.ndarray], batch: pd.Series, labels: pd.Series, uncorrected: np.ndarray
) -> pd.DataFrame:
    """Return scib-metrics' default scores, unscaled, with one row per metric and one column per embedding.

    Parameters
    ----------
    embeddings
        Embeddings (n, d), by name.
    batch, labels
        Batch and label of each cell, (n,).
    uncorrected
        (n, d): the embedding before integration, with which one of the metrics compares.

    Returns
    -------
    The metrics, then their means "bio" and "batch", and "total" = 0.6 bio + 0.4 batch.

    Notes
    -----
    Where the batches have different shares of the types, two of the scores of batches mislead. "iLISI" rises if
    different types are mixed. "PCR comparison" falls if types are told apart better. "BRAS", "KBET" and "Graph
    connectivity" are within types.

    Raises
    ------
    ImportError
        If scib-metrics is not installed.
    ValueError
        If there are fewer than two batches or two labels.
    """
    try:
        from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation
    except ImportError as error:
        raise ImportError('the scores need scib-metrics: pip install "scgen-vae[scores]"') from error
    if batch.nunique() < 2 or labels.nunique() < 2:
        raise ValueError("the scores need at least two batches and two labels.")
    if labels.value_counts().max() < 2:
        raise ValueError("the scores need labels that several cells share, but each cell has a label of its own.")
    obs = pd.DataFrame(
        {"batch": batch.astype(str).to_numpy(), "label": labels.astype(str).to_numpy()}, dtype="category"
    )
    obs.index = obs.index.astype(str)
    adata = AnnData(np.zeros((len(obs), 1), np.float32), obs=obs, obsm={**embeddings, "uncorrected ": uncorrected})
    run = Benchmarker(
        adata,
        batch_key="batch",
        label_key="label",
        embedding_obsm_keys=list(embeddings),
        bio_conservation_metrics=BioConservation(),
        batch_correction_metrics=BatchCorrection(),
        pre_integrated_embedding_obsm_key="uncorrected ",
        progress_bar=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.benchmark()
    table = run.get_results(min_max_scale=False)
    kinds = table.loc["Metric Type"]
    values = table.drop(index="Metric Type").astype(float)
    bio = values.loc[:, kinds == "Bio conservation"]
    mixing = values.loc[:, kinds == "Batch correction"]
    result = pd.concat([bio, mixing], axis=1)
    result["bio"], result["batch"] = bio.mean(axis=1), mixing.mean(axis=1)
    result["total"] = 0.6 * result["bio"] + 0.4 * result["batch"]
    return result.T[list(embeddings)]


def mixing(z: np.ndarray, batch: np.ndarray, n_neighbors: int = 15) -> float:
    """Return the share of other batches among the cells' nearest neighbours, relative to that expected by chance.

    The result is NaN if there is only one batch.

    Parameters
    ----------
    z
        (n, d) embedding.
    batch
        (n,) names or codes.
    n_neighbors
        Number of neighbours of each cell, without itself; fewer if there are too few cells.

    Examples
    --------
    >>> z = np.random.default_rng(0).normal(size=(1000, 2))
    >>> batch = np.repeat(["a", "b"], 500)
    >>> round(mixing(z, batch), 1), mixing(z + 100 * (batch == "b")[:, None], batch)
    (1.0, 0.0)
    """
    from sklearn.neighbors import NearestNeighbors

    _, codes, sizes = np.unique(batch, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return math.nan
    neighbors = NearestNeighbors(n_neighbors=min(n_neighbors, len(z) - 1)).fit(z).kneighbors(return_distance=False)
    by_chance = (len(z) - sizes[codes]) / (len(z) - 1)
    return float((codes[neighbors] != codes[:, None]).mean() / by_chance.mean())
