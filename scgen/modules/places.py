"""What the models of tissue share: cells with values at J places around them, of which some may be missing."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Independent

from scgen.data.cells import Cells
from scgen.distributions import CellCounts, CellsOfNiches, SeededNormal
from scgen.modules.decoders import MAX_LOG, Dispersion
from scgen.modules.networks import WideLinear


@dataclass(frozen=True, kw_only=True)
class Places(Cells):
    """Cells with the features at J places around them.

    Attributes
    ----------
    features
        (n, J, F) float: counts or other values at each place.
    mask
        (n, J) bool: False where there is no cell. The features there have no influence.
    """

    features: Tensor
    mask: Tensor


class Standardised(nn.Module):
    """The features at each place, or log(1 + counts), minus their mean and divided by their standard deviation.

    Both are averages over all minibatches of the training so far, of all places that are not missing.
    """

    def __init__(self, n_features: int, log_input: bool):
        super().__init__()
        self.log_input = log_input
        self.norm = nn.BatchNorm1d(n_features, momentum=None, affine=False, dtype=torch.float32)

    def forward(self, cells: Places) -> Tensor:
        x = cells.features.log1p() if self.log_input else cells.features
        if self.training:
            with torch.no_grad():
                self.norm(x[cells.mask])
        return (x - self.norm.running_mean) * (self.norm.running_var + self.norm.eps).rsqrt()


class PlaceDecoder(nn.Module):
    """Base class of the decoders p(features | latents, s): the likelihood at each place, given its hidden layer.

    A subclass has a method ``hidden(latents, cells)``, which returns this layer at each place, (..., n, J, H).

    Parameters
    ----------
    likelihood
        "normal", "poisson", "nb" or "zinb". The library size of each place is its total count.
    n_features, n_hidden, n_batches
        F, H and the number of batches.
    """

    def __init__(self, likelihood: str, n_features: int, n_hidden: int, n_batches: int):
        super().__init__()
        self.batch = nn.Parameter(torch.zeros(n_batches, n_hidden, dtype=torch.float32)) if n_batches > 1 else None
        self.mean = WideLinear(n_hidden, n_features)
        normal = likelihood == "normal"
        self.log_scale = nn.Parameter(torch.zeros(n_features, dtype=torch.float32)) if normal else None
        # Values are decoded in standard deviations of the feature, so that their unit does not matter.
        self.register_buffer("unit", torch.ones(n_features, dtype=torch.float32) if normal else None)
        dispersed = likelihood in ("nb", "zinb")
        self.dispersion = Dispersion("gene", n_features, n_batches, 1, n_hidden) if dispersed else None
        self.zi_logits = WideLinear(n_hidden, n_features) if likelihood == "zinb" else None

    def category_rows(self) -> dict[str, str | int]:
        """Return the column whose categories the rows of a parameter are of: see `VAE.category_rows`."""
        return {} if self.batch is None else {"batch": "batch"}

    def target(self, cells: Places) -> Tensor:
        """Return the features at all places, (n, J, F), which the likelihood explains."""
        return cells.features

    def start_at(self, mean: Tensor, variance: Tensor) -> None:
        """Start at the mean and variance of each feature over all places; (J, F) each are those at each place."""
        mean, variance = mean.mean(0), variance.mean(0) + mean.var(0, correction=0)
        with torch.no_grad():
            if self.log_scale is None:
                self.mean.bias.copy_((mean + 1e-3 * mean.mean()).log())
            else:
                self.unit.copy_(torch.where(variance > 0, variance, 1).sqrt())
                self.mean.bias.copy_(mean / self.unit)

    def forward(self, latents: dict[str, Tensor], cells: Places) -> CellsOfNiches:
        h = self.hidden(latents, cells).flatten(-3, -2)  # (..., n J, H): all places, one after the other
        if self.log_scale is not None:
            scale = self.log_scale.clamp(-MAX_LOG, MAX_LOG).exp() + 1e-4
            normal = SeededNormal(self.unit * self.mean(h), self.unit * scale, validate_args=False)
            return CellsOfNiches(Independent(normal, 1, validate_args=False), cells.mask)
        log_library = cells.features.sum(-1).clamp(min=1).log().reshape(-1, 1)
        log_theta = None if self.dispersion is None else self.dispersion(h, cells)
        zi = (None, None) if self.zi_logits is None else (self.zi_logits.product(h), self.zi_logits.bias)
        counts = CellCounts(self.mean.product(h), self.mean.bias, log_library, log_theta, *zi)
        return CellsOfNiches(counts, cells.mask)
