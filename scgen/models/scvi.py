"""SCVI: the model of Lopez et al. (2018), its parts chosen by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from anndata import AnnData

from scgen.analysis import inference
from scgen.arguments import check_choice, check_draws, check_flag, check_memory, check_number, check_seed, check_whole
from scgen.data.registry import Registry
from scgen.models import loaders, scvi_tools
from scgen.models.base import Model
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

LIKELIHOODS = ("zinb", "nb", "poisson", "normal")
DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")
#: The flows that bend q(z | x, s), and what n_flows=None and n_components=None stand for.
FLOWS = {"planar": (PlanarFlow, 8), "iaf": (InverseAutoregressiveFlow, 4)}
N_COMPONENTS = {"mog": 20, "vamp": 50}
POSTERIORS, PRIORS = ("normal", *FLOWS), ("normal", *N_COMPONENTS, "flow")

#: What each argument takes: numbers from 1 to this, flags, names; and numbers that only some choices of another take.
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
        for name, value in plain.items():
            object.__setattr__(self, name, value)


class SCVI(Model):
    r"""Variational auto-encoder of counts with two latents: the biological state z and the library size l.

    .. math::
        z_n \sim N(0, I), \quad \log l_n \sim N(m_{s_n}, v_{s_n}), \quad
        \rho_n = \mathrm{softmax} f(z_n, s_n), \quad x_{ng} \sim \mathrm{ZINB}(l_n \rho_{ng}, \theta_g, \pi_{ng})

    with posteriors q(z | x, s) and q(log l | x, s), both Gaussian and conditioned on the batch s.

    Parameters
    ----------
    adata
        Cells x genes, set up by `setup_anndata`.
    n_latent
        Width of z.
    n_hidden, n_layers
        Width and number of the hidden layers, of encoder and decoder alike.
    dropout_rate
        Share of the encoders' hidden units dropped in training.
    gene_likelihood
        "zinb", "nb" or "poisson" for counts; "normal" for normalised values, with a learned deviation per gene, a mean
        linear in the last layer and no library.
    dispersion
        Whose theta is: "gene", "gene-batch", "gene-label" or "gene-cell".
    use_observed_lib_size
        True takes a cell's total for l, as scvi-tools does by default, instead of inferring it.
    encode_covariates
        Whether the encoders see batch and covariates; the decoder always does.
    library_residual
        True infers l by correcting the cell's total; False leaves it to the network to find, as in the paper.
    posterior
        q(z | x, s): "normal", a Gaussian with independent components; "planar" or "iaf", one that a planar or an
        inverse autoregressive flow bends.
    n_flows
        Steps of that flow; None stands for 8 of "planar" and 4 of "iaf".
    prior
        p(z): "normal", N(0, I); "mog", a mixture of Gaussians, whose components `get_cluster_probs` tells; "vamp", a
        mixture of the posterior's Gaussians, before any flow, of cells that are learned; "flow", a masked
        autoregressive flow of 4 steps. All but the first are learned.
    n_components
        Components of "mog" and "vamp"; None stands for 20 and 50.
    seed
        Seed of the initial weights.

    Raises
    ------
    ValueError
        If an argument is out of its range, the data are not set up or no longer fit, or a count likelihood is asked of
        data set up with ``counts=False``.

    References
    ----------
    Lopez et al., Deep generative modeling for single-cell transcriptomics, Nature Methods 15 (2018) 1053.

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
        prior: str = "normal",
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
    def from_scvi_tools(cls, folder: str | Path, adata: AnnData | None = None, *, prefix: str = "") -> "SCVI":
        """Return a model that scvi-tools (from 1.0 on) saved, with its weights: it gives scvi-tools' numbers.

        Nothing of the file is run: of what its pickle names, only containers, tensors and arrays are made. The history
        of its training is left out.

        Parameters
        ----------
        folder
            Where scvi-tools' ``model.save(folder)`` wrote ``model.pt``.
        adata
            The cells it was trained on, or others, as in `load`; need not be set up. Without them, a model with
            observed library sizes cannot answer `sample_prior`, since scvi-tools fits no prior to these, and
            "average" of a continuous covariate stands for 0 instead of its mean.
        prefix
            The prefix that it was saved with.

        Notes
        -----
        The numbers differ where a model says that a cell's library is below one count, as hardly trained ones do, or
        that log theta is beyond 18.4: here these are bounds.

        Raises
        ------
        scgen.storage.ModelFileError
            If there is no model, the file is damaged, names anything else outside of the history, or the model has no
            equal here: another class than SCVI, ``gene_likelihood="normal"``, layer normalisation and the like.
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
        indices: Sequence[int] | None = None,
        n_samples: int = 25,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return, for each cell, the probabilities that z comes from each component of the prior's mixture.

        E_q [w_k N(z; m_k, v_k) / p(z)], the mean over draws z ~ q(z | x, s), for ``prior="mog"`` and "vamp".

        Parameters
        ----------
        adata, indices, batch_size, seed
            As in `get_latent_representation`.
        n_samples
            Draws of z.

        Returns
        -------
        Cells x components, named "0", "1" and so on; rows sum to 1.

        Raises
        ------
        RuntimeError
            If the model is untrained.
        ValueError
            If the prior is no mixture, or as `get_latent_representation`.

        Examples
        --------
        >>> probs = model.get_cluster_probs()  # doctest: +SKIP
        >>> adata.obsm["scgen_cluster_probs"] = probs  # doctest: +SKIP
        >>> adata.obs["scgen_cluster"] = probs.idxmax(axis=1).astype("category")  # doctest: +SKIP
        """
        prior = self.arguments.prior
        if prior not in N_COMPONENTS:
            raise ValueError(f'prior="{prior}" has no components. Train SCVI(adata, prior="mog") for clusters.')
        n_samples = check_draws("n_samples", n_samples)
        loader = loaders.of_question(self, adata, indices, batch_size, seed)
        probs = inference.cluster_probs(self.vae, loader, n_samples, seed)
        names = (self.adata if adata is None else adata).obs_names[loader.index]
        return pd.DataFrame(probs, index=names, columns=[str(k) for k in range(probs.shape[1])])

    @classmethod
    def _check_memory(cls, registry: Registry, arguments: Arguments) -> None:
        """Raise MemoryError where the weights, their gradients and the moments of these have no room."""
        sizes = {name: getattr(arguments, name) or 0 for name in SIZES}
        largest = max(sizes, key=sizes.get)
        if sizes[largest] < 2000:  # no matter on any machine, and to look takes a third of the constructor's time
            return
        with torch.device("meta"):
            n_bytes = 4 * sum(weight.nbytes for weight in cls.build(registry, arguments).parameters())
        check_memory(largest, sizes[largest], n_bytes, "Choose fewer, or model fewer genes.")

    @staticmethod
    def build(registry: Registry, arguments: Arguments) -> VAE:
        """Return the module for these arguments: here, and only here, names become parts."""
        a, setup = arguments, registry.setup
        if a.gene_likelihood != "normal" and not setup.counts:
            raise ValueError(
                f'gene_likelihood="{a.gene_likelihood}" needs counts, but the data were set up with counts=False. Use '
                'SCVI(adata, gene_likelihood="normal"), or setup_anndata on the counts.'
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
