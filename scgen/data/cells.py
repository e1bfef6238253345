"""One minibatch of cells as tensors: what every loader makes and every module reads."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from scgen.data.stores import csr_rows
from scgen.kernels import dispatch


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Cells as tensors; "batch" is always the experimental batch.

    Every field has a row for each cell, or is None. ``cells[rows]`` returns some of the cells, in the order asked for.
    A model that reads more about a cell adds a field with a default, or a subclass with that field.

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
    imputed_counts
        (n, G + M) float: the counts, then the expected counts of M genes that were not measured. The encoders read them
        in place of the counts. None where all genes were measured.

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
        """What the encoders read, before its logarithm."""
        return self.counts if self.imputed_counts is None else self.imputed_counts

    @cached_property
    def log_counts(self) -> Tensor:
        """log(1 + counts), (n, G), sparse if they are: what the encoders of counts read in questions."""
        return torch.log1p(self.encoder_input)

    @cached_property
    def dense_log_counts(self) -> Tensor:
        """The same, dense: what they read in training, since a sparse product has a slow gradient."""
        return dispatch.log1p(self.encoder_input, self.counts.dtype)

    @cached_property
    def reduced_log_counts(self) -> Tensor:
        """The same, dense and in bfloat16, for products that are taken in it."""
        return dispatch.log1p(self.encoder_input, torch.bfloat16)

    def to(self, device: torch.device) -> "Cells":
        """Return the same cells on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def __getitem__(self, rows: slice | Tensor) -> "Cells":
        """Return the cells of a slice, of row numbers (m,) int64, or of a mask (n,) bool."""
        return self._each(lambda tensor: _rows(tensor, rows))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Cells":
        """Return the cells with every field that is not None changed."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: None if of is None else change(of) for name, of in tensors.items()})

    def __len__(self) -> int:
        return len(self.counts)


def _rows(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Return some rows of a dense or a CSR tensor; torch itself cannot take several rows of the latter."""
    if tensor.layout != torch.sparse_csr:
        return tensor[rows]
    chosen = torch.arange(len(tensor), device=tensor.device)[rows]
    return csr_rows(tensor.crow_indices(), tensor.col_indices(), tensor.values(), chosen, tensor.shape[1])
