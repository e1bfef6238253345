"""The validation bound, the best weights so far, and the search for values that are not finite."""

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from scgen.data.loader import CellLoader
from scgen.seeding import seeded


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite.

    Attributes
    ----------
    cells, genes
        Rows and columns of the values that are not finite.
    """

    def __init__(self, cells: np.ndarray, genes: np.ndarray, n_cells: int, n_genes: int):
        self.cells, self.genes = cells, genes
        super().__init__(
            f"the loss is not finite: {len(cells)} of the minibatch's {n_cells} cells and {len(genes)} of {n_genes} "
            "genes are to blame"
        )

    def names(self, cells: pd.Index, genes: list[str], learning_rate: float) -> str:
        """Return the message with the names of cells and genes in it, and what to do."""
        of_cells = ", ".join(str(cells[i]) for i in self.cells[:5]) or "none by itself"
        of_genes = ", ".join(genes[i] for i in self.genes[:5]) or "none by itself"
        return (
            f"{self}. Cells: {of_cells}; genes: {of_genes}. The weights of the last good epoch are kept. If there is "
            f"nothing wrong with these values, lower learning_rate (now {learning_rate:g})."
        )


@dataclass
class Best:
    """The best and the last finite weights of a module.

    Attributes
    ----------
    first_epoch
        Epochs before this one are not compared.
    patience
        Number of epochs without a better value after which to stop; None never stops.
    """

    vae: nn.Module
    first_epoch: int
    patience: int | None
    value: float = -math.inf
    epoch: int = 0
    weights: dict[str, Tensor] | None = None
    last: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        self.last = copy.deepcopy(self.vae.state_dict())

    def stop_after(self, epoch: int, value: float) -> bool:
        """Record an epoch's validation value, and return whether to stop."""
        self.last = copy.deepcopy(self.vae.state_dict())
        if epoch >= self.first_epoch and value > self.value:
            self.value, self.epoch, self.weights = value, epoch, self.last
        return self.has_stopped(epoch)

    def has_stopped(self, epoch: int) -> bool:
        """Return whether the value has not increased for ``patience`` epochs."""
        return self.patience is not None and self.weights is not None and epoch - self.epoch >= self.patience

    def state_dict(self) -> dict:
        """Return the best value so far, its epoch, and both sets of weights."""
        return {"value": self.value, "epoch": self.epoch, "weights": self.weights, "last": self.last}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned."""
        self.value, self.epoch = state["value"], state["epoch"]
        self.weights, self.last = state["weights"], state["last"]

    def restore(self, last: bool = False) -> None:
        """Give the module its best weights, if any were compared, or the weights after the last finished epoch."""
        weights = self.last if last else self.weights
        if weights is not None:
            self.vae.load_state_dict(weights)


@torch.inference_mode()
def evaluate(vae: nn.Module, loader: CellLoader | None, n_importance_samples: int = 1) -> dict[str, float]:
    """Return the mean bound at KL weight 1 and the means of its parts. The noise is the same at each call."""
    if loader is None:
        return {}
    vae.eval()
    sums: dict[str, float] = {}
    with seeded(0):
        for cells in loader:
            elbo = vae(cells, n_importance_samples=n_importance_samples)
            if not torch.isfinite(elbo.value).all():
                raise locate_nonfinite(vae, cells)
            parts = {"elbo": elbo.value, "log_likelihood": elbo.log_likelihood} | {
                f"kl_{k}": v for k, v in elbo.kl.items()
            }
            for name, values in parts.items():
                sums[name] = sums.get(name, 0.0) + float(values.double().sum()) * len(cells) / values.numel()
    return {f"{name}_validation": total / len(loader.index) for name, total in sums.items()}


def search_nonfinite(vae: nn.Module, loader: CellLoader) -> NonFiniteLoss:
    """Return the error for an epoch whose loss was not finite. ``vae`` has the weights from before this epoch.

    The error names the cells whose loss is not finite with these weights. There are none if only later steps of the
    epoch made it so.
    """
    try:
        evaluate(vae, loader)
    except NonFiniteLoss as error:
        return error
    n_cells, n_genes = loader.store.shape
    return NonFiniteLoss(np.empty(0, int), np.empty(0, int), n_cells, n_genes)


@torch.no_grad()
def locate_nonfinite(vae: nn.Module, cells) -> NonFiniteLoss:
    """Return the error that names the cells and genes whose likelihood is not finite."""
    q = vae.infer(cells)
    likelihood, target = vae.decoder({name: q[name].mean for name in q}, cells), vae.decoder.target(cells).to_dense()
    bad = ~torch.isfinite(likelihood.base_dist.log_prob(target))
    # Batch normalisation spreads one bad input over its minibatch, so that only the input is named.
    if not torch.isfinite(target).all():
        bad = ~torch.isfinite(target)
    rows = cells.index[bad.any(1)].cpu().numpy()
    return NonFiniteLoss(rows, bad.any(0).nonzero().squeeze(1).cpu().numpy(), *bad.shape)
