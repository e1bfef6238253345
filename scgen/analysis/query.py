"""Compare query cells with their reference: how typical they are of it, and which of its labels they get."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from scgen.data.loader import CellLoader
from scgen.modules.elbo import draw_and_kl
from scgen.modules.vae import VAE, question
from scgen.seeding import seeded

#: Number of query cells to find directions in, number of directions, and the residuals' limit (standard deviations).
MAX_CELLS, N_DIRECTIONS, MAX_RESIDUAL = 5000, 10, 10.0
#: Cells that a new batch needs to be compared with itself, and the share of its cells that define what is usual.
MIN_BATCH, BULK = 50, 0.8


@dataclass(frozen=True)
class Described:
    """A model's results for n cells.

    Attributes
    ----------
    z
        (n, d) posterior means.
    log_total
        (n,) logarithm of the total count or of the size factor.
    elbo
        (n,) the bound, with the likelihood at the posterior means, in nats.
    residuals
        (n, k): (x - mean) / standard deviation of each gene, or these projected onto directions.
    """

    z: np.ndarray
    log_total: np.ndarray
    elbo: np.ndarray
    residuals: np.ndarray


@question
def described(vae: VAE, loader: CellLoader, directions: np.ndarray | None = None) -> Described:
    """Compute the results for cells; ``directions``, (G, k), project their residuals."""
    parts = []
    basis = None if directions is None else torch.from_numpy(directions).to(vae.device)
    for cells in vae.minibatches(loader):
        q = vae.infer(cells)
        likelihood = vae.decoder({name: q[name].mean for name in q}, cells)
        own, target = likelihood.base_dist, vae.decoder.target(cells).to_dense()
        residuals = ((target - own.mean) / own.variance.sqrt()).clamp(-MAX_RESIDUAL, MAX_RESIDUAL)
        with seeded(0):  # a divergence without a closed form is estimated from a draw
            kl = sum(draw_and_kl(q[name], vae.prior(name, cells), ())[1] for name in q)
        elbo = likelihood.log_prob(target) - kl
        kept = residuals if basis is None else residuals @ basis
        parts.append((q["z"].mean, cells.library[:, 0], elbo, kept))
    return Described(*(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)))


def typicality(
    vae: VAE,
    reference_cells: CellLoader,
    train_z: np.ndarray,
    query_cells: CellLoader,
    new_batch: np.ndarray,
    seed: int,
) -> pd.DataFrame:
    """Return how typical each query cell is of the reference; see `Query.typicality`.

    Parameters
    ----------
    vae
        The query's module.
    reference_cells, query_cells
        Validation cells of the reference (or all its cells), and the new cells.
    train_z
        Embedding of the reference's training cells.
    new_batch
        (n,) code of the new batch of each query cell, -1 for batches that the reference knows.
    seed
        Seed of the split into halves.
    """
    rng = np.random.default_rng(seed)
    halves = rng.permutation(len(query_cells.index)) % 2
    shift = _shift(vae, query_cells, new_batch)
    directions = []
    for half in (0, 1):  # each half uses directions from the other half, so that no cell affects its own
        some = np.sort(rng.permutation(np.flatnonzero(halves != half))[: MAX_CELLS // 2])
        directions.append(_directions(vae, query_cells, some, new_batch, shift))
    both = np.concatenate(directions, 1)
    known, new = described(vae, reference_cells, both), described(vae, query_cells, both)
    _take_off(new.residuals, new_batch, {batch: mean @ both for batch, mean in shift.items()})
    return _compared(new, known, train_z, new_batch, halves, directions[0].shape[1])


def _compared(
    new: Described, known: Described, train_z: np.ndarray, new_batch: np.ndarray, halves: np.ndarray, n_first: int
) -> pd.DataFrame:
    """Return the table of `Query.typicality`; the first ``n_first`` residuals are for half 0, the others for half 1."""
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=min(16, len(train_z))).fit(train_z)

    def sparsity(cells: Described) -> np.ndarray:
        distance, _ = neighbours.kneighbors(cells.z)
        own = (distance[:, :1] == 0).astype(int)  # a cell is not its own neighbour
        distance = np.take_along_axis(distance, own + np.arange(distance.shape[1] - 1), 1)
        return np.log(distance.mean(1) + 1e-12)

    theirs = np.column_stack([known.elbo, -sparsity(known)])
    ours = np.column_stack([new.elbo, -sparsity(new)])
    values, distance, share = np.empty_like(ours, float), np.empty(len(ours)), np.full(len(ours), np.nan)
    of_known = _all_against(known.log_total, theirs, known.log_total, theirs)
    for batch in np.unique(new_batch):
        rows = np.flatnonzero(new_batch == batch)
        with_itself = batch >= 0 and len(rows) >= MIN_BATCH
        place = (new.log_total[rows], ours[rows]) if with_itself else (known.log_total, theirs)
        values[rows] = _all_against(new.log_total[rows], ours[rows], *place)
        for half, own in enumerate((slice(0, n_first), slice(n_first, None))):
            judged = halves[rows] == half
            of_new, residuals = new.residuals[rows, own], known.residuals[:, own]
            if with_itself:
                far, odd = _among_themselves(values[rows, 1], of_new, of_known[:, 1], residuals)
            else:
                from_known = np.column_stack([of_known, residuals])
                far = _mahalanobis(np.column_stack([values[rows], of_new]), from_known)
                odd = _share(far, _without_self(_mahalanobis(from_known, from_known), len(from_known)))
            distance[rows[judged]] = far[judged]
            if batch < 0 or with_itself:
                share[rows[judged]] = odd[judged]
    return pd.DataFrame(
        {
            "typicality": share,
            "distance": distance,
            "elbo": values[:, 0],
            "density": values[:, 1],
            "new_batch": new_batch >= 0,
        }
    )


def _among_themselves(
    density: np.ndarray, residuals: np.ndarray, known_density: np.ndarray, known_residuals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return how far out each cell of a new batch lies in its batch, and the share of known cells at least as far out.

    Two measures are combined: the distance from the bulk of the batch's residuals, scaled to have the median of the
    known cells, and the density of the reference's cells in z, relative to the batch's cells. The more extreme of the
    two counts. They are computed separately for two reasons. A type that the residuals do not show may lie far from
    the reference's cells in z. And a batch changes the residuals much more than the density.
    """
    known_distance = _without_self(_mahalanobis(known_residuals, known_residuals), len(known_residuals))
    distance = _from_bulk(residuals)
    distance *= np.median(known_distance) / (np.median(distance) + 1e-12)
    smaller = np.minimum(_share(distance, known_distance), _share(-density, -known_density))
    known_smaller = np.minimum(_share(known_distance, known_distance), _share(-known_density, -known_density))
    return distance, _share(-smaller, -known_smaller)


def _share(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return, for each value, the share of the known values and itself that are at least as large."""
    return (1 + len(known) - np.searchsorted(np.sort(known), values)) / (1 + len(known))


def _part(loader: CellLoader, rows: np.ndarray) -> CellLoader:
    return loader.over(loader.index[rows], loader.batch_size)


def _shift(vae: VAE, loader: CellLoader, new_batch: np.ndarray) -> dict[int, np.ndarray]:
    """Return the mean residual of each gene, (G,), for each new batch: the effect of the batch."""
    means = {}
    for batch in np.unique(new_batch[new_batch >= 0]):
        rows = np.flatnonzero(new_batch == batch)[:MAX_CELLS]
        means[batch] = described(vae, _part(loader, rows)).residuals.mean(0)
    return means


def _take_off(residuals: np.ndarray, new_batch: np.ndarray, shift: dict[int, np.ndarray]) -> None:
    """Subtract each batch's shift from the residuals of its cells, in place."""
    for batch, mean in shift.items():
        residuals[new_batch == batch] -= mean


def _directions(
    vae: VAE, loader: CellLoader, some: np.ndarray, new_batch: np.ndarray, shift: dict[int, np.ndarray]
) -> np.ndarray:
    """Return the directions, (G, k), that explain most of these cells' residuals (singular vectors)."""
    from sklearn.utils.extmath import randomized_svd

    if not len(some):
        return np.zeros((loader.store.shape[1], 0), np.float32)
    residuals = described(vae, _part(loader, some)).residuals
    _take_off(residuals, new_batch[some], shift)
    k = min(N_DIRECTIONS, *residuals.shape)
    return randomized_svd(residuals, k, random_state=0)[2].T.copy()


def _against(place: np.ndarray, values: np.ndarray, known_place: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return by how many standard deviations each value differs from the 200 known values with the nearest place."""
    order = np.argsort(known_place)
    window = min(200, len(order))
    start = np.searchsorted(known_place[order], place) - window // 2
    near = np.lib.stride_tricks.sliding_window_view(known[order], window)[np.clip(start, 0, len(order) - window)]
    median = np.median(near, 1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(near - median), 1) + 1e-6  # for a Gaussian, the standard deviation
    return (values - median[:, 0]) / spread


def _all_against(place: np.ndarray, values: np.ndarray, known_place: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Apply `_against` to each column."""
    return np.column_stack([_against(place, values[:, i], known_place, known[:, i]) for i in range(values.shape[1])])


def _from_bulk(values: np.ndarray) -> np.ndarray:
    """Return the distance of each row from the bulk of the rows, in units of the bulk's spread.

    The bulk is found like that of the minimum covariance determinant (Rousseeuw and Van Driessen 1999). It starts as
    the rows nearest to the medians. It is then replaced by the rows nearest to its mean, until it does not change.
    """
    median = np.median(values, 0)
    spread = 1.4826 * np.median(np.abs(values - median), 0) + 1e-6
    distance, bulk = np.square((values - median) / spread).sum(1), None
    for _ in range(20):
        nearest = np.sort(np.argsort(distance, kind="stable")[: int(np.ceil(BULK * len(values)))])
        if bulk is not None and np.array_equal(nearest, bulk):
            break
        bulk = nearest
        distance = _mahalanobis(values, values[bulk])
    return distance


def _mahalanobis(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the Mahalanobis distance of each row from the known rows."""
    centred = values - known.mean(0)
    inverse = np.linalg.pinv(np.atleast_2d(np.cov(known.T)))  # cov of one column is a scalar
    return np.sqrt(np.einsum("ni,ij,nj->n", centred, inverse, centred))


def _without_self(distance: np.ndarray, n: int) -> np.ndarray:
    """Convert the distances of n rows from all n rows to those from the n - 1 others, by an exact rank-one update."""
    square = distance**2
    rest = np.clip(1 - n * square / (n - 1) ** 2, 1e-12, None)
    return np.sqrt((n / (n - 1)) ** 2 * (n - 2) * square / (n - 1) / rest)


def transfer(
    reference: np.ndarray, labels: pd.Series, query: np.ndarray, n_neighbors: int, unknown_below: float
) -> pd.DataFrame:
    """Return the label of each query cell, by a vote of the nearest reference cells; see `Query.transfer_labels`.

    Parameters
    ----------
    reference, query
        Embeddings, (N, d) and (n, d).
    labels
        (N,) labels of the reference; cells without a label (NaN) do not vote.
    n_neighbors, unknown_below
        Number of voters; share of the votes below which the label is "unknown".

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
    # A Gaussian whose width is the mean distance of the cell's neighbours.
    weights = np.exp(-((distance / (distance.mean(1, keepdims=True) + 1e-12)) ** 2))
    votes = np.zeros((len(query), len(names)))
    np.add.at(votes, (np.arange(len(query))[:, None], codes[nearest]), weights)
    votes /= votes.sum(1, keepdims=True)
    first = votes.argmax(1)
    share = votes[np.arange(len(query)), first]
    label = np.where(share < unknown_below, "unknown", names.to_numpy()[first])
    return pd.DataFrame({"label": pd.Categorical(label), "share": share})
