"""Picks a kernel: fused for CPUs and for CUDA GPUs, or plain torch and scipy, which run everywhere.

Those for CUDA need Triton, which torch's own CUDA builds bring along. ``SCGEN_KERNELS=reference`` in the environment
takes the plain ones for everything, and neither numba nor Triton is then imported. So does a process that was forked
from one that had used its threads, and ``NUMBA_DISABLE_JIT=1``.
"""

import importlib
import importlib.util
import os
from types import ModuleType

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.autograd.function import once_differentiable

from scgen import threads
from scgen.kernels import reference

#: Fewer entries than this are done before a compiled kernel is loaded.
SMALLEST = 2**14

# glibc hands arrays of some MB back to the system as soon as they are freed, so that a loop that makes them anew waits
# for their pages each time: up to a quarter of a question. Having seen one of just under 32 MB freed, the most that it
# learns from, it keeps up to 64 MB; that one is never written, and takes no memory.
np.empty(2**25 - 2**16, np.uint8)


def dense_rows(matrix: sparse.csr_matrix | sparse.csr_array, index: np.ndarray) -> Tensor:
    """Return the rows ``index`` of a CSR matrix, in this order, as a dense float32 tensor (n, G)."""
    if _known(matrix) and (rows := _compiled("rows", len(index) * matrix.shape[1])):
        return rows.dense_rows(matrix, index)
    return torch.from_numpy(matrix[index].astype(np.float32).toarray())


def gather_rows(indptr: Tensor, indices: Tensor, values: Tensor, rows: Tensor, n_genes: int) -> Tensor:
    """Return the rows of a canonical CSR matrix in tensors, in the order asked for, as a dense float32 one (n, G)."""
    if values.device.type == "cuda" and (on_device := _cuda("rows")):
        return on_device.dense_rows(indptr, indices, values, rows, n_genes)
    n_entries, entries = entries_of_rows(indptr, rows)
    dense = torch.zeros(len(rows), n_genes, device=values.device)
    of_row = torch.arange(len(rows), device=values.device).repeat_interleave(n_entries)
    dense[of_row, indices[entries].long()] = values[entries].float()
    return dense


def entries_of_rows(indptr: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many entries each of some rows of a CSR matrix has, (n,), and where they all are, row after row."""
    first = indptr[rows]
    n_entries = indptr[rows + 1] - first
    before = n_entries.cumsum(0) - n_entries
    shift = (first - before).repeat_interleave(n_entries)
    return n_entries, torch.arange(len(shift), device=shift.device) + shift


def log1p(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return log(1 + counts), dense, as float32 or bfloat16, of dense counts or of a CSR tensor."""
    simple = counts.layout == torch.sparse_csr or counts.is_contiguous()
    simple = simple and counts.dtype == torch.float32 and counts.device.type == "cpu"
    listing = _compiled("listing", counts.shape.numel()) if simple else None
    return listing.log1p(counts, dtype) if listing else torch.log1p(counts.to_dense()).to(dtype)


def row_sums(matrix: np.ndarray | sparse.csr_matrix | sparse.csr_array) -> np.ndarray:
    """Return the sums of each row's values and of their squares, (2, n) float64, added in float64."""
    if sparse.issparse(matrix) and _known(matrix) and (rows := _compiled("rows", matrix.nnz)):
        return rows.row_sums(matrix)
    # Products, since scipy's sum would add float32 values in float32, whatever dtype is asked for.
    ones, wide = np.ones(matrix.shape[1]), matrix.astype(np.float64, copy=False)
    squares = wide.power(2) @ ones if sparse.issparse(wide) else np.einsum("ij,ij->i", wide, wide)
    return np.stack([matrix @ ones, squares])


def cells_log_prob(
    counts: Tensor,
    logits: Tensor,
    bias: Tensor,
    log_library: Tensor,
    log_theta: Tensor | None = None,
    zi_logits: Tensor | None = None,
    zi_bias: Tensor | None = None,
    normalised: bool = True,
) -> Tensor:
    """Return log p(counts) of each cell, (..., n): what the function of this name in `reference` returns.

    The counts may also be a CSR tensor, of which the fused kernel for CPUs needs no dense form.
    """
    parameters = logits, bias, log_library, log_theta, zi_logits, zi_bias
    one_cell_a_row = counts.dim() == 2 and logits.shape[-2:] == counts.shape
    kernel = _fused(counts, *parameters) if one_cell_a_row else None
    if counts.layout == torch.sparse_csr and (kernel is None or counts.device.type != "cpu"):
        counts = counts.to_dense()
    if kernel is None:
        return reference.cells_log_prob(counts, *parameters, normalised)
    shape = logits.shape[:-1]
    gradient = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
    log_library = log_library.squeeze(-1).expand(shape)
    if log_theta is not None and log_theta.shape[:-1] not in ((), counts.shape[:-1]):
        log_theta = log_theta.expand_as(logits)
    rows = (None if p is None else p.reshape(-1, p.shape[-1]).contiguous() for p in (logits, log_theta, zi_logits))
    logits, log_theta, zi_logits = rows
    counts = counts if counts.layout == torch.sparse_csr else counts.contiguous()
    inputs = counts, logits, bias, log_library.reshape(-1), log_theta, zi_logits, zi_bias
    if counts.device.type == "cuda":
        return _CellsLogProbOnCuda.apply(kernel, normalised, *inputs).reshape(shape)
    return _CellsLogProb.apply(kernel, normalised, gradient, *inputs).reshape(shape)


class _CellsLogProb(torch.autograd.Function):
    """A fused kernel's values, (R,), of counts (n, G) and parameters (R, ...), where R is a multiple of n."""

    @staticmethod
    def forward(ctx, kernel: ModuleType, normalised: bool, gradient: bool, *inputs: Tensor | None) -> Tensor:
        # The slopes cost little beside the value, but are needed weighted by what only `backward` knows. In training
        # that is -1/n for every cell: they are computed for it, and again if it was something else.
        weights = torch.full_like(inputs[3], -1 / len(inputs[3])) if gradient else None
        value, slopes = kernel.cells_log_prob(*inputs, normalised, weights)
        ctx.kernel, ctx.normalised, ctx.n_inputs = kernel, normalised, len(inputs)
        ctx.save_for_backward(*inputs, weights, *slopes)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        inputs, (weights, *slopes) = ctx.saved_tensors[: ctx.n_inputs], ctx.saved_tensors[ctx.n_inputs :]
        if not torch.equal(grad, weights):
            slopes = ctx.kernel.cells_log_prob(*inputs, ctx.normalised, grad.contiguous())[1]
        return None, None, None, None, *slopes


class _CellsLogProbOnCuda(torch.autograd.Function):
    """The same, but the slopes wait for `backward`: to compare weights would hold the host up until all is computed."""

    @staticmethod
    def forward(ctx, kernel: ModuleType, normalised: bool, *inputs: Tensor | None) -> Tensor:
        ctx.kernel, ctx.normalised = kernel, normalised
        ctx.save_for_backward(*inputs)
        return kernel.cells_log_prob(*inputs, normalised, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return None, None, None, *ctx.kernel.slopes(*ctx.saved_tensors, ctx.normalised, grad.contiguous())


def _fused(*tensors: Tensor | None) -> ModuleType | None:
    """Return the module with the fused kernel for counts and parameters, in their order, if there is one."""
    products = {1, 5}  # logits and zi_logits, which may be bfloat16
    if any(
        tensor is not None and tensor.dtype != torch.float32 and not (i in products and tensor.dtype == torch.bfloat16)
        for i, tensor in enumerate(tensors)
    ):
        return None
    tensors = [tensor for tensor in tensors if tensor is not None]
    devices = {tensor.device.type for tensor in tensors}
    if devices == {"cuda"}:
        return _cuda("likelihood")
    return _compiled("likelihood", max(tensor.numel() for tensor in tensors)) if devices == {"cpu"} else None


def _cuda(name: str) -> ModuleType | None:
    """Return a module of kernels for CUDA, if Triton is there; small things too, since the plain ones wait for it."""
    if _plain() or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"scgen.kernels.cuda.{name}")


def _compiled(name: str, n_entries: int) -> ModuleType | None:
    """Return a module of kernels for CPUs, if so many entries are worth them."""
    if n_entries < SMALLEST or _plain():
        return None
    return importlib.import_module(f"scgen.kernels.cpu.{name}")


def _plain() -> bool:
    """Say whether the user wants no compiled kernels, or they cannot run here."""
    wanted = os.environ.get("SCGEN_KERNELS", "")
    if wanted not in ("", "reference"):
        raise ValueError(
            f'the environment has SCGEN_KERNELS={wanted!r}, which is unknown: "reference" takes the plain kernels; '
            "unset it for the fast ones."
        )
    return wanted == "reference" or threads.forked or os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


def _known(matrix: sparse.csr_matrix | sparse.csr_array) -> bool:
    """Say whether numba knows the dtype of the values."""
    return matrix.dtype.isnative and matrix.dtype.itemsize <= 8
