"""Where the values of the cells lie, and how some rows of them become a dense tensor."""

import warnings
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

    def rows(self, index: np.ndarray, as_sparse: bool = False) -> Tensor:
        """Return the rows ``index``, in its order, as a float32 tensor (n, G); sparse ones as CSR if so asked."""
        if not sparse.issparse(self.matrix):
            return _dense(self.matrix[index])
        if not as_sparse:
            return dispatch.dense_rows(self.matrix, index)
        first, last = index[0], index[-1] + 1
        consecutive = last - first == len(index) and (np.diff(index) == 1).all()
        if not (consecutive and self.matrix.has_canonical_format):
            return _csr(self.matrix[index])
        # Consecutive rows, which most questions are about, need no copy.
        indptr = self.matrix.indptr[first : last + 1]
        entries = slice(indptr[0], indptr[-1])
        return _csr_of(indptr - indptr[0], self.matrix.indices[entries], self.matrix.data[entries], self.shape[1])

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

    def rows(self, index: np.ndarray, as_sparse: bool = False) -> Tensor:
        """Return the rows ``index``, in its order, as a float32 tensor (n, G); sparse ones as CSR if so asked."""
        # Files are read in ascending order, each row once; the order asked for is restored here.
        ascending, inverse = np.unique(index, return_inverse=True)
        rows = self._cut(self.matrix[ascending])[inverse]
        return _csr(rows) if as_sparse and sparse.issparse(rows) else _dense(rows)

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
    if isinstance(store, MemoryStore) and sparse.issparse(store.matrix):
        return dispatch.row_sums(store.matrix)
    return np.concatenate([dispatch.row_sums(block) for _, block in store.blocks()])


def _csr(rows: sparse.csr_matrix | sparse.csr_array) -> Tensor:
    rows.sum_duplicates()  # a function of the stored entries is to be one of the values
    return _csr_of(rows.indptr, rows.indices, rows.data, rows.shape[1])


def _csr_of(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_columns: int) -> Tensor:
    dtype = np.int32 if indptr[-1] < 2**31 else np.int64
    index = (torch.from_numpy(part.astype(dtype, copy=False)) for part in (indptr, indices))
    values = torch.from_numpy(data.astype(np.float32, copy=False))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(*index, values, (len(indptr) - 1, n_columns), check_invariants=False)


def _dense(rows: np.ndarray | sparse.csr_matrix) -> Tensor:
    dense = rows.toarray() if sparse.issparse(rows) else np.asarray(rows)
    return torch.from_numpy(np.ascontiguousarray(dense, dtype=np.float32))
