"""What of an AnnData the models read: recorded by `setup_anndata`, and remembered by a model as a `Registry`."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scgen.arguments import shown
from scgen.data.advice import advice
from scgen.data.categories import codes_of_column, names_of
from scgen.data.cells import Cells
from scgen.data.checks import LARGEST, Finding, Setup, check_types, raise_errors, some
from scgen.data.counts import matrix_of
from scgen.data.findings import findings
from scgen.data.genes import identifiers, places_of
from scgen.data.stores import BackedStore, DamagedMatrix, MemoryStore, open_store, unreadable


def setup_anndata(
    adata: AnnData,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    counts: bool = True,
) -> None:
    """Check ``adata`` and record, in ``adata.uns["scgen"]["setup"]``, which parts of it the models read.

    Nothing else of ``adata`` is written or changed. All stored values are checked.

    Parameters
    ----------
    adata
        Cells x genes; may be a view (AnnData makes it actual, with a warning) or backed by a file.
    layer
        Layer of the counts; None reads ``adata.X``.
    batch_key
        Column of ``adata.obs``: the experimental batch, whose effect is removed.
    labels_key
        Column of ``adata.obs``: cell types or the like; read only by ``dispersion="gene-label"``.
    size_factor_key
        Column of ``adata.obs``, positive: replaces the library size, in any unit.
    categorical_covariate_keys, continuous_covariate_keys
        Further columns of ``adata.obs`` whose effect is removed. Continuous ones are standardised by the model.
    counts
        False admits values that are no counts (for ``gene_likelihood="normal"``).

    Raises
    ------
    TypeError
        If an argument is of the wrong type, as a string where a list belongs.
    ValueError
        If the values are not finite non-negative integers (only finite, with ``counts=False``), a cell is empty, a
        column is missing, has NaN or is no number where one is needed, or names are not unique.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_cells(n_cells=50, n_genes=20, seed=0)
    >>> scgen.setup_anndata(adata, batch_key="batch")
    >>> adata.uns["scgen"]["setup"]["batch_key"]
    'batch'
    """
    setup = _setup(adata, locals())
    found = findings(adata, setup)
    raise_errors(found, "setup_anndata")
    check_writable(adata)
    for finding in found:
        warnings.warn(str(finding), stacklevel=2)
    # h5ad has no portable None, and reads empty lists back as floats: what is not set is not written.
    record = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(setup).items()
        if value not in (None, ())
    }
    adata.uns["scgen"] = {**adata.uns.get("scgen", {}), "setup": record}


def check_writable(adata: AnnData) -> None:
    """Raise where ``adata.uns["scgen"]`` could not be written."""
    if adata.isbacked and adata.is_view:
        raise ValueError(
            "adata is a view of a backed AnnData, to which nothing can be written. Set up the whole object and pass "
            "indices=, or load the view: adata = adata.to_memory()."
        )
    check_ours(adata)


def check_ours(adata: AnnData) -> None:
    """Raise where ``adata.uns["scgen"]`` holds something else than what is written there."""
    ours = adata.uns.get("scgen", {})
    if not isinstance(ours, Mapping):
        raise ValueError(f'adata.uns["scgen"] holds {shown(ours)}, not ours: del adata.uns["scgen"] first.')
    if not isinstance(ours.get("setup", {}), Mapping | None):
        raise ValueError(
            f'adata.uns["scgen"]["setup"] holds {shown(ours["setup"])}, not what setup_anndata writes: call it again.'
        )


def check(
    adata: AnnData,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    counts: bool = True,
) -> pd.DataFrame:
    """Return what `setup_anndata` would refuse or warn of, and advice about the genes and covariates, as a table.

    Parameters
    ----------
    adata, layer, batch_key, labels_key, size_factor_key, categorical_covariate_keys, continuous_covariate_keys, counts
        As in `setup_anndata`.

    Returns
    -------
    A row per finding: level ("error", "warning" or "note"), where, finding, n (how many), suggestion. Empty if there is
    nothing to say. Confounding is told by Cramer's V of each pair of categorical columns (0: independent, 1: the one
    gives the other) and by the rank of the design of batch and covariates, of which continuous ones count as numbers.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_cells(n_cells=50, n_genes=20, seed=0)
    >>> adata.X[3] = 0
    >>> scgen.check(adata, batch_key="batch")[["level", "n"]].values.tolist()
    [['error', 1]]
    """
    setup = _setup(adata, locals())
    found = findings(adata, setup)
    found += advice(adata, setup, sound=all(finding.level != "error" for finding in found))
    columns = list(Finding.__dataclass_fields__)
    return pd.DataFrame([asdict(finding) for finding in found], columns=columns)


@dataclass(frozen=True)
class Registry:
    """What a model knows of the data that it was made for; plain enough for JSON.

    Attributes
    ----------
    setup
        The arguments of `setup_anndata`.
    genes
        Names of the G genes, in order.
    categories
        By column: the values, as strings, in the order of their codes.
    scaling
        By continuous column: mean and standard deviation.
    gene_ids
        By column of ``adata.var``: other names of the genes.
    missing
        Of a query: genes of its reference that its cells were not measured for. The decoder's last.
    known
        Of a query: by categorical column, the number of values that its reference knew.
    """

    setup: Setup
    genes: list[str]
    categories: dict[str, list[str]]
    scaling: dict[str, tuple[float, float]]
    gene_ids: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, adata: AnnData, labels: bool = True) -> "Registry":
        """Read what `setup_anndata` recorded, with or without the labels, and check ``adata`` again as it is now."""
        record = {}
        if isinstance(adata, AnnData):
            check_ours(adata)
            record = adata.uns.get("scgen", {}).get("setup")
        if record is None:
            raise ValueError(
                'adata.uns["scgen"]["setup"] is not there: this AnnData was not set up. Call '
                "scgen.setup_anndata(adata, layer=..., batch_key=...) first."
            )
        setup = _setup(adata, dict(record) if labels else {**record, "labels_key": None})
        raise_errors(findings(adata, setup), "the model")
        categories = {
            key: names_of(adata.obs[key].astype("category").cat.remove_unused_categories().cat.categories)
            for key in setup.categorical.values()
        }
        scaling = {key: standard(adata.obs[key].to_numpy(float)) for key in setup.continuous_covariate_keys}
        return cls(setup, [str(name) for name in adata.var_names], categories, scaling, identifiers(adata.var))

    @property
    def batches(self) -> list[str]:
        """Names of the batches; one, without a name of its own, where there is no batch column."""
        return self.categories.get(self.setup.batch_key, ["all"])

    @property
    def labels(self) -> list[str]:
        """Names of the labels."""
        return self.categories.get(self.setup.labels_key, ["all"])

    @property
    def n_categories(self) -> list[int]:
        """Number of values of the batch and of each further categorical covariate."""
        return [len(self.batches), *(len(self.categories[key]) for key in self.setup.categorical_covariate_keys)]

    def store(self, adata: AnnData, rows: np.ndarray | None = None) -> MemoryStore | BackedStore:
        """Return the values of the model's genes, found by name, in the model's order; to read some rows of, or all."""
        matrix = matrix_of(adata, self.setup.layer)
        if matrix is None or (reason := unreadable(matrix, self.setup.where)):
            what, fix = (f"{self.setup.where} is no longer there", "Put it back.") if matrix is None else reason
            raise ValueError(f"{what}. {fix}")
        try:
            return open_store(matrix, self._gene_columns(adata, warn=True), rows)
        except DamagedMatrix as error:
            raise ValueError(f"{self.setup.where} is a damaged sparse matrix: {error}.") from None

    def check_new(self, adata: AnnData) -> None:
        """Raise where another AnnData lacks what the model reads, or has it in a wrong form."""
        check_types(adata, self.setup)
        raise_errors(findings(adata, self.setup, self._gene_columns(adata)), "the model")

    def columns(self, adata: AnnData, sums: np.ndarray, rows: np.ndarray | slice = slice(None)) -> dict[str, Tensor]:
        """Return the fields of `Cells` but for counts and index, of some cells or all; ``sums`` are their values'."""
        setup, n = self.setup, len(sums)
        obs = _columns_of(adata.obs, [*setup.categorical.values(), *setup.numeric.values()], rows)
        if setup.size_factor_key is not None:
            size = _numbers(obs, setup.size_factor_key)
        else:
            size = sums if setup.counts else np.ones(n)
        codes = [self._codes(obs, key, n) for key in setup.categorical_covariate_keys]
        values = [self._standardised(obs, key) for key in self.scaling]
        return {
            "library": torch.from_numpy(np.log(size)[:, None].astype(np.float32)),
            "batch": torch.from_numpy(self._codes(obs, setup.batch_key, n)),
            "labels": torch.from_numpy(self._codes(obs, setup.labels_key, n)),
            "categorical": torch.from_numpy(np.stack(codes, 1) if codes else np.zeros((n, 0), np.int64)),
            "continuous": torch.from_numpy(
                np.stack(values, 1).astype(np.float32) if values else np.zeros((n, 0), np.float32)
            ),
        }

    def view(self, adata: AnnData) -> pd.DataFrame:
        """Return where in ``adata`` the model reads what, and what is there; see `Model.view_anndata_setup`."""
        check_types(adata, self.setup)
        self._gene_columns(adata)  # raises where genes are missing
        setup, n = self.setup, adata.n_obs
        obs = _columns_of(adata.obs, [*setup.categorical.values(), *setup.numeric.values()], slice(None))
        genes = f"{len(self.genes)}: {some(self.genes)}" + (f"; {len(self.missing)} not measured" * bool(self.missing))
        rows = [
            ("counts" if setup.counts else "values", setup.where, f"{n} cells x {len(self.genes)} genes"),
            ("cells", "adata.obs_names", f"{n}: {some(adata.obs_names)}"),
            ("genes", "adata.var_names", genes),
        ]
        for role, key in setup.categorical.items():
            names, sizes = self.categories[key], np.bincount(self._codes(obs, key, n), minlength=1)
            told = [f"{name} ({size})" for name, size in zip(names, sizes, strict=False) if size]
            rows.append((role, f'adata.obs["{key}"]', f"{len(told)}: {some(told, 12)}"))
        for role, key in setup.numeric.items():
            values = _numbers(obs, key)
            told = f"{values.min():g} to {values.max():g}, mean {values.mean():g}" if n else "none"
            rows.append((role, f'adata.obs["{key}"]', told))
        return pd.DataFrame(rows, columns=["part", "where", "what"]).set_index("part")

    def known_rows(self, category_rows: Mapping[str, str | int]) -> dict[str, int]:
        """Return, of a query, the parameters with rows for new categories, and how many rows of each are not new.

        Parameters
        ----------
        category_rows
            By parameter, the column that its rows are of: `VAE.category_rows`.
        """
        setup = self.setup
        keys = {
            "batch": setup.batch_key,
            "labels": setup.labels_key,
            **dict(enumerate(setup.categorical_covariate_keys)),
        }
        return {name: self.known[keys[of]] for name, of in category_rows.items() if keys[of] in self.known}

    def obs_of(self, cells: Cells, library: np.ndarray | None) -> dict[str, pd.Categorical | np.ndarray]:
        """Return the columns of ``adata.obs`` that `columns` would read these cells and their l, (n, 1), from."""
        setup = self.setup
        codes = {setup.batch_key: cells.batch, setup.labels_key: cells.labels}
        codes |= dict(zip(setup.categorical_covariate_keys, cells.categorical.T, strict=True))
        found = {
            key: pd.Categorical.from_codes(of.numpy(), self.categories[key])
            for key, of in codes.items()
            if key is not None
        }
        values = cells.continuous.double().numpy().T
        found |= {key: mean + sd * of for (key, (mean, sd)), of in zip(self.scaling.items(), values, strict=True)}
        return found if setup.size_factor_key is None else found | {setup.size_factor_key: library[:, 0]}

    def blank_cells(self, n: int, rng: np.random.Generator) -> Cells:
        """Return n cells without counts: of batches, labels and other categories drawn evenly, at mean numbers."""

        def codes(n_values: int) -> Tensor:
            return torch.from_numpy(rng.integers(n_values, size=n))

        others = [codes(n_values) for n_values in self.n_categories[1:]]
        return Cells(
            counts=torch.zeros(n, 0, dtype=torch.float32),
            library=torch.zeros(n, 1, dtype=torch.float32),
            batch=codes(len(self.batches)),
            labels=codes(len(self.labels)),
            categorical=torch.stack(others, 1) if others else torch.zeros(n, 0, dtype=torch.int64),
            continuous=torch.zeros(n, len(self.scaling), dtype=torch.float32),
            index=torch.arange(n),
        )

    def batches_to_average(self, groupby: str | None, batch_correction: bool) -> list[int] | None:
        """Return the codes of all batches, or None for each cell's own; ValueError where that hides what is asked."""
        if batch_correction and groupby is not None and groupby == self.setup.batch_key:
            raise ValueError(
                f"groupby={groupby!r} is the batch_key: averaged over all batches, batches do not differ. Use "
                "batch_correction=False to compare them."
            )
        return list(range(len(self.batches))) if batch_correction else None

    def _gene_columns(self, adata: AnnData, warn: bool = False) -> np.ndarray | None:
        """Return where the model's genes are in ``adata``, None if they are its genes as they stand."""
        if adata.var_names.equals(pd.Index(self.genes)):
            return None
        columns, n_unversioned = places_of(self.genes, adata.var_names[~adata.var_names.duplicated()])
        missing = [gene for gene, column in zip(self.genes, columns, strict=True) if column < 0]
        if missing:
            raise ValueError(
                f"{len(missing)} of the model's {len(self.genes)} genes are not in adata.var_names (first: "
                f"{', '.join(missing[:5])}; adata has {', '.join(adata.var_names[:3])}, ...). Pass the AnnData before "
                "its genes were selected or renamed."
            )
        if not adata.var_names.is_unique:
            raise ValueError("adata.var_names has names more than once. Call adata.var_names_make_unique() first.")
        if n_unversioned and warn:
            warnings.warn(
                f"{n_unversioned} of the model's {len(self.genes)} genes were found in adata.var_names by their "
                "identifiers without versions.",
                stacklevel=2,
            )
        return columns

    def _standardised(self, obs: dict[str, pd.Series], key: str) -> np.ndarray:
        mean, sd = self.scaling[key]
        values = (_numbers(obs, key) - mean) / sd
        if (far := np.abs(values) > LARGEST).any():
            raise ValueError(
                f'adata.obs["{key}"] has {far.sum()} values more than {LARGEST:g} standard deviations from the mean of '
                f"the cells that the model was made for, {mean:g} (first: {some(obs[key].index[far])}). Correct them."
            )
        return values

    def _codes(self, obs: dict[str, pd.Series], key: str | None, n: int) -> np.ndarray:
        if key is None:
            return np.zeros(n, np.int64)
        try:
            codes = codes_of_column(obs[key], self.categories[key])
        except TypeError:  # lists, and others that have no hash
            raise ValueError(
                f'adata.obs["{key}"] holds values that cannot be categories, such as lists. Make it a column of names '
                "that the model knows."
            ) from None
        if (codes < 0).any():
            unknown = names_of(obs[key][codes < 0].unique())
            raise ValueError(
                f'adata.obs["{key}"] has values that the model has not seen in training: {", ".join(unknown[:5])} '
                f"({(codes < 0).sum()} cells; it knows: {', '.join(self.categories[key][:12])}). Leave these cells "
                "out, or train a model on all of them."
            )
        return codes


def _columns_of(obs: pd.DataFrame, keys: Iterable[str], rows: np.ndarray | slice) -> dict[str, pd.Series]:
    """Return columns of some cells; ValueError where there is not one of each name."""
    for key in keys:
        if (n := list(obs.columns).count(key)) != 1:
            raise ValueError(f'adata.obs has {n} columns named "{key}", which the model reads; it needs one.')
    return {key: obs[key].iloc[rows] for key in keys}


def _numbers(obs: dict[str, pd.Series], key: str) -> np.ndarray:
    try:
        return obs[key].to_numpy(float)
    except (TypeError, ValueError):
        raise ValueError(
            f'adata.obs["{key}"] is of type {obs[key].dtype} and holds values that are missing or no numbers; the '
            "model reads numbers there."
        ) from None


def standard(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and the deviation that a continuous covariate is standardised by."""
    mean, sd = float(values.mean()), float(values.std())
    # A constant's deviation is rounding noise: dividing by it would blow up whatever differs later.
    return mean, sd if sd > 1e-8 * abs(mean) else 1.0


def _setup(adata: AnnData, arguments: dict) -> Setup:
    """Return the arguments as a `Setup`, their types checked."""
    taken = {key: arguments[key] for key in Setup.__dataclass_fields__ if key in arguments}
    for key in ("categorical_covariate_keys", "continuous_covariate_keys"):
        value = taken.get(key)
        # Lists come back from h5ad as arrays.
        listed = value.tolist() if hasattr(value, "tolist") else value
        is_list = isinstance(listed, Iterable) and not isinstance(listed, str)
        taken[key] = () if listed is None else tuple(listed) if is_list else listed
    setup = Setup(**taken)
    check_types(adata, setup)
    # A NumPy boolean, which anndata 0.11 makes of those in files, is nothing that JSON holds.
    return replace(setup, counts=bool(setup.counts))
