"""Latent maps: small images that keep where things are, with a matrix-variate normal posterior (Wang et al. 2017).

Images of the paper have colours at each pixel. Patches of tissue have the features of the spot at each place.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, silu

from scgen.distributions import DiagonalNormal, MatrixNormal
from scgen.modules.networks import Convolution, Linear, TransposedConvolution
from scgen.modules.places import PlaceDecoder, Places, Standardised
from scgen.modules.posteriors import positive_variance

COVARIANCES = ("diagonal", "full", "independent")
#: The smallest image inside the networks has sides of at least this many places.
SMALLEST = 4


def halvings(shape: tuple[int, int], map_size: int) -> list[tuple[int, int]]:
    """Return the size of an image before and after each halving.

    It is halved as long as both sides stay at least as large as a map and as `SMALLEST`.

    Examples
    --------
    >>> halvings((7, 7), 3), halvings((28, 20), 3)
    ([(7, 7), (4, 4)], [(28, 20), (14, 10), (7, 5)])
    """
    sizes = [shape]
    while min(half := tuple(-(-side // 2) for side in sizes[-1])) >= max(map_size, SMALLEST):
        sizes.append(half)
    return sizes


def outputs_of_a_map(map_size: int, covariance: str, rank: int | None) -> tuple[int, int]:
    """Return how many outputs of the encoder the mean and the covariance of a map of d x d values take.

    Examples
    --------
    >>> outputs_of_a_map(3, "diagonal", None), outputs_of_a_map(3, "full", 1)
    ((9, 6), (6, 12))
    """
    d = map_size
    return d * d if rank is None else 2 * rank * d, {"diagonal": 2 * d, "full": d * (d + 1), "independent": d * d}[
        covariance
    ]


class PatchEncoder(nn.Module):
    """Outputs (n, n_out) that a convolutional network computes from images or patches. Missing places are 0.

    Parameters
    ----------
    sizes
        The result of `halvings`.
    n_features, n_out, n_hidden
        F, the number of outputs, and the number of channels of the hidden layers.
    log_input
        Whether the features are counts; the network then reads log(1 + x).
    """

    def __init__(self, sizes: list[tuple[int, int]], n_features: int, n_out: int, n_hidden: int, log_input: bool):
        super().__init__()
        self.shape = sizes[0]
        self.features = Standardised(n_features, log_input)
        self.place = Linear(n_features + 1, n_hidden)
        strides = [2] * (len(sizes) - 1) + [1]
        layers = [layer for stride in strides for layer in (nn.SiLU(), Convolution(n_hidden, n_hidden, stride))]
        self.images = nn.Sequential(*layers, nn.SiLU(), nn.Flatten())
        n_flat = n_hidden * math.prod(sizes[-1])
        self.whole = nn.Sequential(Linear(n_flat, 2 * n_hidden), nn.SiLU(), Linear(2 * n_hidden, n_out))

    def forward(self, cells: Places) -> Tensor:
        missing = ~cells.mask[..., None]
        x = torch.cat([self.features(cells).masked_fill(missing, 0), missing.to(cells.features.dtype)], -1)
        return self.whole(self.images(self.place(x).mT.unflatten(-1, self.shape)))


class MapPosterior(nn.Module):
    """q(F_1, ..., F_K | x): independent maps of d x d values, as one vector of their K d d values.

    Each map is F ~ N(M, Omega x Psi), a matrix-variate normal.

    Parameters
    ----------
    sizes, n_features, n_hidden, log_input
        As in `PatchEncoder`.
    n_maps, map_size
        K and d.
    covariance
        "diagonal": Omega and Psi are diagonal. "full": they are any covariances. "independent": each value has a
        variance of its own, in place of Omega and Psi.
    rank
        r of the mean M = sum over r of mu nu^T; None for any mean.
    """

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        n_features: int,
        n_maps: int,
        map_size: int,
        covariance: str,
        rank: int | None,
        n_hidden: int,
        log_input: bool,
    ):
        super().__init__()
        self.map_size, self.covariance, self.rank = map_size, covariance, rank
        self.n_outputs = outputs_of_a_map(map_size, covariance, rank)
        self.encoder = PatchEncoder(sizes, n_features, n_maps * sum(self.n_outputs), n_hidden, log_input)
        if rank is not None:
            # With mu and nu near 0, neither would have a gradient. The columns of nu start as waves, which differ.
            along = math.pi / map_size * (torch.arange(map_size, dtype=torch.float32) + 0.5)
            waves = torch.cos(torch.arange(rank, dtype=torch.float32)[:, None] * along)
            bias = self.encoder.whole[-1].bias
            with torch.no_grad():
                bias.unflatten(0, (n_maps, -1))[:, rank * map_size : 2 * rank * map_size] += waves.flatten()

    def forward(self, cells: Places) -> MatrixNormal | DiagonalNormal:
        of_mean, of_covariance = self._outputs(cells)
        mean, d = self._mean(of_mean), self.map_size
        if self.covariance == "independent":
            return DiagonalNormal(mean.flatten(1), positive_variance(of_covariance).flatten(1))
        rows, columns = of_covariance.chunk(2, -1)
        if self.covariance == "diagonal":
            # A matrix-variate normal, too, but its values are independent.
            variance = positive_variance(rows)[..., :, None] * positive_variance(columns)[..., None, :]
            return DiagonalNormal(mean.flatten(1), variance.flatten(1))
        return MatrixNormal(mean, factor(rows, d), factor(columns, d))

    def means(self, cells: Places) -> Tensor:
        """Return only the means, (n, K d d)."""
        return self._mean(self._outputs(cells)[0]).flatten(1)

    def _outputs(self, cells: Places) -> tuple[Tensor, Tensor]:
        """Return the outputs for the mean and for the covariance of each map, (n, K, ...) each."""
        return self.encoder(cells).unflatten(-1, (-1, sum(self.n_outputs))).split(self.n_outputs, -1)

    def _mean(self, outputs: Tensor) -> Tensor:
        """Return M, (n, K, d, d)."""
        if self.rank is None:
            return outputs.unflatten(-1, (self.map_size, self.map_size))
        mu, nu = outputs.unflatten(-1, (2, self.rank, self.map_size)).unbind(-3)
        return mu.mT @ nu


def factor(outputs: Tensor, size: int) -> Tensor:
    """Return lower triangular factors (..., d, d) of covariances, with positive diagonals, of d (d + 1) / 2 outputs.

    The first d outputs give the diagonal. The others, by rows, are what is below it, in units of the row's diagonal.

    Examples
    --------
    >>> factor(torch.tensor([0.0, 0.0, 3.0]), 2).round(decimals=2)
    tensor([[1., 0.],
            [3., 1.]])
    """
    scale, below = outputs.split([size, outputs.shape[-1] - size], -1)
    row, column = torch.tril_indices(size, size, -1, device=outputs.device)
    unit = torch.eye(size, dtype=outputs.dtype, device=outputs.device).expand(*outputs.shape[:-1], -1, -1).clone()
    unit[..., row, column] = below
    return positive_variance(scale).sqrt()[..., None] * unit


class MapDecoder(PlaceDecoder):
    """p(features | maps, s): transposed convolutions from the maps to the places of the image or patch.

    Parameters
    ----------
    likelihood, n_features, n_hidden, n_batches
        As in `PlaceDecoder`. All hidden layers have H channels.
    sizes
        The result of `halvings`.
    n_maps, map_size
        K and d.
    """

    def __init__(
        self,
        likelihood: str,
        sizes: list[tuple[int, int]],
        n_maps: int,
        map_size: int,
        n_features: int,
        n_hidden: int,
        n_batches: int,
    ):
        super().__init__(likelihood, n_features, n_hidden, n_batches)
        self.maps = n_maps, map_size, map_size
        kernel = tuple(side - map_size + 1 for side in sizes[-1])
        layers = [TransposedConvolution(n_maps, n_hidden, kernel), nn.SiLU(), Convolution(n_hidden, n_hidden)]
        for size in reversed(sizes[:-1]):
            even = tuple(1 - side % 2 for side in size)
            layers += [nn.SiLU(), TransposedConvolution(n_hidden, n_hidden, (3, 3), 2, 1, even)]
        self.images = nn.Sequential(*layers, nn.Flatten(-2))

    def hidden(self, latents: dict[str, Tensor], cells: Places) -> Tensor:
        """Return the last hidden layer at each place, (..., n, J, H)."""
        z = latents["z"]
        h = self.images(z.reshape(-1, *self.maps)).mT.unflatten(0, z.shape[:-1])
        if self.batch is not None:
            h = h + embedding(cells.batch, self.batch)[:, None]
        return silu(h)
