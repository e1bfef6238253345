"""Correlation of genes: of their denoised values over cells and draws."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from scipy import stats

from scgen.analysis.counterfactual import Asked, Condition, as_if
from scgen.arguments import check_memory
from scgen.data.loader import CellLoader
from scgen.distributions import NegativeBinomial
from scgen.modules.vae import VAE, question
from scgen.seeding import seeded

#: Number of rows of ranks that are converted to float64 at a time.
RANKED_AT_ONCE = 8192


class Moments:
    """Mean (G,) and sum of centred products (G, G), in float64, of rows that come in blocks (Chan et al. 1983).

    Examples
    --------
    >>> rows = np.array([[1.0, 2.0], [2.0, 0.0], [3.0, 1.0]])
    >>> moments = Moments(2)
    >>> moments.add(rows[:1])
    >>> moments.add(rows[1:])
    >>> moments.correlation().round(12).tolist()
    [[1.0, -0.5], [-0.5, 1.0]]
    """

    def __init__(self, n_genes: int):
        self.n, self.mean, self.products = 0, np.zeros(n_genes), np.zeros((n_genes, n_genes))

    def add(self, rows: np.ndarray) -> None:
        """Add rows, (m, G)."""
        rows = rows.astype(np.float64)
        mean, n = rows.mean(0), self.n + len(rows)
        shift = mean - self.mean
        rows -= mean
        self.products += rows.T @ rows + np.outer(shift, shift) * (self.n * len(rows) / n)
        self.mean += shift * (len(rows) / n)
        self.n = n

    def correlation(self) -> np.ndarray:
        """Return Pearson's correlations, (G, G); NaN for genes that do not vary."""
        square = self.products.diagonal()
        # Rounding makes equal values vary by about 1e-16 of their mean.
        deviation = np.sqrt(np.where(square > self.n * (1e-12 * self.mean) ** 2, square, np.nan))
        return np.clip(self.products / deviation[:, None] / deviation, -1, 1)


@question
def correlation_matrix(
    vae: VAE,
    loader: CellLoader,
    asked: Asked,
    correlation_type: str,
    n_samples: int,
    seed: int,
) -> pd.DataFrame:
    """Return the correlations of genes, averaged over the conditions.

    Parameters
    ----------
    vae, loader
        The model and the n cells.
    asked
        Conditions, and genes to return.
    correlation_type, n_samples, seed
        As in `ExpressionModel.get_feature_correlation_matrix`.
    """
    n_genes, n_rows, total = len(asked.genes), n_samples * len(loader.index), 0.0
    if n_rows < 2:
        raise ValueError("a correlation needs at least two values of each gene: use more cells, or n_samples=10.")
    n_bytes = n_genes * (8 * n_genes + 4 * n_rows * (correlation_type == "spearman"))
    check_memory("n_samples", n_samples, n_bytes, 'Choose fewer draws, cells or genes, or "pearson".')
    for condition in asked.conditions:
        with seeded(seed):
            values = _denoised(vae, loader, condition, asked, n_samples)
            if correlation_type == "spearman":
                values = _ranks(values, n_genes, n_rows)
            moments = Moments(n_genes)
            for rows in values:
                moments.add(rows)
        total = total + moments.correlation()
    return pd.DataFrame(total / len(asked.conditions), index=asked.genes, columns=asked.genes)


def _denoised(vae: VAE, loader: CellLoader, condition: Condition, asked: Asked, n_samples: int) -> Iterator[np.ndarray]:
    """Iterate over draws of the Poisson rates of minibatches' counts, for a library size of 1, (n, genes).

    For a negative binomial, a rate is Gamma with mean rho; for a Poisson, it is rho. For normalised values it is their
    mean f(z, s). z is drawn from q.
    """
    for cells in vae.minibatches(loader):
        q, others = vae.posteriors["z"](cells), as_if(cells, condition)
        for _ in range(n_samples):
            latents = {"z": q.rsample(), "library": torch.zeros_like(cells.library)}
            gene = vae.decoder(latents, others).base_dist
            # Drawn for all genes, so that the noise does not depend on which genes are returned.
            rates = gene.sample_rate() if isinstance(gene, NegativeBinomial) else gene.mean
            yield asked.of_genes(rates).cpu().numpy()


def _ranks(values: Iterator[np.ndarray], n_genes: int, n_rows: int) -> Iterator[np.ndarray]:
    """Iterate over blocks of the ranks of the values. All values are held in memory, as (genes, rows) float32.

    Pearson's correlations of the ranks are Spearman's correlations of the values.
    """
    ranks, start = np.empty((n_genes, n_rows), np.float32), 0
    for rows in values:
        ranks[:, start : start + len(rows)] = rows.T
        start += len(rows)
    for of_gene in ranks:
        of_gene[:] = stats.rankdata(of_gene)
    for start in range(0, n_rows, RANKED_AT_ONCE):
        yield ranks[:, start : start + RANKED_AT_ONCE].T
