"""Map new cells onto a trained model: adapt its weights to their genes and batches, and describe the cells."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scgen.analysis import query as analysis
from scgen.arguments import check_memory, check_path, check_seed, check_share, check_whole, counted, shown
from scgen.data.categories import codes_of_column, codes_of_values, names_of
from scgen.data.checks import Setup, check_types, did_you_mean_column, some
from scgen.data.genes import identifiers, matched
from scgen.data.loader import CellLoader
from scgen.data.registry import Registry
from scgen.data.snapshot import Snapshot
from scgen.models import files, loaders, summary
from scgen.models.interop.counterparts import Answering
from scgen.storage import ModelFileError

#: Stands for the batch of a reference without batches. No value of a column has this name.
REFERENCE = "<reference>"


@dataclass(frozen=True, repr=False)
class Query(metaclass=Answering):
    """New cells mapped onto a reference.

    Attributes
    ----------
    model
        A model of the new cells, with all methods of a trained model. It has the reference's weights; new batches have
        the mean of the known batches' effects.
    reference
        The model that the cells were mapped onto. It is not changed.
    overlap
        Share of the reference's genes that the new cells have.
    matched_by
        Which gene names or identifiers were used to match the genes.
    n_trainings
        How many times the reference had been trained.

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
        """Return z of each new cell, (n, n_latent), in the same latent space as the reference's cells."""
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
        """Fit the effects of the new batches. All other weights, and so the reference's embedding, stay as they are.

        The trained weights are the rows that encoders and decoder add for batches and covariate values that the
        reference has not seen, and the theta of these (Lotfollahi et al. 2022, scArches). Training improves the
        likelihood, the denoised expression and the differential expression of the new cells. It hardly changes the
        transferred labels. Parameters and errors are those of `Model.train`. A ValueError is raised if there are no new
        values.
        """
        if not self.model.registry.known_rows(self.model.vae.category_rows()):
            raise ValueError("there is nothing to train, because the reference knows all batches of the new cells.")
        self.model.train(
            max_epochs,
            learning_rate=learning_rate,
            kl_start=1.0,
            accelerator=accelerator,
            seed=seed,
            progress=progress,
        )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the query, without cells, into ``folder``; `Model.load_query` of its reference loads it.

        The files are those that `Model.save` writes for the query's model. Save the reference separately.

        Raises
        ------
        FileExistsError
            If the folder holds a model and ``overwrite`` is false.
        ValueError
            If the reference was trained again since the query was made.
        """
        self._check_reference()
        with self.reference.vae.occupied():
            told = {"matched_by": self.matched_by, "reference": files.digest(self.reference)}
        with self.model.vae.occupied():
            files.save(self.model, folder, overwrite, told)

    def transfer_labels(self, labels_key: str, *, n_neighbors: int = 15, unknown_below: float = 0.5) -> pd.DataFrame:
        """Return a label for each new cell, by a vote of its nearest reference cells.

        Parameters
        ----------
        labels_key
            Column of the reference's ``adata.obs``; cells without a label (NaN) do not vote.
        n_neighbors
            Number of reference cells that vote. Each vote is weighted by a Gaussian of the distance, whose width is the
            new cell's mean distance to these neighbours.
        unknown_below
            A cell whose winning label has a smaller share of the votes than this is labelled "unknown". A cell of a
            type that the reference lacks may still have neighbours that agree; use `typicality` to find such cells.

        Returns
        -------
        A table with one row per cell: "label", and "share", the label's share of the votes.

        Raises
        ------
        ValueError
            If the column does not exist, has no labels or holds numbers, if an argument is out of its range, or if the
            reference was loaded without its cells or trained again since the query was made.
        """
        n_neighbors = check_whole("n_neighbors", n_neighbors, 1)
        check_share("unknown_below", unknown_below)
        n_cells = self._reference_adata().n_obs
        _, obs = loaders.annotated(self.reference, None)
        names = [str(name) for name in obs.columns]
        if not isinstance(labels_key, str) or labels_key not in obs:
            kind = ValueError if isinstance(labels_key, str) else TypeError
            raise kind(
                f"labels_key={shown(labels_key)} is not a column of the reference's adata.obs (it has: "
                f"{some(names, 12)})." + (did_you_mean_column(obs.columns, labels_key) if kind is ValueError else "")
            )
        if (n := list(obs.columns).count(labels_key)) > 1:
            raise ValueError(f'the reference\'s adata.obs has {n} columns named "{labels_key}"; it must have one.')
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
        """Return how typical of the reference each new cell is. Cells of a type that it lacks have small values.

        A cell of a known batch is compared with the reference's validation cells (or all its cells, if it has no
        validation cells). Three things are compared. The first are the cell's Pearson residuals along the ten
        directions that the residuals of the new cells share most; the directions for one half of the new cells are
        found in the other half. The others are the cell's ELBO and the density of the reference's cells around it in z,
        both given its library size. A new cell type shows in what many cells have in common, so more new cells give a
        finer result; a dozen cells show hardly anything. A type that the model cannot tell from a known type is
        typical.

        All cells of a new batch differ from the reference. They are therefore compared with each other. The four fifths
        of the cells whose residuals lie closest together define what is usual in the batch. The distances are scaled to
        have the same median as those of the reference's cells. A cell also has a distance from the reference's cells in
        z, relative to its batch; the more extreme of the two distances counts. This assumes that the reference knows
        the types of most cells of the batch. A type that makes up much of a new batch (a third, say) counts as usual
        there and may not be found. Types that differ by less than the batches do are not found either. A change of all
        cells, such as the effect of a treatment, is not seen. A batch with fewer than 50 cells cannot be compared with
        itself: its typicality is NaN (not calibrated), with a warning, and only the ranks of its distances can be used.

        A new value of a categorical covariate counts as a new batch. If the model has no batches, all cells are
        compared with the reference. In that case, name the column of the new cells' batches in
        ``model.query(adata, batch_key=...)``.

        Parameters
        ----------
        seed
            Seed of the split into halves.

        Returns
        -------
        A table with one row per cell. "typicality" is the share of the reference's cells that lie at least as far out;
        it is uniform from 0 to 1 for cells like those of the reference, and small for others. "distance" is the
        Mahalanobis distance; in a new batch, of the residuals alone. "elbo" and "density" are numbers of standard
        deviations above compared cells of a similar library size; negative density means further from the reference's
        cells. "new_batch" says whether the cell is of a new batch. If so, it is compared with its own batch or, if its
        typicality is NaN, with no cells.

        Raises
        ------
        ValueError
            If the reference was loaded without its cells, has fewer than 50 cells, or does not model the expression of
            single cells, such as `SpatialVAE`.
        """
        seed = check_seed(seed)
        if not hasattr(self.model, "get_normalized_expression"):
            raise ValueError(
                f"typicality compares the expression of single cells, which {type(self.model).__name__} does not "
                "model. Map the cells onto an SCVI."
            )
        adata = self._reference_adata()
        if adata.n_obs < 50:
            raise ValueError(f"the reference has {counted(adata.n_obs, 'cell')}; typicality needs at least 50.")
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
        if missing := int(table["typicality"].isna().sum()):
            warnings.warn(
                f"the typicality of {missing:,} of {counted(len(table), 'cell')} is not calibrated (NaN): a new batch "
                f"needs {analysis.MIN_BATCH} cells or more, to tell its effect from differences between cells. In "
                'smaller batches, compare the ranks of "distance" or "density".',
                stacklevel=3,  # from contextlib, which is between the user's call and this one
            )
        return table.set_index(self.model.adata.obs_names)

    def _reference_adata(self) -> AnnData:
        """Return the reference's cells; raise ValueError if it has none or was trained again since."""
        self._check_reference()
        return loaders.cells_of(self.reference)

    def _check_reference(self) -> None:
        if len(self.reference.trainings) != self.n_trainings:
            raise ValueError("the reference was trained again since the query. Map the cells anew: model.query(adata).")

    def _new_batch(self) -> np.ndarray:
        """Return, for each cell, a number for its combination of new batch and covariate values; -1 for known ones."""
        registry, cells = self.model.registry, self.model.adata.obs
        seen = np.zeros(self.model.adata.n_obs, int)
        for key in (registry.setup.batch_key, *registry.setup.categorical_covariate_keys):
            if key in registry.known:
                values = codes_of_column(cells[key], registry.categories[key])
                unseen = np.maximum(values - registry.known[key] + 1, 0)
                seen = seen * (len(registry.categories[key]) + 1) + unseen
        return seen - 1

    def _reference_cells(self, rows: np.ndarray) -> CellLoader:
        """Return cells of the reference, with only the genes that the query measured, in its order."""
        missing = set(self.model.registry.missing)
        genes = [gene for gene in self.reference.registry.genes if gene not in missing]  # in the query's order
        store, snapshot = Snapshot.of(replace(self.reference.registry, genes=genes), self.reference.adata)
        return loaders.loader_of(self.model, self.reference.adata, store, snapshot.columns, rows, 1024)


def mapped(reference, adata: AnnData, layer: str | None, batch_key: str | None, min_overlap: float) -> Query:
    """Map new cells onto a trained model; see `Model.query`."""
    if reference.registry.known or reference.registry.missing:
        raise ValueError("this is the model of a query. Map new cells onto its reference instead.")
    reference.require_training()
    check_share("min_overlap", min_overlap)
    setup = reference.registry.setup
    asked = {"layer": layer, "batch_key": batch_key}
    setup = replace(setup, **{name: value for name, value in asked.items() if value is not None})
    check_types(adata, setup)
    if setup.batch_key is not None and setup.batch_key not in adata.obs:
        names = [str(name) for name in adata.obs.columns]
        raise ValueError(
            f'batch_key="{setup.batch_key}" is not a column of adata.obs (it has: {some(names, 12)}). Name the column '
            "of the new cells' batches: model.query(adata, batch_key=...)."
            + did_you_mean_column(adata.obs.columns, setup.batch_key)
        )
    if (n := list(adata.obs.columns).count(setup.batch_key)) > 1:
        raise ValueError(f'adata.obs has {n} columns named "{setup.batch_key}"; it must have one.')
    if setup.use_rep is not None:
        if layer is not None:
            raise ValueError(f"layer={layer!r}: the model reads {setup.where}, and no layer. Leave layer out.")
        genes, by = reference.registry.genes, setup.where
    else:
        if not adata.var_names.is_unique:
            raise ValueError("adata.var_names has duplicate names. Call adata.var_names_make_unique() first.")
        genes, by = matched(reference.registry.genes, reference.registry.gene_ids, adata)
    overlap = sum(gene is not None for gene in genes) / len(genes)
    if not overlap or overlap < min_overlap:
        raise ValueError(_few_matches(reference.registry.genes, genes, adata.var_names, by, min_overlap))
    if overlap < 1 and not reference.vae.has_library:
        raise ValueError(
            f"adata lacks {genes.count(None):,} of the model's {counted(len(genes), 'gene')}. A model without a "
            "library size needs all of them."
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


def _few_matches(ours: list[str], found: list[str | None], theirs: pd.Index, by: str, min_overlap: float) -> str:
    """Return the message that too few of the model's genes are in ``adata``."""
    lacking = [name for name, match in zip(ours, found, strict=True) if match is None]
    matches = set(found)
    others = [name for name in map(str, theirs) if name not in matches]
    of_genes = f"of the model's {counted(len(ours), 'gene')}"
    text = f"adata has none {of_genes} ({some(lacking, 3)})."
    if len(lacking) < len(ours):
        n = len(ours) - len(lacking)
        text = (
            f"adata has {n:,} {of_genes} (matched: {by}), but min_overlap={min_overlap} asks for a larger share. It "
            f"lacks {counted(len(lacking), 'gene')} ({some(lacking, 3)})."
        )
    if others:
        text += (
            f" If its genes without a match ({some(others, 3)}) are the same genes under other names, rename them like "
            "the model's, or put the model's names into a column of adata.var."
        )
    return text


def load(reference, folder: str | Path, adata: AnnData) -> Query:
    """Load a saved query; see `Model.load_query`."""
    reference.require_training()
    folder = check_path("folder", folder)
    check_types(adata, Setup())
    kind = type(reference)
    model, told = files.load(kind, folder, None)
    if not isinstance(told, dict) or not {"matched_by", "reference"} <= told.keys():
        text = f"{folder} holds a model, not a query of query.save(folder). Load it with {kind.__name__}.load."
        raise ModelFileError(text)
    with reference.vae.occupied():
        if told["reference"] != files.digest(reference):
            raise ValueError(
                f"{folder} holds a query of another reference, or of this one before it was trained again. Load it "
                "with the model that the cells were mapped onto, or map the cells anew: model.query(adata)."
            )
    files.give_cells(model, adata)
    n_genes, n_missing = len(model.registry.genes), len(model.registry.missing)
    overlap = n_genes / (n_genes + n_missing)
    return Query(model, reference, overlap, told["matched_by"], len(reference.trainings))


def _extended(registry: Registry, setup: Setup, genes: list[str | None], adata: AnnData) -> Registry:
    """Return the reference's registry with the new cells' gene names and with their new categories added."""
    categories = {key: list(values) for key, values in registry.categories.items()}
    if setup.batch_key != registry.setup.batch_key:
        categories[setup.batch_key] = categories.pop(registry.setup.batch_key, [REFERENCE])
    known = {}
    for key in categories:
        if key not in adata.obs:
            continue  # the checks report missing columns
        values = adata.obs[key].dropna().unique()
        new = codes_of_values(values, categories[key]) < 0
        found = sorted(set(names_of(value for value, is_new in zip(values, new, strict=True) if is_new)))
        if found:
            known[key] = len(categories[key])
            categories[key] = categories[key] + found
    present = [gene for gene in genes if gene is not None]
    missing = [name for name, gene in zip(registry.genes, genes, strict=True) if gene is None]
    ids = identifiers(adata.var.loc[present]) if setup.use_rep is None else {}
    return Registry(setup, present, categories, registry.scaling, ids, missing, known)


def _weights(
    theirs: dict[str, Tensor], wanted: dict[str, Tensor], gene_axes: dict[str, int], order: Tensor
) -> dict[str, Tensor]:
    """Return the reference's weights in the new order of genes, with one more row for each new category."""
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
    """Fit the library prior of the new batches to their cells; of all batches if l sums over fewer genes."""
    n_known = model.registry.known.get(model.registry.setup.batch_key)
    if not model.vae.has_library or (n_known is None and not model.registry.missing):
        return
    prior = model.vae.priors["library"]
    columns = Snapshot.of(model.registry, adata)[1].columns
    kept = slice(0, 0 if model.registry.missing else n_known)
    mean, variance = prior.mean[kept].clone(), prior.variance[kept].clone()
    prior.fit(columns["library"], columns["batch"])
    prior.mean[kept], prior.variance[kept] = mean, variance
