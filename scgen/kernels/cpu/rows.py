"""How numba compiles here and on how many threads it runs; and, first of its uses, rows of sparse matrices."""

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
    """Say whether numba finds a folder that it may write compiled code to."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


# "numpy": division without a check for zero, which would keep loops from being vectorised.
COMPILED = {"error_model": "numpy", "fastmath": {"contract", "nsz", "arcp"}, "nogil": True, "cache": _can_cache()}


#: For sums, which may be taken in any order, and thereby several at a time.
ADDING = COMPILED | {"fastmath": {"reassoc", "nsz", "contract"}}


#: Held by the thread that runs a kernel where numba's threads can serve only one at a time.
_one_at_a_time = threading.RLock()


def _serves_several() -> bool:
    """Say whether several threads may run kernels at once: not in numba's own pool, and not while it picks one."""
    try:
        return threading_layer() != "workqueue"
    except ValueError:  # none was needed yet
        return False


@contextmanager
def threads() -> Iterator[int]:
    """Within the block, let numba use as many threads as torch does; neither's setting is changed by it.

    Where numba's threads can serve only one thread at a time, others wait: the process would be killed.
    """
    mark_used()
    with nullcontext() if _serves_several() else _one_at_a_time:
        n_torch, n_numba = torch.get_num_threads(), get_num_threads()
        n_threads = min(n_torch, config.NUMBA_NUM_THREADS)
        set_num_threads(n_threads)
        if torch.get_num_threads() != n_torch:  # numba's first launch sets the number of the pool that they share
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
    """Return what the function of this name in `dispatch` returns."""
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
