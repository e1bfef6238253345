"""Read the columns of ``adata.obs`` that a model was set up with."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from scgen.data.checks import did_you_mean_column


def columns_of(obs: pd.DataFrame, keys: Sequence[str], rows: np.ndarray | slice) -> dict[str, pd.Series]:
    """Return columns for some cells; ValueError unless there is exactly one of each name."""
    for key in keys:
        if (n := list(obs.columns).count(key)) != 1:
            hint = "" if n else did_you_mean_column(obs.columns, key)
            raise ValueError(f'adata.obs has {n} columns named "{key}", which the model reads; it must have one.{hint}')
    return {key: obs[key].iloc[rows] for key in keys}


def numbers_of(obs: dict[str, pd.Series], key: str) -> np.ndarray:
    """Return a column as floats; ValueError if it has values that are not numbers."""
    try:
        return obs[key].to_numpy(float)
    except (TypeError, ValueError):
        raise ValueError(
            f'adata.obs["{key}"] has dtype {obs[key].dtype} and values that are missing or not numbers. The model '
            "needs numbers there."
        ) from None


def standard(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and the standard deviation with which a continuous covariate is standardised."""
    mean, sd = float(values.mean()), float(values.std())
    # The standard deviation of a constant is a rounding error. Dividing by it would blow up any later difference.
    return mean, sd if sd > 1e-8 * abs(mean) else 1.0
