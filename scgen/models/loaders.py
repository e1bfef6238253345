"""Make minibatches of a model's AnnData, or of another, for training and for the methods of a trained model."""

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scgen.arguments import check_flag, check_memory, check_seed, check_whole, counted
from scgen.data.cells import Cells
from scgen.data.checks import check_types
from scgen.data.counts import matrix_of
from scgen.data.loader import CellLoader, Store, rows_asked_for, split
from scgen.data.registry import Registry
from scgen.data.snapshot import Snapshot
from scgen.data.stores import BackedStore, MemoryStore, in_memory, on_device
from scgen.training.options import Options, default_batch_size
from scgen.training.start import start_from_data

#: The validation bound is computed on at most so many cells.
MAX_VALIDATION_CELLS = 1024


@dataclass(frozen=True)
class _Seen:
    """An AnnData that was asked about, its matrix, if that is in memory, and what was read of them."""

    adata: weakref.ref
    matrix: weakref.ref | None
    snapshot: Snapshot

    @classmethod
    def of(cls, adata: AnnData, registry: Registry, snapshot: Snapshot) -> "_Seen":
        matrix = matrix_of(adata, registry.setup)
        return cls(weakref.ref(adata), weakref.ref(matrix) if in_memory(matrix) else None, snapshot)

    def read(
        self, adata: AnnData, registry: Registry, rows: np.ndarray | None
    ) -> tuple[MemoryStore | BackedStore, dict[str, Tensor]] | None:
        """Return values and columns if this is the AnnData and these rows of it are what they were; else None."""
        if self.adata() is not adata or adata.is_view:
            return None
        if self.matrix is not None and self.matrix() is not matrix_of(adata, registry.setup):
            return None
        store = registry.store(adata, rows)
        return (store, self.snapshot.columns) if self.snapshot.holds(registry, adata, store, rows) else None


#: By model: what was seen of its "own" cells, and of the last other ones, by the `Setup` with which they were read. It
#: is kept here and not in the model, of which copies and pickles are made.
_SEEN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def set_cells(model, adata: AnnData) -> Snapshot:
    """Make an AnnData the model's own cells, and return what was read of them."""
    _, snapshot = Snapshot.of(model.registry, adata)
    model.adata, model.fingerprint = adata, snapshot.fingerprint()
    _remember(model, adata, model.registry, snapshot)
    return snapshot


def of_training(
    model, options: Options, batch_size: int | None, train_size: float
) -> tuple[CellLoader, CellLoader | None]:
    """Return the cells to train on and to validate on; the first time, split them and start the module from them."""
    device = options.device
    adata = cells_of(model)
    store, columns = _read(model, adata, model.registry, None)
    store = on_device(store, device)
    rng = np.random.default_rng(options.seed)
    training, validation = model.train_indices, model.validation_indices
    first = training is None
    if first:
        training, validation = split(columns["batch"].numpy(), train_size, rng)
        if len(training) < 2:
            raise ValueError(f"adata has {counted(adata.n_obs, 'cell')}; training needs 2 or more.")
    batch_size = int(batch_size or default_batch_size(len(training), device))
    loader = loader_of(model, adata, store, columns, training, batch_size, device=device, rng=rng)
    _check_memory(loader, options.n_importance_samples)
    if first and not model.is_trained:  # a loaded model goes on from its weights
        start_from_data(model.vae.to(device), loader.over(training, 256))
    model.train_indices, model.validation_indices = training, validation
    held_out = np.sort(rng.permutation(validation)[:MAX_VALIDATION_CELLS])
    return loader, loader.over(held_out, max(batch_size, 512)) if len(held_out) else None


def _check_memory(loader: CellLoader, n_draws: int) -> None:
    """Raise MemoryError if a minibatch of training does not fit into memory. The estimate is a low one."""
    n_at_once = min(loader.batch_size, len(loader.index))
    # Decoded values and their gradients. Of the values of further stores, encoders keep some eight copies as well.
    of_each = [8 * n_draws * loader.store.shape[1]]
    of_each += [(8 * n_draws + 32) * math.prod(store.shape[1:]) for store in loader.stores.values()]
    n_bytes = n_at_once * max(of_each)
    if n_draws > 1:
        check_memory("n_importance_samples", n_draws, n_bytes, "Train with fewer, or a smaller batch_size.")
    check_memory("batch_size", n_at_once, n_bytes, "Train with a smaller one.")


def of_question(
    model,
    adata: AnnData | None,
    indices: Sequence[int] | np.ndarray | None,
    batch_size: int,
    seed: int = 0,
    flags: Mapping[str, bool] | None = None,
    any_batch: bool = False,
) -> CellLoader:
    """Return the cells asked about, in their order.

    Seed and flags, by name, are those of the question: they are checked before anything is read. If ``any_batch``, the
    cells of another AnnData may be of batches that the model does not know, and all have the code 0.
    """
    model.require_training()
    for name, flag in (flags or {}).items():
        check_flag(name, flag)
    check_seed(seed)
    batch_size = check_whole("batch_size", batch_size, 1)
    adata = cells_of(model) if adata is None else adata
    check_types(adata, model.registry.setup)
    index = rows_asked_for(indices, adata.n_obs)
    registry = model.registry.of_any_batch() if any_batch and adata is not model.adata else model.registry
    # Cells with positions are read with their neighbours, so all cells must be what they were.
    rows = None if indices is None or registry.setup.spatial_key is not None else index
    store, columns = _read(model, adata, registry, rows)
    return loader_of(model, adata, store, columns, index, batch_size)


def loader_of(
    model,
    adata: AnnData,
    store: Store,
    columns: dict[str, Tensor],
    index: np.ndarray,
    batch_size: int,
    *,
    device: torch.device | None = None,
    rng: np.random.Generator | None = None,
) -> CellLoader:
    """Return minibatches of some cells, with all that the model reads of them.

    Parameters
    ----------
    model, adata
        The model, and the cells of which ``store`` and ``columns`` were read.
    store, columns, index, batch_size, rng
        As in `CellLoader`.
    device
        The device to train on. Without one, minibatches stay on the host: a question moves each of them itself.
    """
    stores, columns = {}, dict(columns)
    for name, source in model.sources(adata).items():
        where = f"{type(model).__name__}.sources: {name!r}"
        if name not in {field.name for field in fields(model.Cells)} - {field.name for field in fields(Cells)}:
            raise ValueError(f"{where} is not a field that {model.Cells.__name__} adds to Cells.")
        if not hasattr(source, "rows") and not isinstance(source, Tensor):
            raise TypeError(f"{where} is a {type(source).__name__}; it takes a tensor or a store.")
        if source.shape[0] != adata.n_obs:
            raise ValueError(f"{where} has {source.shape[0]} rows; adata has {counted(adata.n_obs, 'cell')}.")
        if isinstance(source, Tensor):
            columns[name] = source
        else:
            stores[name] = source if device is None else on_device(source, device)
    as_sparse = model.vae.reads_sparse(device or model.vae.device)
    impute = model.vae.impute if model.registry.missing else None
    further = {"impute": impute, "stores": stores, "cells_class": model.Cells}
    return CellLoader(store, columns, index, batch_size, rng, as_sparse, device or "cpu", **further)


def cells_of(model) -> AnnData:
    """Return the model's own cells; ValueError if it has none."""
    if model.adata is None:
        raise ValueError("the model was loaded without cells: pass adata=.")
    return model.adata


def annotated(model, adata: AnnData | None) -> tuple[AnnData, pd.DataFrame]:
    """Return the AnnData that columns about the cells are found in and results are written to, and its obs of them.

    For the own cells of a model that `integrate` made, it is the AnnData that `integrate` was given. Its columns are
    read as they are now, so it must still have these cells.
    """
    if adata is not None or model.source is None:
        adata = cells_of(model) if adata is None else adata
        return adata, adata.obs
    source, rows = model.source, model.source_rows
    if rows[-1] >= source.n_obs or not source.obs_names[rows].equals(model.adata.obs_names):
        raise ValueError(
            "the AnnData that integrate was given has changed since: it has other cells, or the same ones in another "
            "order or under other names. Pass the cells to ask about: adata=."
        )
    return source, source.obs.iloc[rows]


def _read(
    model, adata: AnnData, registry: Registry, rows: np.ndarray | None
) -> tuple[MemoryStore | BackedStore, dict[str, Tensor]]:
    """Return values and columns of which some rows, or all, will be read.

    All cells are checked the first time that they are asked about, and again where those asked about have changed: the
    model's own must then be what they were, others fit to be read.
    """
    own, seen = adata is model.adata, _SEEN.setdefault(model, {})
    known = seen.get("own" if own else registry.setup)
    if known is not None and (found := known.read(adata, registry, rows)) is not None:
        return found
    if not own:
        registry.check_new(adata)
    store, snapshot = Snapshot.of(registry, adata)
    if own:
        # A copy of a model has no more than the fingerprint to tell its cells by.
        same = (
            known.snapshot.holds(registry, adata, store, None) if known else snapshot.fingerprint() == model.fingerprint
        )
        if not same:
            setup, fix = registry.setup, "Restore them, or make a new model."
            if setup.use_rep is None:
                fix = (
                    'Keep the counts in a layer of their own, setup_anndata(adata, layer="counts"), or pass adata= '
                    "with the counts."
                )
            raise ValueError(
                "the model's AnnData has changed since the model was made: other or renamed cells, other values in "
                f"{setup.where} or in the columns that the model reads. {fix}"
            )
    _remember(model, adata, registry, snapshot)
    return store, snapshot.columns


def _remember(model, adata: AnnData, registry: Registry, snapshot: Snapshot) -> None:
    if not adata.is_view:  # which makes its matrix anew whenever it is read
        whose = "own" if adata is model.adata else registry.setup
        _SEEN.setdefault(model, {})[whose] = _Seen.of(adata, registry, snapshot)
