"""The joint distribution of the cells of a neighbourhood."""

from torch import Tensor
from torch.distributions import Distribution


class CellsOfNiches(Distribution):
    """The cells of n niches, independent of each other. Padding has the density 1.

    Parameters
    ----------
    cells
        A distribution of whole cells, over (..., n J).
    mask
        (n, J) bool: False for padding.

    Examples
    --------
    >>> import torch
    >>> from scgen.distributions import CellCounts
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> niches = CellsOfNiches(CellCounts(torch.zeros(4, 3), torch.zeros(3), torch.zeros(4, 1)), mask)
    >>> niches.log_prob(torch.zeros(2, 2, 3)).round()
    tensor([-2., -1.])
    """

    arg_constraints = {}

    def __init__(self, cells: Distribution, mask: Tensor):
        self.cells, self.mask = cells, mask
        shape = cells.batch_shape[:-1] + mask.shape[:1]
        super().__init__(shape, mask.shape[1:] + cells.event_shape, validate_args=False)

    @property
    def base_dist(self) -> Distribution:
        """The distribution of each feature, over (..., n J, F)."""
        return self.cells.base_dist

    @property
    def mean(self) -> Tensor:
        return self.base_dist.mean.unflatten(-2, self.mask.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        each = self.cells.log_prob(value.flatten(0, 1)).unflatten(-1, self.mask.shape)
        return each.masked_fill(~self.mask, 0).sum(-1)
