"""From a model's AnnData, or another, to minibatches: to train on, and to ask about."""

from collections.abc import Mapping, Sequence

import numpy as np
from anndata import AnnData
from torch import Tensor

from scgen.arguments import check_flag, check_memory, check_seed, check_whole
from scgen.data.loader import CellLoader, rows_asked_for, split
from scgen.data.stores import BackedStore, MemoryStore, on_device
from scgen.training import Options, default_batch_size, start_from_data

#: The validation bound is computed on at most so many cells.
MAX_VALIDATION_CELLS = 1024


def of_training(
    model, options: Options, batch_size: int | None, train_size: float
) -> tuple[CellLoader, CellLoader | None]:
    """Return the cells to train on and to validate on; the first time, split them and start the module from them."""
    device = options.device
    adata = cells_of(model, None)
    n_at_once = min(batch_size or default_batch_size(adata.n_obs, device), adata.n_obs)
    n_bytes = 8 * options.n_importance_samples * n_at_once * len(model.registry.genes)  # rates, and their gradients
    fewer = "Train with fewer, or a smaller batch_size."
    check_memory("n_importance_samples", options.n_importance_samples, n_bytes, fewer)
    store, columns = _read(model, adata)
    store = on_device(store, device)
    rng = np.random.default_rng(options.seed)
    if model.train_indices is None:
        training, validation = split(columns["batch"].numpy(), train_size, rng)
        if len(training) < 2:
            raise ValueError(f"adata has {adata.n_obs} cell; at least 2 are needed to train.")
        if not model.is_trained:  # a loaded model goes on from its weights
            start_from_data(model.vae.to(device), CellLoader(store, columns, training, 256, device=device))
        model.train_indices, model.validation_indices = training, validation
    batch_size = int(batch_size or default_batch_size(len(model.train_indices), device))
    held_out = np.sort(rng.permutation(model.validation_indices)[:MAX_VALIDATION_CELLS])
    form = {"as_sparse": model.vae.reads_sparse(device), "device": device, "complete": _complete(model)}
    return (
        CellLoader(store, columns, model.train_indices, batch_size, rng, **form),
        CellLoader(store, columns, held_out, max(batch_size, 512), **form) if len(held_out) else None,
    )


def of_question(
    model,
    adata: AnnData | None,
    indices: Sequence[int] | None,
    batch_size: int,
    seed: int = 0,
    flags: Mapping[str, bool] | None = None,
) -> CellLoader:
    """Return the cells asked about, in their order.

    Seed and flags, by name, are those of the question: they are checked before anything is read.
    """
    model.require_training()
    for name, flag in (flags or {}).items():
        check_flag(name, flag)
    check_seed(seed)
    batch_size = check_whole("batch_size", batch_size, 1)
    adata = cells_of(model, adata)
    store, columns = _read(model, adata)
    as_sparse = model.vae.reads_sparse(model.vae.device)
    index = rows_asked_for(indices, adata.n_obs)
    return CellLoader(store, columns, index, batch_size, as_sparse=as_sparse, complete=_complete(model))


def cells_of(model, adata: AnnData | None) -> AnnData:
    """Return the cells asked about, checked if they are not the model's own."""
    if adata is None and model.adata is None:
        raise ValueError("the model was loaded without cells: pass adata=.")
    if adata is None or adata is model.adata:
        return model.adata
    model.registry.check_new(adata)
    return adata


def _complete(model):
    """Return what adds genes to a minibatch that were not measured; None where all were."""
    return model.vae.complete if model.registry.missing else None


def _read(model, adata: AnnData) -> tuple[MemoryStore | BackedStore, dict[str, Tensor]]:
    """Return values and columns of all cells; raise if the model's own cells are no longer what they were."""
    return model.registry.read(adata, model.fingerprint if adata is model.adata else None)[:2]
