"""As if the cells had been others: their batch and covariates as observed, fixed, or averaged over."""

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

#: Combinations of values, at most: each is decoded for every cell and every draw.
MOST_COMBINATIONS = 1000


@dataclass(frozen=True)
class Condition:
    """What replaces the cells' own batch and covariates; whatever is not named stays as observed.

    Attributes
    ----------
    batch
        A code, or None.
    categorical, continuous
        By column of these fields of `Cells`: codes, and standardised values.
    """

    batch: int | None = None
    categorical: dict[int, int] = field(default_factory=dict)
    continuous: dict[int, float] = field(default_factory=dict)


def as_if(cells: Cells, condition: Condition) -> Cells:
    """Return the cells as if they had come under this condition."""
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
    """Return all combinations of what is asked of batch and covariates; an answer is the mean over them.

    Parameters
    ----------
    registry
        What the model knows.
    batch, covariates
        As in `ExpressionModel.get_normalized_expression`.
    argument
        The name that the batch was given by.

    Raises
    ------
    TypeError
        If ``covariates`` is no mapping.
    ValueError
        If a column or value is not known, or more than 1000 values of several of them are combined.
    """
    columns = _columns(registry)
    # None is the batch's: a covariate may be named "batch".
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
        raise ValueError(f"{product} are {n} combinations; {MOST_COMBINATIONS} are the most. Fix some of them.")
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
    """Under which conditions, over which there is a mean, and of which genes an answer is wanted.

    Attributes
    ----------
    conditions
        One or more.
    genes, columns
        Names, and their columns among the model's genes; no columns where all are wanted.
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
        """Look up what `conditions` does, and the genes: TypeError for no list, ValueError for none or unknown ones."""
        argument = "batch" if transform_batch is None else "transform_batch"
        if transform_batch is not None:
            if not (isinstance(batch, str) and batch == "observed"):
                raise ValueError("batch and transform_batch are the same thing; give one of them.")
            batch = transform_batch
        found, known = conditions(registry, batch, covariates, argument), pd.Index(registry.genes)
        if gene_list is None:
            return cls(found, known, None)
        genes = check_names("gene_list", gene_list)
        has = f"the model has {', '.join(known[:5])}, ..."
        if not genes:
            raise ValueError(f"gene_list is an empty list; {has}; None stands for all.")
        columns = known.get_indexer(pd.Index(genes))
        unknown = list(dict.fromkeys(str(gene) for gene, column in zip(genes, columns, strict=True) if column < 0))
        if unknown:
            hint = did_you_mean(unknown[0], registry.genes)
            raise ValueError(f"gene_list: no genes {some(unknown)} ({has}).{hint}")
        return cls(found, known[columns], columns)

    def of_genes(self, values: Tensor) -> Tensor:
        """Return the columns of (..., G) values that are wanted."""
        return values if self.columns is None else values[..., torch.from_numpy(self.columns)]


def one_condition(registry: Registry, batch: str | None, covariates: Mapping[str, str | float] | None) -> Condition:
    """Return the condition that is asked for; ValueError where there are several, as `conditions` may average over."""
    found = conditions(registry, batch, covariates)
    if len(found) > 1:
        raise ValueError(
            f"batch={batch!r}, covariates={covariates!r} are {len(found)} combinations; a sample comes from one batch "
            'and one value of each covariate. Name one of each, or "observed" for each cell\'s own.'
        )
    return found[0]


def _columns(registry: Registry) -> dict[str, tuple[str, int]]:
    """Return, by name of a covariate, the field of `Cells` and the column in it."""
    return {
        name: (kind, column)
        for kind, names in (
            ("categorical", registry.setup.categorical_covariate_keys),
            ("continuous", registry.scaling),
        )
        for column, name in enumerate(names)
    }


def _named(registry: Registry, covariates: Mapping | None) -> Mapping:
    """Return what is asked of covariates, none where it is None; raise where one is not known."""
    if covariates is None:
        return {}
    if not isinstance(covariates, Mapping):
        raise TypeError(f'covariates={shown(covariates)} maps no names to values: covariates={{"donor": "average"}}.')
    known = list(_columns(registry))
    for name in covariates:
        if name == registry.setup.batch_key:
            raise ValueError(f"covariates={{{name!r}: ...}}: that is the batch_key; use batch=.")
        if name not in known:
            raise ValueError(
                f"covariates={{{name!r}: ...}} names no covariate of the model (it has: {', '.join(known) or 'none'}; "
                f"they are named in setup_anndata).{did_you_mean(str(name), known)}"
            )
    return covariates


def _standardised(what: str, scaling: tuple[float, float], asked: float | str | Sequence[float]) -> list[float | None]:
    """Return the standardised values of a continuous covariate; None, for each cell's own, of "observed" and None."""
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
                f"{what}={one:g} is more than {LARGEST:g} standard deviations from the mean, {mean:g}: too far "
                "to compute with."
            )
    return standardised
