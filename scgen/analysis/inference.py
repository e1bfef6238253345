"""What the posterior says of each cell: its latents, and the parts of its evidence lower bound."""

import numpy as np
import torch

from scgen.data.loader import CellLoader
from scgen.modules.vae import VAE
from scgen.training import seeded


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
