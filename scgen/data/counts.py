"""Whether values are counts, where counts are to be found, and what values look like that are none."""

import itertools
from collections.abc import Callable

import numpy as np
from anndata import AnnData
from scipy import sparse

from scgen.data.checks import Setup
from scgen.data.stores import BackedStore, DamagedMatrix, MemoryStore, open_store, unreadable

#: Values that all lie nearer to whole numbers than this are counts but for rounding.
NEAR = 0.05
#: Where rounding changes more than this share of the sum of all values, it is not offered.
LARGE = 1 / 3
NEEDS_COUNTS = 'Raw counts are needed; for normalised data say counts=False and SCVI(adata, gene_likelihood="normal").'


def matrix_of(adata: AnnData, layer: str | None):
    """Return the matrix that is read, or None where it is missing."""
    return adata.X if layer is None else adata.layers.get(layer)


def layers_of(adata: AnnData) -> list[str]:
    """Return the names of the layers, without None, under which anndata 0.13 lists X among them."""
    return [layer for layer in adata.layers if layer is not None]


def looks_like(adata: AnnData, setup: Setup, store: MemoryStore | BackedStore) -> tuple[str, str]:
    """Say what the values look like, counts but for rounding or a normalisation; and what to do where no counts are."""
    distance, change = _rounding(store)
    if max(distance, change) <= NEAR:
        text = f"; all lie within {distance:.2g} of whole numbers"
        return text, f"They are counts but for rounding: {_rounded(adata, setup, store)}."
    _, block = next(iter(store.blocks(1000)))
    values = np.asarray(block.toarray() if sparse.issparse(block) else block, dtype=float)
    if values.min() < 0:
        return "", NEEDS_COUNTS
    if max(_rounding(store, np.expm1)) <= NEAR:
        return "; they look like log1p of counts", f"Take it back: {_rounded(adata, setup, store, 'expm1')}."
    for name, sums in (("log1p of counts", np.expm1(values.clip(max=80)).sum(1)), ("counts", values.sum(1))):
        sums = sums[sums > 0]
        if len(sums) > 1 and sums.std() < 1e-3 * sums.mean():
            return f"; they look like {name} scaled to {sums.mean():.6g} a cell", NEEDS_COUNTS
    if "log1p" in adata.uns:
        return '; adata.uns["log1p"] says that X was log-transformed', NEEDS_COUNTS
    text = f"; the farthest lies {distance:.2g} from a whole number"
    if change > LARGE:
        return text, NEEDS_COUNTS
    return text, (
        "Counts that a correction or an EM algorithm made fractional, such as those of SoupX, RSEM or salmon, can be "
        f"rounded: {_rounded(adata, setup, store)}; better are the counts before it. {NEEDS_COUNTS}"
    )


def _rounding(store: MemoryStore | BackedStore, function: Callable | None = None) -> tuple[float, float]:
    """Return how far a value, or a function of it, is from a whole number at most, and how much rounding changes.

    That is the sum of all changes, as a share of the sum of all values: proportions are near to whole numbers, too, but
    to 0.
    """
    most = total = changes = 0.0
    for _, block in store.blocks():
        values = (block.data if sparse.issparse(block) else np.asarray(block)).astype(float)
        if function is not None:
            if values.max(initial=0.0) > 30:  # the exponential of which has no digits left after the point
                return np.inf, np.inf
            values = function(values)
        changed = np.abs(values - np.rint(values))
        most = max(most, float(changed.max(initial=0.0)))
        total, changes = total + np.abs(values).sum(), changes + changed.sum()
        if function is not None and most > NEAR:  # no more needs to be known of it
            break
    return most, changes / total if total else 0.0


def _rounded(adata: AnnData, setup: Setup, store: MemoryStore | BackedStore, function: str | None = None) -> str:
    """Return the call that makes a layer of the values, or a function of them, rounded."""
    names = itertools.chain(("counts", "rounded_counts"), (f"rounded_counts_{i}" for i in itertools.count(2)))
    layer = next(name for name in names if name not in adata.layers)
    if not isinstance(store, MemoryStore):
        read = "adata = adata.to_memory(), "
    else:
        read = ""
    if sparse.issparse(matrix_of(adata, setup.layer)) or getattr(store.matrix, "format", None) in ("csr", "csc"):
        values = f"{setup.where}.{function}().rint()" if function else f"{setup.where}.rint()"
    else:
        values = f"np.rint(np.{function}({setup.where}))" if function else f"np.rint({setup.where})"
    return f'{read}adata.layers["{layer}"] = {values}, then setup_anndata(adata, layer="{layer}")'


def counts_are_in(adata: AnnData, setup: Setup, otherwise: str) -> str:
    """Say where counts are to be found instead; if nowhere, something else."""
    for layer in layers_of(adata):
        if layer != setup.layer and are_counts(adata.layers[layer]):
            return f'adata.layers["{layer}"] looks like counts: setup_anndata(adata, layer="{layer}").'
    if setup.layer is not None and adata.X is not None and are_counts(adata.X):
        return "adata.X looks like counts: setup_anndata(adata), without layer."
    if adata.raw is not None and are_counts(adata.raw.X):
        return (
            'adata.raw looks like counts: adata.layers["counts"] = adata.raw[:, adata.var_names].X, then '
            'setup_anndata(adata, layer="counts").'
        )
    return otherwise


def are_counts(matrix) -> bool:
    """Whether the first thousand rows are all non-negative integers; enough for a suggestion."""
    if unreadable(matrix, "") or matrix.dtype.kind not in "biuf":
        return False
    try:
        _, block = next(iter(open_store(matrix).blocks(1000)))
    except DamagedMatrix:
        return False
    values = block.data if sparse.issparse(block) else np.asarray(block)
    return bool(values.size) and bool(np.isfinite(values).all() and (values >= 0).all() and (values % 1 == 0).all())
