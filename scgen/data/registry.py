"""Record which parts of an AnnData the models read: `setup_anndata`, and the `Registry` that a model keeps."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scgen.arguments import counted
from scgen.data import positions
from scgen.data.advice import advice
from scgen.data.categories import codes_of_column, names_of
from scgen.data.cells import Cells
from scgen.data.checks import (
    LARGEST,
    Finding,
    Setup,
    check_ours,
    check_types,
    check_writable,
    raise_errors,
    some,
)
from scgen.data.columns import columns_in_obsm, columns_of, names_in_obsm, numbers_of, standard
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
    spatial_key: str | None = None,
    section_key: str | None = None,
) -> None:
    """Check ``adata`` and record in ``adata.uns["scgen"]["setup"]`` which parts of it the models read.

    All stored values are checked. Nothing else in ``adata`` is changed.

    Parameters
    ----------
    adata
        Cells x genes. It may be backed by a file, or a view; AnnData then makes it a copy, with a warning.
    layer
        Layer with the counts; None uses ``adata.X``.
    batch_key
        Column of ``adata.obs`` with the experimental batch, whose effect is removed.
    labels_key
        Column of ``adata.obs`` with labels, such as cell types. Only ``dispersion="gene-label"`` uses them.
    size_factor_key
        Column of ``adata.obs`` with positive size factors, in any unit. They replace the library size.
    categorical_covariate_keys, continuous_covariate_keys
        Further columns of ``adata.obs`` whose effect is removed. The model standardises continuous ones.
    counts
        Whether the values must be counts. False allows other values, for ``gene_likelihood="normal"``.
    spatial_key
        Key of ``adata.obsm`` with the positions of cells in tissue, (n_obs, 2), in any unit. Spatial models need it.
    section_key
        Column of ``adata.obs`` with the tissue section. Cells of different sections are never neighbours. None stands
        for the column of the batches.

    Raises
    ------
    TypeError
        If an argument is of the wrong type, such as a string instead of a list.
    ValueError
        If the values are not finite non-negative integers (with ``counts=False``: not finite), a cell is empty, names
        are not unique, or a column is missing, has NaN or is not numeric but must be. If coordinates are missing or
        not finite, or two cells of a section are at the same place.

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
    # Arguments that are not set are not written: h5ad has no portable None and reads empty lists back as floats.
    record = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(setup).items()
        if value not in (None, ())
    }
    adata.uns["scgen"] = {**adata.uns.get("scgen", {}), "setup": record}


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
    spatial_key: str | None = None,
    section_key: str | None = None,
) -> pd.DataFrame:
    """Return a table of the errors and warnings of `setup_anndata`, with advice about genes and covariates.

    Parameters
    ----------
    adata, layer, batch_key, labels_key, size_factor_key, categorical_covariate_keys, continuous_covariate_keys, \
    counts, spatial_key, section_key
        As in `setup_anndata`.

    Returns
    -------
    One row per finding, with its level ("error", "warning" or "note"), where, finding, n (number of cases) and
    suggestion. The table is empty if there are no findings. Confounding is measured in two ways: by Cramer's V of each
    pair of categorical columns (0: independent, 1: one determines the other), and by the rank of the design matrix of
    batch and covariates, in which a continuous covariate is one column.

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
    """What a model knows about the data that it was made for, as values that JSON can hold.

    Attributes
    ----------
    setup
        The arguments of `setup_anndata`.
    genes
        Names of the G genes, in order. If ``setup.use_rep`` names a matrix in ``obsm``, names of its G columns.
    categories
        For each categorical column, its values as strings, in the order of their codes.
    scaling
        For each continuous column, its mean and standard deviation.
    gene_ids
        For each column of identifiers in ``adata.var``, the identifiers of the genes.
    missing
        For a query, the genes of its reference that were not measured in its cells. They are last on all axes of genes.
    known
        For a query, the number of values that its reference knows, for each categorical column with new values.
    """

    setup: Setup
    genes: list[str]
    categories: dict[str, list[str]]
    scaling: dict[str, tuple[float, float]]
    gene_ids: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, adata: AnnData, labels: bool = True, places: bool = False, use_rep: str | None = None) -> "Registry":
        """Read what `setup_anndata` recorded, with or without labels and positions, and check ``adata`` again.

        If ``use_rep`` is given, the values are those of ``adata.obsm[use_rep]``, and not the ones that were set up.
        """
        record = {}
        if isinstance(adata, AnnData):
            check_ours(adata)
            record = adata.uns.get("scgen", {}).get("setup")
        if record is None:
            raise ValueError(
                'this AnnData was not set up: adata.uns["scgen"]["setup"] is missing. Call '
                "scgen.setup_anndata(adata, layer=..., batch_key=...) first."
            )
        unread = ([] if labels else ["labels_key"]) + ([] if places else ["spatial_key", "section_key"])
        setup = _setup(adata, {**record, **dict.fromkeys(unread), "use_rep": use_rep})
        if use_rep is not None:
            setup = replace(setup, layer=None, counts=False)
        raise_errors(findings(adata, setup), "the model")
        categories = {
            key: names_of(adata.obs[key].astype("category").cat.remove_unused_categories().cat.categories)
            for key in setup.categorical.values()
        }
        scaling = {key: standard(adata.obs[key].to_numpy(float)) for key in setup.continuous_covariate_keys}
        if use_rep is not None:
            return cls(setup, names_in_obsm(adata, use_rep), categories, scaling)
        return cls(setup, [str(name) for name in adata.var_names], categories, scaling, identifiers(adata.var))

    @property
    def counted_features(self) -> str:
        """The number of genes that the model reads, or of columns of a matrix in ``obsm``, as text."""
        return counted(len(self.genes), "gene" if self.setup.use_rep is None else "column")

    @property
    def batches(self) -> list[str]:
        """Names of the batches; without a batch column, the one name "all"."""
        return self.categories.get(self.setup.batch_key, ["all"])

    @property
    def labels(self) -> list[str]:
        """Names of the labels."""
        return self.categories.get(self.setup.labels_key, ["all"])

    @property
    def n_categories(self) -> list[int]:
        """Number of values of the batch and of each further categorical covariate."""
        return [len(self.batches), *(len(self.categories[key]) for key in self.setup.categorical_covariate_keys)]

    def of_any_batch(self) -> "Registry":
        """Return a registry that reads the same, but for the batches. Columns of sections are still read."""
        setup = self.setup
        section_key = None if setup.spatial_key is None else setup.section_key or setup.batch_key
        categories = {key: names for key, names in self.categories.items() if key != setup.batch_key}
        return replace(self, setup=replace(setup, batch_key=None, section_key=section_key), categories=categories)

    def store(self, adata: AnnData, rows: np.ndarray | None = None) -> MemoryStore | BackedStore:
        """Return a store of the values of the model's genes, in its order; for some rows or all."""
        matrix = matrix_of(adata, self.setup)
        if matrix is None or (reason := unreadable(matrix, self.setup.where)):
            what, fix = (f"{self.setup.where} is no longer there", "Restore it.") if matrix is None else reason
            raise ValueError(f"{what}. {fix}")
        try:
            return open_store(matrix, self._gene_columns(adata, warn=True), rows)
        except DamagedMatrix as error:
            raise ValueError(f"{self.setup.where} is a damaged sparse matrix: {error}.") from None

    def check_new(self, adata: AnnData) -> None:
        """Raise an error if another AnnData lacks something that the model reads, or has it in a wrong form."""
        check_types(adata, self.setup)
        raise_errors(findings(adata, self.setup, self._gene_columns(adata)), "the model")

    def columns(self, adata: AnnData, sums: np.ndarray, rows: np.ndarray | slice = slice(None)) -> dict[str, Tensor]:
        """Return the fields of `Cells` except counts and index, for some cells or all; ``sums`` are their totals."""
        setup, n = self.setup, len(sums)
        obs = columns_of(adata.obs, [*setup.categorical.values(), *setup.numeric.values()], rows)
        if setup.size_factor_key is not None:
            size = numbers_of(obs, setup.size_factor_key)
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
        """Return a table of what the model reads in ``adata``, and where; see `Model.view_anndata_setup`."""
        check_types(adata, self.setup)
        self._gene_columns(adata)  # raises where genes are missing
        setup, n = self.setup, adata.n_obs
        obs = columns_of(adata.obs, [*setup.categorical.values(), *setup.numeric.values()], slice(None))
        lacking = f"; {len(self.missing):,} not measured" if self.missing else ""
        rows = [
            ("counts" if setup.counts else "values", setup.where, f"{counted(n, 'cell')} x {self.counted_features}"),
            ("cells", "adata.obs_names", f"{n:,}: {some(adata.obs_names)}"),
        ]
        if setup.use_rep is None:
            rows.append(("genes", "adata.var_names", f"{len(self.genes):,}: {some(self.genes)}{lacking}"))
        for role, key in setup.categorical.items():
            names, sizes = self.categories[key], np.bincount(self._codes(obs, key, n), minlength=1)
            told = [f"{name} ({size:,})" for name, size in zip(names, sizes, strict=False) if size]
            rows.append((role, f'adata.obs["{key}"]', f"{len(told):,}: {some(told, 12)}"))
        for role, key in setup.numeric.items():
            values = numbers_of(obs, key)
            told = f"{values.min():g} to {values.max():g}, mean {values.mean():g}" if n else "none"
            rows.append((role, f'adata.obs["{key}"]', told))
        if setup.spatial_key is not None:
            sections = positions.sections_of(adata, setup)
            n_sections = 1 if sections is None else len(np.unique(sections))
            rows.append(("spatial_key", f'adata.obsm["{setup.spatial_key}"]', counted(n_sections, "section")))
        return pd.DataFrame(rows, columns=["part", "where", "what"]).set_index("part")

    def known_rows(self, category_rows: Mapping[str, str | int]) -> dict[str, int]:
        """Return the parameters of a query that have rows for new categories, and the number of old rows of each.

        Parameters
        ----------
        category_rows
            The column that each parameter has rows for, as `VAE.category_rows` returns it.
        """
        setup = self.setup
        keys = {
            "batch": setup.batch_key,
            "labels": setup.labels_key,
            **dict(enumerate(setup.categorical_covariate_keys)),
        }
        return {name: self.known[keys[of]] for name, of in category_rows.items() if keys[of] in self.known}

    def obs_of(self, cells: Cells, library: np.ndarray | None) -> dict[str, pd.Categorical | np.ndarray]:
        """Return columns of ``adata.obs`` for these cells and their l, (n, 1): the inverse of `columns`."""
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
        """Return n cells without counts, with categories drawn evenly and continuous covariates at their mean."""

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
        """Return the codes of all batches, or None for each cell's own; ValueError if the groups are the batches."""
        if batch_correction and groupby is not None and groupby == self.setup.batch_key:
            raise ValueError(
                f"groupby={groupby!r} is the batch_key: after averaging over all batches, batches do not differ. Use "
                "batch_correction=False to compare them."
            )
        return list(range(len(self.batches))) if batch_correction else None

    def _gene_columns(self, adata: AnnData, warn: bool = False) -> np.ndarray | None:
        """Return the positions of the model's genes in ``adata``; None if it has the same genes in the same order.

        If the model reads a matrix of ``obsm``, these are the columns of this matrix.
        """
        if self.setup.use_rep is not None:
            return columns_in_obsm(adata, self.setup, self.genes)
        if adata.var_names.equals(pd.Index(self.genes)):
            return None
        columns, n_unversioned = places_of(self.genes, adata.var_names[~adata.var_names.duplicated()])
        missing = [gene for gene, column in zip(self.genes, columns, strict=True) if column < 0]
        of_genes = counted(len(self.genes), "gene")
        if missing:
            raise ValueError(
                f"adata.var_names lacks {len(missing):,} of the model's {of_genes} (first: {some(missing)}; it has: "
                f"{some(adata.var_names, 3)}). Pass the AnnData as it was before genes were selected or renamed."
            )
        if not adata.var_names.is_unique:
            raise ValueError("adata.var_names has duplicate names. Call adata.var_names_make_unique() first.")
        if n_unversioned and warn:
            warnings.warn(
                f"{n_unversioned:,} of the model's {of_genes} matched adata.var_names by identifiers without their "
                "versions.",
                stacklevel=2,
            )
        return columns

    def _standardised(self, obs: dict[str, pd.Series], key: str) -> np.ndarray:
        mean, sd = self.scaling[key]
        values = (numbers_of(obs, key) - mean) / sd
        if (far := np.abs(values) > LARGEST).any():
            raise ValueError(
                f'adata.obs["{key}"] has {counted(far.sum(), "value")} more than {LARGEST:g} standard deviations from '
                f"{mean:g}, the mean of the cells that the model was made for (first: {some(obs[key].index[far])}). "
                f"Correct {'it' if far.sum() == 1 else 'them'}."
            )
        return values

    def _codes(self, obs: dict[str, pd.Series], key: str | None, n: int) -> np.ndarray:
        if key is None:
            return np.zeros(n, np.int64)
        try:
            codes = codes_of_column(obs[key], self.categories[key])
        except TypeError:  # lists and other values without a hash
            raise ValueError(
                f'adata.obs["{key}"] holds values that cannot be categories, such as lists. It must hold names that '
                "the model knows."
            ) from None
        if (codes < 0).any():
            unknown = names_of(obs[key][codes < 0].unique())
            raise ValueError(
                f'adata.obs["{key}"] has values that the model has not seen in training: {", ".join(unknown[:5])} '
                f"({counted((codes < 0).sum(), 'cell')}; it knows: {', '.join(self.categories[key][:12])}). Leave out "
                "these cells, map them onto the model with model.query(adata), or train a model on all cells."
            )
        return codes


def _setup(adata: AnnData, arguments: dict) -> Setup:
    """Check the types of the arguments and return them as a `Setup`."""
    taken = {key: arguments[key] for key in Setup.__dataclass_fields__ if key in arguments}
    for key in ("categorical_covariate_keys", "continuous_covariate_keys"):
        value = taken.get(key)
        # h5ad reads lists back as arrays.
        listed = value.tolist() if hasattr(value, "tolist") else value
        is_list = isinstance(listed, Iterable) and not isinstance(listed, str)
        taken[key] = () if listed is None else tuple(listed) if is_list else listed
    setup = Setup(**taken)
    check_types(adata, setup)
    # JSON cannot hold NumPy booleans, and anndata 0.11 reads booleans from files as such.
    return replace(setup, counts=bool(setup.counts))
