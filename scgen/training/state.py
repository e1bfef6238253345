"""Where a training stands between two epochs."""

from dataclasses import dataclass

import numpy as np
from torch import nn

from scgen.seeding import generator
from scgen.training.batches import BatchPenalty
from scgen.training.monitoring import Best
from scgen.training.optimizer import Adam


@dataclass
class TrainingState:
    """Everything, besides the options and the cells, that the rest of a training depends on.

    Attributes
    ----------
    vae, optimizer, best
        The module that is trained, its optimiser, and its best weights so far.
    penalty
        What it knows of the batches.
    order
        The random generator of the order of the cells.
    epoch, step
        Number of finished epochs and minibatches.
    """

    vae: nn.Module
    optimizer: Adam
    best: Best
    penalty: BatchPenalty
    order: np.random.Generator
    epoch: int = 0
    step: int = 0

    def state_dict(self) -> dict:
        """Return the state in tensors and plain Python, within a `seeded` block. The tensors are in use: copy them."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "weights": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best.state_dict(),
            "penalty": self.penalty.state_dict(),
            "order": self.order.bit_generator.state,
            "noise": generator(self.vae.device).get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned, with the random generator of the current `seeded` block."""
        self.epoch, self.step = state["epoch"], state["step"]
        self.vae.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best.load_state_dict(state["best"])
        self.penalty.load_state_dict(state["penalty"], self.vae.device)
        self.order.bit_generator.state = state["order"]
        generator(self.vae.device).set_state(state["noise"])
