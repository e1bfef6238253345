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
    """

    counts: Tensor
    library: Tensor
    batch: Tensor
    labels: Tensor
    categorical: Tensor
    continuous: Tensor
    index: Tensor

    @cached_property
    def log_counts(self) -> Tensor:
        """log(1 + counts), (n, G), sparse if they are: what the encoders of counts read in questions."""
        return torch.log1p(self.counts)

    @cached_property
    def dense_log_counts(self) -> Tensor:
        """The same, dense: what they read in training, since a sparse product has a slow gradient."""
        return dispatch.log1p(self.counts, self.counts.dtype)

    @cached_property
    def reduced_log_counts(self) -> Tensor:
        """The same, dense and in bfloat16, for products that are taken in it."""
        return dispatch.log1p(self.counts, torch.bfloat16)

    def to(self, device: torch.device) -> "Cells":
        """Return the same cells on another device."""
        return Cells(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def __len__(self) -> int:
        return len(self.counts)
