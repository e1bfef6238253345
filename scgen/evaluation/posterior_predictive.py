"""Posterior predictive checks: compare a model's simulated counts with the observed ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scgen.analysis import sampling
from scgen.analysis.counterfactual import Condition
from scgen.arguments import check_draws, check_memory, shown
from scgen.data.loader import CellLoader
from scgen.models.expression import ExpressionModel

#: Statistics of a gene's counts that are compared.
STATISTICS = ("zero_share", "mean", "variance", "cv")
#: Columns of each statistic.
KINDS = ("observed", "replicated", "lower", "upper", "within")
#: Share of the replicates that the interval should contain.
LEVEL = 0.95


@dataclass(frozen=True)
class PosteriorPredictiveCheck:
    """Result of `posterior_predictive_check`: statistics of observed counts and of their replicates.

    Attributes
    ----------
    genes
        One row per gene. The statistics of its counts over the cells are "zero_share", "mean", "variance" and "cv" (the
        coefficient of variation, standard deviation / mean). Each has five columns, such as "mean_observed";
        "mean_replicated", the mean over the replicates; "mean_lower" and "mean_upper", an interval that would contain
        another replicate with probability ``nominal``; and "mean_within", whether it contains the observed value. If
        all counts of the data or of a replicate are zero, cv is NaN and not within.
    cells
        One row per cell, with the same columns for "library", the total of its counts.
    summary
        One row per statistic, over the genes or cells: the mean error of the replicated values ("bias"), the mean
        "absolute_error", their "correlation" with the observed values, and the share of observed values "within" the
        interval. Missing values are ignored. All statistics except zero_share are compared on a log scale, where the
        logarithms are finite.
    nominal
        0.95 with at least 39 replicates. With fewer, the interval is their range, which contains another replicate less
        often.
    """

    genes: pd.DataFrame
    cells: pd.DataFrame
    summary: pd.DataFrame
    nominal: float


def posterior_predictive_check(
    model: ExpressionModel,
    *,
    adata: AnnData | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    n_samples: int = 25,
    seed: int = 0,
) -> PosteriorPredictiveCheck:
    """Compare cells with replicates drawn from the model: x_rep ~ p(x | z, l, s), with z, l ~ q(. | x, s).

    If the replicates have too few zeros or too little variance, the likelihood does not fit the noise of the counts. If
    their library sizes are wrong, the posterior of l is wrong. A replicate depends on the cell that it replaces. The
    intervals of a good model therefore contain the observed values about as often as ``nominal``, or more often. To
    test the model on cells that it has not seen, use ``indices=model.validation_indices``.

    Parameters
    ----------
    model
        A trained model of counts.
    adata, indices
        As in `SCVI.get_latent_representation`.
    n_samples
        Number of replicates of each cell. They are drawn for 256 cells at a time, and only their sums are kept.
    seed
        Seed of all noise. The replicates are those of ``model.posterior_predictive_sample(n_samples=..., seed=...)``.

    Returns
    -------
    Tables by gene and by cell, and a summary. To plot it, use `scgen.plots.posterior_predictive`.

    Raises
    ------
    RuntimeError
        If the model is untrained.
    TypeError
        If ``model`` is not a model.
    ValueError
        If it is not a model of counts, ``n_samples`` is below 2, or as `SCVI.get_latent_representation`.

    References
    ----------
    Gelman, Meng and Stern, Posterior predictive assessment of model fitness, Statistica Sinica 6 (1996) 733.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
    >>> scgen.setup_anndata(adata, batch_key="batch")
    >>> model = scgen.SCVI(adata)
    >>> model.train(max_epochs=5, progress=False)
    >>> check = scgen.posterior_predictive_check(model)
    >>> check.genes.shape, check.cells.shape
    ((30, 20), (100, 5))
    >>> check.summary.index.tolist(), check.summary.columns.tolist()
    (['zero_share', 'mean', 'variance', 'cv', 'library'], ['bias', 'absolute_error', 'correlation', 'within'])
    """
    if not isinstance(model, ExpressionModel):
        raise TypeError(
            f"model={shown(model)} is a {type(model).__name__}, not a trained model: posterior_predictive_check(model)."
        )
    if not model.vae.has_library:
        raise ValueError('gene_likelihood="normal" does not generate counts, so there is nothing to compare.')
    n_samples = check_draws("n_samples", n_samples, 2)
    loader = model._loader(adata, indices, 256, seed)
    n_bytes = (1 + n_samples) * (24 * loader.store.shape[1] + 8 * len(loader.index))
    check_memory("n_samples", n_samples, n_bytes, "Choose fewer samples or fewer cells.")
    sums, library = _summed(model, loader, n_samples, seed)
    statistics = _statistics(sums / len(loader.index))
    genes = pd.concat([_compared(name, of, model.registry.genes) for name, of in statistics.items()], axis=1)
    names = (model.adata if adata is None else adata).obs_names[loader.index]
    cells = _compared("library", library, names)
    summary = {name: _summary(genes, name) for name in STATISTICS} | {"library": _summary(cells, "library")}
    nominal = min(LEVEL, (n_samples - 1) / (n_samples + 1))
    return PosteriorPredictiveCheck(genes, cells, pd.DataFrame(summary).T, nominal)


def _summed(model: ExpressionModel, loader: CellLoader, n_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum the observed counts, which come first, and each of their replicates.

    Returns
    -------
    The number of zeros, the sum and the sum of squares of each gene, (1 + n_samples, 3, G), and the sum of each cell,
    (1 + n_samples, n).
    """
    sums = np.zeros((1 + n_samples, 3, loader.store.shape[1]))
    library = np.empty((1 + n_samples, len(loader.index)), np.float32)

    def add(number: int, start: int, x: Tensor) -> None:
        library[number, start : start + len(x)] = x.sum(1).cpu().numpy()
        x = x.double()
        sums[number] += torch.stack([(x == 0).sum(0), x.sum(0), x.square().sum(0)]).cpu().numpy()

    start = 0
    for cells in loader:
        add(0, start, cells.counts.to_dense())
        start += len(cells)
    for start, number, x in sampling.replicates(model.vae, loader, Condition(), n_samples, seed):
        add(1 + number, start, x)
    return sums, library


def _statistics(means: np.ndarray) -> dict[str, np.ndarray]:
    """Compute `STATISTICS`, (1 + n_samples, G) each, from the means of zeros, counts and squares."""
    zeros, mean, square = np.moveaxis(means, 1, 0)
    variance = np.maximum(square - mean**2, 0)
    cv = np.divide(np.sqrt(variance), mean, out=np.full_like(mean, np.nan), where=mean > 0)
    return dict(zip(STATISTICS, (zeros, mean, variance, cv), strict=True))


def _compared(name: str, values: np.ndarray, index: Sequence[str]) -> pd.DataFrame:
    """Return the observed value, which comes first in ``values``, and the mean and interval of the replicates."""
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    # Weibull's quantiles: another replicate is below the k-th smallest of n with probability k / (n + 1).
    lower, upper = np.quantile(values[1:], tails, axis=0, method="weibull")
    within = (values[0] >= lower) & (values[0] <= upper)
    columns = values[0], values[1:].mean(0), lower, upper, within
    return pd.DataFrame({f"{name}_{kind}": of for kind, of in zip(KINDS, columns, strict=True)}, index=index)


def _summary(table: pd.DataFrame, name: str) -> dict[str, float]:
    """Return a row of `PosteriorPredictiveCheck.summary`."""
    table = table.filter(regex=f"^{name}_").set_axis(KINDS, axis=1).dropna()
    both = table[["observed", "replicated"]]
    if name != "zero_share":
        both = np.log(both.where(both > 0)).dropna()
    error = both["replicated"] - both["observed"]
    return {
        "bias": error.mean(),
        "absolute_error": error.abs().mean(),
        "correlation": both["observed"].corr(both["replicated"], min_periods=2),
        "within": table["within"].mean(),
    }
