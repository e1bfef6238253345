"""New cells: from the prior, or from what the posterior says of given ones."""

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from scgen.analysis.counterfactual import Condition, as_if
from scgen.data.cells import Cells
from scgen.data.checks import check_whole
from scgen.data.loader import CellLoader
from scgen.data.registry import Registry
from scgen.modules.vae import VAE
from scgen.training import seeded

#: Of `Cells`.
FIELDS = [field.name for field in fields(Cells)]


@torch.inference_mode()
def posterior_predictive(
    vae: VAE, loader: CellLoader, condition: Condition, n_samples: int, seed: int
) -> sparse.csr_matrix | list[sparse.csr_matrix]:
    """Return ``n_samples`` matrices (n, G) of x ~ p(x | z, l, s), with z, l ~ q; each sparse, as counts are."""
    check_whole("n_samples", n_samples, 1)
    vae.eval()
    blocks: list[list[sparse.csr_matrix]] = [[] for _ in range(n_samples)]
    with seeded(seed):
        for cells in loader:
            cells = cells.to(vae.device)
            q = vae.infer(cells)
            for drawn in blocks:
                latents = {name: q[name].rsample() for name in q}
                drawn.append(_sampled(vae, latents, as_if(cells, condition)))
    matrices = [sparse.vstack(drawn, format="csr") for drawn in blocks]
    return matrices[0] if n_samples == 1 else matrices


def prior_sample(vae: VAE, registry: Registry, n: int, batch: str | None, seed: int) -> AnnData:
    """Return new cells with their latents; see `Model.sample_prior`."""
    check_whole("n", n, 1)
    rng = np.random.default_rng(seed)
    cells = registry.blank_cells(n, None if batch is None else registry.batch_code(batch), rng)
    x, latents = prior_predictive(vae, cells, seed)
    sample = AnnData(x, var=pd.DataFrame(index=registry.genes), obsm={"z": latents["z"]})
    names = np.array(registry.batches)[cells.batch.numpy()]
    sample.obs[registry.setup.batch_key or "batch"] = pd.Categorical(names, categories=registry.batches)
    if "library" in latents:
        sample.obs["library"] = np.exp(latents["library"][:, 0])
    return sample


@torch.inference_mode()
def prior_predictive(vae: VAE, cells: Cells, seed: int, n_at_once: int = 1024) -> tuple[sparse.csr_matrix, dict]:
    """Return x (n, G), and the latents that it came from, for z ~ p(z), log l ~ p(log l | s).

    Of ``cells``, (n,), only batch, labels and covariates are read.
    """
    vae.eval()
    blocks, latents = [], {name: [] for name in vae.priors}
    with seeded(seed):
        for start in range(0, len(cells), n_at_once):
            rows = slice(start, start + n_at_once)
            some = replace(cells, **{field: getattr(cells, field)[rows] for field in FIELDS})
            some = some.to(vae.device)
            drawn = {}
            for name, prior in vae.priors.items():
                p = prior(some)
                shape = () if p.batch_shape else (len(some),)
                drawn[name] = p.sample(shape)
                latents[name].append(drawn[name].cpu().numpy())
            blocks.append(_sampled(vae, drawn, some))
    return sparse.vstack(blocks, format="csr"), {name: np.concatenate(parts) for name, parts in latents.items()}


def _sampled(vae: VAE, latents: dict[str, torch.Tensor], cells: Cells) -> sparse.csr_matrix:
    return sparse.csr_matrix(vae.decoder(latents, cells).sample().cpu().numpy())
