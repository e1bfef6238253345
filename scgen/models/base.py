"""What every model does with an AnnData: train, answer, save, load."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scgen.analysis import inference
from scgen.arguments import check_draws, check_number
from scgen.data.cells import Cells
from scgen.data.loader import CellLoader, Store
from scgen.data.registry import Registry, setup_anndata
from scgen.models import files, loaders, queries, summary, trainings
from scgen.models.interop.counterparts import Answering
from scgen.modules.vae import VAE
from scgen.seeding import seeded
from scgen.training.loop import fit


class Model(metaclass=Answering):
    """Base class of the models. It holds a `Registry`, the constructor's arguments and the module built from them.

    Attributes
    ----------
    adata
        The cells that the model was made for, or None.
    registry, arguments
        Which parts of the data the model reads; the arguments of the constructor.
    vae
        The torch module.
    history
        A row per epoch: elbo_train, elbo_validation and the means of its parts (nats per cell; higher is better),
        kl_weight, seconds.
    trainings
        One dict per call of `train`: its options, whether it "finished" without an interrupt or error, its
        "first_epoch" in ``history``, and the "kept_epoch" whose weights the model kept.
    train_indices, validation_indices
        Rows of ``adata`` used for training and for validation; None before training.
    source, source_rows
        Set by `integrate`, None otherwise: the AnnData passed to it, whose ``obs`` is used to look up columns, and the
        rows of it from which ``adata`` was made.
    """

    setup_anndata = staticmethod(setup_anndata)
    #: Each model has a frozen dataclass of its arguments, of which one is the seed, and says how they make a module.
    Arguments: type
    build: Callable[..., VAE]  # build(registry, arguments)
    #: The class of the minibatches. A model with `sources` has a subclass with fields of their names.
    Cells: type[Cells] = Cells

    def __init__(self, adata: AnnData, registry: Registry, arguments):
        self.assemble(registry, arguments)
        loaders.set_cells(self, adata)

    def assemble(self, registry: Registry, arguments) -> None:
        """Build the module, without cells."""
        self.registry, self.arguments = registry, arguments
        self.adata: AnnData | None = None
        self.source: AnnData | None = None
        self.source_rows: np.ndarray | None = None
        self.fingerprint: dict | None = None
        self.history = pd.DataFrame()
        self.trainings: list[dict] = []
        self.train_indices: np.ndarray | None = None
        self.validation_indices: np.ndarray | None = None
        # Weights that can be trained, whatever mode of torch the caller is in.
        with seeded(arguments.seed), torch.inference_mode(False):
            self.vae = self.build(registry, arguments).eval()

    #: Epsilon of Adam, which must be small beside the gradients.
    _epsilon = 0.01
    #: What a bound is of.
    _unit = "cell"
    #: Whether the posteriors depend on the batch. If they do not, cells of any batch can be embedded.
    _infers_by_batch = True
    #: Public for other parts of scgen, but not for users: tab completion does not list these names.
    _hidden = (
        "Arguments",
        "Cells",
        "assemble",
        "build",
        "fingerprint",
        "require_training",
        "source",
        "source_rows",
        "sources",
    )
    _summary = summary.of_model
    __repr__, __str__, _repr_html_ = summary.line, summary.text, summary.table

    def sources(self, adata: AnnData) -> dict[str, Store | Tensor]:
        """Return what the model reads of each cell of ``adata`` besides its counts and the columns of ``obs``.

        The keys are the fields that the model's `Cells` adds. A value is a tensor or a store, with a row for each cell
        of ``adata``; rows of a store are read when they are needed. This is called for every training and every
        question. Unlike counts and columns, what it returns is not compared with what the model was made of. A vamp
        prior and `sample_prior` do without it.
        """
        return {}

    @property
    def is_trained(self) -> bool:
        """Whether `train` has run, or the weights come from a trained model."""
        return len(self.trainings) > 0

    def train(
        self,
        max_epochs: int | None = None,
        *,
        batch_size: int | None = None,
        train_size: float = 0.9,
        early_stopping: bool = True,
        patience: int | None = None,
        learning_rate: float = 2e-2,
        kl_start: float = 1.0,
        batch_penalty: float = 20.0,
        n_importance_samples: int = 1,
        accelerator: str = "auto",
        devices: int = 1,
        precision: str = "auto",
        seed: int = 0,
        progress: bool = True,
        on_epoch: Callable[[dict[str, float]], object] | None = None,
    ) -> None:
        """Train the model by maximising the evidence lower bound (ELBO). A further call starts from the weights.

        The learning rate rises during the first tenth of the planned steps, then falls to 0 along a cosine. Ctrl-C ends
        training and keeps the best weights so far.

        Parameters
        ----------
        max_epochs
            Passes over the training cells. None makes as many passes as 400 minibatches take, between 25 and 50.
        batch_size
            Cells in a minibatch. None chooses the size that gives 400 minibatches in 50 passes, between 64 and 512; on
            a GPU the size that gives 400 in 25 passes, up to 4096.
        train_size
            Share of the cells of each batch used for training; the others are the validation cells. The first call
            fixes the split.
        early_stopping, patience
            Whether to stop, in the second half of the planned epochs, when the validation bound has not risen for
            ``patience`` epochs; None is a quarter of the planned epochs. In any case the model keeps the best weights
            of the second half.
        learning_rate
            Peak learning rate of Adam. Gradients are clipped to three times their usual norm.
        kl_start
            Weight of the KL divergence of z at the first step; it goes to 1 over the first half of the planned steps. A
            value below 1 is a warm-up. A value above 1, such as 4, removes batch differences from z early, and with
            them small differences between cell types.
        batch_penalty
            Weight of a penalty on how far apart the batches' means of z are within each component of the prior. It
            removes batch differences from z, whatever shares of the cell types the batches have. But a type that only
            one batch has is drawn towards a similar type if they share a component: a smaller weight keeps it further
            apart. The penalty has no weight in the first tenth of the steps, and less where a batch has few cells in a
            component (about 30 or fewer). It needs ``prior="vamp"`` or "mog" and ``posterior="normal"``. Without them,
            and in `Query.train`, it is not used. 0 switches it off.
        n_importance_samples
            K draws of the latents. With K > 1, training and validation use the tighter bound
            log (1/K) sum_k p(x, z_k, l_k) / q(z_k, l_k | x) of Burda et al. (2016). Decoding then costs K times as
            much, and ``history`` holds this bound in place of the ELBO.
        accelerator
            "auto", "cpu" or "gpu".
        devices
            Number of devices: 1.
        precision
            "bf16" uses bfloat16 for the matrix products of layers that read or return 512 genes or more; "32" uses
            float32 throughout. "auto" chooses "bf16" on devices where it is faster; ``trainings`` records the choice.
            Weights, the validation bound and all results of the trained model are float32 in any case.
        seed
            Seed of the split, the order of the cells and all noise. Global random generators are not used.
        progress
            Whether to show a progress line.
        on_epoch
            A function that is called after each epoch with a dict of numbers: "epoch", from 1, and the new row of
            ``history``. If it returns True, training stops and the best weights are kept, as after early stopping. If
            it raises an error, training ends with that error and the weights of this epoch are kept.

        Raises
        ------
        TypeError
            If an argument is of the wrong type.
        ValueError
            If an argument is out of its range, or fewer than two cells are left to train on.
        FloatingPointError
            If the loss becomes NaN or infinite. The message names cells and genes. The last good weights are kept.

        Examples
        --------
        >>> import scgen
        >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
        >>> scgen.setup_anndata(adata, batch_key="batch")
        >>> model = scgen.SCVI(adata)
        >>> model.train(max_epochs=3, progress=False)
        >>> model.history.index.tolist()
        [1, 2, 3]

        With TensorBoard, the curve can be watched:

        >>> from torch.utils.tensorboard import SummaryWriter  # doctest: +SKIP
        >>> writer, elbo = SummaryWriter(), "elbo_validation"  # doctest: +SKIP
        >>> model.train(on_epoch=lambda row: writer.add_scalar(elbo, row[elbo], row["epoch"]))  # doctest: +SKIP
        """
        plan = max_epochs, batch_size, train_size, early_stopping, patience, learning_rate, kl_start, batch_penalty
        options = trainings.checked(
            *plan, n_importance_samples, accelerator, devices, precision, seed, progress, on_epoch, self._epsilon
        )
        with trainings.recorded(self, options, batch_size, train_size) as (training, validation, rows):
            told = trainings.told(self, rows, on_epoch)
            self.trainings[-1] |= fit(self.vae, training, validation, options, rows, told)

    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        give_mean: bool = True,
        return_dist: bool = False,
        batch_size: int = 4096,
        seed: int = 0,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return z of each cell: the mean of q(z | x, s), or a draw from it.

        Parameters
        ----------
        adata
            Cells to embed; genes are matched by name. None uses the model's own cells.
        indices
            Rows of ``adata``; None for all.
        give_mean
            Whether to return the mean of q; False returns a draw.
        return_dist
            Whether to return the mean and the variance of q.
        batch_size
            Number of cells computed at a time.
        seed
            Seed of the draw.

        Returns
        -------
        (n, n_latent) float32, in the order of ``indices``; two such arrays with ``return_dist``. For a flow, mean and
        variance are those of 100 draws, the same for every cell and call.

        Raises
        ------
        RuntimeError
            If the model is untrained.
        ValueError
            If there are no cells, or ``adata`` lacks genes or has batches that the model does not know. Models whose
            encoders do not read the batch, such as `SpatialVAE`, refuse such batches only for bounds and likelihoods.

        Examples
        --------
        >>> adata.obsm["X_scgen"] = model.get_latent_representation()  # doctest: +SKIP
        """
        flags = {"give_mean": give_mean, "return_dist": return_dist}
        loader = self._loader(adata, indices, batch_size, seed, flags, any_batch=not self._infers_by_batch)
        if give_mean and not return_dist:
            return inference.embedding(self.vae, loader)
        name = self.vae.latent
        return inference.latent(self.vae, loader, name) if return_dist else inference.draw(self.vae, loader, name, seed)

    def get_elbo(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        return_mean: bool = True,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> float | np.ndarray:
        """Return the evidence lower bound, in nats per cell, at KL weight 1 and one draw of the latents.

        Higher is better. ``return_mean=False`` returns one value per cell, (n,). Other parameters and errors are those
        of `get_latent_representation`.
        """
        loader = self._loader(adata, indices, batch_size, seed, {"return_mean": return_mean})
        parts = inference.bound(self.vae, loader, seed)
        elbo = parts.pop("log_likelihood") - sum(parts.values())
        return float(elbo.mean(dtype=np.float64)) if return_mean else elbo

    def get_reconstruction_error(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        return_mean: bool = True,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> float | np.ndarray:
        """Return -log p(x | z, l, s), in nats per cell, at the draw of the latents that `get_elbo` uses.

        Lower is better. Parameters and errors are those of `get_elbo`.
        """
        loader = self._loader(adata, indices, batch_size, seed, {"return_mean": return_mean})
        error = -inference.bound(self.vae, loader, seed)["log_likelihood"]
        return float(error.mean(dtype=np.float64)) if return_mean else error

    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        n_mc_samples: int = 1000,
        return_mean: bool = True,
        return_ess: bool = False,
        batch_size: int = 64,
        seed: int = 0,
    ) -> float | np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return an importance-sampling estimate of log p(x), in nats per cell.

        If the library size is observed, this is an estimate of log p(x | l). Compare it only with other models that
        observe the library size.

        The estimate is log (1/K) sum_k w_k with w_k = p(x, z_k, l_k) / q(z_k, l_k | x) and K = ``n_mc_samples`` draws
        from q. Its expectation is at least that of `get_elbo`, and approaches log p(x) from below as K grows (Burda et
        al. 2016).

        ``return_mean=False`` returns one value per cell, (n,). ``return_ess=True`` also returns the effective sample
        size of each cell, (sum_k w_k)^2 / sum_k w_k^2 (Kong 1992), (n,). It is K if q is the true posterior. A value
        near 1 means that one draw has all the weight and more draws are needed. Other parameters and errors are those
        of `get_latent_representation`.

        Examples
        --------
        >>> values, ess = model.get_marginal_ll(n_mc_samples=100, return_ess=True)  # doctest: +SKIP
        """
        n_draws = check_draws("n_mc_samples", n_mc_samples)
        flags = {"return_mean": return_mean, "return_ess": return_ess}
        loader = self._loader(adata, indices, batch_size, seed, flags)
        values, ess = inference.marginal(self.vae, loader, n_draws, seed)
        if return_ess:
            return values, ess
        return float(values.mean()) if return_mean else values

    def active_units(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        threshold: float = 0.01,
    ) -> pd.DataFrame:
        """Return how much the model uses each latent of z, in the order of `get_latent_representation`.

        Parameters
        ----------
        adata, indices
            As in `get_latent_representation`.
        threshold
            A latent is active if its "variance" is above this value.

        Returns
        -------
        One row per latent. "variance" is the variance over the cells of the means of q(z_u | x) (Burda et al. 2016).
        "kl" is the mean over the cells of KL(q(z_u | x) || p(z_u)), in nats; it is NaN unless both distributions are
        Gaussian with independent units. With the default prior of `SCVI`, it is NaN. "active" says whether the latent
        is active.

        Raises
        ------
        RuntimeError
            If the model is untrained.
        ValueError
            If the threshold is negative or not a number, or as `get_latent_representation`.

        Examples
        --------
        >>> import scgen
        >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
        >>> scgen.setup_anndata(adata, batch_key="batch")
        >>> model = scgen.SCVI(adata, n_latent=4)
        >>> model.train(max_epochs=2, progress=False)
        >>> model.active_units().columns.tolist(), len(model.active_units())
        (['variance', 'kl', 'active'], 4)
        """
        threshold = check_number("threshold", threshold, "a variance, a number from 0", least=0)
        loader = self._loader(adata, indices, 1024, any_batch=not self._infers_by_batch)
        return inference.active_units(self.vae, loader, threshold)

    def query(
        self, adata: AnnData, *, layer: str | None = None, batch_key: str | None = None, min_overlap: float = 0.5
    ) -> queries.Query:
        """Map new cells onto this model. They may be from new batches and lack some genes. The model does not change.

        Genes are matched by name or by a column of identifiers in ``adata.var``, whichever matches most genes; other
        genes are ignored. Genes of the model that were not measured are not taken as zeros: the encoder reads the
        values that the decoder expects. All results are about the measured genes only. Models without a library size,
        such as `SpatialVAE`, need all genes. A new batch is given the mean of the known batches' effects until
        `Query.train` fits its own effect.

        Parameters
        ----------
        adata
            New cells with raw counts, or with the values that the model reads in their place. `setup_anndata` need not
            have been called.
        layer, batch_key
            Where the counts and the batch of the new cells are; None looks where the model has its own.
        min_overlap
            Smallest share of the model's genes that ``adata`` must have.

        Returns
        -------
        A `Query`, which gives the embedding, labels and typicality of the new cells, and a model of them.

        Notes
        -----
        If the reference is meant for label transfer, train it with ``train(kl_start=0, batch_penalty=0)``. This mixes
        the batches less than the default and gives better labels (benchmarks/NOTES.md).

        Raises
        ------
        RuntimeError
            If the model is untrained.
        ValueError
            If ``adata`` has too few of the genes, `setup_anndata` would refuse it, or ``layer`` is given but the model
            reads values of ``adata.obsm``.
        """
        with self.vae.occupied():
            return queries.mapped(self, adata, layer, batch_key, min_overlap)

    def load_query(self, folder: str | Path, adata: AnnData) -> queries.Query:
        """Load a query that `Query.save` wrote. It gives the same results as before it was saved.

        Parameters
        ----------
        folder
            Where it was saved.
        adata
            The new cells. To load only the query's model, with or without cells, use `load` of the model's class.

        Raises
        ------
        scgen.storage.ModelFileError
            If the folder holds no query, or as in `load`.
        ValueError
            If the query belongs to another reference, if this reference was trained again since, or if ``adata`` does
            not fit.

        Examples
        --------
        >>> model.query(new).save("query/")  # doctest: +SKIP
        >>> query = model.load_query("query/", new)  # doctest: +SKIP
        """
        return queries.load(self, folder, adata)

    def view_anndata_setup(self, adata: AnnData | None = None) -> pd.DataFrame:
        """Return a table of what the model reads, and where: counts, cells, genes, batches and further columns.

        Parameters
        ----------
        adata
            The cells to look at; None uses the model's own.

        Returns
        -------
        One row for each part: "where" it is in ``adata``, and "what" is there. The number of cells follows the name of
        each batch and label.

        Raises
        ------
        ValueError
            If ``adata`` lacks what the model reads, or the model was loaded without cells.

        Examples
        --------
        >>> import scgen
        >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
        >>> scgen.setup_anndata(adata, batch_key="batch")
        >>> scgen.SCVI(adata).view_anndata_setup().loc["batch_key"].tolist()
        ['adata.obs["batch"]', '3: batch_1 (29), batch_2 (36), batch_3 (35)']
        """
        return self.registry.view(loaders.cells_of(self) if adata is None else adata)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the model, without the cells, into ``folder``: ``model.json`` and a safetensors file.

        A crash leaves either the old model or the new one, never a mixture. Several processes may save to one folder
        and load from it at the same time; the model of the last one to finish remains.

        Raises
        ------
        FileExistsError
            If the folder holds a model and ``overwrite`` is false.
        """
        with self.vae.occupied():
            files.save(self, folder, overwrite)

    @classmethod
    def load(cls, folder: str | Path, adata: AnnData | None = None) -> Self:
        """Load a model that `save` wrote.

        Parameters
        ----------
        folder
            Where it was saved.
        adata
            The cells that the model was trained on, or other cells; `setup_anndata` need not have been called. None
            loads the weights alone; every method then needs its ``adata=``.

        Raises
        ------
        scgen.storage.ModelFileError
            If the folder holds no model, or a file is damaged, altered, of another class or of another format.
        ValueError
            If ``adata`` does not fit the model.
        """
        return files.load(cls, folder, adata)[0]

    def require_training(self) -> None:
        """Raise RuntimeError if the model is untrained."""
        if not self.is_trained:
            raise RuntimeError("the model is untrained: call model.train() first.")

    def _loader(
        self, adata, indices, batch_size: int, seed: int = 0, flags: Mapping | None = None, any_batch: bool = False
    ) -> CellLoader:
        return loaders.of_question(self, adata, indices, batch_size, seed, flags, any_batch)
