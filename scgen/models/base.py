"""What every model does with an AnnData: train, answer, save, load."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from scgen.analysis import correlation, differential_expression, expression, inference, sampling, thinning
from scgen.analysis.counterfactual import Asked, one_condition
from scgen.analysis.likelihood_parameters import likelihood_parameters
from scgen.arguments import check_choice, check_draws, check_number
from scgen.data.loader import CellLoader
from scgen.data.registry import Registry, setup_anndata
from scgen.models import differences, files, loaders, queries, summary, trainings
from scgen.models.counterparts import Answering
from scgen.modules.vae import VAE
from scgen.seeding import seeded
from scgen.training.loop import fit


class Model(metaclass=Answering):
    """Base of the models: a `Registry`, the constructor's arguments, and the module that they make.

    Attributes
    ----------
    adata
        The cells that the model was made for, or None.
    registry, arguments
        What of the data is read; the constructor's arguments.
    vae
        The torch module.
    history
        A row per epoch: elbo_train, elbo_validation and the means of its parts (nats per cell; higher is better),
        kl_weight, seconds.
    trainings
        The options of each call of `train`, whether it "finished" without an interrupt or error, its "first_epoch" in
        ``history`` and the "kept_epoch", whose weights it left.
    train_indices, validation_indices
        Rows of ``adata`` that were trained on and validated on; None before training.
    source, source_rows
        Of a model that `integrate` made: the AnnData that it was given, in whose ``obs`` columns are looked up, and the
        rows of it that the cells of ``adata`` are. None of other models.
    """

    setup_anndata = staticmethod(setup_anndata)
    #: Each model has a frozen dataclass of its arguments, of which one is the seed, and says how they make a module.
    Arguments: type
    build: Callable[..., VAE]  # build(registry, arguments)

    def __init__(self, adata: AnnData, registry: Registry, arguments):
        self.assemble(registry, arguments)
        loaders.set_cells(self, adata)

    def assemble(self, registry: Registry, arguments) -> None:
        """Make the module, without cells."""
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

    #: What is public for other parts of scgen, and what users need not see: completion does not list it.
    _hidden = ("Arguments", "assemble", "build", "fingerprint", "require_training", "source", "source_rows")
    _summary = summary.of_model
    __repr__, __str__, _repr_html_ = summary.line, summary.text, summary.table

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
        kl_start: float = 4.0,
        n_importance_samples: int = 1,
        accelerator: str = "auto",
        devices: int = 1,
        precision: str = "auto",
        seed: int = 0,
        progress: bool = True,
        on_epoch: Callable[[dict[str, float]], object] | None = None,
    ) -> None:
        """Maximise the evidence lower bound over the training cells; called again, go on from the weights as they are.

        The learning rate rises for a tenth of the planned steps and falls to 0 along a cosine. Ctrl-C ends training
        and keeps the best weights so far.

        Parameters
        ----------
        max_epochs
            Passes over the training cells; None stands for 400 minibatches, but 25 to 50 passes.
        batch_size
            Cells in a minibatch; None stands for as many as leave 400 minibatches in 50 passes, but 64 to 512; on a GPU
            for up to 4096 that leave as many in 25.
        train_size
            Share of the cells trained on, of every batch alike; the others validate. Fixed by the first call.
        early_stopping, patience
            Whether to stop, in the second half of the planned epochs, when the validation bound has not risen for
            ``patience`` epochs; None stands for a quarter of the planned ones. The best weights of the second half are
            kept in any case.
        learning_rate
            Peak learning rate of Adam, whose gradients are no longer than three times their usual length.
        kl_start
            Weight of z's KL at the first step; it goes to 1 over the first half of the planned steps. Above 1, it
            drives the batches out of z early; below, it is a warm-up.
        n_importance_samples
            From 2 on, K: trains, and validates, the bound log (1/K) sum_k p(x, z_k, l_k) / q(z_k, l_k | x), which is
            tighter (Burda et al. 2016), at K times the cost of decoding; ``history`` holds it in place of the ELBO.
        accelerator
            "auto", "cpu" or "gpu".
        devices
            Number of devices: 1.
        precision
            "bf16" takes the products of layers from or to 512 genes and more in bfloat16, "32" all in float32; "auto"
            is "bf16" where the device is faster so, and ``trainings`` tells. Weights are float32 in any case, and so
            are the validation bound and what is asked of the trained model.
        seed
            Seed of the split, the order of the cells and all noise. The global generators are left alone.
        progress
            Whether to show a progress line.
        on_epoch
            A function that is called after each epoch, with a dict of numbers: "epoch", from 1, and the new row of
            ``history``. If it returns True, training stops, and the best weights are kept as after early stopping. If
            it raises an error, training ends with that error, and the weights of this epoch are kept.

        Raises
        ------
        TypeError
            If an argument is of the wrong kind.
        ValueError
            If an argument is out of its range, or fewer than two cells are left to train on.
        FloatingPointError
            If the loss becomes NaN or infinite; names cells and genes. The last good weights are kept.

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
        plan = max_epochs, batch_size, train_size, early_stopping, patience, learning_rate, kl_start
        options = trainings.checked(
            *plan, n_importance_samples, accelerator, devices, precision, seed, progress, on_epoch
        )
        with trainings.recorded(self, options, batch_size, train_size) as (training, validation, rows):
            self.trainings[-1] |= fit(self.vae, training, validation, options, rows, on_epoch)

    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        return_dist: bool = False,
        batch_size: int = 4096,
        seed: int = 0,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return z of each cell: the mean of q(z | x, s), or a draw from it.

        Parameters
        ----------
        adata
            Cells to embed, their genes found by name; None for those of the model.
        indices
            Rows of ``adata``; None for all.
        give_mean
            False draws from q instead.
        return_dist
            True returns mean and variance of q.
        batch_size
            Cells computed at a time.
        seed
            Seed of the draw.

        Returns
        -------
        (n, n_latent) float32, in the order of ``indices``; two of them with ``return_dist``. Of a flow they are taken
        over 100 draws, the same for every cell and call.

        Raises
        ------
        RuntimeError
            If the model is untrained.
        ValueError
            If there are no cells, or ``adata`` lacks genes or has batches that the model does not know.

        Examples
        --------
        >>> adata.obsm["X_scgen"] = model.get_latent_representation()  # doctest: +SKIP
        """
        flags = {"give_mean": give_mean, "return_dist": return_dist}
        loader = self._loader(adata, indices, batch_size, seed, flags)
        if give_mean and not return_dist:
            return inference.embedding(self.vae, loader)
        return inference.latent(self.vae, loader, "z") if return_dist else inference.draw(self.vae, loader, "z", seed)

    def get_latent_library_size(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> np.ndarray:
        """Return l of each cell, (n, 1), in counts: the mean of its log-normal posterior, or a draw from it.

        Where the library is observed, that is the cell's total, or its size factor. Parameters and errors are those of
        `get_latent_representation`; a model with ``gene_likelihood="normal"`` has no library and raises ValueError.
        """
        loader = self._loader(adata, indices, batch_size, seed, {"give_mean": give_mean})
        return inference.library_size(self.vae, loader, give_mean, seed)

    def get_elbo(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | None = None,
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
        indices: Sequence[int] | None = None,
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
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 1000,
        return_mean: bool = True,
        return_ess: bool = False,
        batch_size: int = 64,
        seed: int = 0,
    ) -> float | np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the estimate of log p(x), in nats per cell, from importance-weighted draws of the latents.

        Where the library is observed, it is that of log p(x | l), which compares only with its like.

        log (1/K) sum_k w_k, w_k = p(x, z_k, l_k) / q(z_k, l_k | x), with K = ``n_mc_samples`` draws from q: never below
        `get_elbo` in expectation, and closer to log p(x) from below the more draws (Burda et al. 2016).

        ``return_mean=False`` returns one value per cell, (n,); ``return_ess=True`` these and their effective sample
        sizes (sum_k w_k)^2 / sum_k w_k^2 (Kong 1992), (n,) each: K where q is the posterior itself; where it is near 1,
        one draw has all the weight, and more are needed. Other parameters and errors are those of
        `get_latent_representation`.

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

    def get_thinned_ll(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | None = None,
        held_out: float = 0.1,
        n_samples: int = 100,
        return_mean: bool = True,
        batch_size: int = 64,
        seed: int = 0,
    ) -> float | np.ndarray:
        """Return the log-likelihood of counts held out of each cell, in nats per cell, given those that were kept.

        Each count is split, x_kept ~ Binomial(x, 1 - held_out) and x_rest = x - x_kept; z and l are inferred from
        x_kept alone, as if it were the cell, and what is returned is

        log (1/K) sum_k p(x_rest | x_kept, z_k, l_k, s), z_k, l_k ~ q(. | x_kept, s), K = n_samples.

        Higher is better. It compares across treatments of the library, latents and likelihoods of counts, for the same
        cells and seed are split alike whatever the model. Weights have seen all counts of the cells they were trained
        on: ask about others, as ``indices=model.validation_indices``.

        Parameters
        ----------
        adata, indices, batch_size
            As in `get_latent_representation`.
        held_out
            Share of the counts held out.
        n_samples
            Draws of z and l.
        return_mean
            False returns one value per cell, (n,).
        seed
            Seed of the split and of the draws.

        Raises
        ------
        RuntimeError
            If the model is untrained.
        ValueError
            If the model is not one of counts, an argument is out of its range, or as `get_latent_representation`.

        Notes
        -----
        An observed library is the total of x_kept; a cell of which nothing is kept counts as one of one count. Size
        factors are multiplied by 1 - held_out; where they come from the counts, they know of the held-out ones, too.
        Given z and l, the two parts of Poisson counts are independent. Of "nb" and "zinb" they share each gene's rate,
        Gamma of shape theta, and whether it is off, so that what was kept says more of the rest than z and l do. With
        l the library of x_kept,

        p(x_rest | x_kept, z, l, s) p(x_kept | z, l, s) = Binomial(x_rest; x, held_out) p(x | z, l / (1 - held_out), s):

        for "nb", x_rest is negative binomial of shape theta + x_kept.

        References
        ----------
        Batson, Royer and Webber, Molecular cross-validation for single-cell RNA-seq, bioRxiv 786269 (2019).
        Neufeld et al., Inference after latent variable estimation for single-cell RNA sequencing data, Biostatistics 25
        (2024) 270: count splitting.

        Examples
        --------
        >>> model.get_thinned_ll(indices=model.validation_indices)  # doctest: +SKIP
        """
        held_out = check_number("held_out", held_out, "a share above 0 and below 1", above=0, below=1)
        n_samples = check_draws("n_samples", n_samples)
        loader = self._loader(adata, indices, batch_size, seed, {"return_mean": return_mean})
        factors = self.registry.setup.size_factor_key is not None
        values = thinning.held_out_log_likelihood(self.vae, loader, factors, held_out, n_samples, seed)
        return float(values.mean()) if return_mean else values

    def active_units(
        self, adata: AnnData | None = None, *, indices: Sequence[int] | None = None, threshold: float = 0.01
    ) -> pd.DataFrame:
        """Return how much each latent of z is used: a row per latent, in the order of `get_latent_representation`.

        Parameters
        ----------
        adata, indices
            As in `get_latent_representation`.
        threshold
            Latents are active whose "variance" is above this.

        Returns
        -------
        "variance": over the cells, of the means of q(z_u | x) (Burda et al. 2016); "kl": the mean over the cells of
        KL(q(z_u | x) || p(z_u)), in nats, NaN unless both are Gaussian with independent units; and "active".

        Raises
        ------
        RuntimeError
            If the model is untrained.
        ValueError
            If the threshold is negative or no number, or as `get_latent_representation`.

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
        return inference.active_units(self.vae, self._loader(adata, indices, 1024), threshold)

    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | None = None,
        batch: str | Sequence[str] = "observed",
        covariates: Mapping[str, str | float | Sequence[str] | Sequence[float]] | None = None,
        library_size: float | str = 1,
        gene_list: Sequence[str] | None = None,
        n_samples: int = 1,
        weights: str = "uniform",
        return_mean: bool = True,
        return_numpy: bool = False,
        out=None,
        sparse_below: float | None = None,
        batch_size: int = 1024,
        seed: int = 0,
        transform_batch: str | Sequence[str] | None = None,
    ) -> pd.DataFrame | np.ndarray | sparse.csr_matrix | list[sparse.csr_matrix]:
        """Return denoised expression: l times the decoder's share rho(z, s) of each gene, with z drawn from q.

        Parameters
        ----------
        adata, indices, batch_size, seed
            As in `get_latent_representation`.
        batch
            "observed": each cell in its own batch, which leaves the batch effect in. A name: all cells as if
            from that batch. A list of names: the mean over them, each of the same weight. "average": the mean over all.
            ``["observed"]`` means a batch of that name.
        covariates
            The same for further covariates, by name; those not named are as observed. A continuous one takes a number,
            in its own unit, or a list of numbers; its "average" is the mean of the cells that the model was made for.
            Where several are averaged, the mean is over all combinations of their values, 1000 at most.
        library_size
            The l common to all cells, or "latent" for each cell's own; 1 with ``gene_likelihood="normal"``.
        gene_list
            Genes to return; None for all.
        n_samples, return_mean
            Number of draws of z (and l); whether to average over them.
        weights
            "importance" weighs a cell's draws in proportion to p(x, z, l) / q(z, l | x), so that the mean comes closer,
            with ever more draws, to the one under the true posterior, p(z, l | x). Draws that are not averaged are
            drawn anew from themselves with these weights, so that some come repeatedly (Rubin 1987).
        return_numpy
            True returns an array instead of a table.
        out
            An array that is filled, a minibatch of cells at a time, and returned: `numpy.memmap`, an h5py dataset, a
            zarr array, or whatever has shape, dtype and assignment to slices.
        sparse_below
            Values below this become zeros, and the result a CSR matrix, whatever ``return_numpy`` is, of which no dense
            form is ever held; a list of them if draws are not averaged.
        transform_batch
            scvi-tools' name for ``batch``.

        Returns
        -------
        A table cells x genes; an array (n_samples, cells, genes) if draws are not averaged. Values sum to
        ``library_size`` over all genes, but with size factors they are rates per unit of these. With
        ``gene_likelihood="normal"`` they are the means f(z, s).

        Raises
        ------
        RuntimeError
            If the model is untrained.
        TypeError
            If an argument is of the wrong kind altogether.
        ValueError
            If a batch, covariate, value of it, gene, library size or weight is not known, or ``out`` is of another
            shape, holds no floats of 32 bits or more, or cannot be written to.

        Examples
        --------
        >>> import scgen
        >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
        >>> adata.obs["donor"] = ["a", "b"] * 50
        >>> scgen.setup_anndata(adata, batch_key="batch", categorical_covariate_keys=["donor"])
        >>> model = scgen.SCVI(adata)
        >>> model.train(max_epochs=2, progress=False)
        >>> model.get_normalized_expression(batch="average", covariates={"donor": "a"}).shape
        (100, 30)
        >>> model.get_normalized_expression(library_size=1e4, sparse_below=1.0).format
        'csr'
        """
        asked = Asked.of(self.registry, batch, covariates, gene_list, transform_batch)
        settings = expression.Settings(
            asked, library_size, n_samples, return_mean, weights, seed, return_numpy, sparse_below
        )
        loader = self._loader(adata, indices, batch_size)
        names = (self.adata if adata is None else adata).obs_names
        return expression.answer(self.vae, loader, settings, names, out)

    def get_feature_correlation_matrix(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | None = None,
        batch: str | Sequence[str] = "observed",
        covariates: Mapping[str, str | float | Sequence[str] | Sequence[float]] | None = None,
        gene_list: Sequence[str] | None = None,
        correlation_type: str = "spearman",
        n_samples: int = 10,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return the correlations of genes, genes x genes, over the denoised values of all cells and draws.

        A denoised value is a draw of the rate whose Poisson draw the count would be, without zero inflation and for the
        same library in all cells: Gamma(shape theta, mean rho(z, s)), with z ~ q, for "zinb" and "nb". It is rho for
        "poisson", and the mean f(z, s) for "normal".

        Parameters
        ----------
        adata, indices, batch, covariates, gene_list, batch_size, seed
            As in `get_normalized_expression`; but where several batches or values of covariates are asked for, the
            mean is over the correlations under each.
        correlation_type
            "spearman" or "pearson". Pearson's needs memory for some arrays of genes x genes alone, Spearman's for all
            values: 4 bytes for each of genes x cells x draws. A sample of cells, in ``indices``, or ``gene_list``
            makes it less.
        n_samples
            Draws for each cell.

        Returns
        -------
        A table of values in [-1, 1]; NaN for a gene that does not vary.

        Raises
        ------
        RuntimeError, TypeError, ValueError
            As in `get_normalized_expression`.

        Notes
        -----
        This is what scvi-tools computes, but for its ``rna_size_factor``, which multiplies all values, and so changes
        no correlation; for Poisson and normal likelihoods, of which it computes none; for genes and covariates, which
        it does not let choose; and for its memory, several times all values with either kind of correlation.

        Examples
        --------
        >>> import scgen
        >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
        >>> scgen.setup_anndata(adata, batch_key="batch")
        >>> model = scgen.SCVI(adata)
        >>> model.train(max_epochs=2, progress=False)
        >>> model.get_feature_correlation_matrix(gene_list=["gene_1", "gene_5"]).shape
        (2, 2)
        """
        check_choice("correlation_type", correlation_type, ("spearman", "pearson"))
        n_samples = check_draws("n_samples", n_samples)
        asked = Asked.of(self.registry, batch, covariates, gene_list)
        loader = self._loader(adata, indices, batch_size, seed)
        return correlation.correlation_matrix(self.vae, loader, asked, correlation_type, n_samples, seed)

    def get_likelihood_parameters(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | None = None,
        batch: str | Sequence[str] = "observed",
        covariates: Mapping[str, str | float | Sequence[str] | Sequence[float]] | None = None,
        gene_list: Sequence[str] | None = None,
        n_samples: int | None = 1,
        give_mean: bool = False,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """Return the parameters of p(x | z, l, s) of each cell and gene, by name, with z, l ~ q.

        Parameters
        ----------
        adata, indices, batch, covariates, gene_list, batch_size, seed
            As in `get_normalized_expression`; where several batches or values of covariates are asked for, parameters
            are averaged over them.
        n_samples
            Number of draws of the latents; a single one is that of `get_reconstruction_error`. None takes the means of
            q(z | x, s) and q(log l | x, s) instead.
        give_mean
            Whether to average over the draws.

        Returns
        -------
        Arrays (cells, genes) of float32, (n_samples, cells, genes) of several draws: "mean", the mean mu = l rho of the
        counts before zero inflation; "dispersions", the inverse dispersion theta, for "zinb" and "nb"; "dropout", the
        probability of an additional zero, for "zinb"; "scale", the standard deviation, for "normal".

        Raises
        ------
        RuntimeError, TypeError, ValueError
            As in `get_normalized_expression`.

        Notes
        -----
        In SciPy's terms the counts are ``nbinom(theta, theta / (theta + mu))``; with zero inflation, p(0) = pi + (1 -
        pi) nbinom(0) and p(x) = (1 - pi) nbinom(x).

        Examples
        --------
        >>> import scgen
        >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
        >>> scgen.setup_anndata(adata, batch_key="batch")
        >>> model = scgen.SCVI(adata, gene_likelihood="nb")
        >>> model.train(max_epochs=2, progress=False)
        >>> {name: values.shape for name, values in model.get_likelihood_parameters().items()}
        {'mean': (100, 30), 'dispersions': (100, 30)}
        """
        n_samples = None if n_samples is None else check_draws("n_samples", n_samples)
        asked = Asked.of(self.registry, batch, covariates, gene_list)
        loader = self._loader(adata, indices, batch_size, seed, {"give_mean": give_mean})
        return likelihood_parameters(self.vae, loader, asked, n_samples, give_mean, seed)

    def differential_expression(
        self,
        groupby: str | None = None,
        group1: str | Sequence[str] | None = None,
        group2: str | None = None,
        *,
        adata: AnnData | None = None,
        idx1: Sequence[int] | Sequence[bool] | None = None,
        idx2: Sequence[int] | Sequence[bool] | None = None,
        mode: str = "change",
        delta: float = 0.25,
        fdr_target: float = 0.05,
        batch_correction: bool = True,
        n_samples: int = 500,
        n_cells: int = 500,
        key_added: str | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return, for each gene, by how much groups of cells differ in its mean expression, and how sure that is.

        Parameters
        ----------
        groupby, group1, group2
            A column of ``adata.obs``; groups in it, one or several, None for all; the group that each is compared with,
            None for all other cells. Cells without a group (NaN) are left out.
        adata
            Other cells than the model's own.
        idx1, idx2
            Rows or masks of the two groups, instead of ``groupby``; ``idx2=None`` takes all other cells.
        mode
            "change": log2 of the ratio of the groups' mean rho, lfc, and the larger, p, of the probabilities that it is
            above ``delta`` and below ``-delta``: a gene of which little is known is not called for that.
            "vanilla": P(rho_a >= rho_b) for a cell of each group (Lopez et al. 2018).
        delta
            Log2 fold change that is of interest.
        fdr_target
            The largest set of genes with mean(1 - p) up to this is called.
        batch_correction
            True averages over all batches, whatever the groups' own are; False leaves each cell in its own, and with it
            the batches' differences. Other covariates are each cell's own.
        n_samples, n_cells, seed
            Draws of the means; cells sampled of each group; the seed of both.
        key_added
            Where in ``adata.uns`` to write a copy in the form of ``scanpy.tl.rank_genes_groups``, for its plots and
            ``scanpy.get.rank_genes_groups_df``. None writes nothing. Notes say what is in it.

        Returns
        -------
        A row per comparison and gene, by bayes_factor, with "comparison", "group1" and "group2". In mode "change"
        proba_de, proba_not_de, bayes_factor = log p / (1 - p), scale1, scale2 (means of rho), pseudocounts, delta,
        lfc_mean, lfc_median, lfc_std, lfc_min, lfc_max, is_de_fdr_0.05 (as ``fdr_target``);
        in mode "vanilla" proba_m1, proba_m2, bayes_factor, scale1, scale2. In both the counts themselves: raw_mean,
        non_zeros_proportion, and raw_normalized_mean of counts / total, of groups 1 and 2.

        Raises
        ------
        RuntimeError
            If the model is untrained.
        ValueError
            If a column, group or argument is not known or out of its range, or the model is not one of counts.

        Notes
        -----
        The copy that ``key_added`` writes has the fields of Scanpy. "names" are listed by falling "scores". "pvals" are
        1 - p, the posterior probability of an error; in mode "vanilla", p is the larger of the two probabilities.
        "pvals_adj" are the means of these over all genes that are at least as sure, the expected false discovery rate.
        Scores in mode "change" are z scores with the sign of lfc_mean: as in Scanpy, pvals = 2 (1 - Phi(abs(score))).
        Where all draws agree, pvals is 0, and the score is about (abs(lfc_mean) - delta) / lfc_std. So scores rank also
        the surest genes. Scores in mode "vanilla" are Bayes factors, plus the log2 fold change where p is 1.

        A draw of a group's mean weighs its cells at random and takes z from q, and is spread until it varies by no less
        than the standard error of the counts: the decoder's weights are a point estimate. Of three cells and fewer the
        counts say hardly anything. Means of rho are compared after a pseudocount is added: the 0.9 quantile of the
        larger mean over genes unseen in both groups or, if there are none, one count in the smaller group (Boyeau et
        al. 2023 is the source of the mode).

        Examples
        --------
        >>> import scgen
        >>> adata = scgen.simulate_cells(n_cells=200, n_genes=30, seed=0)
        >>> scgen.setup_anndata(adata, batch_key="batch")
        >>> model = scgen.SCVI(adata)
        >>> model.train(max_epochs=10, progress=False)
        >>> table = model.differential_expression("cell_type", "type_1", "type_2", key_added="rank_genes_groups")
        >>> table.shape, table["comparison"].unique().tolist()
        ((30, 22), ['type_1 vs type_2'])
        """
        settings = differential_expression.Settings(mode, delta, fdr_target, n_samples, n_cells, seed)
        asked = groupby, group1, group2, idx1, idx2
        return differences.compared(self, settings, asked, adata, batch_correction, key_added)

    def posterior_predictive_sample(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | None = None,
        batch: str | None = None,
        covariates: Mapping[str, str | float] | None = None,
        n_samples: int = 1,
        batch_size: int = 256,
        seed: int = 0,
    ) -> sparse.csr_matrix | list[sparse.csr_matrix]:
        """Return counts that the model could have seen instead: x ~ p(x | z, l, s) with z, l ~ q.

        Parameters
        ----------
        adata, indices, batch_size, seed
            As in `get_latent_representation`.
        batch
            None for each cell's own, or a name.
        covariates
            As in `get_normalized_expression`, but one value of each.
        n_samples
            Number of matrices; more than one are returned as a list.

        Returns
        -------
        (n, G) in CSR form, or ``n_samples`` of them.
        """
        n_samples = check_draws("n_samples", n_samples)
        condition = one_condition(self.registry, batch, covariates)
        loader = self._loader(adata, indices, batch_size, seed)
        return sampling.posterior_predictive(self.vae, loader, condition, n_samples, seed)

    def sample_prior(
        self,
        n: int = 1000,
        batch: str | None = None,
        *,
        covariates: Mapping[str, str | float] | None = None,
        seed: int = 0,
    ) -> AnnData:
        """Return new cells: z ~ p(z), log l ~ p(log l | s), x ~ p(x | z, l, s).

        Parameters
        ----------
        n
            Number of cells.
        batch
            Name of their batch; None draws batches evenly.
        covariates
            As in `posterior_predictive_sample`. Those not named are drawn evenly too, continuous ones are at their
            mean; so are labels, where the model reads them.
        seed
            Seed of all draws.

        Returns
        -------
        AnnData that the model can be asked about: counts in ``X``, and in the layer that the model reads; in ``obs``
        the batch, labels, covariates and size factors, as far as it reads them, under the names that they have in its
        own AnnData; z in ``obsm["z"]`` and l, (n, 1), in ``obsm["library"]``. ``obs["library"]`` is l, too, unless the
        model reads a column of that name.

        Examples
        --------
        >>> import scgen
        >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
        >>> scgen.setup_anndata(adata, batch_key="batch")
        >>> model = scgen.SCVI(adata)
        >>> model.train(max_epochs=2, progress=False)
        >>> sample = model.sample_prior(50, batch="batch_1")
        >>> sample.shape, sample.obs.columns.tolist(), bool(model.get_elbo(sample) < 0)
        ((50, 30), ['library', 'batch'], True)
        """
        self.require_training()
        condition = one_condition(self.registry, batch, covariates)
        return sampling.prior_sample(self.vae, self.registry, n, condition, seed)

    def query(
        self, adata: AnnData, *, layer: str | None = None, batch_key: str | None = None, min_overlap: float = 0.5
    ) -> queries.Query:
        """Return new cells mapped onto this model, which stays as it is: of any batches, and not of all genes.

        Genes are found by name, or by whichever identifier in ``adata.var`` of both finds most; others are ignored.
        Genes that were not measured are no zeros: the encoder reads what the decoder expects of them, and all answers
        are about those that were. A batch that the model has not seen is taken for the mean of those it has, until
        `Query.train` fits its own effect.

        Parameters
        ----------
        adata
            New cells, raw counts; need not be set up.
        layer, batch_key
            Where counts and batch are, if not where the model has its own.
        min_overlap
            Share of the model's genes that must be there.

        Returns
        -------
        A `Query`: its embedding, labels, typicality, and a model of its cells.

        Notes
        -----
        The default training mixes batches early; a reference that is made to transfer labels from does it better with
        ``train(kl_start=0)``, which mixes them less (benchmarks/RESULTS.md).

        Raises
        ------
        RuntimeError
            If the model is untrained.
        ValueError
            If too few genes are there, or ``adata`` is not what `setup_anndata` would take.
        """
        with self.vae.occupied():
            return queries.mapped(self, adata, layer, batch_key, min_overlap)

    def view_anndata_setup(self, adata: AnnData | None = None) -> pd.DataFrame:
        """Return what the model reads, and where, as a table: counts, cells, genes, batches and further columns.

        Parameters
        ----------
        adata
            Other cells than the model's own.

        Returns
        -------
        A row for each part that is read: "where" it is in ``adata``, and "what" is there. Names of batches and labels
        have their numbers of cells behind them.

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

        A crash at any moment leaves either the old model or the new one. Several processes may save to one folder, and
        load from it, at the same time: the last one to finish replaces the others' models.

        Raises
        ------
        FileExistsError
            If a model is there and ``overwrite`` is false.
        """
        with self.vae.occupied():
            files.save(self, folder, overwrite)

    @classmethod
    def load(cls, folder: str | Path, adata: AnnData | None = None) -> "Model":
        """Return the model that `save` wrote, ready to answer questions about ``adata``.

        Parameters
        ----------
        folder
            Where it was saved.
        adata
            The cells it was trained on, or others; need not be set up. None loads the weights alone; questions then
            need ``adata=``.

        Raises
        ------
        scgen.storage.ModelFileError
            If the folder holds no model, or a file is damaged, altered, or of another class or format.
        ValueError
            If ``adata`` does not fit the model.
        """
        return files.load(cls, folder, adata)[0]

    def load_query(self, folder: str | Path, adata: AnnData) -> queries.Query:
        """Return the query that `Query.save` wrote, mapped onto this model: its answers are those that it gave.

        Parameters
        ----------
        folder
            Where it was saved.
        adata
            The new cells. ``SCVI.load(folder)`` loads the model of the query alone, also without cells.

        Raises
        ------
        scgen.storage.ModelFileError
            If the folder holds no query, or as in `load`.
        ValueError
            If it is a query of another reference, or of this one before it was trained again, or if ``adata`` does not
            fit.

        Examples
        --------
        >>> model.query(new).save("query/")  # doctest: +SKIP
        >>> query = model.load_query("query/", new)  # doctest: +SKIP
        """
        return queries.load(self, folder, adata)

    def require_training(self) -> None:
        """Raise RuntimeError if the model is untrained."""
        if not self.is_trained:
            raise RuntimeError("the model is untrained: call model.train() first.")

    def _loader(self, adata, indices, batch_size: int, seed: int = 0, flags: Mapping | None = None) -> CellLoader:
        return loaders.of_question(self, adata, indices, batch_size, seed, flags)
