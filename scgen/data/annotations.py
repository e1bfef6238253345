"""What a user names in ``adata.obs`` and ``adata.obsm``, checked: columns with groups of cells, and features."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from scgen.arguments import did_you_mean, shown
from scgen.data.categories import unhashable
from scgen.data.checks import some


def column_of(adata: AnnData, name: str, key: str) -> pd.Series:
    """Return a column of ``adata.obs``. If there is not exactly one, raise an error that names the argument."""
    columns = [str(column) for column in adata.obs.columns]
    there = f"{name}={shown(key)} is not a column of adata.obs (it has: {some(columns, 12) or 'none'})."
    if not isinstance(key, str):
        raise TypeError(there)
    if key not in columns:
        raise ValueError(there + did_you_mean(key, columns))
    if columns.count(key) > 1:
        raise ValueError(f"{name}={key!r}: adata.obs has {columns.count(key)} columns of this name; it must have one.")
    return adata.obs.iloc[:, columns.index(key)]


def groups_of(adata: AnnData, name: str, key: str) -> pd.Categorical:
    """Return a column of ``adata.obs`` as categories, without those that no cell has.

    Parameters
    ----------
    adata, key
        The cells, and the column.
    name
        The argument to name in errors.

    Raises
    ------
    TypeError
        If ``key`` is not a string.
    ValueError
        If there is no such column or more than one, or it has missing values or values that cannot be categories.

    Examples
    --------
    >>> adata = AnnData(obs=pd.DataFrame({"slide": ["b", "a"]}, index=["cell_1", "cell_2"]))
    >>> groups_of(adata, "section_key", "slide").codes.tolist()
    [1, 0]
    >>> groups_of(adata, "section_key", "slides")
    Traceback (most recent call last):
    ValueError: section_key='slides' is not a column of adata.obs (it has: slide). Did you mean "slide"?
    """
    column = column_of(adata, name, key)
    if (row := unhashable(column)) is not None:
        kind = type(column.iloc[row]).__name__
        raise ValueError(f"{name}={key!r}: the column holds a {kind} at {column.index[row]}; it must hold names.")
    missing = column.isna().to_numpy()
    if missing.any():
        raise ValueError(
            f"{name}={key!r}: the column is NaN for {missing.sum()} cells (first: {some(column.index[missing])}). "
            f'Leave them out: adata = adata[adata.obs["{key}"].notna()].copy().'
        )
    return pd.Categorical(column).remove_unused_categories()


def features_of(adata: AnnData, name: str, key: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Return a matrix of ``adata.obsm``, or some rows of it, (n, D) float64.

    Parameters
    ----------
    adata, key
        The cells, and the key in ``obsm``.
    name
        The argument to name in errors.
    rows
        The rows to check and to return.

    Raises
    ------
    TypeError
        If ``key`` is not a string.
    ValueError
        If there is no such key, or the matrix is not two-dimensional, not numeric or not finite.

    Examples
    --------
    >>> adata = AnnData(np.zeros((2, 1)), obsm={"X_pca": np.zeros((2, 3))})
    >>> features_of(adata, "features", "X_pac")
    Traceback (most recent call last):
    ValueError: features='X_pac' is not in adata.obsm (it has: X_pca). Did you mean "X_pca"?
    """
    there = f"{name}={shown(key)} is not in adata.obsm (it has: {some(adata.obsm, 12) or 'none'})."
    if not isinstance(key, str):
        raise TypeError(there)
    if key not in adata.obsm:
        raise ValueError(there + did_you_mean(key, list(adata.obsm)))
    return finite_matrix(f'{name}={key!r}: adata.obsm["{key}"]', adata.obsm[key], adata.obs_names, rows)


def finite_matrix(
    where: str, values, cells: Sequence[str] | pd.Index, rows: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """Return rows of a matrix that a user gave, as float64, after checking that they are finite.

    Parameters
    ----------
    where
        What to call the matrix in errors.
    values
        Array or DataFrame, (N, D).
    cells
        The names of the N cells.
    rows
        The rows to check and to return; others may hold anything.
    """
    try:
        array = np.asarray(values)
    except Exception as error:  # anything that cannot be an array, such as lists of different lengths
        raise TypeError(f"{where} is a {type(values).__name__}, but not an array.") from error
    if array.ndim != 2 or len(array) != len(cells) or not array.shape[1] or array.dtype.kind not in "iuf":
        what = f"has shape {array.shape} and dtype {array.dtype}" if array.ndim else f"is a {type(values).__name__}"
        kind = ValueError if array.ndim else TypeError
        raise kind(f"{where} {what}; it must hold numbers, with one row for each of the {len(cells)} cells.")
    array, cells = array[rows].astype(np.float64), np.asarray(cells)[rows]
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{where} has NaN or infinite values for {bad.sum()} cells (first: {some(cells[bad])}). Correct them, or "
            "leave out these cells."
        )
    return array
