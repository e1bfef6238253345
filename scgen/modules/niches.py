"""Niches: a cell with its neighbours. Encoders and a decoder for which the orientation on the slide means nothing.

The model is that of Bepler et al. (2019): the values at a place are a function of z and of the place, turned back by an
angle theta and then shifted. There the values are the pixels of an image. Here they are the cells of a neighbourhood.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, silu, softplus

from scgen.distributions import CircularUniform, DiagonalNormal, WrappedNormal
from scgen.modules.networks import Linear
from scgen.modules.places import PlaceDecoder, Places, Standardised
from scgen.modules.posteriors import positive_variance

#: One standard deviation of the prior of the translation, in radii of the neighbourhood.
UNIT_OF_TRANSLATION = 0.1
#: Limits of the logarithm of the angle's standard deviation. The widest angle is uniform but for 1e-5 nats. That of
#: `EquivariantAngle` is half a radian: with wider ones, the decoder sees niches that are blurred by rotation, and some
#: trainings end there.
NARROWEST, WIDEST, WIDEST_EQUIVARIANT = -6.0, 1.2, math.log(0.5)
#: Number of `harmonics`.
N_HARMONICS = 5


@dataclass(frozen=True, kw_only=True)
class Niches(Places):
    """Cells with the J cells of their neighbourhoods, the first of which is the cell itself.

    Attributes
    ----------
    offsets
        (n, J, 2) float: where they lie relative to the cell, in the unit disc.
    """

    offsets: Tensor


def turned(offsets: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn positions (..., J, 2) counter-clockwise by an angle, given by its cosine and sine, (...) each.

    Examples
    --------
    >>> angle = torch.tensor(0.7)
    >>> turned(torch.tensor([[1.0, 0.0]]), angle.cos(), angle.sin())
    tensor([[0.7648, 0.6442]])
    """
    x, y, cosine, sine = offsets[..., 0], offsets[..., 1], cosine[..., None], sine[..., None]
    return torch.stack([x * cosine - y * sine, x * sine + y * cosine], -1)


def harmonics(offsets: Tensor) -> Tensor:
    """Return functions of positions, (..., 5): x, y, the second harmonics x^2 - y^2 and 2 x y, and x^2 + y^2."""
    return torch.cat([offsets, squared(offsets), offsets.square().sum(-1, keepdim=True)], -1)


def squared(u: Tensor) -> Tensor:
    """Return u^2 of complex numbers, given as real and imaginary parts (..., 2)."""
    x, y = u.unbind(-1)
    return torch.stack([x * x - y * y, 2 * x * y], -1)


def products_with_conjugate(a: Tensor, b: Tensor) -> Tensor:
    """Return real and imaginary parts of all a_k conj(b_l), (n, K, 2) and (n, L, 2) -> (n, 2 K L).

    Examples
    --------
    >>> products_with_conjugate(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[3.0, 4.0]]]))  # i (3 - 4 i)
    tensor([[4., 3.]])
    """
    x, y = b.unbind(-1)
    return torch.cat([a @ b.mT, a @ torch.stack([-y, x], -1).mT], -1).flatten(1)


def perceptron(*widths: int) -> nn.Sequential:
    """Return linear layers of these widths, with SiLU between them."""
    layers = [Linear(*pair) for pair in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain(*((layer, nn.SiLU()) for layer in layers[:-1])), layers[-1])


def pooled(h: Tensor, mask: Tensor) -> Tensor:
    """Return mean and maximum over the cells of each neighbourhood, (n, J, H) -> (n, 2 H), without the padding."""
    mean = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.cat([mean, h.masked_fill(~mask[..., None], -math.inf).amax(1)], -1)


def angular_scale(log_scale: Tensor, widest: float = WIDEST) -> Tensor:
    """Return the standard deviation of an angle within its limits. The upper one is smooth: there is a way back."""
    return (widest - softplus(widest - log_scale)).clamp(min=NARROWEST).exp()


class NicheEncoder(nn.Module):
    """Outputs (n, n_out) that depend on which cells are where in a neighbourhood, but not on the order of the cells.

    Parameters
    ----------
    n_features, n_out, n_hidden
        F, the number of outputs, and the width of all hidden layers.
    log_input
        Whether the features are counts; the network then reads log(1 + x).
    angle
        If given, an `EquivariantAngle`. The positions are turned back by its mean before they are read.
    """

    def __init__(
        self, n_features: int, n_out: int, n_hidden: int, log_input: bool, angle: "EquivariantAngle | None" = None
    ):
        super().__init__()
        self.features = Standardised(n_features, log_input)
        self.cell = perceptron(n_features + N_HARMONICS, n_hidden, n_hidden)
        self.whole = perceptron(2 * n_hidden, n_hidden, n_out)
        self.angle = (angle,)  # in a tuple: its weights are registered as those of its own latent, and not twice

    def forward(self, cells: Niches) -> Tensor:
        (angle,) = self.angle
        offsets = cells.offsets if angle is None else angle.frame(cells)
        h = silu(self.cell(torch.cat([self.features(cells), harmonics(offsets)], -1)))
        return self.whole(pooled(h, cells.mask))


class InvariantEncoder(nn.Module):
    """Outputs (n, n_out) that depend on the arrangement of the cells, but do not change if it is turned.

    The cells are summed with K sets of weights w, which depend on their features and distances: c_k = sum_j w_k(j) u_j
    and d_k = sum_j w'_k(j) u_j^2, where the position u_j is a complex number. If the niche turns by alpha, all c_k turn
    by alpha and all d_k by 2 alpha. The products c_k conj(c_l), d_k conj(d_l) and c_k^2 conj(d_l) do not change, and
    tell how the sums lie relative to each other. A network reads them beside what is pooled over the cells.

    No angle is needed. An encoder that reads the positions relative to theta does not change under rotation, either.
    But where theta is wrong, z then tells by how much, and no gradient corrects theta.

    Only the first two harmonics of the angle are read. Arrangements that differ in higher ones alone, such as ABAB...
    and AABB... around a ring, look the same.

    Parameters
    ----------
    n_features, n_out, n_hidden, log_input
        As in `NicheEncoder`. The layer that reads the products is twice as wide.
    n_sums
        K of each of the two kinds of sums.
    """

    def __init__(self, n_features: int, n_out: int, n_hidden: int, log_input: bool, n_sums: int = 16):
        super().__init__()
        self.features = Standardised(n_features, log_input)
        self.cell = perceptron(n_features + 1, n_hidden, n_hidden)
        self.weights = Linear(n_hidden, 2 * n_sums, bias=False)
        with torch.no_grad():
            self.weights.weight *= 10  # otherwise the products are so small at first that some trainings miss them
        self.whole = perceptron(2 * n_hidden + 6 * n_sums**2, 2 * n_hidden, n_hidden, n_out)

    def forward(self, cells: Niches) -> Tensor:
        u = cells.offsets
        h = silu(self.cell(torch.cat([self.features(cells), u.square().sum(-1, keepdim=True)], -1)))
        # Divided by the root of the number of cells, sums of independent cells are as large, whatever the number.
        weights = self.weights(h) * cells.mask[..., None] / cells.mask.sum(1)[:, None, None].sqrt()
        first, second = weights.mT.chunk(2, -2)
        c, d = first @ u, second @ squared(u)  # (n, K, 2) each: real and imaginary parts
        products = [products_with_conjugate(a, b) for a, b in ((c, c), (d, d), (squared(c), d))]
        return self.whole(torch.cat([pooled(h, cells.mask), *products], -1))


class FreeAngle(nn.Module):
    """q(theta | niche) as in the paper: the network may return any angle, and need not turn with the niche.

    Parameters
    ----------
    n_features, n_hidden, log_input
        As in `NicheEncoder`.
    wrapped
        Whether theta is a wrapped normal, whose mean is the direction of two outputs. Otherwise it is a normal whose
        mean is an output; angles that differ by a full turn are then different.
    """

    def __init__(self, n_features: int, n_hidden: int, log_input: bool, wrapped: bool):
        super().__init__()
        self.encoder, self.wrapped = NicheEncoder(n_features, 3, n_hidden, log_input), wrapped

    def forward(self, cells: Niches) -> WrappedNormal | DiagonalNormal:
        direction, log_scale = self.encoder(cells).split([2, 1], -1)
        scale = angular_scale(log_scale)
        if not self.wrapped:
            return DiagonalNormal(direction[..., :1], scale.square())
        return WrappedNormal(torch.atan2(direction[..., 1:], direction[..., :1]), scale)


class EquivariantAngle(nn.Module):
    """q(theta | niche): a wrapped normal around an angle that turns with the niche, whatever the weights are.

    It is the angle of c = sum_h a_h c_h with c_h = mean_j w_h(j) u_j, weighted means of the positions u_j of the cells.
    The weights w are computed from the features, the distances |u_j| and what is pooled of both; the weights a from
    what is pooled and from the products c_h c_k, so that a vector of a niche which is near 0 can be left out. None of
    this changes under rotation. So if the niche turns by alpha, c and theta turn by alpha.

    Parameters
    ----------
    n_features, n_hidden, log_input
        As in `NicheEncoder`.
    n_heads
        Number of weighted sums.
    """

    def __init__(self, n_features: int, n_hidden: int, log_input: bool, n_heads: int = 4):
        super().__init__()
        self.features = Standardised(n_features, log_input)
        self.cell = perceptron(n_features + 1, n_hidden, n_hidden)
        self.weights = perceptron(3 * n_hidden, n_hidden, n_heads)
        self.whole = perceptron(2 * n_hidden + n_heads**2, n_hidden, n_heads + 1)
        with torch.no_grad():
            self.whole[-1].bias[-1] = -2.0  # narrow from the start: a wide angle is of no use, and might be given up

    def frame(self, cells: Niches) -> Tensor:
        """Return the positions turned back by theta's mean. They do not change under rotation."""
        (x, y), _ = self._direction(cells)
        return turned(cells.offsets, x, -y)

    def forward(self, cells: Niches) -> WrappedNormal:
        (x, y), log_scale = self._direction(cells)
        return WrappedNormal(torch.atan2(y, x)[:, None], angular_scale(log_scale, WIDEST_EQUIVARIANT)[:, None])

    def _direction(self, cells: Niches) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return cosine and sine of the angle of c, and the logarithm of theta's standard deviation, (n,) each."""
        distance = cells.offsets.square().sum(-1, keepdim=True)
        h = silu(self.cell(torch.cat([self.features(cells), distance], -1)))
        context = pooled(h, cells.mask)
        weights = self.weights(torch.cat([h, context[:, None].expand(-1, h.shape[1], -1)], -1)) * cells.mask[..., None]
        vectors = weights.mT @ cells.offsets / cells.mask.sum(1)[:, None, None]  # (n, heads, 2)
        whole = self.whole(torch.cat([context, (vectors @ vectors.mT).flatten(1)], -1))
        c = (whole[:, :-1, None] * vectors).sum(1)
        cosine, sine = (c / (c.square().sum(-1, keepdim=True) + 1e-12).sqrt()).unbind(-1)
        return (cosine, sine), whole[:, -1]


class NichePosterior(nn.Module):
    """q(z | niche) = N(m, diag v), or q of the translation.

    Parameters
    ----------
    encoder
        A module ``cells -> (n, 2 d)``: m and the logarithm of v.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, cells: Niches) -> DiagonalNormal:
        mean, log_variance = self.encoder(cells).chunk(2, -1)
        return DiagonalNormal(mean, positive_variance(log_variance))

    def means(self, cells: Niches) -> Tensor:
        """Return only the means m, (n, d)."""
        return self.encoder(cells).chunk(2, -1)[0]


class UniformAngle(nn.Module):
    """p(theta): uniform on the circle."""

    def forward(self, cells: Niches, posterior: nn.Module) -> CircularUniform:
        return CircularUniform(cells.offsets.device)


class WideAngle(nn.Module):
    """p(theta) = N(0, pi^2), for a theta that is not wrapped."""

    def forward(self, cells: Niches, posterior: nn.Module) -> DiagonalNormal:
        zero = cells.offsets.new_zeros(1)
        return DiagonalNormal(zero, zero + math.pi**2)


class NicheDecoder(PlaceDecoder):
    """p(features | z, theta, translation, s): at each place a function of z, and of the place turned and shifted.

    The place is u R(-theta) + Delta for an offset u. theta is thus the angle by which the niche is turned, counter-
    clockwise, from the orientation in which it is decoded. After it was turned back, it lies at -Delta.

    Parameters
    ----------
    likelihood, n_features, n_hidden, n_batches
        As in `PlaceDecoder`. There are two hidden layers.
    n_latent
        d.
    """

    def __init__(self, likelihood: str, n_latent: int, n_features: int, n_hidden: int, n_batches: int):
        super().__init__(likelihood, n_features, n_hidden, n_batches)
        self.place, self.state = Linear(N_HARMONICS, n_hidden), Linear(n_latent, n_hidden, bias=False)
        self.layers = nn.Sequential(nn.Tanh(), Linear(n_hidden, n_hidden), nn.Tanh())

    def hidden(self, latents: dict[str, Tensor], cells: Niches) -> Tensor:
        """Return the last hidden layer at each cell of the niches, (..., n, J, H)."""
        offsets = cells.offsets
        if "rotation" in latents:
            theta = latents["rotation"].squeeze(-1)
            offsets = turned(offsets, theta.cos(), -theta.sin())
        if "translation" in latents:
            offsets = offsets + UNIT_OF_TRANSLATION * latents["translation"][..., None, :]
        h = self.place(harmonics(offsets)) + self.state(latents["z"])[..., None, :]
        if self.batch is not None:
            h = h + embedding(cells.batch, self.batch)[:, None]
        return self.layers(h)
