"""New cells mapped onto a trained model: its weights for their genes and batches, and what it says of them."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scgen.analysis import query as analysis
from scgen.arguments import check_memory, check_path, check_seed, check_share, check_whole, did_you_mean, shown
from scgen.data.categories import codes_of_column, codes_of_values, names_of
from scgen.data.checks import Setup, check_types, some
from scgen.data.genes import identifiers, matched
from scgen.data.loader import CellLoader
from scgen.data.registry import Registry
from scgen.data.snapshot import Snapshot
from scgen.models import files, loaders, summary
from scgen.models.counterparts import Answering
from scgen.storage import ModelFileError

#: The batch of a reference that has none: no value of a column is named so.
REFERENCE = "<reference>"


@dataclass(frozen=True, repr=False)
class Query(metaclass=Answering):
    """New cells, mapped onto a reference.

    Attributes
    ----------
    model
        A model of the new cells, which answers everything that a trained model does: the reference's weights, with
        batches that it has not seen at the mean of those it has.
    reference
        The model that was asked; nothing of it is changed.
    overlap
        Share of the reference's genes that the new cells have.
    matched_by
        Which names of the genes were matched.
    n_trainings
        How often the reference had been trained.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_cells(n_cells=300, n_genes=30, n_batches=3, seed=0)
    >>> new = adata.obs["batch"] == "batch_3"
    >>> reference = adata[~new].copy()
    >>> scgen.setup_anndata(reference, batch_key="batch")
    >>> model = scgen.SCVI(reference)
    >>> model.train(max_epochs=3, progress=False)
    >>> query = model.query(adata[new, :25].copy())
    >>> query
    Query of 115 cells; genes: 25 of 30 (83%), by their names in adata.var_names; new in batch: batch_3
    >>> query.transfer_labels("cell_type").columns.tolist()
    ['label', 'share']
    """

    model: "Model"  # noqa: F821
    reference: "Model"  # noqa: F821
    overlap: float
    matched_by: str
    n_trainings: int

    _summary = summary.of_query
    __repr__, __str__, _repr_html_ = summary.line, summary.text, summary.table

    def get_latent_representation(self) -> np.ndarray:
        """Return z of each new cell, (n, n_latent), in the space of the reference's."""
        return self.model.get_latent_representation()

    def train(
        self,
        max_epochs: int | None = None,
        *,
        learning_rate: float = 2e-2,
        accelerator: str = "auto",
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Fit what belongs to the new batches alone, as `Model.train` does; the reference's cells stay where they are.

        Trained are the rows that encoders and decoder add for the values of batch and covariates that the reference
        has not seen, and the theta of these (Lotfollahi et al. 2022, scArches). It makes the new cells likelier, and
        their expression and its differences; labels hardly need it. Parameters and errors are those of `Model.train`,
        and a ValueError if there are no such values.
        """
        if not self.model.registry.known_rows(self.model.vae.category_rows()):
            raise ValueError("there is nothing to train: the reference knows all batches of the new cells.")
        self.model.train(
            max_epochs,
            learning_rate=learning_rate,
            kl_start=1.0,
            accelerator=accelerator,
            seed=seed,
            progress=progress,
        )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the query, without any cells, into ``folder``; `Model.load_query` of its reference loads it.

        The files are those of `Model.save`, of the model of the query. The reference has to be saved by itself.

        Raises
        ------
        FileExistsError
            If a model is there and ``overwrite`` is false.
        ValueError
            If the reference was trained again since.
        """
        self._check_reference()
        with self.reference.vae.occupied():
            told = {"matched_by": self.matched_by, "reference": files.digest(self.reference)}
        with self.model.vae.occupied():
            files.save(self.model, folder, overwrite, told)

    def transfer_labels(self, labels_key: str, *, n_neighbors: int = 15, unknown_below: float = 0.5) -> pd.DataFrame:
        """Return a label for each new cell: what its nearest reference cells vote for.

        Parameters
        ----------
        labels_key
            Column of the reference's ``adata.obs``; cells without a label (NaN) do not vote.
        n_neighbors
            Number of voters, each weighed by a Gaussian of its distance, as wide as the cell's mean distance to them.
        unknown_below
            Share of the votes below which the label is "unknown". Cells of a type that the reference has not seen may
            have neighbours that agree: `typicality` is the one to ask about them.

        Returns
        -------
        By cell: "label", and "share", its part of the votes.

        Raises
        ------
        ValueError
            If the column is not there, holds no label or numbers, an argument is out of its range, or the reference was
            loaded without its cells or trained again since.
        """
        n_neighbors = check_whole("n_neighbors", n_neighbors, 1)
        check_share("unknown_below", unknown_below)
        n_cells = self._reference_adata().n_obs
        _, obs = loaders.annotated(self.reference, None)
        names = [str(name) for name in obs.columns]
        if not isinstance(labels_key, str) or labels_key not in obs:
            kind = ValueError if isinstance(labels_key, str) else TypeError
            raise kind(
                f"labels_key={shown(labels_key)} is no column of the reference's adata.obs (it has: {some(names, 12)})."
                + (did_you_mean(labels_key, names) if kind is ValueError else "")
            )
        if (n := list(obs.columns).count(labels_key)) > 1:
            raise ValueError(f'the reference\'s adata.obs has {n} columns named "{labels_key}": it takes one.')
        n_voters = min(n_neighbors, n_cells)
        fewer = "Ask for fewer, such as n_neighbors=15."
        check_memory("n_neighbors", n_neighbors, 24 * n_voters * self.model.adata.n_obs, fewer)
        labels = obs[labels_key]
        if not labels.notna().any() or pd.api.types.is_float_dtype(labels):
            raise ValueError(f'the reference\'s adata.obs["{labels_key}"] holds no labels (dtype {labels.dtype}).')
        table = analysis.transfer(
            self.reference.get_latent_representation(),
            labels,
            self.get_latent_representation(),
            n_neighbors,
            unknown_below,
        )
        return table.set_index(self.model.adata.obs_names)

    def typicality(self, *, seed: int = 0) -> pd.DataFrame:
        """Return how typical each new cell is of the reference; of a type it has not seen, hardly.

        A cell of a batch that the reference knows is compared with the reference's validation cells (all its cells,
        if there are none). The comparison is of what the model leaves unexplained: the cell's Pearson residuals along
        the ten directions that those of the new cells have most in common (found in one half of them, for the other),
        its ELBO, and how near the reference's cells are in z, the last two given its library. One cell's noise hides
        what a hundred of a kind have in common: the more new cells are given, the finer the answer; of a dozen,
        hardly anything is seen. A type that the model cannot tell from a known one is typical.

        A new batch differs from the reference in all of its cells. Its cells are therefore compared with each other:
        the four fifths whose residuals lie closest together say what is usual in the batch, and the distances are
        scaled so that their median is that of the reference's cells. A cell is as odd as the odder of two things: this
        distance, and how far it lies from the reference's cells in z, beside others of its batch. All this assumes
        that most cells of the batch are of types that the reference knows. A type that makes up much of a new batch (a
        third, say) is taken for what is usual there, and may not be found; nor are types that differ by less than
        the batches do. A change of all cells alike, such as a treatment's effect, is not seen. A batch with fewer than
        50 cells cannot be compared with itself: its typicality is NaN (not calibrated), with a warning, and only the
        ranks of its distances mean something.

        A new value of a categorical covariate counts as a new batch. Where the model has no batches, all cells are
        compared with the reference: name the column of the new cells' batches in
        ``model.query(adata, batch_key=...)``.

        Parameters
        ----------
        seed
            Of the halves.

        Returns
        -------
        By cell: "typicality", the share of the reference's cells that lie at least as far out, even from 0 to 1 for
        cells like them and small for others; "distance", the Mahalanobis distance (in a new batch, of its residuals
        alone); "elbo" and "density", by how many deviations they are above those of compared cells with a like library
        (negative density: further from the reference's cells); "new_batch", whether the cell is of a new batch, and so
        compared with its own batch, or, where typicality is NaN, with nothing.

        Raises
        ------
        ValueError
            If the reference was loaded without its cells, or has fewer than 50.
        """
        seed = check_seed(seed)
        adata = self._reference_adata()
        if adata.n_obs < 50:
            raise ValueError(f"the reference has {adata.n_obs} cells: too few to say what is typical of it.")
        held_out, training = self.reference.validation_indices, self.reference.train_indices
        if held_out is None or len(held_out) < 50:
            held_out = training = np.arange(adata.n_obs)
        table = analysis.typicality(
            self.model.vae,
            self._reference_cells(held_out),
            self.reference.get_latent_representation(indices=training),
            loaders.of_question(self.model, None, None, 1024),
            self._new_batch(),
            seed,
        )
        missing = int(table["typicality"].isna().sum())
        if missing:
            warnings.warn(
                f"the typicality of {missing} of {len(table)} cells is not calibrated (NaN): they are of new batches "
                f"with fewer than {analysis.MIN_BATCH} cells, too few to tell the batch's effect from a cell's own. "
                'Compare the ranks of their "distance" or "density" with each other.',
                stacklevel=3,  # from contextlib, which is between the user's call and this one
            )
        return table.set_index(self.model.adata.obs_names)

    def _reference_adata(self) -> AnnData:
        """Return the reference's cells; ValueError if there are none, or it is no longer what the query was made of."""
        self._check_reference()
        return loaders.cells_of(self.reference)

    def _check_reference(self) -> None:
        if len(self.reference.trainings) != self.n_trainings:
            raise ValueError("the reference was trained again since: map the cells anew, reference.query(adata).")

    def _new_batch(self) -> np.ndarray:
        """Return a number for each new cell's batch and covariates that the reference has not seen, -1 for none."""
        registry, cells = self.model.registry, self.model.adata.obs
        seen = np.zeros(self.model.adata.n_obs, int)
        for key in (registry.setup.batch_key, *registry.setup.categorical_covariate_keys):
            if key in registry.known:
                values = codes_of_column(cells[key], registry.categories[key])
                unseen = np.maximum(values - registry.known[key] + 1, 0)
                seen = seen * (len(registry.categories[key]) + 1) + unseen
        return seen - 1

    def _reference_cells(self, rows: np.ndarray) -> CellLoader:
        """Return cells of the reference as the query sees cells: of the genes that were measured for both."""
        missing = set(self.model.registry.missing)
        genes = [gene for gene in self.reference.registry.genes if gene not in missing]  # in the query's order
        store, snapshot = Snapshot.of(replace(self.reference.registry, genes=genes), self.reference.adata)
        impute = self.model.vae.impute if missing else None
        as_sparse = self.model.vae.reads_sparse(self.model.vae.device)
        return CellLoader(store, snapshot.columns, rows, 1024, as_sparse=as_sparse, impute=impute)


def mapped(reference, adata: AnnData, layer: str | None, batch_key: str | None, min_overlap: float) -> Query:
    """Return new cells mapped onto a trained model; see `Model.query`."""
    if reference.registry.known or reference.registry.missing:
        raise ValueError("this is the model of a query: map new cells onto its reference instead.")
    reference.require_training()
    check_share("min_overlap", min_overlap)
    setup = reference.registry.setup
    asked = {"layer": layer, "batch_key": batch_key}
    setup = replace(setup, **{name: value for name, value in asked.items() if value is not None})
    check_types(adata, setup)
    if setup.batch_key is not None and list(adata.obs.columns).count(setup.batch_key) != 1:
        names = [str(name) for name in adata.obs.columns]
        raise ValueError(
            f'batch_key="{setup.batch_key}" is no one column of adata.obs (it has: {some(names, 12)}). Name the column '
            "of the new cells' batches: model.query(adata, batch_key=...)."
            + ("" if setup.batch_key in names else did_you_mean(setup.batch_key, names))
        )
    if not adata.var_names.is_unique:
        raise ValueError("adata.var_names has names more than once. Call adata.var_names_make_unique() first.")
    genes, by = matched(reference.registry.genes, reference.registry.gene_ids, adata)
    overlap = sum(gene is not None for gene in genes) / len(genes)
    if not overlap or overlap < min_overlap:
        raise ValueError(
            f"of the model's {len(genes)} genes, adata has {overlap:.0%} (matched: {by}), which is below "
            f"min_overlap={min_overlap}. The model's are named {', '.join(reference.registry.genes[:3])}, adata's "
            f"{', '.join(map(str, adata.var_names[:3]))}. Rename them, or put such names into a column of adata.var."
        )
    if overlap < 1 and not reference.vae.has_library:
        raise ValueError(
            f"{sum(gene is None for gene in genes)} of the model's genes are not in adata; with "
            'gene_likelihood="normal" all are needed.'
        )
    registry = _extended(reference.registry, setup, genes, adata)
    registry.check_new(adata)
    with torch.device("meta"):
        wanted = type(reference).build(registry, reference.arguments)
    order = torch.from_numpy(np.argsort([gene is None for gene in genes], kind="stable"))
    weights = _weights(reference.vae.state_dict(), wanted.state_dict(), wanted.gene_axes(), order)
    model = files.assembled(type(reference), registry, reference.arguments, weights)
    model.trainings = list(reference.trainings)
    files.give_cells(model, adata)
    _fit_new_libraries(model, adata)
    return Query(model, reference, overlap, by, len(reference.trainings))


def load(reference, folder: str | Path, adata: AnnData) -> Query:
    """Return a query that was saved; see `Model.load_query`."""
    reference.require_training()
    folder = check_path("folder", folder)
    check_types(adata, Setup())
    model, told = files.load(type(reference), folder, None)
    if not isinstance(told, dict) or not {"matched_by", "reference"} <= told.keys():
        raise ModelFileError(f"{folder} holds a model, and no query that query.save(folder) wrote: use SCVI.load.")
    with reference.vae.occupied():
        if told["reference"] != files.digest(reference):
            raise ValueError(
                f"{folder} holds a query of another reference, or of this one before it was trained again. Load it "
                "with the model that it was made of, or map the cells anew: model.query(adata)."
            )
    files.give_cells(model, adata)
    n_genes, n_missing = len(model.registry.genes), len(model.registry.missing)
    overlap = n_genes / (n_genes + n_missing)
    return Query(model, reference, overlap, told["matched_by"], len(reference.trainings))


def _extended(registry: Registry, setup: Setup, genes: list[str | None], adata: AnnData) -> Registry:
    """Return the reference's registry with the genes by the new cells' names, and with their new categories."""
    categories = {key: list(values) for key, values in registry.categories.items()}
    if setup.batch_key != registry.setup.batch_key:
        categories[setup.batch_key] = categories.pop(registry.setup.batch_key, [REFERENCE])
    known = {}
    for key in categories:
        if key not in adata.obs:
            continue  # what is missing is said by the checks
        values = adata.obs[key].dropna().unique()
        new = codes_of_values(values, categories[key]) < 0
        found = sorted(set(names_of(value for value, is_new in zip(values, new, strict=True) if is_new)))
        if found:
            known[key] = len(categories[key])
            categories[key] = categories[key] + found
    present = [gene for gene in genes if gene is not None]
    missing = [name for name, gene in zip(registry.genes, genes, strict=True) if gene is None]
    return Registry(setup, present, categories, registry.scaling, identifiers(adata.var.loc[present]), missing, known)


def _weights(
    theirs: dict[str, Tensor], wanted: dict[str, Tensor], gene_axes: dict[str, int], order: Tensor
) -> dict[str, Tensor]:
    """Return the reference's weights in the new order of genes, with a further row for each new category."""
    found = {}
    for name, shape in ((name, weight.shape) for name, weight in wanted.items()):
        if name not in theirs:  # with the first batch that differs from the only one, which had no row
            found[name] = torch.zeros(shape, dtype=wanted[name].dtype)
            continue
        weight, axis = theirs[name].cpu(), gene_axes.get(name)
        if len(shape) and shape[0] > len(weight):
            weight = torch.cat([weight, weight.mean(0, keepdim=True).expand(shape[0] - len(weight), *shape[1:])])
        found[name] = weight.clone() if axis is None else weight.index_select(axis, order)
    return found


def _fit_new_libraries(model, adata: AnnData) -> None:
    """Fit the library's prior of new batches to their cells; of all batches where l is the sum over fewer genes."""
    n_known = model.registry.known.get(model.registry.setup.batch_key)
    if not model.vae.has_library or (n_known is None and not model.registry.missing):
        return
    prior = model.vae.priors["library"]
    columns = Snapshot.of(model.registry, adata)[1].columns
    kept = slice(0, 0 if model.registry.missing else n_known)
    mean, variance = prior.mean[kept].clone(), prior.variance[kept].clone()
    prior.fit(columns["library"], columns["batch"])
    prior.mean[kept], prior.variance[kept] = mean, variance
