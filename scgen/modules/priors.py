"""Priors p(z) and p(log l | s): modules that take the cells and the posterior, which some of them use."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from scgen.data.cells import Cells
from scgen.distributions import DiagonalNormal, FlowDistribution, GaussianMixture
from scgen.modules.flows import MaskedAutoregressiveFlow
from scgen.seeding import generator

#: Weight of the pooled library sizes in a batch's prior, in cells. Small batches are shrunk towards the pool.
SHRINKAGE = 10.0


class StandardNormalPrior(nn.Module):
    """p(z) = N(0, I)."""

    def __init__(self, n_latent: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_latent, dtype=torch.float32))
        self.register_buffer("variance", torch.ones(n_latent, dtype=torch.float32))

    def forward(self, cells: Cells, posterior: nn.Module) -> DiagonalNormal:
        return DiagonalNormal(self.mean, self.variance)


class MixturePrior(nn.Module):
    """p(z) = sum_k w_k N(z; m_k, diag v_k), with learned weights, means and variances.

    Parameters
    ----------
    n_latent, n_components
        d and the number of Gaussians K. At the start they are narrow and differ only slightly, in their means.
    """

    def __init__(self, n_latent: int, n_components: int):
        super().__init__()
        means = torch.empty(n_components, n_latent, dtype=torch.float32)
        self.means = nn.Parameter(0.1 * means.normal_(generator=generator(means.device)))
        self.log_scales = nn.Parameter(torch.full_like(means, -1.0))
        self.logits = nn.Parameter(torch.zeros(n_components, dtype=torch.float32))

    def forward(self, cells: Cells, posterior: nn.Module) -> GaussianMixture:
        variance = (2 * self.log_scales).exp().clamp(min=1e-8)
        return GaussianMixture(self.logits, DiagonalNormal(self.means, variance))


class VampPrior(nn.Module):
    """p(z) = sum_k w_k q(z | u_k, s_k), the Gaussian posteriors of K learned pseudo-cells (Tomczak & Welling 2018).

    The Gaussians have independent components, without any flow. The encoder is passed to each call. It runs in
    evaluation mode, without dropout and without updates of its running statistics.

    Parameters
    ----------
    n_genes, n_components
        G and K.
    n_categories, n_continuous
        Number of categorical covariates, including the batch, and of continuous covariates.
    log_input
        Whether the encoder reads log(1 + x); u_k is then positive.
    """

    def __init__(self, n_genes: int, n_components: int, n_categories: int, n_continuous: int, log_input: bool):
        super().__init__()
        self.log_input, self.n_components = log_input, n_components
        # log u, or u itself. softplus(log u) = log(1 + u).
        self.pseudo_inputs = nn.Parameter(torch.zeros(n_components, n_genes, dtype=torch.float32))
        self.logits = nn.Parameter(torch.zeros(n_components, dtype=torch.float32))
        self.register_buffer("categories", torch.zeros(n_components, n_categories, dtype=torch.int64))
        self.register_buffer("continuous", torch.zeros(n_components, n_continuous, dtype=torch.float32))
        self._kept: GaussianMixture | None = None

    def gene_axes(self) -> dict[str, int]:
        """Return the axis of the genes of the pseudo-inputs: see `VAE.gene_axes`."""
        return {"pseudo_inputs": 1}

    def category_codes(self) -> Tensor:
        """Return the codes (K, columns) of batch and covariates that the pseudo-inputs have."""
        return self.categories

    def start_at(self, cells: Cells) -> None:
        """Set the pseudo-inputs to K cells. They keep the covariates of these cells."""
        x = cells.counts.to_dense()
        with torch.no_grad():
            # A pseudo-input nearer to 0 would hardly have a gradient.
            self.pseudo_inputs.copy_((x + 0.01).log() if self.log_input else x)
            self.categories.copy_(torch.cat([cells.batch[:, None], cells.categorical], 1))
            self.continuous.copy_(cells.continuous)

    def train(self, mode: bool = True) -> "VampPrior":
        """Start or end training, and drop the cached mixture. A question begins with ``eval``."""
        self._kept = None
        return super().train(mode)

    def forward(self, cells: Cells, posterior: nn.Module) -> GaussianMixture:
        kept = torch.is_inference_mode_enabled()  # in a question, compute it once for all cells
        if kept and self._kept is not None:
            return self._kept
        inputs = softplus(self.pseudo_inputs) if self.log_input else self.pseudo_inputs
        batch, categorical = self.categories[:, 0], self.categories[:, 1:]
        pseudo = Cells(
            counts=inputs,
            library=inputs[:, :1],
            batch=batch,
            labels=batch,
            categorical=categorical,
            continuous=self.continuous,
            index=batch,
        )
        training = posterior.training
        posterior.eval()
        found = GaussianMixture(self.logits, posterior.gaussian_at(inputs, pseudo))
        posterior.train(training)
        self._kept = found if kept else None
        return found


class FlowPrior(StandardNormalPrior):
    """p(z): a standard normal transformed by a learned masked autoregressive flow, which starts as the identity.

    Parameters
    ----------
    n_latent, n_flows
        d and the number of steps of the flow.
    """

    def __init__(self, n_latent: int, n_flows: int = 4):
        super().__init__(n_latent)
        self.flow = MaskedAutoregressiveFlow(n_latent, 0, n_flows)

    def forward(self, cells: Cells, posterior: nn.Module) -> FlowDistribution:
        return FlowDistribution(super().forward(cells, posterior), self.flow, self.mean.new_zeros(1, 0))


class LibraryPrior(nn.Module):
    """p(log l | s) = N(m_s, v_s), fitted to the logarithms of the training cells' totals.

    Parameters
    ----------
    n_batches
        Number of batches B.
    """

    def __init__(self, n_batches: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_batches, dtype=torch.float32))
        self.register_buffer("variance", torch.ones(n_batches, dtype=torch.float32))

    def fit(self, library: Tensor, batch: Tensor) -> None:
        """Fit mean and variance of each batch, shrunk towards those of all cells: (n m_b + 10 m) / (n + 10).

        Parameters
        ----------
        library
            (N, 1) logarithms of the totals.
        batch
            (N,) codes; a batch without cells gets the pooled values.
        """
        library = library.double().flatten()
        n = torch.bincount(batch, minlength=len(self.mean)).double()

        def per_batch(values: Tensor) -> Tensor:
            sums = torch.zeros_like(n).index_add_(0, batch, values)
            return sums / n.clamp(min=1)

        def shrunk(values: Tensor, pool: Tensor) -> Tensor:
            return (n * values + SHRINKAGE * pool) / (n + SHRINKAGE)

        mean = per_batch(library)
        variance = per_batch((library - mean[batch]) ** 2)
        self.mean.copy_(shrunk(mean, library.mean()))
        self.variance.copy_(shrunk(variance, library.var(correction=0)).clamp(min=1e-4))

    def forward(self, cells: Cells, posterior: nn.Module) -> DiagonalNormal:
        return DiagonalNormal(self.mean[cells.batch, None], self.variance[cells.batch, None])
