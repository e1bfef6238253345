"""Turn the arguments of a user into groups of cells to compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData

from scgen.arguments import check_key, counted, did_you_mean, shown
from scgen.data.categories import name_of, names_of, unhashable
from scgen.data.checks import check_writable, did_you_mean_column, some
from scgen.data.loader import rows_asked_for

#: A column with more values than this hardly holds groups.
MOST_GROUPS = 500


@dataclass(frozen=True)
class Comparison:
    """A comparison of one union of groups with another. Groups are given by their codes."""

    name1: str
    name2: str
    groups1: list[int]
    groups2: list[int]


def asked_for(
    obs: pd.DataFrame,
    groupby: str | None,
    group1: str | Sequence[str] | None,
    group2: str | None,
    idx1: Sequence[int] | Sequence[bool] | np.ndarray | None,
    idx2: Sequence[int] | Sequence[bool] | np.ndarray | None,
) -> tuple[np.ndarray, list[Comparison]]:
    """Call `by_column` or `by_rows`, depending on the arguments; raise ValueError unless they fit exactly one."""
    if groupby is not None and idx1 is None and idx2 is None:
        return by_column(obs, groupby, group1, group2)
    if idx1 is not None and groupby is None and group1 is None and group2 is None:
        return by_rows(len(obs), idx1, idx2)
    raise ValueError(
        'give either groupby= or idx1=. differential_expression("cell_type", "a", "b") compares groups in a column of '
        "adata.obs, differential_expression(idx1=..., idx2=...) compares rows."
    )


def by_column(
    obs: pd.DataFrame, groupby: str, group1: str | Sequence[str] | None, group2: str | None
) -> tuple[np.ndarray, list[Comparison]]:
    """Return the group code of each cell, (n,), -1 for none, and a comparison of each of ``group1`` with ``group2``.

    Parameters
    ----------
    obs, groupby
        A table of cells, and its column with the groups. Cells without a group (NaN) are left out.
    group1
        One group or several; None means all.
    group2
        The group to compare with; None means all cells of other groups.

    Raises
    ------
    ValueError
        If the column or a group does not exist, or there is nothing to compare with.

    Examples
    --------
    >>> codes, found = by_column(pd.DataFrame({"kind": ["b", "a", "b", None]}), "kind", None, None)
    >>> codes.tolist(), found[0]
    ([1, 0, 1, -1], Comparison(name1='a', name2='rest', groups1=[0], groups2=[1]))
    """
    codes, names = _groups_of(obs, groupby)
    several = isinstance(group1, list | tuple | set | np.ndarray | pd.Index | pd.Series)
    first = names if group1 is None else list(group1 if several else [group1])
    second = [] if group2 is None else [group2]
    for what, groups in (("group1", first), ("group2", second)):
        for one in groups:
            _check_group(what, one, groupby, names)
    other = None if group2 is None else name_of(group2)
    asked = [name for name in dict.fromkeys(names_of(first)) if name != other]
    if len(names) < 2 or not asked:
        raise ValueError(
            f"nothing to compare: adata.obs[{groupby!r}] has the groups {some(names, 20)}. Name two groups, or "
            "leave out group2 to compare with all other cells."
        )
    comparisons = []
    for name in asked:
        against = [one for one in names if one != name] if other is None else [other]
        against = [names.index(one) for one in against]
        comparisons.append(Comparison(name, other or "rest", [names.index(name)], against))
    return _used(codes, comparisons)


def _groups_of(obs: pd.DataFrame, groupby: str) -> tuple[np.ndarray, list[str]]:
    """Return the group code of each cell, (n,) int64, -1 for none, and the names of the groups."""
    columns = [str(name) for name in obs.columns]
    if not isinstance(groupby, str):
        raise TypeError(f"groupby={shown(groupby)} is not a column of adata.obs (it has: {', '.join(columns)}).")
    if groupby not in obs:
        raise ValueError(
            f"groupby={groupby!r} is not a column of adata.obs (it has: {', '.join(columns)})."
            + did_you_mean_column(obs.columns, groupby)
        )
    if (n := list(obs.columns).count(groupby)) > 1:
        raise ValueError(f"adata.obs has {n} columns named {groupby!r}; it must have one.")
    if (row := unhashable(obs[groupby])) is not None:
        kind = type(obs[groupby].iloc[row]).__name__
        raise ValueError(f"adata.obs[{groupby!r}] holds a {kind} at {obs.index[row]}; it must hold names of groups.")
    column = obs[groupby].astype("category").cat.remove_unused_categories()
    names = names_of(column.cat.categories)
    if len(names) > MOST_GROUPS or len(set(names)) < len(names):
        why = "too many to compare" if len(names) > MOST_GROUPS else "some with the same text"
        raise ValueError(
            f"adata.obs[{groupby!r}] has {len(names):,} values, {why} ({some(names, 20)}); it must hold names of "
            "groups."
        )
    return column.cat.codes.to_numpy().astype(np.int64), names


def _check_group(what: str, group: str, groupby: str, names: list[str]) -> None:
    """Raise an error if ``group``, given as the argument ``what``, is not the name of a group."""
    if group is None or isinstance(group, bytes) or not pd.api.types.is_scalar(group):
        raise TypeError(f"{what}={shown(group)}; it takes the name of a group of adata.obs[{groupby!r}].")
    if name_of(group) not in names:
        raise ValueError(
            f"{what}={name_of(group)!r} is not a group of adata.obs[{groupby!r}] (it has: {some(names, 20)})."
            + did_you_mean(name_of(group), names)
        )


def by_rows(
    n_cells: int, idx1: Sequence[int] | Sequence[bool], idx2: Sequence[int] | Sequence[bool] | np.ndarray | None
) -> tuple[np.ndarray, list[Comparison]]:
    """Return the same as `by_column`, for rows or masks. ``idx2=None`` compares with all other cells.

    Raises
    ------
    ValueError
        If they are empty, out of range, or share cells.

    Examples
    --------
    >>> by_rows(4, [0], [2, 3])[0].tolist(), by_rows(4, [0], None)[0].tolist()
    ([0, -1, 1, 1], [0, 1, 1, 1])
    """
    group = np.full(n_cells, -1 if idx2 is not None else 1)
    if idx2 is not None:
        group[rows_asked_for(idx2, n_cells, "idx2")] = 1
    first = rows_asked_for(idx1, n_cells, "idx1")
    if idx2 is not None and (group[first] == 1).any():
        shared = len(np.unique(first[group[first] == 1]))
        raise ValueError(f"idx1 and idx2 share {counted(shared, 'cell')}; a cell can be in only one of them.")
    group[first] = 0
    if not (group == 1).any():
        raise ValueError("idx1 has all cells, so there is nothing to compare with. Leave some out, or set idx2=.")
    return group, [Comparison("idx1", "rest" if idx2 is None else "idx2", [0], [1])]


def _used(group: np.ndarray, comparisons: list[Comparison]) -> tuple[np.ndarray, list[Comparison]]:
    """Remove the groups that are in no comparison, and renumber the others."""
    used = sorted({code for one in comparisons for code in (*one.groups1, *one.groups2)})
    renumbered = np.full(max(used[-1], group.max()) + 2, -1)  # the last is for -1
    renumbered[used] = np.arange(len(used))

    def new(groups: list[int]) -> list[int]:
        return renumbered[groups].tolist()

    found = [Comparison(one.name1, one.name2, new(one.groups1), new(one.groups2)) for one in comparisons]
    return renumbered[group], found


def check_copy(adata: AnnData, groupby: str | None, key_added: str | None) -> None:
    """Raise ValueError if a copy for Scanpy cannot be written to ``adata.uns[key_added]`` or would overwrite data."""
    if key_added is None:
        return
    check_key("key_added", key_added, "rank_genes_groups")
    if groupby is None:
        raise ValueError(f"key_added={key_added!r}: Scanpy's format needs groups of a column: use groupby=, not idx1=.")
    there = adata.uns.get(key_added)
    if there is not None and not (isinstance(there, Mapping) and "names" in there):
        raise ValueError(f"adata.uns[{key_added!r}] exists and is not a ranking of genes: choose another name.")
    check_writable(adata)
