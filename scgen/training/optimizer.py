"""The optimiser of the training loop."""

import torch
from torch import nn


class Adam:
    """torch's fused Adam, called directly. Its class loads torch's compiler, which takes 2 s and 60 MB.

    With an epsilon of 0.01, as in the scVI paper, rarely used weights do not jump. Models whose gradients are smaller
    than that need a smaller one. The norm of all gradients is clipped
    to `LONGEST` times its usual value, a running mean (Pascanu et al. 2013). Otherwise one outlying cell makes Adam's
    second moments large, and the steps of these weights stay small for hundreds of minibatches.
    """

    #: The largest multiple of the usual norm, and the decay of the running mean.
    LONGEST, KEPT = 3.0, 0.9

    def __init__(self, vae: nn.Module, epsilon: float = 0.01):
        self.epsilon = epsilon
        self.weights = [weight for weight in vae.parameters() if weight.requires_grad]
        self.means, self.squares = ([torch.zeros_like(weight) for weight in self.weights] for _ in range(2))
        self.n_steps = torch.zeros((), dtype=torch.float32, device=self.weights[0].device)
        self.usual = self.n_steps.clone()  # length of the gradients; 0 stands for none yet
        self._forget_gradients()  # of a training that was interrupted between its backward and its step

    def step(self, learning_rate: float) -> None:
        """Move the weights down their gradients, and forget these."""
        gradients = [weight.grad for weight in self.weights]
        self.n_steps += 1
        state = self.means, self.squares, [], [self.n_steps] * len(self.weights)
        with torch.no_grad():
            length = torch.stack(torch._foreach_norm(gradients)).norm()
            usual = torch.where(self.usual > 0, self.usual, length)
            longest = self.LONGEST * usual
            shrink = torch.where(length > longest, length / longest, 1.0)
            mean = self.KEPT * usual + (1 - self.KEPT) * torch.minimum(length, longest)
            # At 0, nothing of what is learned is in this minibatch.
            self.usual = torch.where((length > 0) & mean.isfinite(), mean, self.usual)
            torch._fused_adam_(
                self.weights,
                gradients,
                *state,
                lr=learning_rate,
                beta1=0.9,
                beta2=0.999,
                weight_decay=1e-6,
                eps=self.epsilon,
                amsgrad=False,
                maximize=False,
                # They are divided by it. To look is free on a CPU, a division by 1 is not; a GPU would be waited for.
                grad_scale=None if shrink.device.type == "cpu" and shrink == 1 else shrink,
            )
        self._forget_gradients()

    def state_dict(self) -> dict:
        """Return the moments, the number of steps and the usual length of the gradients."""
        return {"means": self.means, "squares": self.squares, "n_steps": self.n_steps, "usual": self.usual}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned."""
        with torch.no_grad():
            for name in ("means", "squares"):
                torch._foreach_copy_(getattr(self, name), state[name])
            self.n_steps.copy_(state["n_steps"])
            self.usual = state["usual"].to(self.usual)

    def _forget_gradients(self) -> None:
        for weight in self.weights:
            weight.grad = None
