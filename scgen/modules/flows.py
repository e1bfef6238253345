"""Normalising flows: invertible maps of a latent that a context bends, with the logarithms of their determinants."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, linear, logsigmoid, softplus

from scgen.modules.networks import Linear
from scgen.seeding import generator

#: Its softplus is 1.
INVERSE_SOFTPLUS_OF_1 = math.log(math.expm1(1))


class PlanarFlow(nn.Module):
    r"""Steps z' = z + u tanh(w^T z + b), with u, w and b linear in a context.

    A step is invertible only if w^T u > -1. The component of u along w is therefore changed: if the network gives a for
    w^T u, it becomes -1 + softplus(a + log(e - 1)). u = 0 stays 0, so the flow starts as the identity.

    Parameters
    ----------
    n_latent, n_context
        Widths of z and of the context.
    n_steps
        Number of steps.

    References
    ----------
    Rezende and Mohamed, Variational inference with normalizing flows, ICML 2015.

    Examples
    --------
    >>> import torch
    >>> flow = PlanarFlow(n_latent=2, n_context=0)
    >>> z, log_det = flow(torch.randn(100, 5, 2), torch.zeros(5, 0))
    >>> tuple(z.shape), tuple(log_det.shape)
    ((100, 5, 2), (100, 5))
    """

    def __init__(self, n_latent: int, n_context: int, n_steps: int = 8):
        super().__init__()
        self.n_latent, self.n_steps = n_latent, n_steps
        self.directions = head(n_context, n_steps * n_latent, 0.01)
        self.offsets = head(n_context, n_steps, 0.01)
        self.bends = head(n_context, n_steps * n_latent, 0.0)
        bias = self.directions.bias
        nn.init.normal_(bias, std=n_latent**-0.5, generator=generator(bias.device))

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return z' (..., n, d) and log |det dz'/dz| (..., n), for z (..., n, d) and the context (n, C)."""
        log_det = 0.0
        for w, b, u, slope in self._steps(context):
            bent = ((z * w).sum(-1) + b).tanh()
            z = z + u * bent[..., None]
            log_det = log_det + self._log_slope(bent, slope)
        return z, log_det

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return z of a given z', and the logarithm of the inverse's determinant.

        Along w, a step is t + (w^T u) tanh(t) with t = w^T z + b, an increasing function. Its root is found by
        bisection. A Newton step from there hardly changes it, but carries the gradient.
        """
        log_det = 0.0
        for w, b, u, slope in reversed(self._steps(context)):
            target = (z * w).sum(-1) + b
            with torch.no_grad():
                low, high = target - (slope - 1).abs(), target + (slope - 1).abs()
                for _ in range(60):
                    middle = (low + high) / 2
                    above = middle + (slope - 1) * middle.tanh() > target
                    low, high = torch.where(above, low, middle), torch.where(above, middle, high)
                steepness = self._log_slope(middle.tanh(), slope).exp()
            bent = (middle - (middle + (slope - 1) * middle.tanh() - target) / steepness).tanh()
            z = z - u * bent[..., None]
            log_det = log_det - self._log_slope(bent, slope)
        return z, log_det

    def _steps(self, context: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return w (n, d), b (n,), u (n, d) and 1 + w^T u (n,) of each step."""
        shape = (len(context), self.n_steps, self.n_latent)
        context = context / max(context.shape[-1], 1) ** 0.5
        w, u, b = self.directions(context).view(shape), self.bends(context).view(shape), self.offsets(context)
        # The limit makes 1 + w^T u at least 0.0016, because float32 holds w^T u only to a few digits.
        asked = (w * u).sum(-1).clamp(min=-7)
        slope = softplus(asked + INVERSE_SOFTPLUS_OF_1)
        u = u + ((slope - 1 - (w * u).sum(-1)) / w.square().sum(-1).clamp(min=1e-12))[..., None] * w
        return list(zip(w.unbind(1), b.unbind(1), u.unbind(1), slope.unbind(1), strict=True))

    @staticmethod
    def _log_slope(bent: Tensor, slope: Tensor) -> Tensor:
        """Return log(1 + (1 - tanh^2) w^T u), as a sum of positive terms."""
        square = bent.square()
        return (square + (1 - square) * slope).log()


class MADE(nn.Module):
    """Masked network of z and a context. Its i-th outputs depend only on earlier components of z (Germain 2015).

    Parameters
    ----------
    n_latent, n_context, n_hidden
        Widths of z, of the context and of the hidden layer.
    gate_bias
        Initial value of the second output. The first starts at 0.
    """

    def __init__(self, n_latent: int, n_context: int, n_hidden: int, gate_bias: float):
        super().__init__()
        # A hidden unit of degree k reads the first k components; only the outputs after the k-th read it.
        degrees, of_z = torch.arange(n_hidden) % n_latent, torch.arange(n_latent)
        self.register_buffer("sees", (degrees[:, None] > of_z).float())
        self.register_buffer("seen_by", (of_z[:, None] >= degrees).float().repeat(2, 1))
        self.of_z = Linear(n_latent, n_hidden, bias=False)
        self.of_context = head(n_context, n_hidden, None)
        self.outputs = head(n_hidden, 2 * n_latent, 0.0)
        nn.init.constant_(self.outputs.bias[n_latent:], gate_bias)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return two outputs for each component, (..., n, d) each."""
        h = elu(linear(z, self.of_z.weight * self.sees) + self.of_context(context))
        shift, gate = linear(h, self.outputs.weight * self.seen_by, self.outputs.bias).chunk(2, -1)
        return shift, gate


class InverseAutoregressiveFlow(nn.Module):
    r"""Steps z' = g z + (1 - g) m with a gate g = sigmoid(s). m and s are autoregressive in z and depend on a context.

    The gate is below 1, so no step can explode. The order of the components is reversed between steps.

    Parameters
    ----------
    n_latent, n_context
        Widths of z and of the context.
    n_steps, n_hidden
        Number of steps; width of their networks' hidden layer, at least that of z.

    References
    ----------
    Kingma et al., Improving variational inference with inverse autoregressive flow, NeurIPS 2016.

    Examples
    --------
    >>> import torch
    >>> flow = InverseAutoregressiveFlow(n_latent=2, n_context=0)
    >>> z, log_det = flow(torch.ones(5, 2), torch.zeros(5, 0))
    >>> bool((z < 1).all()), bool((log_det < 0).all())
    (True, True)
    """

    #: Initial argument of the gate. The gate is then nearly open, and the flow near the identity.
    gate_bias = 2.0

    def __init__(self, n_latent: int, n_context: int, n_steps: int = 4, n_hidden: int = 64):
        super().__init__()
        n_hidden = max(n_hidden, n_latent)  # a unit for each number of components that an output may see
        steps = (MADE(n_latent, n_context, n_hidden, self.gate_bias) for _ in range(n_steps))
        self.steps = nn.ModuleList(steps)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return z' (..., n, d) and log |det dz'/dz| (..., n), for z (..., n, d) and the context (n, C)."""
        log_det = 0.0
        for i, step in enumerate(self.steps):
            z = z.flip(-1) if i else z
            scale, shift, log_scale = self.affine(*step(z, context))
            z = scale * z + shift
            log_det = log_det + log_scale
        return z, log_det

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return z of a given z', component by component, and the logarithm of the inverse's determinant."""
        log_det = 0.0
        for i, step in reversed(list(enumerate(self.steps))):
            found = torch.zeros_like(z)
            for component in range(z.shape[-1]):
                scale, shift, log_scale = self.affine(*step(found, context))
                solved = (z - shift) / scale
                found = torch.cat([solved[..., : component + 1], found[..., component + 1 :]], -1)
            z = found.flip(-1) if i else found
            log_det = log_det - log_scale
        return z, log_det

    def affine(self, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scale and shift of each component, (..., n, d), and the sum of the scales' logarithms, (..., n)."""
        gate = s.sigmoid()
        return gate, (1 - gate) * m, logsigmoid(s).sum(-1)


class MaskedAutoregressiveFlow(InverseAutoregressiveFlow):
    """The inverse of `InverseAutoregressiveFlow`. Densities are computed at once, draws component by component.

    Steps are noise = g (z - m) with log g = tanh(s), so no step scales by more than a factor of e. g starts at 1 and m
    at 0, so the flow starts as the identity. Parameters are those of `InverseAutoregressiveFlow`.

    References
    ----------
    Papamakarios, Pavlakou and Murray, Masked autoregressive flow for density estimation, NeurIPS 2017.
    """

    gate_bias = 0.0

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return super().inverse(z, context)

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(z, context)

    def affine(self, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_gate = s.tanh()
        gate = log_gate.exp()
        return gate, -gate * m, log_gate.sum(-1)


def head(n_in: int, n_out: int, std: float | None) -> Linear:
    """Return a linear layer for a context that may be empty, with zero bias and weights of standard deviation ``std``.

    With None, the weights have torch's initial values.
    """
    layer = Linear(n_in, n_out)
    if std is not None:
        nn.init.normal_(layer.weight, std=std, generator=generator(layer.weight.device))
        nn.init.zeros_(layer.bias)
    return layer
