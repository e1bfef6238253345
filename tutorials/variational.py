"""What the tutorial on variational inference computes with: a linear model whose p(x) is known, estimators, a ring."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, LowRankMultivariateNormal, MultivariateNormal, kl_divergence

from scgen.analysis.inference import log_sums
from scgen.data.cells import Cells
from scgen.distributions import DiagonalNormal, FlowDistribution
from scgen.modules.decoders import GaussianDecoder
from scgen.modules.priors import StandardNormalPrior
from scgen.modules.vae import VAE


def cells_of(x: np.ndarray) -> Cells:
    """Return values (n, G) as cells of one batch, in float64."""
    n, none = len(x), torch.zeros(len(x), 0)
    codes = torch.zeros(n, dtype=torch.int64)
    return Cells(
        counts=torch.from_numpy(x).double(),
        library=torch.zeros(n, 1),
        batch=codes,
        labels=codes,
        categorical=none.long(),
        continuous=none,
        index=torch.arange(n),
    )


# A linear model, and what is known of it in closed form.


class LinearPosterior(nn.Module):
    """q(z | x) = N(A x + c, diag v), with A, c and v learned; v is the same for every cell."""

    def __init__(self, n_genes: int, n_latent: int):
        super().__init__()
        self.mean = nn.Linear(n_genes, n_latent)
        self.log_variance = nn.Parameter(torch.zeros(n_latent))

    def forward(self, cells: Cells) -> DiagonalNormal:
        mean = self.mean(cells.counts)
        return DiagonalNormal(mean, self.log_variance.exp().expand(mean.shape))


def linear_vae(n_genes: int, n_latent: int) -> VAE:
    """Return p(z) = N(0, I) and p(x | z) = N(W z + b, Psi), Psi diagonal, with a `LinearPosterior`, in float64."""
    decoder = GaussianDecoder(n_latent, n_hidden=1, n_layers=0, n_genes=n_genes)
    return VAE({"z": LinearPosterior(n_genes, n_latent)}, {"z": StandardNormalPrior(n_latent)}, decoder).double()


def marginal(vae: VAE, cells: Cells) -> LowRankMultivariateNormal:
    """Return p(x) = N(b, W W^T + Psi)."""
    w = vae.decoder.mean.weight
    at_zero = vae.decoder({"z": w.new_zeros(w.shape[1])}, cells)
    return LowRankMultivariateNormal(at_zero.mean, w, at_zero.variance)


def exact_posterior(vae: VAE, cells: Cells) -> MultivariateNormal:
    """Return p(z | x) = N(M^-1 W^T Psi^-1 (x - b), M^-1) of each cell, with M = I + W^T Psi^-1 W."""
    p = marginal(vae, cells)
    weighted = p.cov_factor.T / p.cov_diag
    precision = torch.eye(len(weighted)).to(weighted) + weighted @ p.cov_factor
    mean = torch.linalg.solve(precision, weighted @ (cells.counts - p.loc).T).T
    return MultivariateNormal(mean, precision_matrix=precision)


def exact_elbo(vae: VAE, cells: Cells) -> Tensor:
    """Return E_q log p(x | z) - KL(q || p(z)) of each cell, (n,), without draws.

    log p(x | z) is quadratic in z: its mean is log p(x | E_q z) - 1/2 sum_g sum_j W_gj^2 v_j / Psi_g.
    """
    q, p = vae.infer(cells)["z"], marginal(vae, cells)
    spread = (q.variance @ p.cov_factor.square().T / p.cov_diag).sum(-1) / 2
    at_mean = vae.decoder({"z": q.mean}, cells).log_prob(cells.counts)
    return at_mean - spread - kl_divergence(q, vae.prior("z", cells))


def gap(vae: VAE, cells: Cells) -> Tensor:
    """Return KL(q(z | x) || p(z | x)) of each cell, (n,)."""
    q = vae.infer(cells)["z"]
    return kl_divergence(MultivariateNormal(q.mean, q.variance.diag_embed()), exact_posterior(vae, cells))


def fit(vae: VAE, cells: Cells, schedule: list[tuple[str, ...]], rate: float) -> np.ndarray:
    """Climb the ELBO by reparametrised gradients, a draw for each cell; return its exact mean after each step.

    Each entry of the schedule is a step of Adam, and names the parts that move: "encoder", "decoder" or both. The
    steps shrink linearly to 0.
    """
    optimizers = {
        "encoder": torch.optim.Adam(vae.posteriors.parameters(), rate),
        "decoder": torch.optim.Adam(vae.decoder.parameters(), rate),
    }
    values = []
    for i, parts in enumerate(schedule):
        vae.zero_grad()
        vae(cells).loss().backward()
        for part in parts:
            optimizers[part].param_groups[0]["lr"] = rate * (1 - i / len(schedule))
            optimizers[part].step()
        with torch.no_grad():
            values.append(exact_elbo(vae, cells).mean().item())
    return np.array(values)


def turns(length: int, n_steps: int) -> list[tuple[str, ...]]:
    """Return the schedule in which encoder and decoder move in turn, so many steps each."""
    return [("encoder", "decoder")[i // length % 2 :][:1] for i in range(n_steps)]


# Two estimators of a gradient, and two of log p(x).


def gradients(f: Callable[[Tensor], Tensor], mean: Tensor, n_draws: int, baseline: float = 0.0) -> dict[str, Tensor]:
    """Return the gradient of E f(z), z ~ N(mean, I), with respect to the mean, as each draw estimates it, (n_draws, d).

    "reparametrised" goes through z = mean + e; "score" is (f(z) - baseline) times the gradient of log q(z).
    """
    mean = mean.expand(n_draws, -1).clone().requires_grad_()  # one for each draw, so that each has its own gradient
    q = DiagonalNormal(mean, torch.ones_like(mean))
    z = q.rsample()
    (through_z,) = torch.autograd.grad(f(z).sum(), mean)
    z = z.detach()
    (score,) = torch.autograd.grad(q.log_prob(z).sum(), mean)
    return {"reparametrised": through_z, "score": (f(z) - baseline)[:, None] * score}


def best_baseline(f: Callable[[Tensor], Tensor], mean: Tensor, n_draws: int) -> float:
    """Return E[f s^2] / E[s^2], s the score of the mean's first component: no constant leaves that less variance."""
    z = DiagonalNormal(mean, torch.ones_like(mean)).rsample((n_draws,))
    squares = (z - mean)[:, 0].square()
    return ((f(z) * squares).mean() / squares.mean()).item()


@torch.no_grad()
def log_marginal(vae: VAE, cells: Cells, q: Distribution, n_draws: int) -> tuple[Tensor, Tensor]:
    """Return the estimate of log p(x) by n_draws of z ~ q for each cell, and their effective number, (n,) each.

    With q = p(z) it is naive Monte Carlo: the weights p(x | z) p(z) / q(z) are then p(x | z).
    """
    log_sum, log_squares = log_sums(partial(vae.log_weights, cells, {"z": q}), n_draws, at_once=256)
    return log_sum - math.log(n_draws), (2 * log_sum - log_squares).exp()


def prior_of(vae: VAE, cells: Cells) -> DiagonalNormal:
    """Return p(z) once for each cell, so that each has draws of its own."""
    p = vae.prior("z", cells)
    return DiagonalNormal(p.mean.expand(len(cells), -1), p.variance.expand(len(cells), -1))


# A ring, and flows that bend a Gaussian into it.


def ring(z: Tensor) -> Tensor:
    """Return the energy U1 of Rezende and Mohamed (2015) at points (..., 2), in a soft box from -4 to 4."""
    sides = torch.logaddexp(-0.5 * ((z[..., 0] - 2) / 0.6) ** 2, -0.5 * ((z[..., 0] + 2) / 0.6) ** 2)
    box = ((z.abs() - 4).clamp(min=0) ** 2).sum(-1) / (2 * 0.25**2)
    return 0.5 * ((z.norm(dim=-1) - 2) / 0.4) ** 2 - sides + box


def grid(n: int, reach: float) -> tuple[Tensor, float]:
    """Return the middles of n x n squares that fill [-reach, reach]^2, (n, n, 2), and the area of each."""
    width = 2 * reach / n
    axis = -reach + width * (torch.arange(n, dtype=torch.float64) + 0.5)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1), width**2


def log_normaliser(energy: Callable[[Tensor], Tensor], n: int = 600, reach: float = 6) -> float:
    """Return log Z, the logarithm of the integral of exp(-energy), by the midpoint rule."""
    points, area = grid(n, reach)
    return (-energy(points)).flatten().logsumexp(0).item() + math.log(area)


def bend(
    flow: nn.Module | None, energy: Callable[[Tensor], Tensor], scale: float, rate: float, n_steps: int, n_draws: int
) -> Distribution:
    """Fit a Gaussian, bent by a flow if there is one, to exp(-energy) / Z, by Adam on the free energy; return it.

    The Gaussian starts with standard deviation ``scale``. The energy weighs 0.01 at first, and 1 from the middle on;
    the steps shrink to 0 along half a cosine.
    """
    mean = torch.zeros(1, 2, requires_grad=True)
    log_scale = torch.full((1, 2), math.log(scale), requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_scale, *(flow.parameters() if flow else ())], rate)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)

    def q() -> Distribution:
        base = DiagonalNormal(mean, (2 * log_scale).exp())
        return FlowDistribution(base, flow, torch.zeros(1, 0)) if flow else base

    for i in range(n_steps):
        weight = min(1.0, 0.01 + 2 * i / n_steps)
        optimizer.zero_grad()
        free_energies(q(), lambda z, weight=weight: weight * energy(z), n_draws).mean().backward()
        optimizer.step()
        slower.step()
    return q()


def free_energies(q: Distribution, energy: Callable[[Tensor], Tensor], n_draws: int) -> Tensor:
    """Return log q(z) + energy(z) at draws from q, (n_draws,): their mean is KL(q || exp(-energy) / Z) - log Z."""
    z, log_q = q.rsample_and_log_prob((n_draws,))
    return (log_q + energy(z)).flatten()


@torch.no_grad()
def density(q: Distribution, points: Tensor) -> np.ndarray:
    """Return q at points (..., 2), each asked for on its own."""
    return q.log_prob(points.reshape(-1, 1, 2).float()).exp().reshape(points.shape[:-1]).numpy()
