"""Choose a kernel: a fused one for CPUs or CUDA GPUs, or plain torch and scipy, which run everywhere.

The kernels for CUDA need Triton, which torch's CUDA builds install. With ``SCGEN_KERNELS=reference`` in the
environment, the plain ones are used for everything, and neither numba nor Triton is imported. The same holds with
``NUMBA_DISABLE_JIT=1``, and in a process that was forked from one that had used its threads.
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

#: For fewer entries than this, plain code finishes before a compiled kernel is loaded.
SMALLEST = 2**14

# glibc returns arrays of some MB to the system as soon as they are freed. A loop that allocates them again then waits
# for their pages each time, for up to a quarter of the time of a question. After an array of just under 32 MB is freed,
# the largest size that glibc adapts to, it keeps up to 64 MB. This array is never written and takes no memory.
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
    """Return the number of entries of each of the rows of a CSR matrix, (n,), and the places of all these entries."""
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
    # Matrix products, because scipy's sum adds float32 values in float32 even if another dtype is requested.
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
    """Return log p(counts) of each cell, (..., n), like the function of the same name in `reference`.

    The counts may also be a CSR tensor, which the fused kernel for CPUs does not make dense.
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
    """Values of a fused kernel, (R,), for counts (n, G) and parameters (R, ...), where R is a multiple of n."""

    @staticmethod
    def forward(ctx, kernel: ModuleType, normalised: bool, gradient: bool, *inputs: Tensor | None) -> Tensor:
        # The slopes cost little in addition to the value, but only `backward` knows their weights. In training every
        # weight is -1/n. The slopes are computed for this value, and again if the weights turn out to differ.
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
    """The same, but the slopes are computed in `backward`: comparing weights would make the host wait for the GPU."""

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
    """Return the module with the fused kernel for these counts and parameters, or None."""
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
    """Return a module of kernels for CUDA if Triton is installed. It is used for small arrays, too: plain ones wait."""
    if _plain() or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"scgen.kernels.cuda.{name}")


def _compiled(name: str, n_entries: int) -> ModuleType | None:
    """Return a module of kernels for CPUs, if there are enough entries to be worth it."""
    if n_entries < SMALLEST or _plain():
        return None
    return importlib.import_module(f"scgen.kernels.cpu.{name}")


def _plain() -> bool:
    """Tell whether the user has turned compiled kernels off, or they cannot run here."""
    wanted = os.environ.get("SCGEN_KERNELS", "")
    if wanted not in ("", "reference"):
        raise ValueError(
            f'the environment has SCGEN_KERNELS={wanted!r}, which is unknown: "reference" takes the plain kernels; '
            "unset it for the fast ones."
        )
    return wanted == "reference" or threads.forked or os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


def _known(matrix: sparse.csr_matrix | sparse.csr_array) -> bool:
    """Tell whether numba supports the dtype of the values."""
    return matrix.dtype.isnative and matrix.dtype.itemsize <= 8
