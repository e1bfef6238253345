"""Picks a kernel: fused for CPUs, or plain torch and scipy, which run everywhere.

``SCGEN_KERNELS=reference`` in the environment takes the plain ones for everything, and numba is then not imported.
"""

import importlib
import os
from types import ModuleType

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from scgen.kernels import reference

#: Fewer entries than this are done before a compiled kernel is loaded.
SMALLEST = 2**14


def dense_rows(matrix: sparse.csr_matrix | sparse.csr_array, index: np.ndarray) -> Tensor:
    """Return the rows ``index`` of a CSR matrix, in this order, as a dense float32 tensor (n, G)."""
    if _known(matrix) and (cpu := _compiled(len(index) * matrix.shape[1])):
        return cpu.dense_rows(matrix, index)
    return torch.from_numpy(matrix[index].astype(np.float32).toarray())


def dense(counts: Tensor) -> Tensor:
    """Return a CSR tensor (n, G) as a dense one."""
    if counts.device.type == "cpu" and (cpu := _compiled(counts.shape.numel())):
        return cpu.dense(counts)
    return counts.to_dense()


def row_sums(matrix: np.ndarray | sparse.csr_matrix | sparse.csr_array) -> np.ndarray:
    """Return the sum of each row, (n,) float64, added in float64."""
    if sparse.issparse(matrix) and _known(matrix) and (cpu := _compiled(matrix.nnz)):
        return cpu.row_sums(matrix)
    # A product, since scipy's sum would add float32 values in float32, whatever dtype is asked for.
    return matrix @ np.ones(matrix.shape[1])


def poisson_log_prob(counts: Tensor, log_mu: Tensor) -> Tensor:
    """Return x log(mu) - mu - log(x!)."""
    return _likelihoods(counts, log_mu).poisson_log_prob(counts, log_mu)


def negative_binomial_log_prob(counts: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """Return log NB(x; mu, theta), with mean mu and variance mu + mu^2 / theta."""
    return _likelihoods(counts, log_mu, log_theta).negative_binomial_log_prob(counts, log_mu, log_theta)


def zero_inflated_negative_binomial_log_prob(
    counts: Tensor, log_mu: Tensor, log_theta: Tensor, zi_logits: Tensor
) -> Tensor:
    """Return log of pi [x = 0] + (1 - pi) NB(x; mu, theta), where pi = sigmoid(zi_logits) is the extra zeros' share."""
    kernels = _likelihoods(counts, log_mu, log_theta, zi_logits)
    return kernels.zero_inflated_negative_binomial_log_prob(counts, log_mu, log_theta, zi_logits)


def _likelihoods(*tensors: Tensor) -> ModuleType:
    """Return the module to ask."""
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in tensors):
        return reference
    return _compiled(max(tensor.numel() for tensor in tensors)) or reference


def _compiled(n_entries: int) -> ModuleType | None:
    """Return the compiled kernels, if so many entries are worth them."""
    if n_entries < SMALLEST or os.environ.get("SCGEN_KERNELS") == "reference":
        return None
    return importlib.import_module("scgen.kernels.cpu")


def _known(matrix: sparse.csr_matrix | sparse.csr_array) -> bool:
    """Say whether numba knows the dtype of the values."""
    return matrix.dtype.isnative and matrix.dtype.itemsize <= 8
