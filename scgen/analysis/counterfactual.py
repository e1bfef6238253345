"""Decode cells under other conditions: with batch and covariates as observed, fixed or averaged over."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scgen.arguments import check_names, check_number, did_you_mean, shown
from scgen.data.categories import codes_of, value_or_list
from scgen.data.cells import Cells
from scgen.data.checks import LARGEST, some
from scgen.data.registry import Registry

#: Largest number of combinations of values. Each is decoded for every cell and every draw.
MOST_COMBINATIONS = 1000


@dataclass(frozen=True)
class Condition:
    """Values that replace the cells' own batch and covariates. Those that are not named stay as observed.

    Attributes
    ----------
    batch
        A code, or None.
    categorical, continuous
        New codes and new standardised values, by column of these fields of `Cells`.
    """

    batch: int | None = None
    categorical: dict[int, int] = field(default_factory=dict)
    continuous: dict[int, float] = field(default_factory=dict)


def as_if(cells: Cells, condition: Condition) -> Cells:
    """Return the cells with the batch and covariates of this condition."""
    changed = {} if condition.batch is None else {"batch": torch.full_like(cells.batch, condition.batch)}
    for name in ("categorical", "continuous"):
        if replaced := getattr(condition, name):
            changed[name] = getattr(cells, name).clone()
            for column, value in replaced.items():
                changed[name][:, column] = value
    return replace(cells, **changed) if changed else cells


def conditions(
    registry: Registry,
    batch: str | Sequence[str] | None,
    covariates: Mapping[str, str | float | Sequence[str] | Sequence[float]] | None,
    argument: str = "batch",
) -> list[Condition]:
    """Return all combinations of the chosen batches and covariate values. Results are averaged over them.

    Parameters
    ----------
    registry
        The model's registry.
    batch, covariates
        As in `ExpressionModel.get_normalized_expression`.
    argument
        Name of the argument with the batch, for messages.

    Raises
    ------
    TypeError
        If ``covariates`` is not a mapping.
    ValueError
        If a column or value is not known, or several columns have more than 1000 combinations of values.
    """
    columns = _columns(registry)
    # The key None stands for the batch, because a covariate may be named "batch".
    chosen: dict[str | None, list] = {None: codes_of(argument, registry.batches, batch)}
    for name, asked in _named(registry, covariates).items():
        what = f"covariates={{{name!r}: ...}}"
        if columns[name][0] == "continuous":
            chosen[name] = _standardised(f"covariates[{name!r}]", registry.scaling[name], asked)
        else:
            chosen[name] = codes_of(what, registry.categories[name], asked)
    sizes = {name or "batch": len(values) for name, values in chosen.items() if len(values) > 1}
    n = math.prod(sizes.values())
    if n > MOST_COMBINATIONS and len(sizes) > 1:
        product = " x ".join(f"{size} ({name})" for name, size in sizes.items())
        raise ValueError(
            f"{product} are {n:,} combinations; at most {MOST_COMBINATIONS:,} are possible. Fix some of them."
        )
    found = []
    for code, *values in itertools.product(*chosen.values()):
        replaced: dict[str, dict] = {"categorical": {}, "continuous": {}}
        for name, value in zip(list(chosen)[1:], values, strict=True):
            if value is not None:
                kind, column = columns[name]
                replaced[kind][column] = value
        found.append(Condition(code, **replaced))
    return found


@dataclass(frozen=True)
class Asked:
    """The conditions to average over and the genes to return.

    Attributes
    ----------
    conditions
        One or more.
    genes, columns
        Names of the genes, and their columns among the model's genes; ``columns`` is None for all genes.
    """

    conditions: list[Condition]
    genes: pd.Index
    columns: np.ndarray | None

    @classmethod
    def of(
        cls,
        registry: Registry,
        batch: str | Sequence[str] | None,
        covariates: Mapping | None,
        gene_list: Iterable[str] | None,
        transform_batch: str | Sequence[str] | None = None,
    ) -> "Asked":
        """Look up conditions and genes. Raise TypeError if the genes are not a list, ValueError if one is unknown."""
        argument = "batch" if transform_batch is None else "transform_batch"
        if transform_batch is not None:
            if not (isinstance(batch, str) and batch == "observed"):
                raise ValueError("batch and transform_batch mean the same; give only one of them.")
            batch = transform_batch
        found, known = conditions(registry, batch, covariates, argument), pd.Index(registry.genes)
        if gene_list is None:
            return cls(found, known, None)
        genes = check_names("gene_list", gene_list)
        has = f"the model has {', '.join(known[:5])}, ..."
        if not genes:
            raise ValueError(f"gene_list is an empty list; {has}. Use None for all genes.")
        columns = known.get_indexer(pd.Index(genes))
        unknown = list(dict.fromkeys(str(gene) for gene, column in zip(genes, columns, strict=True) if column < 0))
        if unknown:
            hint = did_you_mean(unknown[0], registry.genes)
            raise ValueError(f"gene_list: no genes {some(unknown)} ({has}).{hint}")
        return cls(found, known[columns], columns)

    def of_genes(self, values: Tensor) -> Tensor:
        """Select the columns of these genes from values (..., G)."""
        return values if self.columns is None else values[..., torch.from_numpy(self.columns)]


def one_condition(registry: Registry, batch: str | None, covariates: Mapping[str, str | float] | None) -> Condition:
    """Return the only condition; raise ValueError if there are several."""
    found = conditions(registry, batch, covariates)
    if len(found) > 1:
        raise ValueError(
            f"batch={batch!r}, covariates={covariates!r} are {len(found):,} combinations; a sample has one batch "
            'and one value of each covariate. Name one of each, or "observed" for each cell\'s own.'
        )
    return found[0]


def _columns(registry: Registry) -> dict[str, tuple[str, int]]:
    """Return the field of `Cells` and the column in it for each covariate, by name."""
    return {
        name: (kind, column)
        for kind, names in (
            ("categorical", registry.setup.categorical_covariate_keys),
            ("continuous", registry.scaling),
        )
        for column, name in enumerate(names)
    }


def _named(registry: Registry, covariates: Mapping | None) -> Mapping:
    """Return the covariates, or an empty dict for None; raise an error if one is unknown."""
    if covariates is None:
        return {}
    if not isinstance(covariates, Mapping):
        raise TypeError(f'covariates={shown(covariates)} is not a mapping: write covariates={{"donor": "average"}}.')
    known = list(_columns(registry))
    for name in covariates:
        if name == registry.setup.batch_key:
            raise ValueError(f"covariates={{{name!r}: ...}}: that is the batch_key; use batch=.")
        if name not in known:
            raise ValueError(
                f"covariates={{{name!r}: ...}} is not a covariate of the model (it has: {', '.join(known) or 'none'}; "
                f"setup_anndata names them).{did_you_mean(str(name), known)}"
            )
    return covariates


def _standardised(what: str, scaling: tuple[float, float], asked: float | str | Sequence[float]) -> list[float | None]:
    """Return standardised values of a continuous covariate; [None], each cell's own, for "observed" and None."""
    asked = value_or_list(asked)
    if asked is None or (isinstance(asked, str) and asked == "observed"):
        return [None]
    if isinstance(asked, str) and asked == "average":
        return [0.0]
    takes = 'a number, a list of numbers, "observed" or "average"'
    values = [check_number(what, one, takes) for one in (asked if isinstance(asked, list) else [asked])]
    if not values:
        raise ValueError(f"{what} is an empty list; it takes {takes}.")
    mean, deviation = scaling
    standardised = [(one - mean) / deviation for one in values]
    for one, value in zip(values, standardised, strict=True):
        if not abs(value) <= LARGEST:
            raise ValueError(
                f"{what}={one:g} is more than {LARGEST:g} standard deviations from the mean, {mean:g}, "
                "which is too far."
            )
    return standardised
