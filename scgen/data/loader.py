"""Minibatches of cells: in which order, and of what size."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from scgen.data.cells import Cells
from scgen.data.stores import BackedStore, MemoryStore


class CellLoader:
    """Iterates over some cells of a store in minibatches of nearly equal size.

    They differ by one cell at most, so that no small rest is left over, which batch normalisation could not take.

    Parameters
    ----------
    store
        The values of all N cells.
    columns
        The other fields of `Cells` but for ``index``, for all N cells.
    index
        Rows to iterate over; None for all.
    batch_size
        The largest minibatch.
    rng
        Draws a new order for every pass; None keeps the order of ``index``.
    as_sparse
        Whether sparse values come as CSR tensors, which questions to a model read faster.
    """

    def __init__(
        self,
        store: MemoryStore | BackedStore,
        columns: dict[str, Tensor],
        index: np.ndarray | None = None,
        batch_size: int = 1024,
        rng: np.random.Generator | None = None,
        as_sparse: bool = False,
    ):
        self.store, self.columns, self.batch_size, self.rng = store, columns, batch_size, rng
        self.as_sparse = as_sparse
        self.index = np.arange(store.shape[0]) if index is None else np.asarray(index)

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __iter__(self) -> Iterator[Cells]:
        order = self.index if self.rng is None else self.rng.permutation(self.index)
        columns = {name: column[torch.from_numpy(order)] for name, column in self.columns.items()}
        edges = np.arange(len(self) + 1) * len(order) // max(len(self), 1)
        for start, stop in itertools.pairwise(edges.tolist()):
            rows = order[start:stop]
            some = {name: column[start:stop] for name, column in columns.items()}
            yield Cells(counts=self.store.rows(rows, self.as_sparse), index=torch.from_numpy(rows), **some)


def split(batch: np.ndarray, train_size: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of training and of validation cells, each batch in proportion.

    The cells, sorted by batch and shuffled within, are sampled at equal distances: every batch gives its share of
    validation cells to within one, however small it is.

    Parameters
    ----------
    batch
        (N,) codes.
    train_size
        Share of training cells, in (0, 1].
    rng
        Source of the order.

    Examples
    --------
    >>> import numpy as np
    >>> training, validation = split(np.repeat([0, 1], [90, 10]), 0.9, np.random.default_rng(0))
    >>> len(training), len(validation), int((validation >= 90).sum())
    (90, 10, 1)
    """
    n = len(batch)
    n_validation = n - max(round(n * train_size), min(n, 2))
    order = np.lexsort((rng.random(n), batch))
    picked = ((np.arange(n_validation) + rng.random()) * n / max(n_validation, 1)).astype(int)
    in_validation = np.zeros(n, dtype=bool)
    in_validation[order[picked]] = True
    return np.flatnonzero(~in_validation), np.flatnonzero(in_validation)
