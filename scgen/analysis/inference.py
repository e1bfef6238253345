"""Results from the posterior: latents, bounds on the log-likelihood, and which latents are used."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from scgen.data.loader import CellLoader
from scgen.distributions import DiagonalNormal
from scgen.modules.vae import VAE, question
from scgen.seeding import seeded

#: Number of draws of the latents that are in memory together.
AT_ONCE = 16


@question
def embedding(vae: VAE, loader: CellLoader) -> np.ndarray:
    """Return the mean of q(z) of each cell, (n, d), in the loader's order."""
    return np.concatenate([vae.posteriors[vae.latent].means(cells).cpu().numpy() for cells in vae.minibatches(loader)])


@question
def latent(vae: VAE, loader: CellLoader, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of q of one latent, (n, d) each, in the loader's order."""
    means, variances = [], []
    for cells in vae.minibatches(loader):
        q = vae.posteriors[name](cells)
        means.append(q.mean.cpu().numpy())
        variances.append(q.variance.cpu().numpy())
    return np.concatenate(means), np.concatenate(variances)


@question
def draw(vae: VAE, loader: CellLoader, name: str, seed: int) -> np.ndarray:
    """Draw one latent from q for each cell, (n, d), in the loader's order. The size of minibatches has no effect."""
    rng, draws = np.random.default_rng(seed), []
    for cells in vae.minibatches(loader):
        q = vae.posteriors[name](cells)
        noise = rng.standard_normal(q.batch_shape + q.event_shape, dtype=np.float32)
        draws.append(q.from_noise(torch.from_numpy(noise).to(vae.device)).cpu().numpy())
    return np.concatenate(draws)


def library_size(vae: VAE, loader: CellLoader, give_mean: bool, seed: int) -> np.ndarray:
    """Return l of each cell, (n, 1): the mean of its log-normal posterior, or a draw from it."""
    if not vae.has_library:
        raise ValueError('gene_likelihood="normal" has no library size.')
    if not give_mean:
        return np.exp(draw(vae, loader, "library", seed))
    mean, variance = latent(vae, loader, "library")
    return np.exp(mean + variance / 2)


@question
def bound(vae: VAE, loader: CellLoader, seed: int) -> dict[str, np.ndarray]:
    """Return log_likelihood and the KL of each latent, (n,) each, at one draw from q."""
    parts: dict[str, list[np.ndarray]] = {}
    with seeded(seed):
        for cells in vae.minibatches(loader):
            elbo = vae(cells)
            for part, values in ({"log_likelihood": elbo.log_likelihood} | elbo.kl).items():
                parts.setdefault(part, []).append(values.cpu().numpy())
    return {part: np.concatenate(values) for part, values in parts.items()}


@question
def marginal(vae: VAE, loader: CellLoader, n_draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the log of the mean importance weight of each cell, and the effective sample size, (n,) each.

    The weights are w = p(x, latents) / q(latents | x), the effective sample size is (sum w)^2 / sum w^2.
    """
    results = []
    with seeded(seed):
        for cells in vae.minibatches(loader):
            q = vae.infer(cells)
            log_sum, log_squares = log_sums(partial(vae.log_weights, cells, q), n_draws, AT_ONCE)
            results.append(torch.stack([log_sum - math.log(n_draws), (2 * log_sum - log_squares).exp()]).cpu().numpy())
    values, sizes = np.concatenate(results, axis=1)
    return values, sizes


def log_sums(draw: Callable[[tuple[int]], Tensor], n_draws: int, at_once: int = AT_ONCE) -> Tensor:
    """Return log sum w and log sum w^2 over the draws, (2, n) float64. ``draw((k,))`` returns log w, (k, n).

    At most ``at_once`` draws are in memory together.

    Examples
    --------
    >>> log_sums(torch.zeros, 20).exp().round().tolist()
    [20.0, 20.0]
    """
    total = None
    for start in range(0, n_draws, at_once):
        log_w = draw((min(at_once, n_draws - start),)).double()
        some = torch.stack([log_w, 2 * log_w]).logsumexp(1)
        total = some if total is None else torch.logaddexp(total, some)
    return total


@question
def active_units(vae: VAE, loader: CellLoader, threshold: float) -> pd.DataFrame:
    """Return variance, KL and activity of each latent of z; see `Model.active_units`."""
    means, divergence = [], 0.0
    for cells in vae.minibatches(loader):
        q = vae.posteriors[vae.latent](cells)
        means.append(q.mean.cpu().numpy())
        divergence = divergence + _kl_of_units(q, vae.prior(vae.latent, cells)).double().sum(0).cpu().numpy()
    variance = np.concatenate(means).var(0, dtype=np.float64)
    table = {"variance": variance, "kl": divergence / len(loader.index), "active": variance > threshold}
    return pd.DataFrame(table, index=pd.RangeIndex(len(variance), name="latent"))


@question
def cluster_probs(vae: VAE, loader: CellLoader, n_samples: int, seed: int) -> np.ndarray:
    """Return the mean over draws of z of its probabilities under each component of the prior's mixture, (n, K)."""
    probs = []
    with seeded(seed):
        for cells in vae.minibatches(loader):
            p, q, total = vae.prior("z", cells), vae.posteriors["z"](cells), 0.0
            for _ in range(n_samples):
                each = p.component_distribution.log_prob(q.rsample()[:, None])
                total = total + (p.mixture_distribution.logits + each).softmax(-1)
            probs.append((total / n_samples).cpu().numpy())
    return np.concatenate(probs)


def _kl_of_units(q: Distribution, p: Distribution) -> Tensor:
    """Return KL(q || p) of each unit, (n, d), between Gaussians; NaN if the units of either are not independent."""
    if not (isinstance(q, DiagonalNormal) and isinstance(p, DiagonalNormal)):
        return torch.full_like(q.mean, math.nan)
    return kl_divergence(*(DiagonalNormal(one.mean[..., None], one.variance[..., None]) for one in (q, p)))
