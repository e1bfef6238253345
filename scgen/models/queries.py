"""New cells mapped onto a trained model: its weights for their genes and batches, and what it says of them."""

from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scgen.analysis import query as analysis
from scgen.data.checks import Setup, check_types, nearest
from scgen.data.genes import identifiers, matched
from scgen.data.registry import Registry
from scgen.models import files, loaders


@dataclass(frozen=True)
class Query:
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
    Query of 115 cells: 25 of 30 genes (83%), by their names in adata.var_names; new in batch: batch_3
    >>> query.transfer_labels("cell_type").columns.tolist()
    ['label', 'share']
    """

    model: "Model"  # noqa: F821
    reference: "Model"  # noqa: F821
    overlap: float
    matched_by: str

    def __repr__(self) -> str:
        n, known = len(self.model.registry.genes), self.model.registry.known
        new = {key: self.model.registry.categories[key][n:] for key, n in known.items()}
        told = "; ".join(f"new in {key}: {', '.join(values[:5])}" for key, values in new.items()) or "no new batch"
        of = f"{n} of {n + len(self.model.registry.missing)} genes ({self.overlap:.0%}), by {self.matched_by}"
        return f"Query of {self.model.adata.n_obs} cells: {of}; {told}"

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
        has not seen, and the theta of these (Lotfollahi et al. 2022, scArches). Parameters and errors are those of
        `Model.train`, and a ValueError if there are no such values.
        """
        if not self.model.registry.known:
            raise ValueError("there is nothing to train: the reference knows all batches of the new cells.")
        self.model.train(
            max_epochs,
            learning_rate=learning_rate,
            kl_start=1.0,
            accelerator=accelerator,
            seed=seed,
            progress=progress,
        )

    def transfer_labels(self, labels_key: str, *, n_neighbors: int = 15, unknown_below: float = 0.5) -> pd.DataFrame:
        """Return a label for each new cell: what its nearest reference cells vote for.

        Parameters
        ----------
        labels_key
            Column of the reference's ``adata.obs``; cells without a label (NaN) do not vote.
        n_neighbors
            Number of voters, each weighed by a Gaussian of its distance, as wide as the cell's mean distance to them.
        unknown_below
            Share of the votes below which the label is "unknown".

        Returns
        -------
        By cell: "label", and "share", its part of the votes.

        Raises
        ------
        ValueError
            If the column is not there or holds no label, or the reference was loaded without its cells.
        """
        adata = loaders.cells_of(self.reference, None)
        if labels_key not in adata.obs:
            closest = nearest(str(labels_key), [str(name) for name in adata.obs.columns])
            raise ValueError(
                f'labels_key="{labels_key}" is no column of the reference\'s adata.obs (it has: '
                f"{', '.join(map(str, adata.obs.columns[:12]))})." + (f' Did you mean "{closest}"?' if closest else "")
            )
        labels = adata.obs[labels_key]
        if not labels.notna().any():
            raise ValueError(f'the reference\'s adata.obs["{labels_key}"] is NaN for all cells.')
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

        A cell is compared with the reference's validation cells (all its cells, if there are none) in what the model
        leaves unexplained of it: its Pearson residuals along the ten directions that those of the new cells have most
        in common (found in one half of them, for the other), its ELBO, and how near the reference's cells are in z,
        the last two given its library. One cell's noise hides what a hundred of a kind have in common: the more new
        cells are given, the finer the answer; of a dozen, hardly anything is seen.

        Parameters
        ----------
        seed
            Of the halves.

        Returns
        -------
        By cell: "typicality", the share of the compared cells that lie at least as far out, even from 0 to 1 for cells
        like them; "distance", the Mahalanobis distance that this is of; "elbo" and "density", by how many deviations
        they are above those of compared cells with a like library.

        Raises
        ------
        ValueError
            If the reference was loaded without its cells, or has fewer than 50.
        """
        adata = loaders.cells_of(self.reference, None)
        if adata.n_obs < 50:
            raise ValueError(f"the reference has {adata.n_obs} cells: too few to say what is typical of it.")
        held_out, training = self.reference.validation_indices, self.reference.train_indices
        if held_out is None or len(held_out) < 50:
            held_out = training = np.arange(adata.n_obs)
        table = analysis.typicality(
            self.reference.vae,
            loaders.of_question(self.reference, None, held_out, 1024),
            self.reference.get_latent_representation(indices=training),
            self.model.vae,
            loaders.of_question(self.model, None, None, 1024),
            seed,
        )
        return table.set_index(self.model.adata.obs_names)


def mapped(reference, adata: AnnData, layer: str | None, batch_key: str | None, min_overlap: float) -> Query:
    """Return new cells mapped onto a trained model; see `Model.query`."""
    if reference.registry.known or reference.registry.missing:
        raise ValueError("this is the model of a query: map new cells onto its reference instead.")
    reference.require_training()
    if isinstance(min_overlap, bool) or not isinstance(min_overlap, Real) or not 0 <= min_overlap <= 1:
        raise ValueError(f"min_overlap={min_overlap!r}; it takes a share from 0 to 1.")
    setup = reference.registry.setup
    setup = replace(setup, layer=layer or setup.layer, batch_key=batch_key or setup.batch_key)
    check_types(adata, setup)
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
    if overlap < 1 and "library" not in reference.vae.posteriors:
        raise ValueError(
            f"{sum(gene is None for gene in genes)} of the model's genes are not in adata; with "
            'gene_likelihood="normal" all are needed.'
        )
    registry = _extended(reference.registry, setup, genes, adata)
    registry.check_new(adata)
    with torch.device("meta"):
        wanted = type(reference).build(registry, **reference.arguments).state_dict()
    order = torch.from_numpy(np.argsort([gene is None for gene in genes], kind="stable"))
    weights = _weights(reference.vae.state_dict(), wanted, order)
    model = files.assembled(type(reference), registry, reference.arguments, weights)
    model.trainings = list(reference.trainings)
    files.give_cells(model, adata)
    _fit_new_libraries(model, adata)
    return Query(model, reference, overlap, by)


def _extended(registry: Registry, setup: Setup, genes: list[str | None], adata: AnnData) -> Registry:
    """Return the reference's registry with the genes by the new cells' names, and with their new categories."""
    categories = {key: list(values) for key, values in registry.categories.items()}
    if setup.batch_key != registry.setup.batch_key:
        categories[setup.batch_key] = categories.pop(registry.setup.batch_key, ["reference"])
    known = {}
    for key in categories:
        if key not in adata.obs:
            continue  # what is missing is said by the checks
        found = sorted({str(value) for value in adata.obs[key].dropna().unique()} - set(categories[key]))
        if found:
            known[key] = len(categories[key])
            categories[key] = categories[key] + found
    present = [gene for gene in genes if gene is not None]
    missing = [name for name, gene in zip(registry.genes, genes, strict=True) if gene is None]
    return Registry(setup, present, categories, registry.scaling, identifiers(adata.var.loc[present]), missing, known)


def _weights(theirs: dict[str, Tensor], wanted: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Return the reference's weights in the new order of genes, with a further row for each new category."""
    found = {}
    for name, shape in ((name, weight.shape) for name, weight in wanted.items()):
        if name not in theirs:  # with the first batch that differs from the only one, which had no row
            found[name] = torch.zeros(shape)
            continue
        weight, dimension = theirs[name].cpu(), _dimension_of_genes(name, len(shape))
        if len(shape) and shape[0] > len(weight):
            weight = torch.cat([weight, weight.mean(0, keepdim=True).expand(shape[0] - len(weight), *shape[1:])])
        found[name] = weight.clone() if dimension is None else weight.index_select(dimension, order)
    return found


def _dimension_of_genes(name: str, n_dimensions: int) -> int | None:
    if name.startswith("posteriors.") and name.endswith("mlp.layers.0.linear.weight"):
        return 1
    if name == "decoder.dispersion.log_theta":
        return n_dimensions - 1
    heads = ("scale", "zi_logits", "dispersion.head", "mean", "log_scale")
    return 0 if name.startswith(tuple(f"decoder.{head}" for head in heads)) else None


def _fit_new_libraries(model, adata: AnnData) -> None:
    """Fit the library's prior of new batches to their cells; that of the others stays."""
    n_known = model.registry.known.get(model.registry.setup.batch_key)
    if n_known is None or "library" not in model.vae.priors:
        return
    prior = model.vae.priors["library"]
    _, columns, _ = model.registry.read(adata)
    mean, variance = prior.mean.clone(), prior.variance.clone()
    prior.fit(columns["library"], columns["batch"])
    prior.mean[:n_known], prior.variance[:n_known] = mean[:n_known], variance[:n_known]
