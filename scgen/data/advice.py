"""Advice on the data: how many genes to model, and covariates whose effects cannot be separated."""

import numpy as np
import pandas as pd
from anndata import AnnData

from scgen.data.categories import unhashable
from scgen.data.checks import Finding, Setup

#: With fewer genes than this, there is no advice to select genes.
MANY_GENES = 5000


def advice(adata: AnnData, setup: Setup, sound: bool) -> list[Finding]:
    """Return notes and warnings that `check` gives but `setup_anndata` does not.

    Parameters
    ----------
    adata, setup
        The cells, and which parts of them the model reads.
    sound
        Whether there are no errors. If there are, the values are not looked at.
    """
    found = [*_genes(adata, setup)] if sound else []
    return found + confounding(adata.obs, setup, sound)


def _genes(adata: AnnData, setup: Setup) -> list[Finding]:
    if adata.n_vars < MANY_GENES or adata.n_vars < adata.n_obs or not setup.counts:
        return []
    text = f"there are more genes ({adata.n_vars:,}) than cells ({adata.n_obs:,})"
    fix = (
        "Training is faster with the most variable genes only: integrate(adata, n_top_genes=2000). With all genes, "
        "fewer hidden units predict held-out cells better: SCVI(adata, n_hidden=64)."
    )
    return [Finding("note", "adata.var", text, adata.n_vars, fix)]


def confounding(obs: pd.DataFrame, setup: Setup, sound: bool = True) -> list[Finding]:
    """Return notes and warnings on columns whose effects cannot be separated."""
    once = [key for key in setup.categorical.values() if list(obs.columns).count(key) == 1]
    once = [key for key in once if unhashable(obs[key]) is None]  # others are an error of their own
    # A column with nearly as many values as cells has a warning of its own.
    keys = [key for key in once if len(obs) and not obs[key].isna().any() and obs[key].nunique() <= len(obs) / 2]
    found = []
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:
            v = cramers_v(obs[one], obs[other])
            level = "warning" if v > 0.9 else "note"
            text = f'Cramer\'s V of "{one}" and "{other}" is {v:.2f}'
            fix = "One nearly determines the other: removing one effect removes both."
            fix = fix if v > 0.9 else "A value of 1 would mean that one determines the other."
            found.append(Finding(level, f'adata.obs["{one}"], adata.obs["{other}"]', text, 1, fix))
    numbers = list(setup.continuous_covariate_keys) if sound else []
    categorical = [key for key in keys if key != setup.labels_key]
    if len(categorical) + len(numbers) > 1:
        missing, rank = _missing_ranks(obs, categorical, numbers)
        if missing:
            names = ", ".join(categorical + numbers)
            text = f"the design matrix of {names} has rank {rank - missing}; full rank is {rank}"
            fix = "Some of their effects cannot be separated; name fewer covariates."
            found.append(Finding("warning", "adata.obs", text, missing, fix))
    return found


def _missing_ranks(obs: pd.DataFrame, categorical: list[str], numbers: list[str]) -> tuple[int, int]:
    """Return by how much the rank of the design matrix of these columns is too low, and its full rank."""
    columns = [np.ones((len(obs), 1))]
    for key in categorical:
        codes = pd.Series(pd.Categorical(pd.factorize(obs[key])[0]))
        columns.append(pd.get_dummies(codes, drop_first=True).to_numpy(float))
    for key in numbers:
        values = obs[key].to_numpy(float)[:, None]
        spread = np.ptp(values)  # a constant column has a warning of its own
        columns.append((values - values.mean()) / spread if spread else np.empty((len(obs), 0)))
    matrix = np.column_stack(columns)
    return matrix.shape[1] - int(np.linalg.matrix_rank(matrix.T @ matrix)), matrix.shape[1]


def cramers_v(one: pd.Series, other: pd.Series) -> float:
    """Return Cramer's V of two categorical columns, from 0 (independent) to 1; 0 if a column has one value."""
    table = pd.crosstab(pd.factorize(one)[0], pd.factorize(other)[0]).to_numpy(float)
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    degrees = min(table.shape) - 1
    return float(np.sqrt(((table - expected) ** 2 / expected).sum() / table.sum() / degrees)) if degrees else 0.0
