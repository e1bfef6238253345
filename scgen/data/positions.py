"""Where cells lie in tissue: their coordinates and sections, and what is wrong with them."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from anndata import AnnData

from scgen.arguments import counted, did_you_mean
from scgen.data.categories import unhashable
from scgen.data.checks import LARGEST, Finding, Setup, some


def coordinates_of(adata: AnnData, setup: Setup) -> np.ndarray:
    """Return the coordinates of the cells, (N, 2). `findings` has checked them."""
    return np.asarray(adata.obsm[setup.spatial_key])


def sections_of(adata: AnnData, setup: Setup) -> np.ndarray | None:
    """Return a code for the section of each cell, (N,); None if there is one section."""
    key = _key_of_sections(setup)
    return None if key is None else pd.factorize(adata.obs[key])[0]


def findings(adata: AnnData, setup: Setup) -> Iterator[Finding]:
    """Find what is wrong with the coordinates and the sections that ``setup`` names."""
    if setup.spatial_key is None:
        if setup.section_key is not None:
            text = f'section_key="{setup.section_key}" is given, but spatial_key is not'
            yield Finding("error", "adata.obsm", text, 1, 'Pass both: spatial_key="spatial".')
        return
    where = f'adata.obsm["{setup.spatial_key}"]'
    if setup.spatial_key not in adata.obsm:
        names = list(adata.obsm)
        text = f'spatial_key="{setup.spatial_key}" is not in adata.obsm (it has: {some(names, 12) or "nothing"})'
        yield Finding("error", "adata.obsm", text, 1, _put_there(adata, where) + did_you_mean(setup.spatial_key, names))
        return
    places = np.asarray(adata.obsm[setup.spatial_key])
    if places.dtype.kind not in "fiu":
        text = f"{where} does not hold numbers, but {places.dtype}"
        yield Finding("error", where, text, 1, "Put an array of x and y there.")
        return
    if places.ndim != 2 or places.shape[1] != 2:
        text = f"{where} has the shape {places.shape}, but positions in a section are x and y: (cells, 2)"
        fix = f"Keep the two columns of the section's plane: {where} = {where}[:, :2]." if places.ndim == 2 else ""
        yield Finding("error", where, text, 1, fix or "Put an array of x and y there.")
        return
    wrong = ~(np.abs(places) <= LARGEST).all(1)
    if wrong.any():
        has = f"{where} has {counted(wrong.sum(), 'cell')}"
        text = (
            f"{has} without coordinates, or with coordinates beyond {LARGEST:g} (first: {some(adata.obs_names[wrong])})"
        )
        yield Finding("error", where, text, int(wrong.sum()), "Leave these cells out.")
        return
    yield from _sections(adata, setup, places)


def _sections(adata: AnnData, setup: Setup, places: np.ndarray) -> Iterator[Finding]:
    key = _key_of_sections(setup)
    if key is not None and list(adata.obs.columns).count(key) != 1:
        if key == setup.section_key:  # a batch_key that is not there is reported with the other columns
            names = [str(name) for name in adata.obs.columns]
            n = names.count(key)
            text = f'section_key="{key}" is not a column of adata.obs (it has: {some(names, 12) or "none"})'
            text = f'adata.obs has {n} columns named "{key}", the section_key; it must have one' if n else text
            fix = "Keep one of them."
            if not n:
                alone = f' If all cells are of one section: adata.obs["{key}"] = "section_1".'
                fix = "Name the column of sections." + (did_you_mean(key, names) or alone)
            yield Finding("error", "adata.obs", text, max(n, 1), fix)
        return
    table = pd.DataFrame(places, index=adata.obs_names)
    if key is not None and unhashable(adata.obs[key]) is not None:
        if key == setup.section_key:
            text = f'adata.obs["{key}"] holds values that cannot name sections, such as lists'
            yield Finding("error", f'adata.obs["{key}"]', text, 1, "Make them strings.")
        return
    if key is not None:
        table[key] = adata.obs[key].to_numpy()
        if (missing := table[key].isna()).any():
            cells = counted(missing.sum(), "cell")
            text = f'adata.obs["{key}"] names no section for {cells} (first: {some(table.index[missing])})'
            yield Finding("error", f'adata.obs["{key}"]', text, int(missing.sum()), "Name it, or leave them out.")
            return
    if setup.batch_key is not None and setup.section_key is not None and setup.batch_key in adata.obs:
        batches = adata.obs.groupby(setup.section_key, observed=True)[setup.batch_key].nunique()
        if (several := batches.index[batches > 1]).size:
            has = counted(len(several), "section has", "sections have")
            text = f'adata.obs["{key}"]: {has} cells of several batches ({some(several)})'
            yield Finding("error", f'adata.obs["{key}"]', text, len(several), "A section must be of one batch.")
    twice = table.duplicated(keep=False)
    if twice.any():
        where = f'adata.obsm["{setup.spatial_key}"]'
        has = f"{where} has {counted(twice.sum(), 'cell')}"
        text = f"{has} at the place of another cell (first: {some(table.index[twice])})"
        fix = "Leave out the copies" + ("." if key else ", or name the sections if there are several: section_key=...")
        yield Finding("error", where, text, int(twice.sum()), fix)


def _key_of_sections(setup: Setup) -> str | None:
    return setup.batch_key if setup.section_key is None else setup.section_key


def _put_there(adata: AnnData, where: str) -> str:
    """Return how to put the coordinates into ``obsm``, by columns that are often named so if they are there."""
    for x, y in (("x", "y"), ("X", "Y"), ("x_coord", "y_coord"), ("imagerow", "imagecol"), ("array_col", "array_row")):
        if x in adata.obs and y in adata.obs:
            column, row = (pd.to_numeric(adata.obs[name], errors="coerce") for name in (x, y))
            # Columns of a hexagonal lattice, such as Visium's, count in half steps.
            hexagonal = x == "array_col" and (column + row).mod(2).nunique() == 1
            units = " * [0.5, 0.75**0.5]" if hexagonal else ""
            return f'Put the columns there: {where} = adata.obs[["{x}", "{y}"]].to_numpy(float){units}.'
    return f"Put x and y of each cell there: {where} = xy."
