"""The arguments of `setup_anndata`, and the form in which problems of an AnnData are reported."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData

from scgen.arguments import did_you_mean, shown

#: Larger numbers are refused, because their squares and other results must fit into float32, which ends at 3e38.
LARGEST = 1e15


@dataclass(frozen=True)
class Setup:
    """Which parts of an AnnData a model reads: the arguments of `setup_anndata`, and ``use_rep`` of some models.

    If ``use_rep`` is given, the values are those of ``adata.obsm[use_rep]``, and neither X nor a layer is read.
    """

    layer: str | None = None
    batch_key: str | None = None
    labels_key: str | None = None
    size_factor_key: str | None = None
    categorical_covariate_keys: tuple[str, ...] = ()
    continuous_covariate_keys: tuple[str, ...] = ()
    counts: bool = True
    spatial_key: str | None = None
    section_key: str | None = None
    use_rep: str | None = None

    @property
    def categorical(self) -> dict[str, str]:
        """The categorical columns, by the role they play."""
        named = {"batch_key": self.batch_key, "labels_key": self.labels_key}
        extra = {f'categorical_covariate_keys "{key}"': key for key in self.categorical_covariate_keys}
        return {role: key for role, key in named.items() if key is not None} | extra

    @property
    def numeric(self) -> dict[str, str]:
        """The numeric columns, by the role they play."""
        size_factor = {} if self.size_factor_key is None else {"size_factor_key": self.size_factor_key}
        return size_factor | {f'continuous_covariate_keys "{key}"': key for key in self.continuous_covariate_keys}

    @property
    def where(self) -> str:
        """The name of the matrix."""
        if self.use_rep is not None:
            return f'adata.obsm["{self.use_rep}"]'
        return "adata.X" if self.layer is None else f'adata.layers["{self.layer}"]'


@dataclass(frozen=True)
class Finding:
    """One finding: its level ("error", "warning" or "note"), place, text, number of cases, and what to do."""

    level: str
    where: str
    finding: str
    n: int
    suggestion: str

    def __str__(self) -> str:
        return f"{self.finding}. {self.suggestion}"


def check_types(adata: AnnData, setup: Setup) -> None:
    """Raise TypeError if an argument has the wrong type."""
    if not isinstance(adata, AnnData):
        for name, parts in (("mod", "modalities"), ("tables", "tables")):  # MuData, SpatialData
            if isinstance(held := getattr(adata, name, None), Mapping) and len(held):
                what = "mdata" if name == "mod" else "sdata.tables"
                raise TypeError(
                    f"adata is a {type(adata).__name__}, not an AnnData. Pass one of its {parts} ({some(held)}): "
                    f'{what}["{next(iter(held))}"].'
                )
        raise TypeError(
            f"adata is a {type(adata).__name__}, not an AnnData. Read a file with anndata.read_h5ad(path), or "
            "make an AnnData from a matrix of cells x genes: AnnData(X)."
        )
    if not isinstance(adata.obs, pd.DataFrame):
        raise TypeError(
            f"adata was read lazily: its obs is a {type(adata.obs).__name__}, not a DataFrame. Load it first: "
            "adata = adata.to_memory()."
        )
    check_setup(setup)


def check_setup(setup: Setup) -> None:
    """Raise TypeError if a name is not a string, or a list of names is not a list."""
    for name in ("layer", "batch_key", "labels_key", "size_factor_key", "spatial_key", "section_key", "use_rep"):
        value = getattr(setup, name)
        if value is not None and not isinstance(value, str):
            several = name == "batch_key" and isinstance(value, list)
            further = " Pass further columns as categorical_covariate_keys=[...]." if several else ""
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it takes one name, a string.{further}")
    for name in ("categorical_covariate_keys", "continuous_covariate_keys"):
        value = getattr(setup, name)
        if not isinstance(value, tuple):
            kind = "string" if isinstance(value, str) else type(value).__name__
            raise TypeError(f"{name}={value!r} is a {kind}; it takes a list: {name}=[{value!r}].")
        if any(not isinstance(key, str) for key in value):
            raise TypeError(f"{name}={list(value)!r} has items that are not column names.")
    if not isinstance(setup.counts, bool | np.bool_):
        raise TypeError(f"counts={setup.counts!r} must be True or False.")


def did_you_mean_column(columns: pd.Index, key: str) -> str:
    """Return a sentence that names the column that ``key`` may stand for, or an empty string.

    Examples
    --------
    >>> did_you_mean_column(pd.Index(["donor", 5]), "5")
    ' The name of the column 5 is not a string. Make it one: adata.obs = adata.obs.rename(columns=str).'
    >>> did_you_mean_column(pd.Index(["donor", 5]), "doner")
    ' Did you mean "donor"?'
    """
    names = [str(name) for name in columns]
    if key in names and key not in columns:
        return f" The name of the column {key} is not a string. Make it one: adata.obs = adata.obs.rename(columns=str)."
    return did_you_mean(key, names)


def check_writable(adata: AnnData) -> None:
    """Raise ValueError if ``adata.uns["scgen"]`` cannot be written."""
    if adata.isbacked and adata.is_view:
        raise ValueError(
            "adata is a view of a backed AnnData, which cannot be written to. Set up the whole object and pass "
            "indices=, or load the view: adata = adata.to_memory()."
        )
    check_ours(adata)


def check_ours(adata: AnnData) -> None:
    """Raise ValueError if ``adata.uns["scgen"]`` holds something that scgen did not write."""
    ours = adata.uns.get("scgen", {})
    if not isinstance(ours, Mapping):
        raise ValueError(f'adata.uns["scgen"] holds {shown(ours)}, which is not from scgen: del adata.uns["scgen"].')
    if not isinstance(ours.get("setup", {}), Mapping | None):
        raise ValueError(
            f'adata.uns["scgen"]["setup"] holds {shown(ours["setup"])}, which is not from setup_anndata. Call it again.'
        )


def raise_errors(found: list[Finding], call: str) -> None:
    """Raise a ValueError with all errors among the findings, if there are any."""
    errors = [str(finding) for finding in found if finding.level == "error"]
    if len(errors) == 1:
        raise ValueError(errors[0])
    if errors:
        raise ValueError(f"{call} found {len(errors)} problems:\n- " + "\n- ".join(errors))


def some(names, n: int = 5) -> str:
    """Return the first names, followed by dots if there are more."""
    shown = ", ".join(str(name) for name in list(names)[:n])
    return shown + (", ..." if len(names) > n else "")
