"""What models of expression are asked: denoised values, differences between groups, samples."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scgen.analysis import correlation, differential_expression, expression, inference, sampling, thinning
from scgen.analysis.counterfactual import Asked, one_condition
from scgen.analysis.likelihood_parameters import likelihood_parameters
from scgen.arguments import check_choice, check_draws, check_number
from scgen.models import differences
from scgen.models.base import Model


class ExpressionModel(Model):
    """Base of the models whose decoder explains the genes' counts, or their normalised values."""

    def get_latent_library_size(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        give_mean: bool = True,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> np.ndarray:
        """Return l of each cell, (n, 1), in counts: the mean of its log-normal posterior, or a draw from it.

        If the library size is observed, the result is the cell's total count or its size factor. Parameters and errors
        are those of `get_latent_representation`. A model with ``gene_likelihood="normal"`` has no library size: it
        raises ValueError.
        """
        loader = self._loader(adata, indices, batch_size, seed, {"give_mean": give_mean})
        return inference.library_size(self.vae, loader, give_mean, seed)

    def get_thinned_ll(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        held_out: float = 0.1,
        n_samples: int = 100,
        return_mean: bool = True,
        batch_size: int = 64,
        seed: int = 0,
    ) -> float | np.ndarray:
        """Return the log-likelihood of held-out counts of each cell, in nats per cell, given the kept counts.

        Each count is split: x_kept ~ Binomial(x, 1 - held_out) and x_rest = x - x_kept. z and l are inferred from
        x_kept alone. The method returns

        log (1/K) sum_k p(x_rest | x_kept, z_k, l_k, s), z_k, l_k ~ q(. | x_kept, s), K = n_samples.

        Higher is better. Models with different latents, library sizes or count likelihoods can be compared, because the
        split depends only on the cells and the seed. The weights were fitted to all counts of the training cells, so
        use other cells, such as ``indices=model.validation_indices``.

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
            If the model is not a model of counts, an argument is out of its range, or as `get_latent_representation`.

        Notes
        -----
        An observed library size is the total of x_kept; a cell without kept counts is given a total of 1. Size factors
        are multiplied by 1 - held_out. If they were computed from the counts, they contain information about the
        held-out counts. Given z and l, the two parts of Poisson counts are independent. For "nb" and "zinb" they share
        the gene's rate, which is Gamma with shape theta, and the zero inflation. The kept counts therefore say more
        about the rest than z and l do. With l the library size of x_kept,

        p(x_rest | x_kept, z, l, s) p(x_kept | z, l, s) = Binomial(x_rest; x, held_out) p(x | z, l / (1 - held_out), s):

        for "nb", x_rest is negative binomial with shape theta + x_kept.

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

    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
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
            "observed" decodes each cell in its own batch and keeps the batch effect. A name decodes all cells as if
            they came from that batch. A list of names returns the mean over these batches, with equal weights;
            "average" the mean over all batches. ``["observed"]`` means a batch of that name.
        covariates
            The same for further covariates, by name; covariates that are not named are as observed. A continuous
            covariate takes a number in its own unit, or a list of numbers; its "average" is the mean of the model's
            own cells. If several are averaged, the mean is over all combinations of their values, at most 1000.
        library_size
            The library size l of all cells, or "latent" for each cell's own; 1 with ``gene_likelihood="normal"``.
        gene_list
            Genes to return; None for all.
        n_samples, return_mean
            Number of draws of z (and l); whether to average over them.
        weights
            "uniform" or "importance". "importance" weights a cell's draws in proportion to p(x, z, l) / q(z, l | x).
            With more draws, the mean approaches the mean under the true posterior p(z, l | x). Draws that are not
            averaged are resampled with these weights, so some are repeated (Rubin 1987).
        return_numpy
            Whether to return an array instead of a table.
        out
            An array to write to, a minibatch of cells at a time, and to return: a `numpy.memmap`, an h5py dataset, a
            zarr array, or any object with a shape, a dtype and assignment to slices.
        sparse_below
            Values below this are set to zero, and the result is a CSR matrix, whatever ``return_numpy`` is. No dense
            copy of it is made. If draws are not averaged, the result is a list of CSR matrices.
        transform_batch
            scvi-tools' name for ``batch``.

        Returns
        -------
        A table of cells x genes, or an array (n_samples, cells, genes) if draws are not averaged. The values of a cell
        sum to ``library_size`` over all genes. With size factors they are rates per unit of the size factor instead.
        With ``gene_likelihood="normal"`` they are the means f(z, s).

        Raises
        ------
        RuntimeError
            If the model is untrained.
        TypeError
            If an argument is of the wrong type.
        ValueError
            If a batch, covariate, value of a covariate, gene, library size or weight is not known, or if ``out`` has
            another shape, does not hold floats of at least 32 bits, or cannot be written to.

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
        indices: Sequence[int] | np.ndarray | None = None,
        batch: str | Sequence[str] = "observed",
        covariates: Mapping[str, str | float | Sequence[str] | Sequence[float]] | None = None,
        gene_list: Sequence[str] | None = None,
        correlation_type: str = "spearman",
        n_samples: int = 10,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return the correlations between genes of the denoised values of all cells and draws.

        For "zinb" and "nb", a denoised value is a draw of the Poisson rate of the count, without zero inflation and for
        the same library size in all cells: Gamma(shape theta, mean rho(z, s)), with z ~ q. For "poisson" it is rho, and
        for "normal" the mean f(z, s).

        Parameters
        ----------
        adata, indices, batch, covariates, gene_list, batch_size, seed
            As in `get_normalized_expression`. For several batches or values of covariates, the correlations are
            computed under each and then averaged.
        correlation_type
            "spearman" or "pearson". Pearson's needs memory for a few arrays of genes x genes. Spearman's needs 4 bytes
            for each of genes x cells x draws; choose fewer cells with ``indices`` or fewer genes with ``gene_list`` to
            need less.
        n_samples
            Number of draws for each cell.

        Returns
        -------
        A table of genes x genes, with values in [-1, 1]; NaN for a gene that does not vary.

        Raises
        ------
        RuntimeError, TypeError, ValueError
            As in `get_normalized_expression`.

        Notes
        -----
        scvi-tools computes the same correlations. Its ``rna_size_factor`` is not here, because it multiplies all values
        and changes no correlation. scvi-tools has no correlations for Poisson and normal likelihoods, does not let you
        choose genes and covariates, and needs memory for several times all values with either type of correlation.

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
        indices: Sequence[int] | np.ndarray | None = None,
        batch: str | Sequence[str] = "observed",
        covariates: Mapping[str, str | float | Sequence[str] | Sequence[float]] | None = None,
        gene_list: Sequence[str] | None = None,
        n_samples: int | None = 1,
        give_mean: bool = False,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """Return the parameters of p(x | z, l, s) for each cell and gene, by name, with z, l ~ q.

        Parameters
        ----------
        adata, indices, batch, covariates, gene_list, batch_size, seed
            As in `get_normalized_expression`. For several batches or values of covariates, the parameters are
            averaged.
        n_samples
            Number of draws of the latents; one draw is that of `get_reconstruction_error`. None uses the means of
            q(z | x, s) and q(log l | x, s) instead.
        give_mean
            Whether to average over the draws.

        Returns
        -------
        Arrays (cells, genes) of float32, or (n_samples, cells, genes) for several draws. "mean" is the mean mu = l rho
        of the counts before zero inflation; "dispersions" the inverse dispersion theta, for "zinb" and "nb"; "dropout"
        the probability of an additional zero, for "zinb"; "scale" the standard deviation, for "normal".

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
        idx1: Sequence[int] | Sequence[bool] | np.ndarray | None = None,
        idx2: Sequence[int] | Sequence[bool] | np.ndarray | None = None,
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
            ``groupby`` is a column of ``adata.obs``. ``group1`` is a group in it or several; None takes all.
            ``group2`` is the group that each is compared with; None takes all other cells. Cells without a group (NaN)
            are left out.
        adata
            Cells to compare; None uses the model's own cells.
        idx1, idx2
            Rows or masks of the two groups, instead of ``groupby``; ``idx2=None`` takes all other cells.
        mode
            "change" computes lfc, the log2 of the ratio of the groups' mean rho. p is the larger of the probabilities
            P(lfc > delta) and P(lfc < -delta); a gene is therefore not called only because its lfc is uncertain.
            "vanilla" computes P(rho_a >= rho_b) for one cell of each group (Lopez et al. 2018).
        delta
            Smallest log2 fold change of interest.
        fdr_target
            Expected false discovery rate: the largest set of genes with mean(1 - p) up to this value is called.
        batch_correction
            True averages over all batches, whichever batches the groups are from. False decodes each cell in its own
            batch and keeps the batch effect. Other covariates are as observed in each cell.
        n_samples, n_cells, seed
            Number of draws of the means; number of cells sampled from each group; seed of both.
        key_added
            Key of ``adata.uns`` under which to write a copy in the format of ``scanpy.tl.rank_genes_groups``, for
            Scanpy's plots and ``scanpy.get.rank_genes_groups_df``; see Notes. None writes nothing.

        Returns
        -------
        One row per comparison and gene, sorted by bayes_factor: "comparison", "group1", "group2". In mode "change"
        proba_de, proba_not_de, bayes_factor = log p / (1 - p), scale1, scale2 (means of rho), pseudocounts, delta,
        lfc_mean, lfc_median, lfc_std, lfc_min, lfc_max, is_de_fdr_0.05 (as ``fdr_target``);
        in mode "vanilla" proba_m1, proba_m2, bayes_factor, scale1, scale2. In both modes, statistics of the counts of
        groups 1 and 2: raw_mean, non_zeros_proportion, and raw_normalized_mean of counts / total.

        Raises
        ------
        RuntimeError
            If the model is untrained.
        ValueError
            If a column, group or argument is unknown or out of its range, or the model is not a model of counts.

        Notes
        -----
        The copy that ``key_added`` writes has the fields of Scanpy. "names" are sorted by decreasing "scores". "pvals"
        are 1 - p, the posterior probability of an error; in mode "vanilla", p is the larger of the two probabilities.
        "pvals_adj" are the means of pvals over all genes whose pvals are at most as large: the expected false discovery
        rate. Scores in mode "change" are z scores with the sign of lfc_mean: as in Scanpy, pvals = 2 (1 -
        Phi(abs(score))). If all draws agree, pvals is 0 and the score is about (abs(lfc_mean) - delta) / lfc_std, which
        also ranks the most certain genes. Scores in mode "vanilla" are Bayes factors, plus the log2 fold change if p is
        1.

        Mode "change" follows Boyeau et al. (2023). Each draw of a group's mean weights the group's cells at random and
        draws z from q. The decoder's weights are a point estimate, so these draws alone vary too little. They are
        spread until they vary at least as much as the standard error of the counts. With three cells or fewer, the
        counts carry hardly any information. A pseudocount is added to the means of rho before they are compared. It is
        the 0.9 quantile of the larger mean over the genes that neither group expresses. If there are no such genes, it
        is one count in the smaller group.

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
        indices: Sequence[int] | np.ndarray | None = None,
        batch: str | None = None,
        covariates: Mapping[str, str | float] | None = None,
        n_samples: int = 1,
        batch_size: int = 256,
        seed: int = 0,
    ) -> sparse.csr_matrix | list[sparse.csr_matrix]:
        """Return counts drawn from the posterior predictive distribution: x ~ p(x | z, l, s) with z, l ~ q.

        Parameters
        ----------
        adata, indices, batch_size, seed
            As in `get_latent_representation`.
        batch
            Name of a batch; None uses each cell's own.
        covariates
            As in `get_normalized_expression`, but only one value for each covariate.
        n_samples
            Number of matrices; if there are several, they are returned as a list.

        Returns
        -------
        A CSR matrix (n, G), or a list of ``n_samples`` of them.
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
        """Return simulated cells: z ~ p(z), log l ~ p(log l | s), x ~ p(x | z, l, s).

        Parameters
        ----------
        n
            Number of cells.
        batch
            Name of their batch; None draws each cell's batch, all with equal probability.
        covariates
            As in `posterior_predictive_sample`. A categorical covariate that is not named is drawn like the batch, and
            so are the labels if the model reads them. A continuous covariate that is not named is at its mean.
        seed
            Seed of all draws.

        Returns
        -------
        An AnnData that can be passed to the model's methods. The counts are in ``X`` and in the layer that the model
        reads. ``obs`` has the columns that the model reads (batch, labels, covariates, size factors), under the same
        names as in the model's own AnnData. z is in ``obsm["z"]`` and l, (n, 1), in ``obsm["library"]``.
        ``obs["library"]`` is l as well, unless the model reads a column of that name.

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
