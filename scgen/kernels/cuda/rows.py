"""Rows of a sparse matrix in the memory of a GPU, made dense."""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Number of entries of a sparse row at a time.
ENTRY_BLOCK = 256


def dense_rows(indptr: Tensor, indices: Tensor, values: Tensor, rows: Tensor, n_genes: int) -> Tensor:
    """Return the rows of a canonical CSR matrix in device memory, in this order, as a dense float32 tensor (n, G)."""
    dense = torch.zeros(len(rows), n_genes, device=values.device)
    if len(rows):
        with torch.cuda.device_of(values):
            _fill_rows[(len(rows),)](indptr, indices, values, rows, dense, n_genes, BLOCK=ENTRY_BLOCK)
    return dense


@triton.jit
def _fill_rows(indptr, indices, values, rows, dense, n_genes, BLOCK: tl.constexpr):
    """One program per row. The output must be zero before."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    last = tl.load(indptr + row + 1)
    for start in range(tl.load(indptr + row), last, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        real = entry < last
        gene = tl.load(indices + entry, mask=real, other=0)
        tl.store(dense + i * n_genes + gene, tl.load(values + entry, mask=real, other=0).to(tl.float32), mask=real)
