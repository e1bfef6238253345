"""A training of a model: its cells, the loop, and what the model remembers of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import pandas as pd
import torch

from scgen.arguments import shown
from scgen.data.loader import CellLoader
from scgen.models import loaders
from scgen.training.monitoring import NonFiniteLoss
from scgen.training.options import Options, choose_device


def checked(
    max_epochs: int | None,
    batch_size: int | None,
    train_size: float,
    early_stopping: bool,
    patience: int | None,
    learning_rate: float,
    kl_start: float,
    batch_penalty: float,
    n_importance_samples: int,
    accelerator: str,
    devices: int,
    precision: str,
    seed: int,
    progress: bool,
    on_epoch: Callable | None = None,
    epsilon: float = 0.01,
) -> Options:
    """Return the arguments of `Model.train`, in its order, and Adam's epsilon as options; raise where one is wrong.

    ``on_epoch`` is checked but is not an option, because options are saved.
    """
    if on_epoch is not None and not callable(on_epoch):
        raise TypeError(f"on_epoch={shown(on_epoch)}; it takes a function of a dict, such as on_epoch=print.")
    device = choose_device(accelerator)
    plan = max_epochs, learning_rate, kl_start, batch_penalty, n_importance_samples, early_stopping, patience
    options = Options(*plan, device, precision, seed, progress, epsilon)
    options.check(batch_size, train_size, devices)
    return options


@contextmanager
def recorded(
    model, options: Options, batch_size: int | None, train_size: float
) -> Iterator[tuple[CellLoader, CellLoader | None, list[dict]]]:
    """Give the block a model's cells to train on and to validate on, and the rows of its history.

    No other thread may ask the model within the block. After it, the model's history, trainings and split of the cells
    are up to date; `Model.train` says what is raised.
    """
    # Gradients are needed, whatever mode of torch the caller is in.
    with model.vae.occupied(training=True), torch.inference_mode(False), torch.enable_grad():
        training, validation = loaders.of_training(model, options, batch_size, train_size)
        rows: list[dict] = model.history.to_dict(orient="records")
        n_before = len(rows)
        started = {"device": str(options.device), "batch_size": training.batch_size, "finished": False}
        started |= {"first_epoch": len(rows) + 1}
        model.trainings.append(asdict(options) | started)
        new_rows = model.registry.known_rows(model.vae.category_rows())
        try:
            with model.vae.to(options.device).learning_rows(new_rows):
                yield training, validation, rows
        except NonFiniteLoss as error:
            message = error.names(model.adata.obs_names, model.registry.genes, options.learning_rate)
            raise FloatingPointError(message) from error
        finally:
            if len(rows) == n_before:  # no epoch was completed: as if `train` had not been called
                model.trainings.pop()
                if not rows:
                    model.train_indices = model.validation_indices = None
            else:
                model.trainings[-1].setdefault("kept_epoch", len(rows))  # an error leaves the last good weights
            model.history = history_of(rows)


def history_of(rows: list[dict]) -> pd.DataFrame:
    """Return the table of the epochs."""
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="epoch"))


def told(model, rows: list[dict], on_epoch: Callable | None) -> Callable | None:
    """Return the function of an epoch that finds the model's history as it is then."""

    def up_to_date(row: dict):
        model.history = history_of(rows)
        return on_epoch(row)

    return None if on_epoch is None else up_to_date
