"""Simulate cells from the generative model, and return them with the true parameters."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from scgen.arguments import check_memory, check_number, check_seed, check_whole
from scgen.distributions import ZeroInflatedNegativeBinomial
from scgen.seeding import seeded


def simulate_cells(
    n_cells: int = 2000,
    n_genes: int = 500,
    *,
    n_batches: int = 3,
    n_types: int = 5,
    n_latent: int = 5,
    batch_effect: float = 0.5,
    type_effect: float = 1.0,
    zero_inflation: float = 0.1,
    mean_library: float = 2000.0,
    seed: int = 0,
) -> AnnData:
    """Simulate cells from scVI's model, with batches, cell types, library sizes and zero-inflated counts.

    Each cell type is a Gaussian cloud of z around its centre. log rho is linear in tanh(z) plus an offset for each
    batch. log l is normal around the mean of its batch. theta is log-uniform over [0.5, 10]. The zero inflation varies
    between genes around ``zero_inflation``.

    Parameters
    ----------
    n_cells, n_genes, n_batches, n_types, n_latent
        Numbers of cells, genes, batches, cell types and latents. Each batch has all types, in similar proportions.
    batch_effect, type_effect
        Standard deviations of the batch offsets and of the effect of z on log rho.
    zero_inflation
        Median share of additional zeros; 0 adds none.
    mean_library
        Geometric mean of the library sizes, in counts.
    seed
        Seed of all draws. Global random generators are not used.

    Returns
    -------
    AnnData with the counts in ``X`` (CSR, float32). ``obs`` has "batch", "cell_type" and the true "log_library". The
    other true values are ``obsm["true_z"]``, ``layers["true_scale"]`` (rho, cells x genes), "log_theta" and "zi_logit"
    in ``var``, and ``varm["batch_offset"]``. ``uns["simulation"]`` has the arguments. A cell without counts is given
    one count, in its most expressed gene.

    Raises
    ------
    ValueError
        If a size is not a whole number of at least 1, the seed is negative, or an effect or share is out of range.
    TypeError
        If an argument is not a number.
    MemoryError
        If the cells and genes do not fit into memory.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_cells(n_cells=100, n_genes=50, n_batches=2, seed=1)
    >>> adata.shape, sorted(adata.obs["batch"].unique())
    ((100, 50), ['batch_1', 'batch_2'])
    """
    sizes = {"n_cells": n_cells, "n_genes": n_genes, "n_batches": n_batches, "n_types": n_types, "n_latent": n_latent}
    sizes = {name: check_whole(name, size, 1) for name, size in sizes.items()}
    seed, effect = check_seed(seed), "a standard deviation from 0 to 100"
    takes = "a positive number of counts, up to a billion"
    settings = {
        "batch_effect": check_number("batch_effect", batch_effect, effect, least=0, most=100),
        "type_effect": check_number("type_effect", type_effect, effect, least=0, most=100),
        "zero_inflation": check_number("zero_inflation", zero_inflation, "a share from 0 to below 1", least=0, below=1),
        "mean_library": check_number("mean_library", mean_library, takes, above=0, most=1e9),
    }
    n_cells, n_genes, n_batches, n_types, n_latent = sizes.values()
    n_numbers = 8 * n_cells * n_genes + (n_cells + n_batches) * n_types + (n_types + n_genes) * n_latent
    largest = max(sizes, key=sizes.get)
    check_memory(largest, sizes[largest], 8 * n_numbers, "Simulate fewer cells, or in several parts.")
    truth = _drawn_truth(np.random.default_rng(seed), **sizes, **settings)
    adata = _annotated(_drawn_counts(truth, seed), truth)
    adata.uns["simulation"] = sizes | settings | {"seed": seed}
    return adata


@dataclass(frozen=True)
class _Truth:
    """Parameters of the counts of N cells, G genes and B batches."""

    batch: np.ndarray  # (N,) codes
    cell_type: np.ndarray  # (N,) codes
    z: np.ndarray  # (N, d)
    batch_offset: np.ndarray  # (B, G)
    log_rho: np.ndarray  # (N, G)
    log_library: np.ndarray  # (N,)
    log_theta: np.ndarray  # (G,)
    zi_logit: np.ndarray  # (G,)


def _drawn_truth(
    rng: np.random.Generator,
    *,
    n_cells: int,
    n_genes: int,
    n_batches: int,
    n_types: int,
    n_latent: int,
    batch_effect: float,
    type_effect: float,
    zero_inflation: float,
    mean_library: float,
) -> _Truth:
    """Draw everything except the counts; `simulate_cells` documents the distributions."""
    batch = rng.integers(n_batches, size=n_cells)
    shares = rng.dirichlet(np.full(n_types, 50.0), size=n_batches)
    cell_type = (rng.random(n_cells)[:, None] > shares[batch].cumsum(1)[:, :-1]).sum(1)
    centres = rng.normal(size=(n_types, n_latent))
    z = centres[cell_type] + 0.3 * rng.normal(size=(n_cells, n_latent))

    loadings = rng.normal(size=(n_latent, n_genes)) * type_effect
    offsets = rng.normal(size=(n_batches, n_genes)) * batch_effect
    log_rho = rng.normal(size=n_genes) + np.tanh(z) @ loadings + offsets[batch]
    log_rho -= np.logaddexp.reduce(log_rho, axis=1, keepdims=True)
    log_library = rng.normal(np.log(mean_library) + 0.3 * rng.normal(size=n_batches)[batch], 0.5)
    log_theta = rng.uniform(np.log(0.5), np.log(10), size=n_genes)
    log_odds = -np.inf if zero_inflation == 0 else np.log(zero_inflation / (1 - zero_inflation))
    zi_logit = np.maximum(log_odds + 0.5 * rng.normal(size=n_genes), -40.0)
    return _Truth(batch, cell_type, z, offsets, log_rho, log_library, log_theta, zi_logit)


def _drawn_counts(truth: _Truth, seed: int) -> np.ndarray:
    """Draw the counts, (N, G) float32. A cell without counts is given one, in its most expressed gene."""
    log_mu = torch.from_numpy(truth.log_rho + truth.log_library[:, None])
    counts = ZeroInflatedNegativeBinomial(log_mu, torch.from_numpy(truth.log_theta), torch.from_numpy(truth.zi_logit))
    with seeded(seed):
        x = counts.sample().numpy().astype(np.float32)
    empty = np.flatnonzero(x.sum(1) == 0)
    x[empty, truth.log_rho[empty].argmax(1)] = 1
    return x


def _annotated(x: np.ndarray, truth: _Truth) -> AnnData:
    """Return an AnnData of the counts, with names of cells, genes, batches and types, and the true parameters."""
    n_cells, n_genes = x.shape

    def named(codes: np.ndarray, what: str) -> pd.Categorical:
        names = [f"{what}_{i + 1}" for i in range(codes.max() + 1)]
        return pd.Categorical.from_codes(codes, names).remove_unused_categories()

    return AnnData(
        sparse.csr_matrix(x),
        obs=pd.DataFrame(
            {
                "batch": named(truth.batch, "batch"),
                "cell_type": named(truth.cell_type, "type"),
                "log_library": truth.log_library,
            },
            index=[f"cell_{i + 1}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(
            {"log_theta": truth.log_theta, "zi_logit": truth.zi_logit}, index=[f"gene_{i + 1}" for i in range(n_genes)]
        ),
        obsm={"true_z": truth.z},
        varm={"batch_offset": truth.batch_offset.T},
        layers={"true_scale": np.exp(truth.log_rho).astype(np.float32)},
    )
