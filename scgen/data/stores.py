"""Stores hold the values of the cells, in memory, on disk or on a GPU, and return rows of them as tensors."""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from scgen.kernels import dispatch

#: Number of entries of a file that are checked at a time.
CHUNK = 2**24
#: Arrays of these packages cannot be read; the text says how to convert them.
LOADED = {
    "dask": "Load it: adata = adata.to_memory().",
    "cupy": "Copy it from the GPU: {where} = {where}.get().",
    "cupyx": "Copy it from the GPU: {where} = {where}.get().",
    "torch": "Make it an array: {where} = {where}.numpy(force=True).",
    "jax": "Make it an array: {where} = numpy.asarray({where}).",
    "xarray": "Make it an array: {where} = {where}.to_numpy().",
    "sparse": "Make it a sparse matrix of scipy: {where} = {where}.tocsr().",
}
#: Rows are "few" if the matrix has at least this many times as many.
FEW = 8


class DamagedMatrix(ValueError):
    """The structure of a sparse matrix does not fit its shape.

    Attributes
    ----------
    row
        The first row with an error; None if the error is not in a single row.
    """

    def __init__(self, text: str, row: int | None = None):
        super().__init__(text)
        self.row = row


class MemoryStore:
    """A matrix in memory: dense, or sparse in any of scipy's formats.

    Parameters
    ----------
    matrix
        (N, G'), of any numeric dtype. Dense and CSR matrices are not copied; other sparse formats are copied to CSR.
    columns
        The G columns to read, in this order; None reads all.
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
        # Consecutive rows, the usual case after training, need no copy.
        indptr = self.matrix.indptr[first : last + 1]
        entries = slice(indptr[0], indptr[-1])
        return _csr_of(indptr - indptr[0], self.matrix.indices[entries], self.matrix.data[entries], self.shape[1])

    def as_stored(self, index: np.ndarray) -> np.ndarray | sparse.csr_matrix:
        """Return the rows ``index``, in its order, as stored."""
        return self.matrix[index]

    def blocks(self, n_rows: int = 8192) -> Iterator[tuple[int, np.ndarray | sparse.csr_matrix]]:
        """Iterate over (first row, block of rows as stored)."""
        for start in range(0, self.shape[0], n_rows):
            yield start, self.matrix[start : start + n_rows]


class BackedStore:
    """A matrix on disk, h5ad or zarr. Only the requested rows are read.

    It is also used to read a few rows of a matrix in memory that a `MemoryStore` would have to copy as a whole.

    Parameters
    ----------
    matrix
        (N, G'): h5py or zarr dataset, AnnData's backed sparse matrix, or an array or sparse matrix.
    columns
        As in `MemoryStore`.
    """

    def __init__(self, matrix, columns: np.ndarray | None = None):
        self.matrix, self.columns = matrix, columns
        self.shape = (matrix.shape[0], matrix.shape[1] if columns is None else len(columns))

    def rows(self, index: np.ndarray, as_sparse: bool = False) -> Tensor:
        """Return the rows ``index``, in its order, as a float32 tensor (n, G); sparse ones as CSR if so asked."""
        rows = self.as_stored(index)
        return _csr(rows) if as_sparse and sparse.issparse(rows) else _dense(rows)

    def as_stored(self, index: np.ndarray) -> np.ndarray | sparse.csr_matrix:
        """Return the rows ``index``, in its order, as stored."""
        # Files are read in ascending order, each row once. The requested order is restored here.
        ascending, inverse = np.unique(index, return_inverse=True)
        return self._cut(self.matrix[ascending])[inverse]

    def blocks(self, n_rows: int = 8192) -> Iterator[tuple[int, np.ndarray | sparse.csr_matrix]]:
        """Iterate over (first row, block of rows as stored)."""
        for start in range(0, self.shape[0], n_rows):
            yield start, self._cut(self.matrix[start : start + n_rows], start)

    def _cut(self, block, first_row: int = 0):
        if sparse.issparse(block):
            # A file may change at any time, so every block is checked before compiled code reads it.
            check_structure(block, first_row)
            block = block.tocsr()
        return block if self.columns is None else block[:, self.columns]


class DeviceStore:
    """The values of a `MemoryStore` as a CSR matrix in the memory of a device, which makes the rows dense.

    Values have the first dtype of `DTYPES` that holds them as exactly as float32 does. Columns are int32, row pointers
    int64. The form is canonical: the columns of a row are in ascending order, without duplicates.

    Parameters
    ----------
    store
        The values to copy. It is read twice, by blocks, and not kept.
    device
        The device to copy them to.
    """

    #: A wider integer would take as much memory as float32, and rows are float32 in any case.
    DTYPES = (np.uint8, np.int16, np.float32)

    def __init__(self, store: MemoryStore, device: torch.device):
        self.shape, self.device = store.shape, torch.device(device)
        n_entries, dtype = self._measure(store)
        kept = torch.from_numpy(np.empty(0, dtype)).dtype
        self.indptr = torch.zeros(self.shape[0] + 1, dtype=torch.int64, device=device)
        self.indices = torch.empty(n_entries, dtype=torch.int32, device=device)
        self.values = torch.empty(n_entries, dtype=kept, device=device)
        row = entry = 0
        for block in _canonical_blocks(store):
            last = entry + block.nnz
            self.indices[entry:last] = torch.from_numpy(block.indices.astype(np.int32, copy=False))
            self.values[entry:last] = torch.from_numpy(block.data.astype(dtype, copy=False))
            self.indptr[row + 1 : row + 1 + block.shape[0]] = torch.from_numpy(block.indptr[1:] + np.int64(entry))
            row, entry = row + block.shape[0], last

    def _measure(self, store: MemoryStore) -> tuple[int, type]:
        """Return the number of entries and the dtype that holds them all."""
        n_entries, dtypes = 0, self.DTYPES
        for block in _canonical_blocks(store):
            n_entries += block.nnz
            dtypes = [dtype for dtype in dtypes if _holds(dtype, block.data)]
        return n_entries, dtypes[0]

    def rows(self, index: np.ndarray | Tensor, as_sparse: bool = False) -> Tensor:
        """Return the rows ``index``, in its order, as a float32 tensor (n, G) on the device; as CSR if so asked."""
        rows = torch.as_tensor(index, device=self.device)
        if not as_sparse:
            return dispatch.gather_rows(self.indptr, self.indices, self.values, rows, self.shape[1])
        return csr_rows(self.indptr, self.indices, self.values, rows, self.shape[1])


def on_device(store: MemoryStore | BackedStore, device: torch.device) -> MemoryStore | BackedStore | DeviceStore:
    """Copy the values to the memory of a GPU, if the device is a GPU and they fit; else return the store itself.

    The values fit if 8 bytes per entry, the most that they take, and 8 bytes per row are at most half of the free
    memory. The other half is for the weights and the minibatches. Values on disk stay on disk.
    """
    if device.type != "cuda" or not isinstance(store, MemoryStore):
        return store
    n_entries = store.matrix.nnz if sparse.issparse(store.matrix) else np.count_nonzero(store.matrix)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # reserved by torch, but unused
    return DeviceStore(store, device) if 8 * (n_entries + store.shape[0] + 1) <= free // 2 else store


def open_store(matrix, columns: np.ndarray | None = None, rows: np.ndarray | None = None) -> MemoryStore | BackedStore:
    """Return the store for a matrix, which depends on where the matrix is.

    Parameters
    ----------
    matrix, columns
        As in `MemoryStore` and `BackedStore`.
    rows
        The rows that will be read; None means all. If they are few, the other rows are neither checked nor copied.

    Raises
    ------
    DamagedMatrix
        If the structure of a sparse matrix does not fit its shape. The indices of a CSR matrix on disk are checked only
        when they are read.
    """
    form = getattr(matrix, "format", None)
    few = rows is not None and FEW * len(rows) <= matrix.shape[0]
    if form in ("csr", "csc"):
        if few and form == "csr" and in_memory(matrix):
            _check_rows(matrix, rows)
        else:
            check_structure(matrix)
    as_it_is = columns is None and form != "csc"
    return (MemoryStore if in_memory(matrix) and (as_it_is or not few) else BackedStore)(matrix, columns)


def in_memory(matrix) -> bool:
    """Tell whether a matrix is in memory."""
    return sparse.issparse(matrix) or isinstance(matrix, np.ndarray)


def unreadable(matrix, where: str) -> tuple[str, str] | None:
    """Return why a matrix cannot be read, and the call that fixes it; None if it can be read."""
    package = type(matrix).__module__.partition(".")[0]
    if np.ma.is_masked(matrix):
        return f"{where} is a masked array with masked values", f"Fill them: {where} = {where}.filled(0)."
    if not in_memory(matrix) and package not in ("h5py", "zarr", "anndata"):
        text = f"{where} is a {package}.{type(matrix).__name__}, not an array, a sparse matrix or a matrix on disk"
        return text, LOADED.get(package, "Make it an array: {where} = numpy.asarray({where}).").format(where=where)
    if getattr(matrix, "format", None) in ("csr", "csc") and matrix.dtype == np.float16:
        fix = f'Convert it: {where}.data = {where}.data.astype("float32").'
        fix = fix if in_memory(matrix) else "Write the file with float32."
        return f"{where} is a sparse matrix of float16, which scipy does not support", fix
    return None


def _check_rows(matrix: sparse.csr_matrix | sparse.csr_array, rows: np.ndarray) -> None:
    """Check some rows as `check_structure` does, on a copy of them."""
    n_entries = len(matrix.indices)
    if matrix.indptr.shape == (matrix.shape[0] + 1,) and matrix.data.shape == matrix.indices.shape == (n_entries,):
        first, last = matrix.indptr[rows], matrix.indptr[rows + 1]
        if (first >= 0).all() and (first <= last).all() and (last <= n_entries).all():
            check_structure(matrix[rows])
            return
    check_structure(matrix)


def check_structure(matrix, first_row: int = 0) -> None:
    """Raise DamagedMatrix if pointers or indices of a CSR or CSC matrix, in memory or on disk, do not fit its shape.

    Compiled code, including that of scipy, does not check them before it reads and writes. Wrong ones crash the process
    or change other data.

    Parameters
    ----------
    matrix
        The indices of a CSR matrix on disk are not read here: `BackedStore` checks them in each block that it reads.
    first_row
        Number of the first row, used in messages.
    """
    here = sparse.issparse(matrix)
    names = ("indptr", "indices", "data")
    indptr, indices, data = (getattr(matrix, name) if here else matrix.group[name] for name in names)
    indptr, by_row = np.asarray(indptr[:]), matrix.format == "csr"
    n_major, n_minor = matrix.shape if by_row else matrix.shape[::-1]
    if indptr.dtype.kind not in "iu" or indices.dtype.kind not in "iu":
        raise DamagedMatrix(f"indptr and indices are {indptr.dtype} and {indices.dtype}, not integers")
    if indptr.shape != (n_major + 1,):
        raise DamagedMatrix(
            f"indptr has the shape {indptr.shape}; a matrix of shape {tuple(matrix.shape)} needs {n_major + 1} values"
        )
    if indices.ndim != 1 or indices.shape != data.shape:
        raise DamagedMatrix(f"indices has the shape {indices.shape}, but data has {data.shape}")
    if (falls := np.flatnonzero(indptr[1:] < indptr[:-1])).size:
        raise DamagedMatrix("indptr decreases", first_row + int(falls[0]) if by_row else None)
    if indptr[0] != 0 or indptr[-1] != indices.shape[0]:
        raise DamagedMatrix(f"indptr goes from {indptr[0]} to {indptr[-1]}; it must go from 0 to {indices.shape[0]}")
    if by_row and not here:
        return
    for start in range(0, indices.shape[0], CHUNK):
        chunk = indices[start : start + CHUNK]
        if chunk.min() >= 0 and chunk.max() < n_minor:
            continue
        first = int(np.flatnonzero((chunk < 0) | (chunk >= n_minor))[0])
        row = first_row + int(np.searchsorted(indptr, start + first, side="right")) - 1 if by_row else None
        what = "columns" if by_row else "rows"
        raise DamagedMatrix(f"indices has {chunk[first]}, but the {what} go from 0 to {n_minor - 1}", row)


def totals(store: MemoryStore | BackedStore, rows: np.ndarray | None = None) -> np.ndarray:
    """Return the sum of each row, (N,) float64, or of some rows, in their order."""
    return totals_and_squares(store, rows)[0]


def totals_and_squares(store: MemoryStore | BackedStore, rows: np.ndarray | None = None) -> np.ndarray:
    """Return the sum of each row and the sum of its squares, (2, N) float64, or those of some rows."""
    if rows is not None and FEW * len(rows) > store.shape[0]:
        return totals_and_squares(store)[:, rows]
    if rows is not None:
        parts = (store.as_stored(part) for part in np.array_split(rows, -(-len(rows) // 8192)))
    elif isinstance(store, MemoryStore) and sparse.issparse(store.matrix):
        parts = [store.matrix]
    else:
        parts = (block for _, block in store.blocks())
    sums = np.concatenate([dispatch.row_sums(part) for part in parts], axis=1)
    return sums.astype(np.float64, copy=False)  # the sums of long doubles are long doubles


def _csr(rows: sparse.csr_matrix | sparse.csr_array) -> Tensor:
    rows = _canonical(rows)  # a function is applied to stored entries: no value may be in two of them
    return _csr_of(rows.indptr, rows.indices, rows.data, rows.shape[1])


def _csr_of(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_columns: int) -> Tensor:
    dtype = np.int32 if indptr[-1] < 2**31 else np.int64
    parts = indptr.astype(dtype, copy=False), indices.astype(dtype, copy=False), data.astype(np.float32, copy=False)
    with warnings.catch_warnings():
        # The matrix may be in read-only memory, such as a mapped file. The tensors are only read.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = [torch.from_numpy(part) for part in parts]
    return _csr_tensor(*tensors, n_columns)


def csr_rows(indptr: Tensor, indices: Tensor, values: Tensor, rows: Tensor, n_columns: int) -> Tensor:
    """Return some rows of a CSR matrix, in the requested order, as a float32 CSR tensor."""
    n_entries, entries = dispatch.entries_of_rows(indptr, rows)
    ends = torch.cat([n_entries.new_zeros(1), n_entries.cumsum(0)])
    return _csr_tensor(ends.to(indices.dtype), indices[entries], values[entries].float(), n_columns)


def _csr_tensor(indptr: Tensor, indices: Tensor, values: Tensor, n_columns: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(indptr, indices, values, (len(indptr) - 1, n_columns), check_invariants=False)


def _canonical(rows: sparse.csr_matrix | sparse.csr_array) -> sparse.csr_matrix | sparse.csr_array:
    """Return the rows with their columns in ascending order and without duplicates."""
    if not rows.has_canonical_format:
        # Copy, because the arrays may belong to the store. Use float32, because sums of small integers may overflow.
        rows = rows.astype(np.float32, copy=True)
        rows.sum_duplicates()
    return rows


def _canonical_blocks(store: MemoryStore) -> Iterator[sparse.csr_array]:
    """Iterate over blocks of rows in canonical CSR form."""
    for _, block in store.blocks():
        yield _canonical(sparse.csr_array(block))


def _holds(dtype: type, values: np.ndarray) -> bool:
    """Tell whether a dtype holds the values exactly; True for float32, to which they are converted in any case."""
    if dtype is np.float32 or not len(values):
        return True
    info = np.iinfo(dtype)
    return info.min <= values.min() and values.max() <= info.max and bool((values == values.astype(dtype)).all())


def _dense(rows: np.ndarray | sparse.csr_matrix) -> Tensor:
    dense = rows.toarray() if sparse.issparse(rows) else np.asarray(rows)
    return torch.from_numpy(np.ascontiguousarray(dense, dtype=np.float32))
