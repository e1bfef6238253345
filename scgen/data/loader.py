"""Minibatches of cells: their order and their size."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from scgen import threads
from scgen.arguments import counted, shown
from scgen.data.cells import Cells
from scgen.data.stores import BackedStore, DeviceStore, MemoryStore

#: What holds one source of the cells' values.
Store = MemoryStore | BackedStore | DeviceStore


class CellLoader:
    """Iterate over cells of a store in minibatches of nearly equal size.

    Sizes differ by at most one cell. A small last minibatch would be a problem for batch normalisation.

    Parameters
    ----------
    store
        The counts or normalised values of all N cells.
    columns
        Other fields of the minibatches, for all N cells: tensors with N rows.
    index
        Rows to iterate over; None means all.
    batch_size
        The largest minibatch.
    rng
        Draws a new order for every pass; None keeps the order of ``index``.
    as_sparse
        Whether to return sparse values as CSR tensors.
    device
        Device of the minibatches. ``columns`` are moved there once, the order once per pass. Values come from a
        `DeviceStore` on this device or from the host's memory; for a GPU, through pinned memory.
    impute
        Function that adds the expected counts of genes that were not measured; None if all were measured.
    stores
        Further stores of all N cells, by the field of the minibatches that their rows become; None for none.
    cells_class
        The class of the minibatches: `Cells`, or a subclass that has the fields of ``columns`` and ``stores``.

    Examples
    --------
    A model that also reads two proteins of each cell:

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, kw_only=True)
    ... class CellsWithProteins(Cells):
    ...     proteins: Tensor
    >>> counts, proteins = np.eye(3), np.array([[5, 1], [2, 2], [0, 7]])
    >>> codes = torch.zeros(3, dtype=torch.int64)
    >>> columns = {"library": codes[:, None], "batch": codes, "labels": codes}
    >>> columns |= {"categorical": codes[:, None], "continuous": codes[:, None]}
    >>> further = {"stores": {"proteins": MemoryStore(proteins)}, "cells_class": CellsWithProteins}
    >>> loader = CellLoader(MemoryStore(counts), columns, batch_size=2, **further)
    >>> [cells.proteins.tolist() for cells in loader]
    [[[5.0, 1.0]], [[2.0, 2.0], [0.0, 7.0]]]
    """

    def __init__(
        self,
        store: Store,
        columns: dict[str, Tensor],
        index: np.ndarray | None = None,
        batch_size: int = 1024,
        rng: np.random.Generator | None = None,
        as_sparse: bool = False,
        device: torch.device | str = "cpu",
        impute: Callable[[Cells], Cells] | None = None,
        stores: Mapping[str, Store] | None = None,
        cells_class: type[Cells] = Cells,
    ):
        self.store, self.batch_size, self.rng = store, batch_size, rng
        self.as_sparse, self.device, self.impute = as_sparse, torch.device(device), impute
        self.stores, self.cells_class = stores or {}, cells_class
        self.columns = {name: column.to(device) for name, column in columns.items()}
        self.index = np.arange(store.shape[0]) if index is None else np.asarray(index)

    def over(self, index: np.ndarray, batch_size: int) -> "CellLoader":
        """Return a loader of other cells of the same store, in the order of ``index``."""
        other = copy.copy(self)
        other.index, other.batch_size, other.rng = np.asarray(index), batch_size, None
        return other

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __iter__(self) -> Iterator[Cells]:
        order = self.index if self.rng is None else self.rng.permutation(self.index)
        index = self._moved(torch.from_numpy(order))
        columns = {name: column[index] for name, column in self.columns.items()}
        edges = np.arange(len(self) + 1) * len(order) // max(len(self), 1)
        for start, stop in itertools.pairwise(edges.tolist()):
            threads.watch.look()
            here = slice(start, stop)
            some = {name: column[here] for name, column in columns.items()}
            some |= {name: self._rows(store, order[here], index[here]) for name, store in self.stores.items()}
            counts = self._rows(self.store, order[here], index[here], self.as_sparse)
            cells = self.cells_class(counts=counts, index=index[here], **some)
            yield cells if self.impute is None else self.impute(cells)

    def _rows(self, store: Store, rows: np.ndarray, rows_on_device: Tensor, as_sparse: bool = False) -> Tensor:
        return self._moved(store.rows(rows_on_device if isinstance(store, DeviceStore) else rows, as_sparse))

    def _moved(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device. A GPU reads pinned memory while the host continues."""
        if tensor.device.type == self.device.type:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def split(batch: np.ndarray, train_size: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of training and of validation cells, with the same share of each batch.

    The cells are sorted by batch, shuffled within each batch and sampled at equal distances. The number of validation
    cells of a batch therefore differs from its share by at most one, even for small batches.

    Parameters
    ----------
    batch
        (N,) codes.
    train_size
        Share of training cells, in (0, 1].
    rng
        Random generator.

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
    """Return the rows given by row numbers or by a mask, in their order; None returns all.

    Raises
    ------
    TypeError
        If ``indices`` is neither row numbers nor a mask.
    ValueError
        If a row is out of range, or there are no rows.

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
        except Exception as error:  # anything that cannot be an array, such as lists of different lengths
            raise TypeError(takes) from error
        if asked.size and asked.dtype.kind not in "iub":
            raise TypeError(takes)
        if asked.ndim > 1:
            raise ValueError(takes)
        if asked.dtype == bool and len(asked) != n_cells:
            raise ValueError(f"{name} is a mask of length {len(asked)}, but adata has {counted(n_cells, 'cell')}.")
        # Checked before indexing: NumPy would take a number beyond int64 for a row counted from the end.
        outside = asked[(asked < -n_cells) | (asked >= n_cells)] if asked.dtype != bool else asked[:0]
        if len(outside):
            raise ValueError(f"{name}: row {outside[0]} is out of bounds; adata has {counted(n_cells, 'cell')}.")
        index = index[asked] if len(asked) else index[:0]
    if not len(index):
        raise ValueError(f"{name} is empty: choose at least one cell.")
    return index
