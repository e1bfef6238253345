"""Picks a kernel: fused for CPUs, or plain torch and scipy, which run everywhere.

``SCGEN_KERNELS=reference`` in the environment takes plain torch for all likelihoods.
"""

import importlib
import os

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from scgen.kernels import reference

#: Fewer entries than this are done before a compiled kernel is loaded.
SMALLEST = 2**14


def dense_rows(matrix: sparse.csr_matrix | sparse.csr_array, rows: np.ndarray) -> Tensor:
    """Return the rows of a CSR matrix, in the order asked for, as a dense float32 tensor (n, G)."""
    if len(rows) * matrix.shape[1] >= SMALLEST:
        return importlib.import_module("scgen.kernels.cpu").dense_rows(matrix, rows)
    return torch.from_numpy(matrix[rows].toarray().astype(np.float32, copy=False))


def dense(rows: Tensor) -> Tensor:
    """Return a CSR tensor (n, G) as a dense one."""
    if rows.device.type == "cpu" and rows.shape.numel() >= SMALLEST:
        return importlib.import_module("scgen.kernels.cpu").dense(rows)
    return rows.to_dense()


def row_sums(matrix: np.ndarray | sparse.csr_matrix | sparse.csr_array) -> np.ndarray:
    """Return the sum of each row, (n,) float64, added in float64."""
    if sparse.issparse(matrix) and matrix.nnz >= SMALLEST:
        return importlib.import_module("scgen.kernels.cpu").row_sums(matrix)
    # A product, since scipy's sum would add float32 values in float32, whatever dtype is asked for.
    return matrix @ np.ones(matrix.shape[1])


def poisson_log_prob(counts: Tensor, log_mu: Tensor) -> Tensor:
    """Return x log(mu) - mu - log(x!)."""
    return _kernels(counts, log_mu).poisson_log_prob(counts, log_mu)


def negative_binomial_log_prob(counts: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """Return log NB(x; mu, theta), with mean mu and variance mu + mu^2 / theta."""
    return _kernels(counts, log_mu, log_theta).negative_binomial_log_prob(counts, log_mu, log_theta)


def zero_inflated_negative_binomial_log_prob(
    counts: Tensor, log_mu: Tensor, log_theta: Tensor, zi_logits: Tensor
) -> Tensor:
    """Return log of pi [x = 0] + (1 - pi) NB(x; mu, theta), where pi = sigmoid(zi_logits) is the extra zeros' share."""
    kernels = _kernels(counts, log_mu, log_theta, zi_logits)
    return kernels.zero_inflated_negative_binomial_log_prob(counts, log_mu, log_theta, zi_logits)


def _kernels(*tensors: Tensor):
    """Return the module to ask."""
    fused = (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and max(tensor.numel() for tensor in tensors) >= SMALLEST
        and os.environ.get("SCGEN_KERNELS") != "reference"
    )
    return importlib.import_module("scgen.kernels.cpu") if fused else reference
