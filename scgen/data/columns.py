"""Read the columns of ``adata.obs`` that a model was set up with, and the names of those of a matrix in ``obsm``."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from scgen.arguments import counted
from scgen.data.checks import Setup, did_you_mean_column, some
from scgen.data.counts import matrix_of


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


def names_in_obsm(adata: AnnData, key: str) -> list[str]:
    """Return the names of the columns of a matrix in ``adata.obsm``. If they have none, they are numbered from 1.

    Examples
    --------
    >>> shares = pd.DataFrame({"neurons": [0.2, 0.7], "glia": [0.8, 0.3]}, index=["0", "1"])
    >>> adata = AnnData(np.zeros((2, 1)), obsm={"shares": shares, "X_pca": np.zeros((2, 2))})
    >>> names_in_obsm(adata, "shares"), names_in_obsm(adata, "X_pca")
    (['neurons', 'glia'], ['X_pca_1', 'X_pca_2'])
    """
    values = adata.obsm[key]
    if isinstance(values, pd.DataFrame) and values.columns.is_unique:
        return [str(name) for name in values.columns]
    return _numbered(key, values.shape[1])


def columns_in_obsm(adata: AnnData, setup: Setup, names: list[str]) -> np.ndarray | None:
    """Return the positions of columns of ``adata.obsm[setup.use_rep]``; None if they are the same in the same order.

    They are matched by name if both have names. ValueError is raised if their number differs, or if one is not there.
    """
    key, shape = setup.use_rep, np.shape(matrix_of(adata, setup))
    if len(shape) != 2:
        return None  # what is missing, or is no matrix, is reported with the values
    same = "Compute it in the same way as for the model's cells."
    if shape[1] != len(names):
        n = counted(shape[1], "column")
        raise ValueError(f"{setup.where} has {n}, but the model was made for {len(names)}. {same}")
    found, no_names = names_in_obsm(adata, key), _numbered(key, shape[1])
    if found == names or no_names in (found, names):
        return None
    if lacking := [name for name in names if name not in found]:
        raise ValueError(f"{setup.where} lacks the model's columns {some(lacking)}. {same}")
    return np.array([found.index(name) for name in names])


def _numbered(key: str, n: int) -> list[str]:
    return [f"{key}_{i}" for i in range(1, n + 1)]


def standard(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and the standard deviation with which a continuous covariate is standardised."""
    mean, sd = float(values.mean()), float(values.std())
    # The standard deviation of a constant is a rounding error. Dividing by it would blow up any later difference.
    return mean, sd if sd > 1e-8 * abs(mean) else 1.0
