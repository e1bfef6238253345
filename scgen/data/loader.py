"""Minibatches of cells: in which order, and of what size."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from scgen import threads
from scgen.arguments import shown
from scgen.data.cells import Cells
from scgen.data.stores import BackedStore, DeviceStore, MemoryStore


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
        Whether sparse values come as CSR tensors.
    device
        Where the minibatches go. ``columns`` are moved there once, the order once a pass; values come from a
        `DeviceStore` that is there, or from the host's memory, through pinned memory to a GPU.
    impute
        Adds to a minibatch the expected counts of genes that were not measured; None where all were.
    """

    def __init__(
        self,
        store: MemoryStore | BackedStore | DeviceStore,
        columns: dict[str, Tensor],
        index: np.ndarray | None = None,
        batch_size: int = 1024,
        rng: np.random.Generator | None = None,
        as_sparse: bool = False,
        device: torch.device | str = "cpu",
        impute: Callable[[Cells], Cells] | None = None,
    ):
        self.store, self.batch_size, self.rng = store, batch_size, rng
        self.as_sparse, self.device, self.impute = as_sparse, torch.device(device), impute
        self.columns = {name: column.to(device) for name, column in columns.items()}
        self.index = np.arange(store.shape[0]) if index is None else np.asarray(index)

    def over(self, index: np.ndarray, batch_size: int) -> "CellLoader":
        """Return a loader of other cells of the same store, in their order."""
        return CellLoader(self.store, self.columns, index, batch_size, None, self.as_sparse, self.device, self.impute)

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __iter__(self) -> Iterator[Cells]:
        order = self.index if self.rng is None else self.rng.permutation(self.index)
        index = self._moved(torch.from_numpy(order))
        columns = {name: column[index] for name, column in self.columns.items()}
        rows = index if isinstance(self.store, DeviceStore) else order
        edges = np.arange(len(self) + 1) * len(order) // max(len(self), 1)
        for start, stop in itertools.pairwise(edges.tolist()):
            threads.watch.look()
            counts = self._moved(self.store.rows(rows[start:stop], self.as_sparse))
            some = {name: column[start:stop] for name, column in columns.items()}
            cells = Cells(counts=counts, index=index[start:stop], **some)
            yield cells if self.impute is None else self.impute(cells)

    def _moved(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device; a GPU reads pinned memory by itself, while the host goes on."""
        if tensor.device.type == self.device.type:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


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


def rows_asked_for(indices: Sequence[int] | Sequence[bool] | None, n_cells: int, name: str = "indices") -> np.ndarray:
    """Return the rows that row numbers or a mask stand for, in their order; None stands for all.

    Raises
    ------
    TypeError
        If they are neither.
    ValueError
        If they are out of range, or none.

    Examples
    --------
    >>> rows_asked_for([True, False, True], 3).tolist(), rows_asked_for([2, -3], 3).tolist()
    ([0, 2], [2, 0])
    """
    index = np.arange(n_cells)
    if indices is not None:
        takes = f"{name}={shown(indices)}; it takes row numbers, or one True or False for each cell."
        try:
            asked = np.atleast_1d(np.asarray(indices))
        except Exception as error:  # whatever cannot be an array, as lists of several lengths
            raise TypeError(takes) from error
        if asked.size and asked.dtype.kind not in "iub":
            raise TypeError(takes)
        if asked.ndim > 1:
            raise ValueError(takes)
        if asked.dtype == bool and len(asked) != n_cells:
            raise ValueError(f"{name} is a mask of {len(asked)} for {n_cells} cells.")
        # Said before NumPy looks: what is beyond int64, it would take for a row from the end.
        outside = asked[(asked < -n_cells) | (asked >= n_cells)] if asked.dtype != bool else asked[:0]
        if len(outside):
            raise ValueError(f"{name}: row {outside[0]} is out of bounds; adata has {n_cells} cells.")
        index = index[asked] if len(asked) else index[:0]
    if not len(index):
        raise ValueError(f"no cells are asked about: {name} is empty.")
    return index
