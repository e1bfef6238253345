"""Tell whether values are counts, find the layer with counts, and guess what other values are."""

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scgen.data.checks import Setup
from scgen.data.stores import BackedStore, DamagedMatrix, MemoryStore, open_store, unreadable

#: If all values lie nearer to whole numbers than this, they are taken for counts with rounding errors.
NEAR = 0.05
#: Rounding is not suggested if it changes more than this share of the sum of all values.
LARGE = 1 / 3
NEEDS_COUNTS = 'Raw counts are needed; for normalised data use counts=False and SCVI(adata, gene_likelihood="normal").'


def matrix_of(adata: AnnData, setup: Setup):
    """Return the matrix that the model reads, or None if it is missing. A DataFrame is returned as an array."""
    if setup.use_rep is not None:
        matrix = adata.obsm.get(setup.use_rep)
        return matrix.to_numpy() if isinstance(matrix, pd.DataFrame) else matrix
    return adata.X if setup.layer is None else adata.layers.get(setup.layer)


def layers_of(adata: AnnData) -> list[str]:
    """Return the names of the layers. anndata 0.13 also lists X among them, as None, which is left out."""
    return [layer for layer in adata.layers if layer is not None]


def looks_like(adata: AnnData, setup: Setup, store: MemoryStore | BackedStore) -> tuple[str, str]:
    """Return what the values look like, and what to do if there are no counts elsewhere."""
    distance, change = _rounding(store)
    if max(distance, change) <= NEAR:
        text = f"; all lie within {distance:.2g} of whole numbers"
        return text, f"They are counts with rounding errors. Round them: {_rounded(adata, setup, store)}."
    _, block = next(iter(store.blocks(1000)))
    values = np.asarray(block.toarray() if sparse.issparse(block) else block, dtype=float)
    if values.min() < 0:
        return "", NEEDS_COUNTS
    if max(_rounding(store, np.expm1)) <= NEAR:
        return "; they look like log1p of counts", f"Undo the logarithm: {_rounded(adata, setup, store, 'expm1')}."
    for name, sums in (("log1p of counts", np.expm1(values.clip(max=80)).sum(1)), ("counts", values.sum(1))):
        sums = sums[sums > 0]
        if len(sums) > 1 and sums.std() < 1e-3 * sums.mean():
            return f"; they look like {name} scaled to {sums.mean():.6g} per cell", NEEDS_COUNTS
    if "log1p" in adata.uns:
        return '; adata.uns["log1p"] says that X was log-transformed', NEEDS_COUNTS
    text = f"; the farthest lies {distance:.2g} from a whole number"
    if change > LARGE:
        return text, NEEDS_COUNTS
    return text, (
        "SoupX, RSEM, salmon and similar tools return fractional counts. Prefer the raw counts before them; if there "
        f"are none, round: {_rounded(adata, setup, store)}. {NEEDS_COUNTS}"
    )


def _rounding(store: MemoryStore | BackedStore, function: Callable | None = None) -> tuple[float, float]:
    """Return the largest distance of a value, or a function of it, from a whole number, and how much rounding changes.

    The second is the sum of all changes as a share of the sum of all values. It shows proportions, which are close to a
    whole number only because they are close to 0.
    """
    most = total = changes = 0.0
    for _, block in store.blocks():
        values = (block.data if sparse.issparse(block) else np.asarray(block)).astype(float)
        if function is not None:
            if values.max(initial=0.0) > 30:  # its exponential has no digits after the decimal point
                return np.inf, np.inf
            values = function(values)
        changed = np.abs(values - np.rint(values))
        most = max(most, float(changed.max(initial=0.0)))
        total, changes = total + np.abs(values).sum(), changes + changed.sum()
        if function is not None and most > NEAR:  # the answer is known
            break
    return most, changes / total if total else 0.0


def _rounded(adata: AnnData, setup: Setup, store: MemoryStore | BackedStore, function: str | None = None) -> str:
    """Return the code that makes a layer of the rounded values, or of a rounded function of them."""
    names = itertools.chain(("counts", "rounded_counts"), (f"rounded_counts_{i}" for i in itertools.count(2)))
    layer = next(name for name in names if name not in adata.layers)
    if not isinstance(store, MemoryStore):
        read = "adata = adata.to_memory(), "
    else:
        read = ""
    if sparse.issparse(matrix_of(adata, setup)) or getattr(store.matrix, "format", None) in ("csr", "csc"):
        values = f"{setup.where}.{function}().rint()" if function else f"{setup.where}.rint()"
    else:
        values = f"np.rint(np.{function}({setup.where}))" if function else f"np.rint({setup.where})"
    return f'{read}adata.layers["{layer}"] = {values}, then setup_anndata(adata, layer="{layer}")'


def counts_are_in(adata: AnnData, setup: Setup, otherwise: str) -> str:
    """Return the call that reads counts from elsewhere in ``adata``; ``otherwise`` if there are none."""
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
    """Tell whether the first thousand rows are all non-negative integers; this is enough for a suggestion."""
    if unreadable(matrix, "") or matrix.dtype.kind not in "biuf":
        return False
    try:
        _, block = next(iter(open_store(matrix).blocks(1000)))
    except DamagedMatrix:
        return False
    values = block.data if sparse.issparse(block) else np.asarray(block)
    return bool(values.size) and bool(np.isfinite(values).all() and (values >= 0).all() and (values % 1 == 0).all())
