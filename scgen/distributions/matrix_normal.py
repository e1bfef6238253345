"""The matrix-variate normal distribution, whose rows and columns have a covariance each."""

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from scgen.distributions.gaussian import DiagonalNormal
from scgen.seeding import standard_normal


class MatrixNormal(Distribution):
    """K independent maps F_k of m x n values, F_k ~ N(M_k, Omega_k x Psi_k), as one vector of their K m n values.

    Omega is the covariance of the rows and Psi that of the columns. The covariance of a map, taken row by row, is their
    Kronecker product. Omega and Psi are given by lower triangular factors, as in Omega = A A^T. Only their product is
    determined: c Omega and Psi / c give the same distribution (Gupta and Nagar 1999, chapter 2).

    Parameters
    ----------
    mean
        (..., K, m, n): M.
    row_factor, column_factor
        (..., K, m, m) and (..., K, n, n): the factors of Omega and of Psi, with positive diagonals.

    Examples
    --------
    >>> eye = torch.eye(3).expand(2, 3, 3)
    >>> maps = MatrixNormal(torch.zeros(5, 2, 3, 3), eye, 2 * eye)
    >>> maps.rsample((4,)).shape, maps.variance[0, 0].item()
    (torch.Size([4, 5, 18]), 4.0)
    """

    arg_constraints = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mean: Tensor, row_factor: Tensor, column_factor: Tensor):
        self.maps, self.row_factor, self.column_factor = mean, row_factor, column_factor
        super().__init__(mean.shape[:-3], (math.prod(mean.shape[-3:]),), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.maps.flatten(-3)

    @property
    def variance(self) -> Tensor:
        rows, columns = (factor.square().sum(-1) for factor in (self.row_factor, self.column_factor))
        return (rows[..., :, None] * columns[..., None, :]).expand(self.maps.shape).flatten(-3)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.from_noise(self._noise(sample_shape))

    def from_noise(self, noise: Tensor) -> Tensor:
        """Transform standard normal noise (..., K m n) into draws."""
        noise = noise.unflatten(-1, self.maps.shape[-3:])
        return (self.maps + self.row_factor @ noise @ self.column_factor.mT).flatten(-3)

    def log_prob(self, value: Tensor) -> Tensor:
        centred = value.unflatten(-1, self.maps.shape[-3:]) - self.maps
        by_rows = torch.linalg.solve_triangular(self.row_factor, centred, upper=False)
        noise = torch.linalg.solve_triangular(self.column_factor.mT, by_rows, upper=True, left=False)
        return self._log_density(noise.flatten(-3))

    def rsample_and_log_prob(self, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Return draws (*shape, ..., K m n) that carry gradients, and their log-density (*shape, ...)."""
        noise = self._noise(shape)
        return self.from_noise(noise), self._log_density(noise)

    @property
    def half_log_determinant(self) -> Tensor:
        """Half the logarithm of the determinant of the covariance, (...)."""
        m, n = self.maps.shape[-2:]
        by_rows, by_columns = (
            factor.diagonal(dim1=-2, dim2=-1).log().sum((-1, -2)) for factor in (self.row_factor, self.column_factor)
        )
        return n * by_rows + m * by_columns

    def _noise(self, sample_shape: tuple[int, ...]) -> Tensor:
        return standard_normal(self._extended_shape(sample_shape), self.maps)

    def _log_density(self, noise: Tensor) -> Tensor:
        """Return the log-density of the draw that is made from this noise."""
        constant = 0.5 * math.log(2 * math.pi) * noise.shape[-1]
        return -0.5 * noise.square().sum(-1) - constant - self.half_log_determinant


@register_kl(MatrixNormal, DiagonalNormal)
def _kl_to_a_gaussian(q: MatrixNormal, p: DiagonalNormal) -> Tensor:
    squares = (q.variance + (q.mean - p.mean).square()) / p.variance
    return 0.5 * (squares + p.variance.log() - 1).sum(-1) - q.half_log_determinant
