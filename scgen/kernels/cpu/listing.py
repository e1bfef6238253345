"""Counts in the form of the compiled kernels: lists of non-zero entries, and dense log(1 + counts) for encoders."""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from scgen.kernels.cpu import functions
from scgen.kernels.cpu.functions import write
from scgen.kernels.cpu.rows import COMPILED, threads


def non_zeros(counts: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the non-zero entries as the three arrays of a canonical CSR matrix: ends of rows, columns, values."""
    if counts.layout == torch.sparse_csr:
        ends = counts.crow_indices().numpy().astype(np.int64, copy=False)
        genes = counts.col_indices().numpy().astype(np.int32, copy=False)
        if _ascend(ends, genes):
            return ends, genes, counts.values().numpy()
        counts = counts.to_dense()
    counts = as_array(counts)
    ends = np.zeros(len(counts) + 1, np.int64)
    _count(counts, ends[1:])
    np.cumsum(ends, out=ends)
    genes, values = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float32)
    _list(counts, ends, genes, values)
    return ends, genes, values


def log1p(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return log(1 + counts), dense, as float32 or bfloat16. Counts are as in `cells_log_prob`."""
    result = torch.empty(counts.shape, dtype=dtype)
    with threads():
        _log1p(*non_zeros(counts), as_array(result))
    return result


def as_array(tensor: Tensor) -> np.ndarray:
    """Return the tensor's memory as an array. numpy has no bfloat16, so its bits are returned."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


@njit(parallel=True, **COMPILED)
def _log1p(ends, genes, values, result):
    for r in prange(len(result)):
        row = result[r]
        row[:] = 0
        for i in range(ends[r], ends[r + 1]):
            write(row, genes[i], functions.log1p(values[i]))


@njit(parallel=True, **COMPILED)
def _ascend(ends, genes):
    """Tell whether the columns of each row ascend within range. Otherwise kernels would write outside their arrays."""
    wrong = 0
    for r in prange(len(ends) - 1):
        row, n = genes[ends[r] : ends[r + 1]], 0
        for i in range(len(row) - 1):
            n += row[i] >= row[i + 1]
        wrong += n
    return wrong == 0


@njit(parallel=True, **COMPILED)
def _count(counts, n_found):
    """Write the number of non-zero entries of each row."""
    for r in prange(len(counts)):
        n = 0
        for g in range(counts.shape[1]):
            n += counts[r, g] != 0
        n_found[r] = n


@njit(parallel=True, **COMPILED)
def _list(counts, ends, genes, values):
    """Write the non-zero values and their columns, without a branch, which the processor could not predict."""
    for r in prange(len(counts)):
        found = np.empty(counts.shape[1] + 1, np.int32)
        n = 0
        for g in range(counts.shape[1]):
            found[n] = g
            n += counts[r, g] != 0
        for i in range(n):
            genes[ends[r] + i], values[ends[r] + i] = found[i], counts[r, found[i]]
