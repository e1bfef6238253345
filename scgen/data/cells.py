"""One minibatch of cells as tensors. Loaders make it and modules read it."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from scgen.data.stores import csr_rows
from scgen.kernels import dispatch


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Cells as tensors. "batch" always means the experimental batch.

    Every field has one row per cell, or is None. ``cells[rows]`` returns some of the cells, in the order of ``rows``. A
    model that needs more data per cell has a subclass with more fields: see `Model.sources`.

    Attributes
    ----------
    counts
        (n, G) float, dense or CSR: the counts or normalised values that the likelihood describes.
    library
        (n, 1) float: logarithm of the cell's total count or of its size factor.
    batch, labels
        (n,) int64 codes.
    categorical
        (n, C) int64 codes of the further categorical covariates.
    continuous
        (n, K) float: standardised continuous covariates.
    index
        (n,) int64: the cells' rows in their AnnData.
    imputed_counts
        (n, G + M) float: the counts, then the expected counts of M genes that were not measured. The encoders read them
        instead of the counts. None if all genes were measured.

    Examples
    --------
    >>> codes = torch.tensor([0, 1, 1])
    >>> cells = Cells(
    ...     counts=torch.eye(3),
    ...     library=torch.zeros(3, 1),
    ...     batch=codes,
    ...     labels=codes,
    ...     categorical=torch.zeros(3, 0, dtype=torch.int64),
    ...     continuous=torch.zeros(3, 0),
    ...     index=torch.arange(3),
    ... )
    >>> some = cells[torch.tensor([2, 0])]
    >>> len(some), some.batch.tolist(), some.index.tolist()
    (2, [1, 0], [2, 0])
    """

    counts: Tensor
    library: Tensor
    batch: Tensor
    labels: Tensor
    categorical: Tensor
    continuous: Tensor
    index: Tensor
    imputed_counts: Tensor | None = None

    @property
    def encoder_input(self) -> Tensor:
        """The values whose logarithm the encoders read."""
        return self.counts if self.imputed_counts is None else self.imputed_counts

    @cached_property
    def log_counts(self) -> Tensor:
        """log(1 + counts), (n, G), sparse if the counts are. Encoders of counts read it outside training."""
        return torch.log1p(self.encoder_input)

    @cached_property
    def dense_log_counts(self) -> Tensor:
        """Dense log(1 + counts). Encoders read it in training, because a sparse product has a slow gradient."""
        return dispatch.log1p(self.encoder_input, self.counts.dtype)

    @cached_property
    def reduced_log_counts(self) -> Tensor:
        """Dense log(1 + counts) in bfloat16, for matrix products in bfloat16."""
        return dispatch.log1p(self.encoder_input, torch.bfloat16)

    def to(self, device: torch.device) -> "Cells":
        """Return the same cells on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def __getitem__(self, rows: slice | Tensor) -> "Cells":
        """Return the cells of a slice, of row numbers (m,) int64 or of a mask (n,) bool."""
        return self._each(lambda tensor: _rows(tensor, rows))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Cells":
        """Apply a function to every field that is not None."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: None if of is None else change(of) for name, of in tensors.items()})

    def __len__(self) -> int:
        return len(self.counts)


def _rows(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Return some rows of a dense or a CSR tensor. torch cannot select several rows of a CSR tensor."""
    if tensor.layout != torch.sparse_csr:
        return tensor[rows]
    chosen = torch.arange(len(tensor), device=tensor.device)[rows]
    return csr_rows(tensor.crow_indices(), tensor.col_indices(), tensor.values(), chosen, tensor.shape[1])
