"""Layers: linear ones, convolutions, and perceptrons with covariates as additional inputs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from scgen.data.cells import Cells
from scgen.seeding import generator


class Linear(nn.Linear):
    """torch's linear layer in float32, with initial weights from scgen's random generator."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True):
        super().__init__(n_in, n_out, bias, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Draw weights and bias like torch, uniformly within 1 / sqrt(n_in) of 0."""
        draw_evenly(self, self.in_features)


class Convolution(nn.Conv2d):
    """torch's convolution of images, like `Linear` in float32 and with initial weights from scgen's generator."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1):
        super().__init__(n_in, n_out, 3, stride, padding=1, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Draw weights and bias uniformly within 1 / sqrt(n) of 0, for n inputs of each output."""
        draw_evenly(self, 9 * self.in_channels)


class TransposedConvolution(nn.ConvTranspose2d):
    """torch's transposed convolution, like `Convolution`.

    Parameters
    ----------
    n_in, n_out
        Number of channels.
    kernel, stride, padding, output_padding
        As in torch. The sides of the result are (side - 1) stride - 2 padding + kernel + output_padding.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: tuple[int, int],
        stride: int = 1,
        padding: int = 0,
        output_padding: tuple[int, int] = (0, 0),
    ):
        super().__init__(n_in, n_out, kernel, stride, padding, output_padding, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Draw weights and bias uniformly within 1 / sqrt(n) of 0, for n inputs of each output."""
        draw_evenly(self, self.in_channels * self.kernel_size[0] * self.kernel_size[1] // math.prod(self.stride))


def draw_evenly(layer: nn.Module, n_in: int) -> None:
    """Draw all parameters of a layer uniformly within 1 / sqrt(n_in) of 0."""
    bound = n_in**-0.5 if n_in else 0.0
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator(parameter.device))


class WideLinear(Linear):
    """A linear layer that may be from or to all genes, which takes nearly all of the computation.

    Attributes
    ----------
    reduced
        Whether its products use bfloat16. Weights, bias and result are float32 in any case, except that of `product`.
    """

    reduced = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if not self.reduced else self.product(x).float().add_(self.bias)

    def product(self, x: Tensor) -> Tensor:
        """Return the result without the bias, in bfloat16 if ``reduced``."""
        return linear(x.bfloat16(), self.weight.bfloat16()) if self.reduced else linear(x, self.weight)


class Dropout(nn.Dropout):
    """Dropout with four 16-bit numbers per draw. torch draws once per unit, which costs more than a hidden layer."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        draws.random_(-(2**63), None, generator=generator(x.device))
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * (kept.to(x.dtype) / (1 - dropped / 2**16))


class CovariateLinear(nn.Module):
    """A linear layer of [x, one-hots, continuous covariates].

    A one-hot vector times a matrix is a row of the matrix. The rows are therefore looked up and added, without a
    concatenation. A category with one value is left out.

    Parameters
    ----------
    n_in, n_out
        Width of x and of the result.
    n_categories
        Number of values of the batch and of each further categorical covariate.
    n_continuous
        Number of continuous covariates.
    """

    def __init__(self, n_in: int, n_out: int, n_categories: Sequence[int] = (), n_continuous: int = 0):
        super().__init__()
        used = {i: n for i, n in enumerate(n_categories) if n > 1}
        bound = (n_in + sum(used.values()) + n_continuous) ** -0.5
        self.linear = WideLinear(n_in, n_out)
        self.rows = nn.ParameterDict({str(i): self._evenly(n, n_out, bound) for i, n in used.items()})
        self.slopes = nn.Parameter(self._evenly(n_continuous, n_out, bound)) if n_continuous else None

    def category_rows(self) -> dict[str, str | int]:
        """Return, by parameter, the column whose categories its rows are of: see `VAE.category_rows`."""
        return {f"rows.{i}": "batch" if i == "0" else int(i) - 1 for i in self.rows}

    @staticmethod
    def _evenly(n_rows: int, n_columns: int, bound: float) -> Tensor:
        weight = torch.empty(n_rows, n_columns, dtype=torch.float32)
        return weight.uniform_(-bound, bound, generator=generator(weight.device))

    def forward(self, x: Tensor, cells: Cells) -> Tensor:
        return self._with_covariates(self.linear(x), cells, None)

    def scaled(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight and bias with which the layer computes scale * forward(x, cells) + shift."""
        return (self.linear.weight.T * scale).contiguous(), self.linear.bias * scale + shift

    def scaled_forward(self, x: Tensor, cells: Cells, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        """Return the result for a CSR tensor x."""
        return self._with_covariates(torch.addmm(bias, x, weight), cells, scale)

    def _with_covariates(self, h: Tensor, cells: Cells, scale: Tensor | None) -> Tensor:
        for i, rows in self.rows.items():
            rows = rows if scale is None else rows * scale
            h += embedding(cells.batch if i == "0" else cells.categorical[:, int(i) - 1], rows)
        if self.slopes is not None:
            h += cells.continuous @ (self.slopes if scale is None else self.slopes * scale)
        return h


class SliceBatchNorm(nn.BatchNorm1d):
    """Batch normalisation that normalises each draw of x (S, n, H) separately in training."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return super().forward(x)
        if self.training:
            return torch.stack([self(slice_) for slice_ in x])
        return super().forward(x.flatten(0, -2)).reshape(x.shape)

    def as_affine(self) -> tuple[Tensor, Tensor]:
        """Return the scale and shift, (H,) each, that this layer applies outside training."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class MLP(nn.Module):
    """Layers of Linear, batch normalisation, ReLU and dropout. Covariates are inputs of every layer.

    Parameters
    ----------
    n_in, n_hidden, n_layers
        Width of the input, width and number of the layers.
    n_categories, n_continuous
        As in `CovariateLinear`.
    dropout_rate
        Share of hidden units dropped in training.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_layers: int,
        n_categories: Sequence[int] = (),
        n_continuous: int = 0,
        dropout_rate: float = 0.0,
    ):
        super().__init__()
        widths = [n_in] + [n_hidden] * (n_layers - 1)
        self.layers = nn.ModuleList(CovariateLinear(n, n_hidden, n_categories, n_continuous) for n in widths)
        # Momentum and epsilon are those of the paper's code, in torch's convention.
        self.norms = nn.ModuleList(
            SliceBatchNorm(n_hidden, momentum=0.01, eps=1e-3, dtype=torch.float32) for _ in widths
        )
        self.dropout = Dropout(dropout_rate)
        self._folded: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def reduced(self) -> bool:
        """Whether the first layer's products use bfloat16."""
        return self.layers[0].linear.reduced

    def train(self, mode: bool = True) -> "MLP":
        """Start or end training, and drop the cached first layer. A question begins with ``eval``, which calls this."""
        self._folded = None
        return super().train(mode)

    def forward(self, x: Tensor, cells: Cells) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            if x.layout == torch.sparse_csr and not self.training:
                h = layer.scaled_forward(x, cells, *self._first_layer())
            else:
                h = norm(layer(x, cells))
            x = self.dropout(torch.relu_(h))
        return x

    def _first_layer(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first layer with its batch normalisation folded into it; in a question, computed only once."""
        folded, kept = self._folded, torch.is_inference_mode_enabled()
        if folded is None or not kept:
            scale, shift = self.norms[0].as_affine()
            folded = *self.layers[0].scaled(scale, shift), scale
        if kept:
            self._folded = folded
        return folded
