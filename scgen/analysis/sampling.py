"""Simulate cells from the prior, or from the posterior of given cells."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from scgen.analysis.counterfactual import Condition, as_if
from scgen.arguments import check_memory, check_seed, check_whole
from scgen.data.cells import Cells
from scgen.data.loader import CellLoader
from scgen.data.registry import Registry
from scgen.modules.vae import VAE, question
from scgen.seeding import seeded


def posterior_predictive(
    vae: VAE, loader: CellLoader, condition: Condition, n_samples: int, seed: int
) -> sparse.csr_matrix | list[sparse.csr_matrix]:
    """Draw ``n_samples`` CSR matrices (n, G) of x ~ p(x | z, l, s), with z, l ~ q."""
    _, some = next(iter(loader.store.blocks(1000)))
    n_counts = (some.nnz if sparse.issparse(some) else np.count_nonzero(some)) / some.shape[0]
    n_bytes = n_samples * len(loader.index) * 8 * n_counts  # a float32 and a column each; as many as in the data
    check_memory("n_samples", n_samples, n_bytes, "Choose fewer samples or fewer cells.")
    blocks: list[list[sparse.csr_matrix]] = [[] for _ in range(n_samples)]
    for _, number, x in replicates(vae, loader, condition, n_samples, seed):
        blocks[number].append(sparse.csr_matrix(x.cpu().numpy()))
    matrices = [sparse.vstack(drawn, format="csr") for drawn in blocks]
    return matrices[0] if n_samples == 1 else matrices


@question
def replicates(
    vae: VAE, loader: CellLoader, condition: Condition, n_samples: int, seed: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Iterate over (first cell, number of the replicate, x (n, G)): all replicates of a minibatch, then the next."""
    rng, start = np.random.default_rng(seed), 0
    for cells in vae.minibatches(loader):
        q = vae.infer(cells)
        for number in range(n_samples):
            with seeded(rng.integers(2**63)):  # a block per replicate, which ends before the caller runs
                latents = {name: q[name].rsample() for name in q}
                x = vae.decoder(latents, as_if(cells, condition)).sample()
            yield start, number, x
        start += len(cells)


def prior_sample(vae: VAE, registry: Registry, n: int, condition: Condition, seed: int) -> AnnData:
    """Simulate cells with their latents; see `ExpressionModel.sample_prior`."""
    n, seed = check_whole("n", n, 1), check_seed(seed)
    n_bytes = n * (len(registry.genes) + 100)  # if a tenth of the counts is not zero; plus names and latents
    check_memory("n", n, n_bytes, "Draw fewer cells at a time.")
    if vae.has_library and not (vae.priors["library"].variance > 0).all():
        raise ValueError(
            "the model has no library sizes to draw from, because it was loaded from scvi-tools without cells. Pass "
            "the cells: SCVI.from_scvi_tools(folder, adata)."
        )
    cells = as_if(registry.blank_cells(n, np.random.default_rng(seed)), condition)
    x, latents = prior_predictive(vae, cells, seed)
    library = np.exp(latents["library"]) if vae.has_library else None
    # Columns that the model reads come last, because one of them may be named "library".
    obs = ({} if library is None else {"library": library[:, 0]}) | registry.obs_of(cells, library)
    return AnnData(
        x,
        obs=pd.DataFrame(obs, index=[str(i) for i in range(n)]),
        var=pd.DataFrame(index=registry.genes),
        obsm={"z": latents["z"]} | ({} if library is None else {"library": library}),
        layers={} if registry.setup.layer is None else {registry.setup.layer: x.copy()},
    )


@question
def prior_predictive(vae: VAE, cells: Cells, seed: int, n_at_once: int = 1024) -> tuple[sparse.csr_matrix, dict]:
    """Draw x (n, G) and its latents, with z ~ p(z), log l ~ p(log l | s).

    Only batch, labels and covariates of the n ``cells`` are read.
    """
    blocks, latents = [], {name: [] for name in vae.priors}
    with seeded(seed):
        for some in vae.minibatches(cells[i : i + n_at_once] for i in range(0, len(cells), n_at_once)):
            drawn = {}
            for name in vae.priors:
                p = vae.prior(name, some)
                shape = () if p.batch_shape else (len(some),)
                drawn[name] = p.sample(shape)
                latents[name].append(drawn[name].cpu().numpy())
            blocks.append(sparse.csr_matrix(vae.decoder(drawn, some).sample().cpu().numpy()))
    return sparse.vstack(blocks, format="csr"), {name: np.concatenate(parts) for name, parts in latents.items()}
