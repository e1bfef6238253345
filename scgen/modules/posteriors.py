"""Posteriors q(z | x, s) and q(log l | x, s)."""

from collections.abc import Sequence

from torch import Tensor, nn

from scgen.data.cells import Cells
from scgen.distributions import DiagonalNormal, FlowDistribution, PointMass
from scgen.modules.networks import MLP, CovariateLinear, Linear

#: The largest mean of log l, and the largest logarithm of its variance. The mean of l, exp(m + v / 2), is then finite
#: in float32. A network that must find the total itself exceeds them early in training, or for a cell with far more
#: counts than the training cells.
MOST_LOG_LIBRARY, MOST_LOG_VARIANCE = 60.0, 3.0


def positive_variance(a: Tensor) -> Tensor:
    """Return exp(a) + 1e-4, with a limited to +-15 so that it cannot overflow."""
    return a.clamp(-15, 15).exp() + 1e-4


def clamp_straight_through(values: Tensor, most: float) -> Tensor:
    """Limit the values to ``most``. The gradient stays 1, so that training can lower them.

    Examples
    --------
    >>> import torch
    >>> values = torch.tensor([1.0, 80.0], requires_grad=True)
    >>> clamp_straight_through(values, 60.0).sum().backward()
    >>> clamp_straight_through(values, 60.0).tolist(), values.grad.tolist()
    ([1.0, 60.0], [1.0, 1.0])
    """
    return values + (values.clamp(max=most) - values).detach()


class GaussianPosterior(nn.Module):
    """q(z | x, s) = N(m(x, s), diag v(x, s)).

    Parameters
    ----------
    n_genes, n_latent
        G and d.
    n_hidden, n_layers, dropout_rate, n_categories, n_continuous
        As in `MLP`.
    log_input
        Whether x are counts; the network then reads log(1 + x).
    """

    def __init__(
        self,
        n_genes: int,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        dropout_rate: float,
        n_categories: Sequence[int] = (),
        n_continuous: int = 0,
        log_input: bool = True,
    ):
        super().__init__()
        self.log_input = log_input
        self.mlp = MLP(n_genes, n_hidden, n_layers, n_categories, n_continuous, dropout_rate)
        self.mean = Linear(n_hidden, n_latent)
        self.log_variance = Linear(n_hidden, n_latent)

    def forward(self, cells: Cells) -> DiagonalNormal:
        return self.gaussian(self.hidden(cells))

    def gene_axes(self) -> dict[str, int]:
        """Return the axis of the genes of the first layer's weight: see `VAE.gene_axes`."""
        return {"mlp.layers.0.linear.weight": 1}

    def gaussian(self, h: Tensor) -> DiagonalNormal:
        """Return N(m, diag v) for the last hidden layer, (n, n_hidden)."""
        return DiagonalNormal(self.mean(h), positive_variance(self.log_variance(h)))

    def gaussian_at(self, inputs: Tensor, cells: Cells) -> DiagonalNormal:
        """Return N(m, diag v) for given network inputs, (n, G), instead of the cells' own values."""
        return self.gaussian(self.mlp(inputs, cells))

    def hidden(self, cells: Cells) -> Tensor:
        """Return the last hidden layer, (n, n_hidden)."""
        if not self.log_input:
            return self.mlp(cells.counts, cells)
        if self.mlp.reduced:
            return self.mlp(cells.reduced_log_counts, cells)
        return self.mlp(cells.dense_log_counts if self.training else cells.log_counts, cells)

    def means(self, cells: Cells) -> Tensor:
        """Return only the means m(x, s), (n, d). This makes the embedding of many cells faster."""
        return self.mean(self.hidden(cells))


class FlowPosterior(nn.Module):
    """q(z | x, s): a Gaussian transformed by a flow. Both depend on the last hidden layer, the flow also on s.

    Parameters
    ----------
    base
        Posterior that gives the Gaussian and the hidden layer.
    flow
        A module ``(z, context) -> (z', log_det)`` of `scgen.modules.flows`.
    context
        Layer that computes the flow's context from hidden units and covariates.
    """

    def __init__(self, base: GaussianPosterior, flow: nn.Module, context: CovariateLinear):
        super().__init__()
        self.base, self.flow, self.context = base, flow, context

    def forward(self, cells: Cells) -> FlowDistribution:
        h = self.base.hidden(cells)
        return FlowDistribution(self.base.gaussian(h), self.flow, self.context(h, cells).tanh())

    def means(self, cells: Cells) -> Tensor:
        """Return the means of q, (n, d), over fixed draws."""
        return self(cells).mean

    def gaussian_at(self, inputs: Tensor, cells: Cells) -> DiagonalNormal:
        """Return the Gaussian of the base."""
        return self.base.gaussian_at(inputs, cells)


class LibraryPosterior(GaussianPosterior):
    """q(log l | x, s) = N(log total + r(x, s), v(x, s)): the observed total with a learned correction r.

    A network that must find the total itself misses it by some per cent, which costs tens of nats per cell. r starts at
    0 and v near exp(-4).

    Parameters
    ----------
    residual
        Whether to use the observed total; the network of the paper does not. Other parameters are those of
        `GaussianPosterior`.
    """

    def __init__(
        self,
        n_genes: int,
        n_hidden: int,
        dropout_rate: float,
        n_categories: Sequence[int] = (),
        n_continuous: int = 0,
        residual: bool = True,
    ):
        super().__init__(n_genes, 1, n_hidden, 1, dropout_rate, n_categories, n_continuous)
        self.residual = residual
        if residual:
            nn.init.zeros_(self.mean.weight)
            nn.init.zeros_(self.mean.bias)
            nn.init.constant_(self.log_variance.bias, -4.0)

    def forward(self, cells: Cells) -> DiagonalNormal:
        h = self.hidden(cells)
        return DiagonalNormal(
            self._mean(h, cells), positive_variance(clamp_straight_through(self.log_variance(h), MOST_LOG_VARIANCE))
        )

    def means(self, cells: Cells) -> Tensor:
        return self._mean(self.hidden(cells), cells)

    def _mean(self, h: Tensor, cells: Cells) -> Tensor:
        return clamp_straight_through(self.mean(h) + self.offset(cells), MOST_LOG_LIBRARY)

    def offset(self, cells: Cells) -> Tensor | float:
        """Return log total, or without residual what limits l to the measured genes, to add to the network's output."""
        if self.residual:
            return cells.library
        return 0.0 if cells.imputed_counts is None else cells.library - cells.imputed_counts.sum(-1, keepdim=True).log()


class ObservedLibrary(nn.Module):
    """log l is observed: the logarithm of the cell's total count or size factor."""

    def forward(self, cells: Cells) -> PointMass:
        return PointMass(cells.library)
