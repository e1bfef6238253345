"""SCVI, the model of Lopez et al. (2018). Its parts are chosen by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scgen.analysis import inference
from scgen.arguments import (
    check_choice,
    check_draws,
    check_flag,
    check_memory,
    check_number,
    check_seed,
    check_whole,
    set_fields,
)
from scgen.data.registry import Registry
from scgen.models import loaders
from scgen.models.expression import ExpressionModel
from scgen.models.interop import scvi_tools
from scgen.modules.decoders import CountDecoder, Dispersion, GaussianDecoder
from scgen.modules.flows import InverseAutoregressiveFlow, PlanarFlow
from scgen.modules.networks import CovariateLinear
from scgen.modules.posteriors import (
    FlowPosterior,
    GaussianPosterior,
    LibraryPosterior,
    ObservedLibrary,
)
from scgen.modules.priors import FlowPrior, LibraryPrior, MixturePrior, StandardNormalPrior, VampPrior
from scgen.modules.vae import VAE

#: The last is for normalised values and has a decoder of its own; the others are for counts.
LIKELIHOODS = ("zinb", "nb", "poisson", "normal")
DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")
#: The flows that bend q(z | x, s), and what n_flows=None and n_components=None stand for.
FLOWS = {"planar": (PlanarFlow, 8), "iaf": (InverseAutoregressiveFlow, 4)}
N_COMPONENTS = {"mog": 20, "vamp": 50}
POSTERIORS, PRIORS = ("normal", *FLOWS), ("normal", *N_COMPONENTS, "flow")

#: What the arguments take: numbers from 1 to these, flags, names. `TAKERS` are numbers that only some names take.
SIZES = {"n_latent": 100_000, "n_hidden": 100_000, "n_layers": 100, "n_flows": 100, "n_components": 100_000}
FLAGS = ("use_observed_lib_size", "encode_covariates", "library_residual")
CHOICES = {"gene_likelihood": LIKELIHOODS, "dispersion": DISPERSIONS, "posterior": POSTERIORS, "prior": PRIORS}
TAKERS = {"n_flows": ("posterior", FLOWS), "n_components": ("prior", N_COMPONENTS)}


@dataclass(frozen=True)
class Arguments:
    """The settings of `SCVI`, whose documentation describes each; all are checked.

    Those with a default are not in the files of older models, which were made with these values.
    """

    n_latent: int
    n_hidden: int
    n_layers: int
    dropout_rate: float
    gene_likelihood: str
    dispersion: str
    use_observed_lib_size: bool
    encode_covariates: bool
    seed: int
    library_residual: bool = True
    posterior: str = "normal"
    n_flows: int | None = None
    prior: str = "normal"
    n_components: int | None = None

    def __post_init__(self):
        plain = {name: check_flag(name, getattr(self, name)) for name in FLAGS}
        plain |= {name: check_choice(name, getattr(self, name), known) for name, known in CHOICES.items()}
        for name, most in SIZES.items():
            if (value := getattr(self, name)) is not None or name not in TAKERS:
                plain[name] = check_whole(name, value, 1, most)
        plain["dropout_rate"] = check_number(
            "dropout_rate", self.dropout_rate, "a number from 0 to below 1", least=0, below=1
        )
        plain["seed"] = check_seed(self.seed)
        for name, (of, takers) in TAKERS.items():
            value, choice = getattr(self, name), getattr(self, of)
            if value is not None and choice not in takers:
                raise ValueError(f"{name}={value!r} is for {of}={' or '.join(takers)}, not for {of}={choice!r}.")
        set_fields(self, plain)


class SCVI(ExpressionModel):
    r"""Variational auto-encoder of counts with two latents: the biological state z and the library size l.

    .. math::
        z_n \sim \sum_k w_k N(m_k, v_k), \quad \log l_n \sim N(m_{s_n}, v_{s_n}), \quad
        \rho_n = \mathrm{softmax} f(z_n, s_n), \quad x_{ng} \sim \mathrm{ZINB}(l_n \rho_{ng}, \theta_g, \pi_{ng})

    The posteriors q(z | x, s) and q(log l | x, s) are Gaussian and conditioned on the batch s. The components of p(z)
    are the posteriors of learned pseudo-cells; the model of Lopez et al. has one component, N(0, I).

    Parameters
    ----------
    adata
        Cells x genes, set up by `setup_anndata`.
    n_latent
        Number of dimensions of z.
    n_hidden, n_layers
        Width and number of the hidden layers, in the encoders and in the decoder.
    dropout_rate
        Share of the encoders' hidden units dropped in training.
    gene_likelihood
        "zinb", "nb" or "poisson" for counts; "normal" for normalised values. "normal" learns a standard deviation per
        gene and a mean that is linear in the last layer, and has no library size.
    dispersion
        What theta depends on: "gene", "gene-batch", "gene-label" or "gene-cell".
    use_observed_lib_size
        Whether l is the cell's total count, as in scvi-tools by default, instead of being inferred.
    encode_covariates
        Whether the encoders see batch and covariates; the decoder always does.
    library_residual
        True infers l as a correction of the cell's total count. False lets the network predict l without it, as in the
        paper.
    posterior
        q(z | x, s): "normal" is a Gaussian with independent components; "planar" and "iaf" transform this Gaussian by a
        planar or an inverse autoregressive flow.
    n_flows
        Number of steps of that flow; None uses 8 for "planar" and 4 for "iaf".
    prior
        p(z): "vamp" is a mixture of the Gaussian posteriors, without any flow, of learned pseudo-cells (Tomczak &
        Welling 2018). "mog" is a mixture of Gaussians; if its components are meant as clusters, use
        ``train(kl_start=4)``. `get_cluster_probs` returns the probabilities of the components of both. "flow" is a
        masked autoregressive flow of 4 steps. "normal" is N(0, I), as in the paper and in scvi-tools. All but "normal"
        are learned.
    n_components
        Number of components of "mog" and "vamp"; None uses 20 and 50.
    seed
        Seed of the initial weights.

    Raises
    ------
    ValueError
        If an argument is out of its range, if `setup_anndata` was not called or the data have changed since and no
        longer fit, or if a count likelihood is chosen for data set up with ``counts=False``.

    References
    ----------
    Lopez et al., Deep generative modeling for single-cell transcriptomics, Nature Methods 15 (2018) 1053.
    Tomczak & Welling, VAE with a VampPrior, AISTATS 2018.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
    >>> scgen.setup_anndata(adata, batch_key="batch")
    >>> model = scgen.SCVI(adata, n_latent=4)
    >>> model.train(max_epochs=2, progress=False)
    >>> model.get_latent_representation().shape
    (100, 4)
    """

    Arguments = Arguments

    def __init__(
        self,
        adata: AnnData,
        *,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        gene_likelihood: str = "zinb",
        dispersion: str = "gene",
        use_observed_lib_size: bool = False,
        encode_covariates: bool = True,
        library_residual: bool = True,
        posterior: str = "normal",
        n_flows: int | None = None,
        prior: str = "vamp",
        n_components: int | None = None,
        seed: int = 0,
    ):
        arguments = Arguments(
            n_latent,
            n_hidden,
            n_layers,
            dropout_rate,
            gene_likelihood,
            dispersion,
            use_observed_lib_size,
            encode_covariates,
            seed,
            library_residual,
            posterior,
            n_flows,
            prior,
            n_components,
        )
        registry = Registry.of(adata, labels=dispersion == "gene-label")
        self._check_memory(registry, arguments)
        super().__init__(adata, registry, arguments)

    @classmethod
    def from_scvi_tools(cls, folder: str | Path, adata: AnnData | None = None, *, prefix: str = "") -> Self:
        """Load a model that scvi-tools (1.0 or later) saved. With its weights, it gives the same numbers as scvi-tools.

        No code in the file is run: only containers, tensors and arrays are made from its pickle. The training history
        is not read.

        Parameters
        ----------
        folder
            Where scvi-tools' ``model.save(folder)`` wrote ``model.pt``.
        adata
            The cells that the model was trained on, or others, as in `load`; `setup_anndata` need not have been called.
            Without cells, the "average" of a continuous covariate is 0 instead of its mean, and `sample_prior` does not
            work for a model with observed library sizes, because scvi-tools fits no prior to them.
        prefix
            The prefix that the model was saved with.

        Notes
        -----
        The numbers differ if the model predicts a library size below one count, as a barely trained model may, or a log
        theta beyond 18.4: scgen limits both.

        Raises
        ------
        scgen.storage.ModelFileError
            If there is no model, if the file is damaged or holds other kinds of objects outside its history, or if
            scgen has no such model: a class other than SCVI, ``gene_likelihood="normal"``, layer normalisation and so
            on.
        ValueError
            If ``adata`` does not fit the model.

        Examples
        --------
        >>> model = scgen.SCVI.from_scvi_tools("scvi_model/", adata)  # doctest: +SKIP
        """
        return scvi_tools.load(cls, folder, adata, prefix)

    def get_cluster_probs(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        n_samples: int = 25,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return the probability, for each cell, that z comes from each component of the prior.

        The prior is a mixture for ``prior="mog"`` and "vamp". The probability of component k is
        E_q [w_k N(z; m_k, v_k) / p(z)], a mean over draws z ~ q(z | x, s).

        Parameters
        ----------
        adata, indices, batch_size, seed
            As in `get_latent_representation`.
        n_samples
            Number of draws of z.

        Returns
        -------
        A table of cells x components, with columns "0", "1" and so on; rows sum to 1.

        Raises
        ------
        RuntimeError
            If the model is untrained.
        ValueError
            If the prior is not a mixture, or as `get_latent_representation`.

        Examples
        --------
        >>> model = scgen.SCVI(adata, prior="mog", n_components=8)  # doctest: +SKIP
        >>> model.train(kl_start=4)  # doctest: +SKIP
        >>> probs = model.get_cluster_probs()  # doctest: +SKIP
        >>> adata.obsm["scgen_cluster_probs"] = probs  # doctest: +SKIP
        >>> adata.obs["scgen_cluster"] = probs.idxmax(axis=1).astype("category")  # doctest: +SKIP
        """
        prior = self.arguments.prior
        if prior not in N_COMPONENTS:
            raise ValueError(
                f'prior="{prior}" has no components. For clusters, use SCVI(adata, prior="mog") and train(kl_start=4).'
            )
        n_samples = check_draws("n_samples", n_samples)
        loader = loaders.of_question(self, adata, indices, batch_size, seed)
        probs = inference.cluster_probs(self.vae, loader, n_samples, seed)
        names = (self.adata if adata is None else adata).obs_names[loader.index]
        return pd.DataFrame(probs, index=names, columns=[str(k) for k in range(probs.shape[1])])

    @classmethod
    def _check_memory(cls, registry: Registry, arguments: Arguments) -> None:
        """Raise MemoryError if the weights, their gradients and the optimiser's moments do not fit into memory."""
        sizes = {name: getattr(arguments, name) or 0 for name in SIZES}
        largest = max(sizes, key=sizes.get)
        if sizes[largest] < 2000:  # fits on any machine, and the check would take a third of the constructor's time
            return
        with torch.device("meta"):
            n_bytes = 4 * sum(weight.nbytes for weight in cls.build(registry, arguments).parameters())
        check_memory(largest, sizes[largest], n_bytes, "Choose fewer, or model fewer genes.")

    @staticmethod
    def build(registry: Registry, arguments: Arguments) -> VAE:
        """Return the module for these arguments. Only this function turns names into parts."""
        a, setup = arguments, registry.setup
        if a.gene_likelihood != "normal" and not setup.counts:
            raise ValueError(
                f'gene_likelihood="{a.gene_likelihood}" needs counts, but the data were set up with counts=False. Use '
                'SCVI(adata, gene_likelihood="normal"), or set the counts up.'
            )
        if a.gene_likelihood == "normal" and setup.size_factor_key is not None:
            raise ValueError('gene_likelihood="normal" has no library: set the data up without size_factor_key.')
        if a.dispersion == "gene-label" and setup.labels_key is None:
            raise ValueError('dispersion="gene-label" needs labels: setup_anndata(adata, labels_key=...).')

        n_genes, n_continuous = len(registry.genes) + len(registry.missing), len(registry.scaling)
        covariates = (registry.n_categories, n_continuous)
        encoded = covariates if a.encode_covariates else ((), 0)
        counts = a.gene_likelihood != "normal"
        q = GaussianPosterior(n_genes, a.n_latent, a.n_hidden, a.n_layers, a.dropout_rate, *encoded, counts)
        if a.posterior in FLOWS:
            flow, n_steps = FLOWS[a.posterior]
            context = CovariateLinear(a.n_hidden, a.n_hidden, *encoded)
            q = FlowPosterior(q, flow(a.n_latent, a.n_hidden, a.n_flows or n_steps), context)
        n_components = a.n_components or N_COMPONENTS.get(a.prior)
        p = {
            "normal": lambda: StandardNormalPrior(a.n_latent),
            "mog": lambda: MixturePrior(a.n_latent, n_components),
            "vamp": lambda: VampPrior(n_genes, n_components, len(registry.n_categories), n_continuous, counts),
            "flow": lambda: FlowPrior(a.n_latent),
        }[a.prior]()
        posteriors, priors = {"z": q}, {"z": p}
        sizes = (a.n_latent, a.n_hidden, a.n_layers, n_genes, *covariates)
        if not counts:
            return VAE(posteriors, priors, GaussianDecoder(*sizes))
        if a.use_observed_lib_size or setup.size_factor_key is not None:
            posteriors["library"] = ObservedLibrary()
        else:
            posteriors["library"] = LibraryPosterior(n_genes, a.n_hidden, a.dropout_rate, *encoded, a.library_residual)
        priors["library"] = LibraryPrior(len(registry.batches))
        theta = Dispersion(a.dispersion, n_genes, len(registry.batches), len(registry.labels), a.n_hidden)
        decoder = CountDecoder(
            a.gene_likelihood,
            None if a.gene_likelihood == "poisson" else theta,
            *sizes,
            normalised=setup.size_factor_key is None,
            n_missing=len(registry.missing),
        )
        return VAE(posteriors, priors, decoder)
