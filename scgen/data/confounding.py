"""How far batch and covariates can be told apart."""

import numpy as np
import pandas as pd

from scgen.data.checks import Finding, Setup


def confounding(obs: pd.DataFrame, setup: Setup) -> list[Finding]:
    """Return notes and warnings on columns that cannot be told apart."""
    once = [key for key in setup.categorical.values() if list(obs.columns).count(key) == 1]
    keys = [key for key in once if len(obs) and not obs[key].isna().any()]
    found = []
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:
            v = cramers_v(obs[one], obs[other])
            level = "warning" if v > 0.9 else "note"
            text = f'Cramer\'s V of "{one}" and "{other}" is {v:.2f}'
            fix = "The one nearly gives the other: removing its effect removes both." if v > 0.9 else "1 would be full."
            found.append(Finding(level, f'adata.obs["{one}"], adata.obs["{other}"]', text, 1, fix))
    design = [key for key in keys if key != setup.labels_key]
    if len(design) > 1:
        codes = obs[design].apply(lambda column: pd.Categorical(pd.factorize(column)[0]))
        dummies = pd.get_dummies(codes, drop_first=True).to_numpy(float)
        matrix = np.column_stack([np.ones(len(obs)), dummies])
        missing = matrix.shape[1] - int(np.linalg.matrix_rank(matrix.T @ matrix))
        if missing:
            text = f"the design of {', '.join(design)} lacks {missing} of {matrix.shape[1]} ranks"
            fix = "Some of their effects cannot be told apart; name fewer covariates."
            found.append(Finding("warning", "adata.obs", text, missing, fix))
    return found


def cramers_v(one: pd.Series, other: pd.Series) -> float:
    """Return Cramer's V of two categorical columns, from 0 (independent) to 1; 0 where a column has one value."""
    table = pd.crosstab(pd.factorize(one)[0], pd.factorize(other)[0]).to_numpy(float)
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    degrees = min(table.shape) - 1
    return float(np.sqrt(((table - expected) ** 2 / expected).sum() / table.sum() / degrees)) if degrees else 0.0
