"""Settings of numba (compilation, number of threads), and the kernel for rows of sparse matrices."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numba import config, get_num_threads, njit, prange, set_num_threads, threading_layer
from scipy import sparse
from torch import Tensor

from scgen.threads import mark_used


def _can_cache() -> bool:
    """Tell whether numba finds a folder to which it can write compiled code."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


# "numpy": division without a check for zero, which would prevent vectorised loops.
COMPILED = {"error_model": "numpy", "fastmath": {"contract", "nsz", "arcp"}, "nogil": True, "cache": _can_cache()}


#: For sums. Their terms may be added in any order, and so several at a time.
ADDING = COMPILED | {"fastmath": {"reassoc", "nsz", "contract"}}


#: The thread that runs a kernel holds this lock if numba's threads can serve only one thread at a time.
_one_at_a_time = threading.RLock()


def _serves_several() -> bool:
    """Tell whether several threads may run kernels at once. They may not in numba's own pool."""
    try:
        return threading_layer() != "workqueue"
    except ValueError:  # none was needed yet
        return False


@contextmanager
def threads() -> Iterator[int]:
    """Context manager: numba uses as many threads as torch, without a change of either setting.

    If numba's threads can serve only one thread at a time, others wait. Otherwise the process would be killed.
    """
    mark_used()
    with nullcontext() if _serves_several() else _one_at_a_time:
        n_torch, n_numba = torch.get_num_threads(), get_num_threads()
        n_threads = min(n_torch, config.NUMBA_NUM_THREADS)
        set_num_threads(n_threads)
        if torch.get_num_threads() != n_torch:  # numba's first launch sets the size of the shared pool
            torch.set_num_threads(n_torch)
        try:
            yield n_threads
        finally:
            set_num_threads(n_numba)


def dense_rows(matrix: sparse.csr_matrix | sparse.csr_array, rows: np.ndarray) -> Tensor:
    """Return the rows of a CSR matrix, in the order asked for, as a dense float32 tensor (n, G)."""
    dense = np.empty((len(rows), matrix.shape[1]), np.float32)
    with threads():
        _fill_rows(matrix.indptr, matrix.indices, matrix.data, rows, dense)
    return torch.from_numpy(dense)


def row_sums(matrix: sparse.csr_matrix | sparse.csr_array) -> np.ndarray:
    """Return the result of the function of the same name in `dispatch`."""
    sums = np.empty((2, matrix.shape[0]))
    with threads():
        _sum_rows(matrix.indptr, matrix.data, *sums)
    return sums


@njit(parallel=True, **ADDING)
def _sum_rows(indptr, data, sums, squares):
    for i in prange(len(sums)):
        total = total_squares = 0.0
        for k in range(indptr[i], indptr[i + 1]):
            value = np.float64(data[k])
            total += value
            total_squares += value * value
        sums[i] = total
        squares[i] = total_squares


@njit(parallel=True, **COMPILED)
def _fill_rows(indptr, indices, data, rows, dense):
    for i in prange(len(rows)):
        out = dense[i]
        out[:] = np.float32(0)
        for k in range(indptr[rows[i]], indptr[rows[i] + 1]):
            out[indices[k]] += np.float32(data[k])
