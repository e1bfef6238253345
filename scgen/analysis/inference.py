"""What the posterior says of each cell: its latents, and the parts of its evidence lower bound."""

import math

import numpy as np
import torch

from scgen.data.checks import check_whole
from scgen.data.loader import CellLoader
from scgen.modules.vae import VAE
from scgen.training import seeded


@torch.inference_mode()
def embedding(vae: VAE, loader: CellLoader) -> np.ndarray:
    """Return the mean of q(z) of each cell, (n, d), in the loader's order."""
    vae.eval()
    return np.concatenate([vae.posteriors["z"].means(cells.to(vae.device)).cpu().numpy() for cells in loader])


@torch.inference_mode()
def latent(vae: VAE, loader: CellLoader, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of q of one latent, (n, d) each, in the loader's order."""
    vae.eval()
    means, variances = [], []
    for cells in loader:
        q = vae.posteriors[name](cells.to(vae.device))
        means.append(q.mean.cpu().numpy())
        variances.append(q.variance.cpu().numpy())
    return np.concatenate(means), np.concatenate(variances)


def draw(mean: np.ndarray, variance: np.ndarray, seed: int) -> np.ndarray:
    """Return a draw from each Gaussian."""
    noise = np.random.default_rng(seed).standard_normal(mean.shape, dtype=np.float32)
    return mean + np.sqrt(variance) * noise


def library_size(vae: VAE, loader: CellLoader, give_mean: bool, seed: int) -> np.ndarray:
    """Return l of each cell, (n, 1): the mean of its log-normal posterior, or a draw from it."""
    if "library" not in vae.posteriors:
        raise ValueError('gene_likelihood="normal" has no library size.')
    mean, variance = latent(vae, loader, "library")
    return np.exp(mean + variance / 2 if give_mean else draw(mean, variance, seed))


@torch.inference_mode()
def bound(vae: VAE, loader: CellLoader, seed: int) -> dict[str, np.ndarray]:
    """Return log_likelihood and the KL of each latent, (n,) each, at one draw from q."""
    vae.eval()
    parts: dict[str, list[np.ndarray]] = {}
    with seeded(seed):
        for cells in loader:
            elbo = vae(cells.to(vae.device))
            for part, values in ({"log_likelihood": elbo.log_likelihood} | elbo.kl).items():
                parts.setdefault(part, []).append(values.cpu().numpy())
    return {part: np.concatenate(values) for part, values in parts.items()}


@torch.inference_mode()
def marginal(vae: VAE, loader: CellLoader, n_draws: int, seed: int, at_once: int = 16) -> np.ndarray:
    """Return the log-mean-exp of so many importance weights p(x, latents) / q(latents | x) for each cell, (n,)."""
    check_whole("n_mc_samples", n_draws, 1)
    vae.eval()
    results = []
    with seeded(seed):
        for cells in loader:
            cells = cells.to(vae.device)
            q, total = vae.infer(cells), None
            for start in range(0, n_draws, at_once):
                some = vae.log_weights(cells, q, (min(at_once, n_draws - start),)).double().logsumexp(0)
                total = some if total is None else torch.logaddexp(total, some)
            results.append((total - math.log(n_draws)).cpu().numpy())
    return np.concatenate(results)
