"""One minibatch of cells as tensors: what every loader makes and every module reads."""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from scgen.kernels import dispatch


@dataclass(frozen=True)
class Cells:
    """Cells as tensors; "batch" is always the experimental batch.

    Attributes
    ----------
    counts
        (n, G) float: what the likelihood describes, counts or normalised values; dense, or CSR.
    library
        (n, 1) float: logarithm of the cell's total, or of its size factor.
    batch, labels
        (n,) int64 codes.
    categorical
        (n, C) int64 codes of the further categorical covariates.
    continuous
        (n, K) float: standardised continuous covariates.
    index
        (n,) int64: the cells' rows in their AnnData.
    completed
        (n, G + M) float: the counts, then what is expected of M genes that were not measured; what encoders read
        instead. None where no gene is missing.
    """

    counts: Tensor
    library: Tensor
    batch: Tensor
    labels: Tensor
    categorical: Tensor
    continuous: Tensor
    index: Tensor
    completed: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """What the encoders read, before its logarithm."""
        return self.counts if self.completed is None else self.completed

    @cached_property
    def log_counts(self) -> Tensor:
        """log(1 + counts), (n, G), sparse if they are: what the encoders of counts read in questions."""
        return torch.log1p(self.seen)

    @cached_property
    def dense_log_counts(self) -> Tensor:
        """The same, dense: what they read in training, since a sparse product has a slow gradient."""
        return dispatch.log1p(self.seen, self.counts.dtype)

    @cached_property
    def reduced_log_counts(self) -> Tensor:
        """The same, dense and in bfloat16, for products that are taken in it."""
        return dispatch.log1p(self.seen, torch.bfloat16)

    def to(self, device: torch.device) -> "Cells":
        """Return the same cells on another device."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return Cells(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors))

    def __len__(self) -> int:
        return len(self.counts)
