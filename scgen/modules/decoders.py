"""Decoders p(x | z, l, s): turn draws of the latents into a distribution over the cells' values."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Independent
from torch.nn.functional import embedding, softmax, softplus

from scgen.data.cells import Cells
from scgen.distributions import CellCounts, SeededNormal
from scgen.modules.networks import MLP, WideLinear
from scgen.seeding import generator

#: Library sizes are limited to exp(0) = 1 to exp(18.4) = 1e8 counts, theta to exp(+-18.4).
MAX_LOG = 18.4


class Dispersion(nn.Module):
    """log theta of each gene, or of each gene in each batch, label or cell.

    Parameters
    ----------
    kind
        "gene", "gene-batch", "gene-label" or "gene-cell".
    n_genes, n_batches, n_labels, n_hidden
        Sizes of the table; of the hidden layer, for "gene-cell".
    """

    def __init__(self, kind: str, n_genes: int, n_batches: int, n_labels: int, n_hidden: int):
        super().__init__()
        self.kind = kind
        rows = {"gene": (), "gene-batch": (n_batches,), "gene-label": (n_labels,)}
        if kind == "gene-cell":
            self.head = WideLinear(n_hidden, n_genes)
        else:
            log_theta = torch.empty(*rows[kind], n_genes, dtype=torch.float32)
            self.log_theta = nn.Parameter(log_theta.normal_(generator=generator(log_theta.device)))

    def gene_axes(self) -> dict[str, int]:
        """Return the axis of the genes of each parameter: see `VAE.gene_axes`."""
        return (
            {"head.weight": 0, "head.bias": 0} if self.kind == "gene-cell" else {"log_theta": self.log_theta.dim() - 1}
        )

    def category_rows(self) -> dict[str, str | int]:
        """Return the column whose categories the rows of log theta are of: see `VAE.category_rows`."""
        column = {"gene-batch": "batch", "gene-label": "labels"}.get(self.kind)
        return {"log_theta": column} if column else {}

    def forward(self, h: Tensor, cells: Cells) -> Tensor:
        if self.kind == "gene-cell":
            log_theta = self.head(h)
        elif self.kind == "gene":
            log_theta = self.log_theta
        else:
            # Gradients of indexing are summed in any order and differ between runs. Those of an embedding do not.
            log_theta = embedding(cells.batch if self.kind == "gene-batch" else cells.labels, self.log_theta)
        return log_theta.clamp(-MAX_LOG, MAX_LOG)


class CountDecoder(nn.Module):
    """Counts with mean mu = l rho, where rho = softmax(f(z, s)) sums to 1 over the genes.

    Parameters
    ----------
    likelihood
        "zinb", "nb" or "poisson".
    dispersion
        A `Dispersion`; None for "poisson".
    n_latent, n_hidden, n_layers, n_genes, n_categories, n_continuous
        Sizes, as in `MLP`.
    normalised
        Whether rho sums to 1. False uses rho = softplus(f(z, s)), for size factors, whose unit is arbitrary.
    n_missing
        Number of genes that were not measured, which are the last. The distribution is over the other genes, and l is
        the total of these.
    """

    def __init__(
        self,
        likelihood: str,
        dispersion: Dispersion | None,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        n_genes: int,
        n_categories: Sequence[int] = (),
        n_continuous: int = 0,
        normalised: bool = True,
        n_missing: int = 0,
    ):
        super().__init__()
        self.normalised, self.measured = normalised, slice(0, n_genes - n_missing)
        self.mlp = MLP(n_latent, n_hidden, n_layers, n_categories, n_continuous)
        self.scale = WideLinear(n_hidden, n_genes)
        self.dispersion = dispersion
        self.zi_logits = WideLinear(n_hidden, n_genes) if likelihood == "zinb" else None

    def gene_axes(self) -> dict[str, int]:
        """Return the axis of the genes of each parameter: see `VAE.gene_axes`."""
        heads = ["scale", *(["zi_logits"] if self.zi_logits is not None else [])]
        return {f"{head}.{name}": 0 for head in heads for name in ("weight", "bias")}

    def target(self, cells: Cells) -> Tensor:
        """Return the counts, (n, G), which the likelihood explains."""
        return cells.counts

    def start_at(self, mean: Tensor, variance: Tensor) -> None:
        """Set the initial rho to the mean of the cells' rates, (G,). Their variance is not used.

        theta starts at random around 1. If it starts at the value from the variance, the model learns fine detail first
        and separates cell types less well (benchmarks/NOTES.md).
        """
        mean = mean + 1e-3 * mean.mean()  # a gene that no training cell expresses
        with torch.no_grad():
            self.scale.bias.copy_(mean.log() if self.normalised else mean + torch.log(-torch.expm1(-mean)))

    def expression(self, latents: dict[str, Tensor], cells: Cells, missing: bool = False) -> Tensor:
        """Return rho (..., n, G), the mean count per unit of library size; with ``missing``, (..., n, G + M)."""
        logits = self.scale(self.mlp(latents["z"], cells))
        logits = logits if missing else logits[..., self.measured]
        return softmax(logits, -1) if self.normalised else softplus(logits)

    def expected_missing(self, latents: dict[str, Tensor], cells: Cells) -> Tensor:
        """Return the mean counts of genes that were not measured, (n, M), without zero inflation."""
        rho = self.expression(latents, cells, missing=True)
        unit = rho[..., self.measured].sum(-1, keepdim=True) if self.normalised else 1
        return rho[..., self.measured.stop :] * cells.library.exp() / unit

    def forward(self, latents: dict[str, Tensor], cells: Cells) -> CellCounts:
        h = self.mlp(latents["z"], cells)
        logits, bias = self.scale.product(h), self.scale.bias
        zi_logits = None if self.zi_logits is None else self.zi_logits.product(h)
        zi_bias = None if self.zi_logits is None else self.zi_logits.bias
        log_theta = None if self.dispersion is None else self.dispersion(h, cells)
        if self.n_missing:
            measured = (logits, bias, zi_logits, zi_bias, log_theta)
            measured = (None if part is None else part[..., self.measured].contiguous() for part in measured)
            logits, bias, zi_logits, zi_bias, log_theta = measured
        if not self.normalised:
            # Below -15, softplus(x) equals exp(x) in float32, and the logarithm of softplus would lose digits.
            f = logits + bias
            logits, bias = torch.where(f < -15, f, softplus(f.clamp(min=-15)).log()), torch.zeros_like(bias)
        return CellCounts(
            logits,
            bias,
            self.log_library(latents),
            log_theta,
            zi_logits,
            zi_bias,
            self.normalised,
        )

    @property
    def n_missing(self) -> int:
        """Number of genes that were not measured."""
        return len(self.scale.bias) - self.measured.stop

    def log_library(self, latents: dict[str, Tensor]) -> Tensor:
        """Return log l (..., n, 1), limited to its range."""
        return latents["library"].clamp(0 if self.normalised else -MAX_LOG, MAX_LOG)


class GaussianDecoder(nn.Module):
    """Normalised values x_g ~ N(f_g(z, s), sigma_g^2), with a learned sigma for each gene and no library size.

    Parameters
    ----------
    n_latent, n_hidden, n_layers, n_genes, n_categories, n_continuous
        Sizes, as in `MLP`; ``n_layers=0`` makes f linear in z.
    """

    def __init__(
        self,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        n_genes: int,
        n_categories: Sequence[int] = (),
        n_continuous: int = 0,
    ):
        super().__init__()
        self.mlp = MLP(n_latent, n_hidden, n_layers, n_categories, n_continuous) if n_layers else None
        self.mean = WideLinear(n_hidden if n_layers else n_latent, n_genes)
        self.log_scale = nn.Parameter(torch.zeros(n_genes, dtype=torch.float32))

    def gene_axes(self) -> dict[str, int]:
        """Return the axis of the genes of each parameter: see `VAE.gene_axes`."""
        return {"mean.weight": 0, "mean.bias": 0, "log_scale": 0}

    def target(self, cells: Cells) -> Tensor:
        """Return the values, (n, G), which the likelihood explains; they are in the field ``counts``."""
        return cells.counts

    def start_at(self, mean: Tensor, variance: Tensor) -> None:
        """Set the initial f to the genes' means and sigma to their standard deviations, (G,) each."""
        with torch.no_grad():
            self.mean.bias.copy_(mean)
            self.log_scale.copy_(variance.sqrt().clamp(min=1e-3).log())

    def expression(self, latents: dict[str, Tensor], cells: Cells) -> Tensor:
        """Return the means f(z, s), (..., n, G)."""
        return self.mean(latents["z"] if self.mlp is None else self.mlp(latents["z"], cells))

    def forward(self, latents: dict[str, Tensor], cells: Cells) -> Independent:
        scale = self.log_scale.clamp(-MAX_LOG, MAX_LOG).exp() + 1e-4
        normal = SeededNormal(self.expression(latents, cells), scale, validate_args=False)
        return Independent(normal, 1, validate_args=False)
