"""Where the values of the cells lie, and how some rows of them become a dense tensor."""

from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from scgen.kernels import dispatch


class MemoryStore:
    """A matrix in memory: dense, or sparse in any of scipy's formats.

    Parameters
    ----------
    matrix
        (N, G'), numbers of any dtype. CSR and dense are read in place; other sparse formats are copied to CSR.
    columns
        Which G columns to read, in this order; None for all.
    """

    def __init__(self, matrix: np.ndarray | sparse.spmatrix | sparse.sparray, columns: np.ndarray | None = None):
        self.matrix = matrix.tocsr() if sparse.issparse(matrix) else np.asarray(matrix)
        if columns is not None:
            self.matrix = self.matrix[:, columns]
        self.shape = self.matrix.shape

    def rows(self, index: np.ndarray) -> Tensor:
        """Return the rows ``index``, in its order, as a dense float32 tensor (n, G)."""
        return dispatch.dense_rows(self.matrix, index) if sparse.issparse(self.matrix) else _dense(self.matrix[index])

    def blocks(self, n_rows: int = 8192) -> Iterator[tuple[int, np.ndarray | sparse.csr_matrix]]:
        """Iterate over (first row, block of rows as stored)."""
        for start in range(0, self.shape[0], n_rows):
            yield start, self.matrix[start : start + n_rows]


class BackedStore:
    """A matrix on disk, h5ad or zarr, of which only the rows asked for are read.

    Parameters
    ----------
    matrix
        (N, G'): h5py or zarr dataset, or AnnData's backed sparse matrix.
    columns
        As in `MemoryStore`.
    """

    def __init__(self, matrix, columns: np.ndarray | None = None):
        self.matrix, self.columns = matrix, columns
        self.shape = (matrix.shape[0], matrix.shape[1] if columns is None else len(columns))

    def rows(self, index: np.ndarray) -> Tensor:
        """Return the rows ``index``, in its order, as a dense float32 tensor (n, G)."""
        # Files are read in ascending order, each row once; the order asked for is restored here.
        ascending, inverse = np.unique(index, return_inverse=True)
        return _dense(self._cut(self.matrix[ascending])[inverse])

    def blocks(self, n_rows: int = 8192) -> Iterator[tuple[int, np.ndarray | sparse.csr_matrix]]:
        """Iterate over (first row, block of rows as stored)."""
        for start in range(0, self.shape[0], n_rows):
            yield start, self._cut(self.matrix[start : start + n_rows])

    def _cut(self, block):
        block = block.tocsr() if sparse.issparse(block) else block
        return block if self.columns is None else block[:, self.columns]


def open_store(matrix, columns: np.ndarray | None = None) -> MemoryStore | BackedStore:
    """Return the store for a matrix, by where it lies."""
    in_memory = sparse.issparse(matrix) or isinstance(matrix, np.ndarray)
    return (MemoryStore if in_memory else BackedStore)(matrix, columns)


def totals(store: MemoryStore | BackedStore) -> np.ndarray:
    """Return the sum of each row, (N,) float64."""
    # A product, since scipy's sum would add float32 values in float32, whatever dtype is asked for.
    return np.concatenate([block @ np.ones(block.shape[1]) for _, block in store.blocks()])


def _dense(rows: np.ndarray | sparse.csr_matrix) -> Tensor:
    dense = rows.toarray() if sparse.issparse(rows) else np.asarray(rows)
    return torch.from_numpy(np.ascontiguousarray(dense, dtype=np.float32))
