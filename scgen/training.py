"""The training loop, whole: minibatches, learning rate, validation, early stopping, and what may go wrong."""

import copy
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from scgen.arguments import MOST_EPOCHS, check_choice, check_flag, check_number, check_seed, check_whole
from scgen.data.loader import CellLoader
from scgen.seeding import seeded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How to train; see `Model.train` for the meaning of each."""

    max_epochs: int | None
    learning_rate: float
    kl_start: float
    n_importance_samples: int
    early_stopping: bool
    patience: int | None
    device: torch.device
    precision: str
    seed: int
    progress: bool

    def __post_init__(self):
        plain = {
            "learning_rate": check_number("learning_rate", self.learning_rate, "a positive number", above=0),
            "kl_start": check_number("kl_start", self.kl_start, "a weight from 0", least=0),
            "n_importance_samples": check_whole("n_importance_samples", self.n_importance_samples, 1),
            "seed": check_seed(self.seed),
        }
        for name, most in (("max_epochs", MOST_EPOCHS), ("patience", None)):
            if getattr(self, name) is not None:
                plain[name] = check_whole(name, getattr(self, name), 1, most)
        for name in ("early_stopping", "progress"):
            plain[name] = check_flag(name, getattr(self, name))
        plain["precision"] = check_choice("precision", self.precision, ("auto", "32", "bf16"))
        if self.precision == "auto":
            plain["precision"] = "bf16" if has_fast_bfloat16(self.device) else "32"
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def check(self, batch_size: int | None, train_size: float, devices: int) -> None:
        """Raise where the other arguments of `Model.train` are of a wrong kind, or out of their range."""
        if batch_size is not None:
            check_whole("batch_size", batch_size, 3)
        check_number("train_size", train_size, "a share above 0 and up to 1", above=0, most=1)
        if check_whole("devices", devices, 1) != 1:
            raise ValueError(f"devices={devices!r}: this version trains on one device; use devices=1.")


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite.

    Attributes
    ----------
    cells, genes
        Rows and columns of the values to blame.
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


@torch.no_grad()
def start_from_data(vae: nn.Module, loader: CellLoader) -> None:
    """Start what the training cells tell without training: priors that are made of them, the decoder at their moments.

    The moments are those of a cell's rates: x divided by its library, where the model has one.
    """
    total, squares = 0.0, 0.0
    for cells in loader:
        rate = cells.counts.to(torch.float64, copy=True)  # changed in place: new memory costs more than the sums
        if vae.has_library:
            rate /= cells.library.double().exp()
        total = total + rate.sum(0)
        squares = squares + rate.square_().sum(0)
    mean = total / len(loader.index)
    vae.decoder.start_at(mean, (squares / len(loader.index) - mean**2).clamp(min=0))
    if vae.has_library:
        # On the host, where sums are always in the same order.
        vae.priors["library"].fit(*(loader.columns[name][loader.index].cpu() for name in ("library", "batch")))
    if hasattr(vae.priors["z"], "start_at"):
        # At cells from all over the data, in whose order batches and types often follow each other.
        n = vae.priors["z"].n_components
        few = loader.index[np.linspace(0, len(loader.index) - 1, n).round().astype(int)]
        vae.priors["z"].start_at(next(iter(loader.over(few, n))))


def choose_device(accelerator: str) -> torch.device:
    """Return the device for "auto", "cpu" or "gpu" ("cuda"); ValueError for others, or for no GPU."""
    if not isinstance(accelerator, str) or accelerator not in ("cuda", "mps"):
        check_choice("accelerator", accelerator, ("auto", "cpu", "gpu"))
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f'accelerator="{accelerator}", but torch sees no GPU here. Use accelerator="cpu" or "auto".')
    if accelerator == "mps":
        raise ValueError(
            'accelerator="mps" is not supported: the likelihoods need float64, which Apple\'s MPS lacks. Use '
            'accelerator="cpu".'
        )
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Say whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every release
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def default_batch_size(n_cells: int, device: torch.device) -> int:
    """Return the cells in a minibatch: as many as leave 400 minibatches in 50 passes, but 64 to 512.

    On a GPU, whose steps cost the same, they are up to 4096 if these leave 400 minibatches in 25 passes.
    """
    size = min(max(n_cells * 50 // 400, 64), 512)
    return size if device.type != "cuda" else max(size, min(n_cells * 25 // 400, 4096))


def default_epochs(n_steps: int) -> int:
    """Return the number of passes, of so many minibatches each: enough for 400 steps, but 25 to 50 passes.

    More passes over few cells, and their ELBO is one of cells learned by heart (benchmarks/NOTES.md).
    """
    return min(max(math.ceil(400 / n_steps), 25), 50)


def one_cycle(progress: float) -> float:
    """Return the share of the peak learning rate at a share of the planned steps: a short rise, then a cosine to 0."""
    rise = 0.1
    if progress < rise:
        return max(progress / rise, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))


def fit(
    vae: nn.Module,
    training: CellLoader,
    validation: CellLoader | None,
    options: Options,
    rows: list[dict],
    on_epoch: Callable[[dict], object] | None = None,
) -> dict[str, bool | int]:
    """Train ``vae`` in place and append to ``rows`` what each finished epoch brought.

    Returns whether training "finished" as planned, and the "kept_epoch": the row, counted from 1, whose weights the
    module now has.

    Minibatches are taken from where the loaders put them, ``options.device``. On a CPU the loss of every step is looked
    at; on a GPU, where the host runs ahead and to look would be to wait, their sum is at the end of an epoch.

    Weights are compared, and training stopped early, only in the second half of the planned epochs: before it the
    learning rate is high and batches are still mixing, whatever the bound says; stopping so is as planned. An interrupt
    (Ctrl-C) ends training and keeps the best weights so far; before the first epoch is over, it is raised.

    ``on_epoch`` is called with each new row and its "epoch". If it returns True, training stops as planned.

    Raises
    ------
    NonFiniteLoss
        If the loss is NaN or infinite; ``vae`` then has the weights of the last good epoch.
    """
    optimizer = Adam(vae)
    max_epochs = options.max_epochs or default_epochs(len(training))
    n_steps = max_epochs * len(training)
    patience = (options.patience or math.ceil(max_epochs / 4)) if options.early_stopping else None
    best = Best(vae, first_epoch=max_epochs // 2, patience=patience)
    reduced = options.precision == "bf16"
    step, n_before, interrupted = 0, len(rows), False
    with (
        seeded(options.seed),
        progress_bar(max_epochs, "training", "epoch", options.progress) as bar,
    ):
        try:
            for epoch in range(max_epochs):
                started, sums = time.perf_counter(), 0.0
                vae.train()
                with vae.reduced_products(reduced):
                    for cells in training:
                        learning_rate = options.learning_rate * one_cycle(step / n_steps)
                        kl_weight = 1 + (options.kl_start - 1) * max(0.0, 1 - 2 * (step + 1) / n_steps)
                        elbo = vae(cells, n_importance_samples=options.n_importance_samples)
                        loss = elbo.loss(kl_weight)
                        if options.device.type == "cpu" and not torch.isfinite(loss):
                            raise blame(vae, cells)
                        loss.backward()
                        optimizer.step(learning_rate)
                        sums += elbo.value.detach().sum()
                        step += 1
                if not math.isfinite(sums):
                    best.restore(last=True)
                    raise blame_some(vae, training)
                row = {
                    "elbo_train": float(sums) / len(training.index),
                    **evaluate(vae, validation, options.n_importance_samples),
                }
                rows.append(row | {"kl_weight": kl_weight, "seconds": time.perf_counter() - started})
                bar.update()
                bar.set_postfix_str(" ".join(f"{name} {row[name]:.1f}" for name in row if name.startswith("elbo")))
                stop = best.stop_after(epoch, row.get("elbo_validation", math.nan))
                answer = on_epoch({"epoch": len(rows), **rows[-1]}) if on_epoch is not None else None
                if stop or (isinstance(answer, bool | np.bool_) and answer):
                    break
        except BaseException as error:
            # Half an epoch is no result: whatever went wrong, the weights are those of a finished one.
            best.restore(last=True)
            if not isinstance(error, KeyboardInterrupt) or len(rows) == n_before:
                vae.eval()
                raise
            interrupted = True
            logger.warning("interrupted after %d epochs; the best weights so far are kept", len(rows) - n_before)
    best.restore()
    vae.eval()
    kept = len(rows) if best.weights is None else n_before + best.epoch + 1
    return {"finished": not interrupted, "kept_epoch": kept}


def progress_bar(total: int, description: str, unit: str, shown: bool) -> tqdm:
    """Return a progress line, which is not shown where there is no console: ``sys.stderr`` is then None."""
    return tqdm(total=total, desc=description, unit=unit, disable=not shown or sys.stderr is None)


class Adam:
    """torch's fused Adam, without its class, which loads torch's compiler: 2 s and 60 MB that training has no use for.

    The epsilon of the paper, 0.01, keeps rarely used weights from jumping. Gradients, all together, are no longer than
    `LONGEST` times their usual length, a running mean that starts at the first ones' (Pascanu et al. 2013): one cell
    that the encoder sends astray would else hold the steps of its weights small for hundreds of others.
    """

    #: Times as long as usual; share of the usual length that each step leaves.
    LONGEST, KEPT = 3.0, 0.9

    def __init__(self, vae: nn.Module):
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
                eps=0.01,
                amsgrad=False,
                maximize=False,
                # They are divided by it. To look is free on a CPU, a division by 1 is not; a GPU would be waited for.
                grad_scale=None if shrink.device.type == "cpu" and shrink == 1 else shrink,
            )
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for weight in self.weights:
            weight.grad = None


@dataclass
class Best:
    """Remembers the best and the last finite weights of a module.

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
        """Take note of an epoch's validation value; say whether to stop."""
        self.last = copy.deepcopy(self.vae.state_dict())
        if epoch < self.first_epoch:
            return False
        if value > self.value:
            self.value, self.epoch, self.weights = value, epoch, self.last
        return self.patience is not None and self.weights is not None and epoch - self.epoch >= self.patience

    def restore(self, last: bool = False) -> None:
        """Give the module its best weights, if any were compared, or those of the last epoch's end."""
        weights = self.last if last else self.weights
        if weights is not None:
            self.vae.load_state_dict(weights)


@torch.inference_mode()
def evaluate(vae: nn.Module, loader: CellLoader | None, n_importance_samples: int = 1) -> dict[str, float]:
    """Return the mean bound at full KL weight, and the means of its parts, under the same noise each time."""
    if loader is None:
        return {}
    vae.eval()
    sums: dict[str, float] = {}
    with seeded(0):
        for cells in loader:
            elbo = vae(cells, n_importance_samples=n_importance_samples)
            if not torch.isfinite(elbo.value).all():
                raise blame(vae, cells)
            parts = {"elbo": elbo.value, "log_likelihood": elbo.log_likelihood} | {
                f"kl_{k}": v for k, v in elbo.kl.items()
            }
            for name, values in parts.items():
                sums[name] = sums.get(name, 0.0) + float(values.double().sum()) * len(cells) / values.numel()
    return {f"{name}_validation": total / len(loader.index) for name, total in sums.items()}


def blame_some(vae: nn.Module, loader: CellLoader) -> NonFiniteLoss:
    """Return the error for an epoch that went wrong somewhere, of which ``vae`` has the weights before it.

    It names the cells that are to blame with these weights already; none where the steps themselves led astray.
    """
    try:
        evaluate(vae, loader)
    except NonFiniteLoss as error:
        return error
    n_cells, n_genes = loader.store.shape
    return NonFiniteLoss(np.empty(0, int), np.empty(0, int), n_cells, n_genes)


@torch.no_grad()
def blame(vae: nn.Module, cells) -> NonFiniteLoss:
    """Return the error that names the cells and genes of which the likelihood or its parameters are not finite."""
    q = vae.infer(cells)
    likelihood, counts = vae.decoder({name: q[name].mean for name in q}, cells), cells.counts.to_dense()
    bad = ~torch.isfinite(likelihood.base_dist.log_prob(counts))
    # Batch normalisation spreads one bad input over its minibatch: the input itself, where there is one, is to blame.
    if not torch.isfinite(counts).all():
        bad = ~torch.isfinite(counts)
    rows = cells.index[bad.any(1)].cpu().numpy()
    return NonFiniteLoss(rows, bad.any(0).nonzero().squeeze(1).cpu().numpy(), *bad.shape)
