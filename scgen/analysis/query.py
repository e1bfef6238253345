"""Cells mapped onto a reference: how typical they are of it, and which of its labels are theirs."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from scgen.data.loader import CellLoader
from scgen.modules.elbo import draw_and_kl
from scgen.modules.vae import VAE

#: Query cells that directions are found in, directions, and the largest residual that counts, in standard deviations.
MAX_CELLS, N_DIRECTIONS, MAX_RESIDUAL = 5000, 10, 10.0


@dataclass(frozen=True)
class Described:
    """What a model says of n cells.

    Attributes
    ----------
    z
        (n, d) posterior means.
    log_total
        (n,) logarithm of what the library is taken from.
    elbo
        (n,) the bound with its likelihood at the posterior means, in nats.
    residuals
        (n, k): (x - mean) / standard deviation of each gene, or their product with given directions.
    """

    z: np.ndarray
    log_total: np.ndarray
    elbo: np.ndarray
    residuals: np.ndarray


@torch.inference_mode()
def described(vae: VAE, loader: CellLoader, directions: np.ndarray | None = None) -> Described:
    """Describe cells; ``directions``, (G, k), keep only as much of their residuals."""
    vae.eval()
    basis = None if directions is None else torch.from_numpy(directions).to(vae.device)
    parts = []
    for cells in loader:
        cells = cells.to(vae.device)
        q = vae.infer(cells)
        likelihood = vae.decoder({name: q[name].mean for name in q}, cells)
        own, counts = likelihood.base_dist, cells.counts.to_dense()
        residuals = ((counts - own.mean) / own.variance.sqrt()).clamp(-MAX_RESIDUAL, MAX_RESIDUAL)
        elbo = likelihood.log_prob(counts) - sum(draw_and_kl(q[name], vae.priors[name](cells), ())[1] for name in q)
        kept = residuals if basis is None else residuals @ basis
        parts.append((q["z"].mean, cells.library[:, 0], elbo, kept))
    return Described(*(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)))


def typicality(
    reference: VAE, reference_cells: CellLoader, train_z: np.ndarray, query: VAE, query_cells: CellLoader, seed: int
) -> pd.DataFrame:
    """Return how typical each query cell is of the reference; see `Query.typicality`.

    Parameters
    ----------
    reference, reference_cells
        The reference's module, and cells of its that it was not trained on, or as good.
    train_z
        Embedding of the cells that it was trained on.
    query, query_cells
        The query's module and its cells.
    seed
        Of the halves.
    """
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(seed)
    halves = rng.permutation(len(query_cells.index)) % 2
    directions = []
    for half in (0, 1):  # of each half, for the other: no cell is judged by a direction that it has part in
        some = np.sort(rng.permutation(np.flatnonzero(halves != half))[: MAX_CELLS // 2])
        directions.append(_directions(query, query_cells, some))
    both = np.concatenate(directions, 1)
    known, new = described(reference, reference_cells, both), described(query, query_cells, both)
    neighbours = NearestNeighbors(n_neighbors=min(15, len(train_z))).fit(train_z)

    def scores(cells: Described) -> np.ndarray:
        sparsity = [np.log(neighbours.kneighbors(one.z)[0].mean(1) + 1e-12) for one in (cells, known)]
        fit = _against(cells.log_total, cells.elbo, known.log_total, known.elbo)
        return np.stack([fit, -_against(cells.log_total, sparsity[0], known.log_total, sparsity[1])], 1)

    known_scores, new_scores = scores(known), scores(new)
    distance, share = np.zeros((2, len(halves)))
    edges = np.cumsum([0, *(part.shape[1] for part in directions)])
    for half in (0, 1):
        own, part = halves == half, slice(edges[half], edges[half + 1])
        ours = np.concatenate([new.residuals[own, part], new_scores[own]], 1)
        theirs = np.concatenate([known.residuals[:, part], known_scores], 1)
        distance[own], null = _mahalanobis(ours, theirs), np.sort(_mahalanobis(theirs, theirs))
        share[own] = (1 + len(null) - np.searchsorted(null, distance[own])) / (1 + len(null))
    elbo, density = new_scores.T
    return pd.DataFrame({"typicality": share, "distance": distance, "elbo": elbo, "density": density})


def _directions(vae: VAE, loader: CellLoader, some: np.ndarray) -> np.ndarray:
    """Return the directions, (G, k), along which these cells' residuals are largest together."""
    from sklearn.utils.extmath import randomized_svd

    if not len(some):
        return np.zeros((loader.store.shape[1], 0), np.float32)
    residuals = described(vae, loader.over(loader.index[some], loader.batch_size)).residuals
    k = min(N_DIRECTIONS, *residuals.shape)
    return randomized_svd(residuals, k, random_state=0)[2].T.copy()


def _against(place: np.ndarray, values: np.ndarray, known_place: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return by how many deviations each value differs from the 200 known ones that are nearest by place."""
    order = np.argsort(known_place)
    window = min(200, len(order))
    start = np.searchsorted(known_place[order], place) - window // 2
    near = np.lib.stride_tricks.sliding_window_view(known[order], window)[np.clip(start, 0, len(order) - window)]
    median = np.median(near, 1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(near - median), 1) + 1e-6  # of a Gaussian, its standard deviation
    return (values - median[:, 0]) / spread


def _mahalanobis(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the distance of each row from the known rows, in units of their spread along every direction."""
    centred = values - known.mean(0)
    return np.sqrt(np.einsum("ni,ij,nj->n", centred, np.linalg.pinv(np.cov(known.T)), centred))


def transfer(
    reference: np.ndarray, labels: pd.Series, query: np.ndarray, n_neighbors: int, unknown_below: float
) -> pd.DataFrame:
    """Return the label that the nearest reference cells vote for, by query cell; see `Query.transfer_labels`.

    Parameters
    ----------
    reference, query
        Embeddings, (N, d) and (n, d).
    labels
        (N,); cells without one (NaN) do not vote.
    n_neighbors, unknown_below
        Number of voters; the share of the votes below which the answer is "unknown".

    Examples
    --------
    >>> labels = pd.Series(["B", "B", "T", "T"])
    >>> reference, query = np.array([[0.0], [1], [8], [9]]), np.array([[0.4], [4.4]])
    >>> transfer(reference, labels, query, 3, 0.7)["label"].tolist()
    ['B', 'unknown']
    """
    from sklearn.neighbors import NearestNeighbors

    voters = labels.notna().to_numpy()
    codes, names = pd.factorize(labels[voters].astype(str), sort=True)
    neighbours = NearestNeighbors(n_neighbors=min(n_neighbors, len(codes))).fit(reference[voters])
    distance, nearest = neighbours.kneighbors(query)
    # A Gaussian as wide as the cell's own neighbourhood.
    weights = np.exp(-((distance / (distance.mean(1, keepdims=True) + 1e-12)) ** 2))
    votes = np.zeros((len(query), len(names)))
    np.add.at(votes, (np.arange(len(query))[:, None], codes[nearest]), weights)
    votes /= votes.sum(1, keepdims=True)
    first = votes.argmax(1)
    share = votes[np.arange(len(query)), first]
    label = np.where(share < unknown_below, "unknown", names.to_numpy()[first])
    return pd.DataFrame({"label": pd.Categorical(label), "share": share})
