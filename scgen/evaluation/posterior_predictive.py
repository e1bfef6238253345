"""Whether a model makes counts like those that it was fitted to: posterior-predictive checks."""

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

#: What of a gene's counts is compared.
STATISTICS = ("zero_share", "mean", "variance", "cv")
#: A statistic's columns.
KINDS = ("observed", "replicated", "lower", "upper", "within")
#: Of the replicates, how many the interval is to hold.
LEVEL = 0.95


@dataclass(frozen=True)
class PosteriorPredictiveCheck:
    """Observed counts beside replicates of them, as `posterior_predictive_check` returns it.

    Attributes
    ----------
    genes
        A row per gene. Of "zero_share", "mean", "variance" and "cv" (the coefficient of variation, standard deviation /
        mean) of its counts over the cells there are five columns each: "mean_observed"; "mean_replicated", the mean
        over the replicates; "mean_lower" and "mean_upper", an interval that a further replicate would be in with
        probability ``nominal``; and whether the observed value is in it, "mean_within". The cv is NaN, and not within,
        where all counts, observed or of a replicate, are zero.
    cells
        A row per cell: the same of its "library", the total of its counts.
    summary
        A row per statistic: over the genes, or cells, the mean error of the replicated values ("bias"), the mean
        "absolute_error", their "correlation" with the observed ones, and the share of observed values "within" the
        interval, all where there are values. All but zero_share are compared by their logarithms, where these are
        finite.
    nominal
        0.95 from 39 replicates on. The interval of fewer is their range, which holds a further one less often.
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
    """Compare cells with replicates that the model makes of them: x_rep ~ p(x | z, l, s), with z, l ~ q(. | x, s).

    Where the replicates' zeros are too few, or their variance is too low, the likelihood does not fit the noise of the
    counts; where the library is off, the posterior of l is. A replicate leans on the cell that it replaces, so that a
    good model's intervals hold the observed values about as often as ``nominal``, or more often. They are no test of
    what the model has not seen: for that, ask about ``indices=model.validation_indices``.

    Parameters
    ----------
    model
        A trained model of counts.
    adata, indices
        As in `SCVI.get_latent_representation`.
    n_samples
        Replicates of each cell. They are summed up as they are drawn, 256 cells at a time.
    seed
        Seed of all noise. The replicates are those of ``model.posterior_predictive_sample(n_samples=..., seed=...)``.

    Returns
    -------
    Tables by gene and by cell, and a summary of them; for a picture, pass it to `scgen.plots.posterior_predictive`.

    Raises
    ------
    RuntimeError
        If the model is untrained.
    TypeError
        If ``model`` is no model.
    ValueError
        If it is not one of counts, there are fewer than two samples, or as `SCVI.get_latent_representation`.

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
        raise ValueError('gene_likelihood="normal" makes no counts that could be compared with counts.')
    n_samples = check_draws("n_samples", n_samples, 2)
    loader = model._loader(adata, indices, 256, seed)
    n_bytes = (1 + n_samples) * (24 * loader.store.shape[1] + 8 * len(loader.index))
    check_memory("n_samples", n_samples, n_bytes, "Ask for fewer, or about fewer cells.")
    sums, library = _summed(model, loader, n_samples, seed)
    statistics = _statistics(sums / len(loader.index))
    genes = pd.concat([_compared(name, of, model.registry.genes) for name, of in statistics.items()], axis=1)
    names = (model.adata if adata is None else adata).obs_names[loader.index]
    cells = _compared("library", library, names)
    summary = {name: _summary(genes, name) for name in STATISTICS} | {"library": _summary(cells, "library")}
    nominal = min(LEVEL, (n_samples - 1) / (n_samples + 1))
    return PosteriorPredictiveCheck(genes, cells, pd.DataFrame(summary).T, nominal)


def _summed(model: ExpressionModel, loader: CellLoader, n_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what the counts, which come first, and each of their replicates add up to.

    Returns
    -------
    By gene: the number of zeros, the sum and the sum of squares, (1 + n_samples, 3, G); by cell: (1 + n_samples, n).
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
    """Return `STATISTICS`, (1 + n_samples, G) each, from the means of zeros, counts and squares."""
    zeros, mean, square = np.moveaxis(means, 1, 0)
    variance = np.maximum(square - mean**2, 0)
    cv = np.divide(np.sqrt(variance), mean, out=np.full_like(mean, np.nan), where=mean > 0)
    return dict(zip(STATISTICS, (zeros, mean, variance, cv), strict=True))


def _compared(name: str, values: np.ndarray, index: Sequence[str]) -> pd.DataFrame:
    """Return the observed value, which comes first in ``values``, beside mean and interval of the replicates."""
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    # Weibull's quantiles: below the k-th smallest of n, a further one falls with probability k / (n + 1).
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
