"""The training loop: minibatches, learning rate, validation and early stopping."""

import logging
import math
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from torch import nn

from scgen.data.loader import CellLoader
from scgen.seeding import seeded
from scgen.training.batches import BatchPenalty, rise
from scgen.training.monitoring import Best, evaluate, locate_nonfinite, search_nonfinite
from scgen.training.optimizer import Adam
from scgen.training.options import Options, default_epochs, warmup_cosine
from scgen.training.state import TrainingState

# In a notebook, tqdm.auto draws its line as a widget. It warns when it is imported there without ipywidgets.
if find_spec("ipywidgets"):
    from tqdm.auto import tqdm
else:
    from tqdm import tqdm

logger = logging.getLogger(__name__)


def fit(
    vae: nn.Module,
    training: CellLoader,
    validation: CellLoader | None,
    options: Options,
    rows: list[dict],
    on_epoch: Callable[[dict], object] | None = None,
    on_state: Callable[[TrainingState], object] | None = None,
    resume: dict | None = None,
) -> dict[str, bool | int]:
    """Train ``vae`` in place, and append a row of metrics to ``rows`` after each epoch.

    Weights are compared, and training may stop early, only in the second half of the planned epochs. Before that, the
    learning rate is high and the batches are still mixing, whatever the bound is. An interrupt (Ctrl-C) ends training
    and keeps the best weights so far. It is raised if no epoch is finished yet.

    The loss is checked for NaN and infinity: on a CPU after each step, on a GPU once an epoch. A check on a GPU has to
    wait for the device.

    Parameters
    ----------
    vae
        The module, on ``options.device``.
    training, validation
        The minibatches to train on and to validate on, on the same device.
    options
        How to train.
    rows
        The rows of earlier epochs.
    on_epoch
        Called with each new row and its "epoch". If it returns True, training stops.
    on_state
        Called with the `TrainingState` after each epoch.
    resume
        What ``state_dict`` of a `TrainingState` returned. With the same options and the rows of the epochs before it,
        training continues to the same weights.

    Returns
    -------
    Whether training "finished" without an interrupt, and the "kept_epoch": the row, counted from 1, with the weights
    that the module has now.

    Raises
    ------
    NonFiniteLoss
        If the loss is NaN or infinite. ``vae`` then has the weights of the last good epoch.
    """
    max_epochs = options.max_epochs or default_epochs(len(training))
    n_steps = max_epochs * len(training)
    patience = (options.patience or math.ceil(max_epochs / 4)) if options.early_stopping else None
    best = Best(vae, first_epoch=max_epochs // 2, patience=patience)
    penalty = BatchPenalty(int(training.columns["batch"].max()) + 1, len(training))
    state = TrainingState(vae, Adam(vae, options.epsilon), best, penalty, training.rng)
    reduced = options.precision == "bf16"
    n_before, interrupted = len(rows), False
    with (
        seeded(options.seed),
        progress_bar(max_epochs, "training", "epoch", options.progress) as bar,
    ):
        try:
            if resume is not None:
                state.load_state_dict(resume)
                bar.update(state.epoch)
                n_before -= state.epoch  # the rows of the epochs before are there
            stopped = state.epoch and best.has_stopped(state.epoch - 1)
            for epoch in range(max_epochs if stopped else state.epoch, max_epochs):
                started, sums = time.perf_counter(), 0.0
                vae.train()
                with vae.reduced_products(reduced):
                    for cells in training:
                        learning_rate = options.learning_rate * warmup_cosine(state.step / n_steps)
                        kl_weight = 1 + (options.kl_start - 1) * max(0.0, 1 - 2 * (state.step + 1) / n_steps)
                        elbo = vae(cells, n_importance_samples=options.n_importance_samples)
                        loss = elbo.loss(kl_weight)
                        penalty_weight = options.batch_penalty * rise(state.step / n_steps)
                        # The rows of a query are trained without the reference's cells, so without their means.
                        q_and_p = elbo.distributions[vae.latent]
                        if penalty_weight and not vae.frozen and penalty.applies(*q_and_p):
                            loss = loss + penalty_weight * penalty(*q_and_p, cells.batch)
                        if options.device.type == "cpu" and not torch.isfinite(loss):
                            raise locate_nonfinite(vae, cells)
                        loss.backward()
                        state.optimizer.step(learning_rate)
                        sums += elbo.value.detach().sum()
                        state.step += 1
                if not math.isfinite(sums):
                    best.restore(last=True)
                    raise search_nonfinite(vae, training)
                row = {
                    "elbo_train": float(sums) / len(training.index),
                    **evaluate(vae, validation, options.n_importance_samples),
                }
                rows.append(row | {"kl_weight": kl_weight, "seconds": time.perf_counter() - started})
                bar.update()
                bar.set_postfix_str(" ".join(f"{name} {row[name]:.1f}" for name in row if name.startswith("elbo")))
                stop = best.stop_after(epoch, row.get("elbo_validation", math.nan))
                state.epoch = epoch + 1
                if on_state is not None:
                    on_state(state)
                answer = on_epoch({"epoch": len(rows), **rows[-1]}) if on_epoch is not None else None
                if stop or (isinstance(answer, bool | np.bool_) and answer):
                    break
        except BaseException as error:
            # The weights of an unfinished epoch are never kept.
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
    """Return a progress line. It is not shown if there is no console, where ``sys.stderr`` is None."""
    return tqdm(total=total, desc=description, unit=unit, disable=not shown or sys.stderr is None)
