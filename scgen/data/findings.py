"""Find what is wrong with an AnnData. Each message says what was looked for, where, what is there, and the fix."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scgen.arguments import counted, did_you_mean, nearest
from scgen.data import positions
from scgen.data.categories import name_of, names_of, unhashable
from scgen.data.checks import LARGEST, Finding, Setup, did_you_mean_column, some
from scgen.data.counts import NEEDS_COUNTS, are_counts, counts_are_in, layers_of, looks_like, matrix_of
from scgen.data.stores import BackedStore, DamagedMatrix, MemoryStore, open_store, unreadable

#: A batch with fewer cells than this gives a warning.
FEW_CELLS = 10


def findings(
    adata: AnnData, setup: Setup, columns: np.ndarray | None = None, empty_cells: bool = True
) -> list[Finding]:
    """Return the errors and warnings about the parts of ``adata`` that ``setup`` names.

    Parameters
    ----------
    adata, setup
        The cells, and which parts of them the model reads.
    columns
        Columns of the genes to read; None reads all.
    empty_cells
        Whether a cell without counts is an error.
    """
    found = [*_shape(adata, setup), *_columns(adata, setup), *positions.findings(adata, setup)]
    matrix = matrix_of(adata, setup)
    if matrix is None:
        found.append(_no_matrix(adata, setup))
    elif found_of_kind := list(_kind(setup, matrix)):
        found += found_of_kind
    elif all(matrix.shape):
        try:
            found += _values(adata, setup, open_store(matrix, columns), empty_cells)
        except DamagedMatrix as error:
            found.append(_damaged(adata, setup, error))
    return found


def _shape(adata: AnnData, setup: Setup) -> Iterator[Finding]:
    if not adata.n_obs:
        yield Finding("error", "adata.obs", "adata has no cells (its shape is 0 x genes)", 0, "Check the last filter.")
    named = {"adata.obs_names": adata.obs_names}
    if setup.use_rep is None:
        named["adata.var_names"] = adata.var_names
        if not adata.n_vars:
            text = "adata has no genes (its shape is cells x 0)"
            yield Finding("error", "adata.var", text, 0, "Check the last filter.")
    for where, names in named.items():
        if len(names) and not _are_texts(names):
            several = isinstance(names, pd.MultiIndex)
            kind = "are a MultiIndex" if several else f"are not all strings (one is {_no_text(names)!r})"
            made = f'["_".join(map(str, name)) for name in {where}]' if several else f"{where}.astype(str)"
            yield Finding("error", where, f"{where} {kind}", len(names), f"Make them strings: {where} = {made}.")
    twice = adata.var_names[adata.var_names.duplicated()].unique()
    if len(twice) and setup.use_rep is None:
        text = f"adata.var_names has {counted(len(twice), 'duplicate name')} ({some(twice)})"
        yield Finding("error", "adata.var_names", text, len(twice), "Call adata.var_names_make_unique() first.")


def _are_texts(names: pd.Index) -> bool:
    """Say whether all names are strings."""
    names = names.categories if isinstance(names, pd.CategoricalIndex) else names
    return pd.api.types.infer_dtype(names, skipna=False) == "string" and not names.hasnans


def _no_text(names: pd.Index):
    return next((name for name in names if not isinstance(name, str)), None)


def _columns(adata: AnnData, setup: Setup) -> Iterator[Finding]:
    single = (setup.batch_key, setup.labels_key, setup.size_factor_key)
    used = [*single, *setup.categorical_covariate_keys, *setup.continuous_covariate_keys]
    for key in sorted({key for key in used if key is not None and used.count(key) > 1}):
        text = f'the column "{key}" is named twice'
        yield Finding("error", f'obs["{key}"]', text, 1, "Name each column once, in one argument only.")
    for role, key in (setup.categorical | setup.numeric).items():
        if key not in adata.obs:
            yield _no_column(adata, role, key)
        elif (n := list(adata.obs.columns).count(key)) > 1:
            text = f'adata.obs has {n} columns named "{key}"; it must have one'
            fix = "Keep the first: adata.obs = adata.obs.loc[:, ~adata.obs.columns.duplicated()]"
            yield Finding("error", "adata.obs", text, n, fix)
        elif role in setup.numeric:
            yield from _numbers(adata.obs[key], role, key)
        else:
            yield from _categories(adata.obs[key], role, key)


def _no_column(adata: AnnData, role: str, key: str) -> Finding:
    names = [str(name) for name in adata.obs.columns]
    argument, _, listed = role.partition(" ")
    closest = nearest(key, names)
    call = (
        f'setup_anndata(adata, {argument}=["{closest}"])' if listed else f'setup_anndata(adata, {argument}="{closest}")'
    )
    hint = f"Did you mean {call}?" if closest else "Name one of these columns."
    if key in names:  # the name of the column is another type's
        hint = did_you_mean_column(adata.obs.columns, key).strip()
    if key in adata.obsm or key in adata.var:
        hint += f' ("{key}" is in adata.{"obsm" if key in adata.obsm else "var"}; it must be in adata.obs.)'
    text = f'{argument}="{key}" is not a column of adata.obs (it has: {some(names, 12) or "none"})'
    return Finding("error", "adata.obs", text, 1, hint)


def _numbers(column: pd.Series, role: str, key: str) -> Iterator[Finding]:
    where, argument = f'adata.obs["{key}"]', role.partition(" ")[0]
    is_real = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column)
    if not is_real or pd.api.types.is_bool_dtype(column):
        text = f"{argument}: {where} is not numeric (dtype {column.dtype})"
        convert = f"Convert it, {where} = {where}.astype(float)" if is_real else "Convert it"
        instead = "" if role == "size_factor_key" else f', or pass categorical_covariate_keys=["{key}"]'
        yield Finding("error", where, text, len(column), f"{convert}{instead}.")
        return
    values = column.to_numpy(dtype=float, na_value=np.nan)
    bad = ~np.isfinite(values)
    if bad.any():
        n = counted(bad.sum(), "NaN or infinite value")
        text = f"{argument}: {where} has {n} (first: {some(column.index[bad])})"
        yield Finding("error", where, text, int(bad.sum()), "Replace such values, or remove their cells.")
        return
    # Covariates are standardised, so their unit is free, but their squares must be finite.
    least, most = (1 / LARGEST, LARGEST) if role == "size_factor_key" else (0, float(np.finfo(np.float32).max))
    if role == "size_factor_key" and (bad := values <= 0).any():
        n = counted(bad.sum(), "value that is not positive", "values that are not positive")
        text = f"size_factor_key: {where} has {n} ({some(column.index[bad])})"
        yield Finding("error", where, text, int(bad.sum()), "Size factors divide the counts and must be above 0.")
    elif (bad := (np.abs(values) < least) | (np.abs(values) > most)).any():
        n = counted(bad.sum(), "value that is too small or too large", "values that are too small or too large")
        text = f"{argument}: {where} has {n} ({some(column.index[bad])})"
        first = f"{column.index[bad][0]} has {values[bad][0]:g}"
        fix = f"{first}; absolute values must be from {least:g} to {most:.4g}. Correct or rescale such values."
        yield Finding("error", where, text, int(bad.sum()), fix)
    elif len(values) > 1 and np.ptp(values) == 0:
        text = f"{argument}: {where} has one value, {values[0]:g}, for all cells"
        yield Finding("warning", where, text, len(values), "It has no information for the model; leave it out.")


def _categories(column: pd.Series, role: str, key: str) -> Iterator[Finding]:
    where, argument = f'adata.obs["{key}"]', role.partition(" ")[0]
    if (row := unhashable(column)) is not None:
        kind = type(column.iloc[row]).__name__
        text = f"{argument}: {where} holds values that cannot be categories (a {kind} at {column.index[row]})"
        yield Finding("error", where, text, len(column), f"Make them strings: {where} = {where}.astype(str).")
        return
    missing = column.isna().to_numpy()
    if missing.any():
        text = f"{argument}: {where} is NaN for {counted(missing.sum(), 'cell')} (first: {some(column.index[missing])})"
        fix = f'adata.obs["{key}"] = adata.obs["{key}"].astype(object).fillna("missing")'
        yield Finding("error", where, text, int(missing.sum()), f"Give it a name, {fix}, or remove these cells.")
        return
    sizes = column.value_counts()
    sizes = sizes[sizes > 0]
    if pd.Index(names_of(sizes.index)).has_duplicates:
        text = f"{argument}: {where} has values of different types with the same text, such as 1 and '1'"
        fix = f'adata.obs["{key}"] = adata.obs["{key}"].astype(str)'
        fix += '.str.removesuffix(".0")' if any(isinstance(value, float) for value in sizes.index) else ""
        yield Finding("error", where, text, 1, f"Make them the same type: {fix}.")
    few = sizes[sizes < FEW_CELLS]
    if len(column) > FEW_CELLS and len(sizes) > len(column) / 2:
        text = f"{argument}: {where} has {len(sizes):,} values for {len(column):,} cells, nearly one value per cell"
        fix = "Is this a column of barcodes or numbers? Several cells must share each value."
        if pd.api.types.is_numeric_dtype(column):
            fix = f'They are numbers: pass continuous_covariate_keys=["{key}"].'
        yield Finding("warning", where, text, len(sizes), fix)
    elif len(sizes) == 1 and len(column) > 1 and role != "labels_key":
        text = f"{argument}: {where} has one value ({name_of(sizes.index[0])}) for all cells"
        no_use = "It has no information for the model; leave it out."
        fix = "There is nothing to integrate." if role == "batch_key" else no_use
        yield Finding("warning", where, text, len(column), fix)
    elif role == "batch_key" and len(few):
        sizes_of_few = some([f"{name_of(value)}: {size}" for value, size in few.items()])
        n = counted(len(few), "batch", "batches")
        text = f"batch_key: {where} has {n} of fewer than {FEW_CELLS} cells ({sizes_of_few})"
        fix = "A batch effect cannot be estimated from so few cells; merge or remove small batches."
        yield Finding("warning", where, text, len(few), fix)


def _no_matrix(adata: AnnData, setup: Setup) -> Finding:
    if setup.use_rep is not None:
        names = list(adata.obsm)
        text = f'use_rep="{setup.use_rep}" is not in adata.obsm (it has: {some(names, 12) or "none"})'
        fix = f"Store the values there: {setup.where} = values."
        return Finding("error", "adata.obsm", text, 1, fix + did_you_mean(setup.use_rep, names))
    layers = layers_of(adata)
    if setup.layer is None:
        layers = [layer for layer in layers if not setup.counts or are_counts(adata.layers[layer])]
        call = f'setup_anndata(adata, layer="{layers[0]}")' if layers else 'adata.X = counts, or layer="..."'
        return Finding("error", "adata.X", "adata.X is empty (None)", 1, f"Say where the counts are: {call}.")
    closest = nearest(setup.layer, layers)
    hint = f'Did you mean setup_anndata(adata, layer="{closest}")?' if closest else "Leave layer out to read adata.X."
    text = f'layer="{setup.layer}" is not a layer of adata (it has: {some(layers, 12) or "none"})'
    return Finding("error", "adata.layers", text, 1, hint)


def _kind(setup: Setup, matrix) -> Iterator[Finding]:
    """Report a matrix of a type that cannot be read, or without real numbers."""
    if reason := unreadable(matrix, setup.where):
        yield Finding("error", setup.where, reason[0], 1, reason[1])
    elif matrix.dtype.kind not in "biuf":
        text = f"{setup.where} does not hold real numbers (dtype {matrix.dtype})"
        fix = f'Convert it to numbers: {setup.where} = {setup.where}.astype("float32").'
        yield Finding("error", setup.where, text, matrix.shape[0], fix)
    elif setup.use_rep is not None and (len(matrix.shape) != 2 or not matrix.shape[1]):
        text = f"{setup.where} has the shape {matrix.shape}, but it must have one row for each cell, and columns"
        yield Finding("error", setup.where, text, 1, "Store a matrix of cells x values there.")


def _damaged(adata: AnnData, setup: Setup, error: DamagedMatrix) -> Finding:
    where = "" if error.row is None else f' (first in cell "{adata.obs_names[error.row]}")'
    text = f"{setup.where} is a damaged sparse matrix: {error}{where}"
    return Finding("error", setup.where, text, 1, "It cannot be used. Make it again, or read the file again.")


def _values(adata: AnnData, setup: Setup, store: MemoryStore | BackedStore, empty_cells: bool) -> Iterator[Finding]:
    """Check every stored value, a block of cells at a time."""
    n = dict.fromkeys(("infinite", "large", "negative", "fractional"), 0)
    first: dict[str, str] = {}
    empty = []
    for start, block in store.blocks():
        values = block.data if sparse.issparse(block) else block
        for kind, mask in _wrong(values, setup.counts).items():
            if mask.any():
                n[kind] += int(mask.sum())
                first.setdefault(kind, _place(adata, block, mask, start))
        empty.append(start + np.flatnonzero(np.asarray(block.sum(axis=1)).ravel() == 0))
    cells = np.concatenate(empty)
    if n["infinite"]:
        text = f"{setup.where} has {counted(n['infinite'], 'NaN or infinite value')} (first at {first['infinite']})"
        yield Finding(
            "error", setup.where, text, n["infinite"], "Correct or remove such values; numpy.isfinite finds them."
        )
    if n["large"]:
        values = counted(n["large"], "value")
        text = f"{setup.where} has {values} larger than {LARGEST:g} (first at {first['large']})"
        fix = "The model cannot compute with such large values. Correct or rescale them."
        yield Finding("error", setup.where, text, n["large"], fix)
    if n["negative"]:
        text = f"{setup.where} has {counted(n['negative'], 'negative value')} (first at {first['negative']})"
        yield Finding("error", setup.where, text, n["negative"], counts_are_in(adata, setup, NEEDS_COUNTS))
    if n["fractional"]:
        values = counted(n["fractional"], "value that is not an integer", "values that are not integers")
        text = f"{setup.where} has {values} (first at {first['fractional']})"
        sound = not (n["infinite"] or n["large"])
        looks, otherwise = looks_like(adata, setup, store) if sound else ("", NEEDS_COUNTS)
        yield Finding("error", setup.where, text + looks, n["fractional"], counts_are_in(adata, setup, otherwise))
    if empty_cells and setup.counts and len(cells) and not sum(n.values()):
        has = counted(len(cells), "cell has", "cells have")
        text = f"{has} no counts in {setup.where} (first: {some(adata.obs_names[cells])})"
        fix = "Remove cells without counts: sc.pp.filter_cells(adata, min_counts=1)"
        yield Finding(
            "error", setup.where, text, len(cells), fix + (f', for the layer "{setup.layer}".' if setup.layer else ".")
        )


def _wrong(values: np.ndarray, counts: bool) -> dict[str, np.ndarray]:
    """Return a mask for each kind of bad value; an empty dict if all values are good."""
    if not values.size:
        return {}
    least, most = float(values.min()), float(values.max())  # NaN if any is
    if (0 if counts else -LARGEST) <= least and most <= LARGEST:
        if not counts or values.dtype.kind in "biu":
            return {}
        return {"fractional": values != np.floor(values)}
    values = values.astype(float)
    finite = np.isfinite(values)
    wrong = {"infinite": ~finite, "large": finite & (np.abs(values) > LARGEST)}
    if counts:
        wrong |= {"negative": values < 0, "fractional": finite & (values != np.floor(values))}
    return wrong


def _place(adata: AnnData, block, mask: np.ndarray, start: int) -> str:
    """Return the name of the first cell for which ``mask`` holds."""
    if sparse.issparse(block):
        row = np.searchsorted(block.indptr, np.flatnonzero(mask)[0], side="right") - 1
    else:
        row = np.argwhere(mask)[0][0]
    return f'cell "{adata.obs_names[start + row]}"'
