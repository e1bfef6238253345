"""Describe each cell by the cells around it, without a model: means, gradients, maxima and composition."""

from dataclasses import replace

import numpy as np
from anndata import AnnData

from scgen.arguments import check_choice, check_memory
from scgen.data import positions
from scgen.data.annotations import groups_of
from scgen.data.checks import Setup, check_types, raise_errors, some
from scgen.data.counts import are_counts, layers_of, matrix_of
from scgen.data.findings import findings
from scgen.data.neighbourhoods import Neighbourhoods
from scgen.data.stores import BackedStore, MemoryStore, open_store, totals

METHODS = ("mean", "gradient", "pool", "composition")
#: Angular frequencies of the gradients.
FREQUENCIES = (1, 2, 3)
#: Number of features of neighbours that are held in memory at a time.
BLOCK = 2**24


def neighborhood_features(
    adata: AnnData,
    method: str,
    *,
    use_rep: str | None = None,
    layer: str | None = None,
    labels_key: str | None = None,
    n_neighbors: int = 18,
    radius: float | None = None,
    spatial_key: str = "spatial",
    section_key: str | None = None,
) -> np.ndarray:
    """Describe each cell and its neighbours in the tissue by features that do not depend on how the tissue is rotated.

    These are baselines for models of niches: cells can be clustered by the result. A cell's own features vary more than
    means over many cells. Standardise the columns before you use distances between cells. None of the methods tells an
    arrangement from its mirror image.

    Parameters
    ----------
    adata
        The cells. It is not changed.
    method
        ============= ==========================================================================================
        "mean"        the cell's own features | their means over the neighbours; what CellCharter uses
        "gradient"    own | means | azimuthal gradients ``|mean_j f_j exp(i m phi_j)|`` for m = 1, then 2 and 3,
                      where f_j are the features of neighbour j and phi_j is its direction; BANKSY's idea, without
                      its weights
        "pool"        means | maxima, both over the cell and its neighbours
        "composition" share of each value of ``labels_key`` among the cell and its neighbours
        ============= ==========================================================================================
    use_rep
        Key of the features in ``adata.obsm``, such as principal components. They are used as they are.
    layer
        Layer with the features, if ``use_rep`` is None; None uses ``adata.X``. Counts are scaled to the median total of
        the cells, then log1p is taken, as `scanpy.pp.normalize_total` and `scanpy.pp.log1p` do. The values are taken
        for counts if those of the first thousand cells are whole and not negative. Other values are used as they are.
    labels_key
        Column of ``adata.obs`` with the labels, such as cell types; for ``method="composition"`` only.
    n_neighbors
        Number of nearest cells of the same section. Cells at the same distance as the last are neighbours, too.
    radius
        If given, the neighbours are the cells within this distance, in the unit of the positions, and ``n_neighbors``
        is not used. A cell without neighbours has means and gradients of 0.
    spatial_key
        Key of the positions in ``adata.obsm``, two columns.
    section_key
        Column of ``adata.obs`` with the section; None if all cells are of one section.

    Returns
    -------
    (N, D) float32. With G features, D is 2 G for "mean" and "pool", and 5 G for "gradient". For "composition", it is
    the number of labels, which are in the order of the column's categories, or sorted.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If a key does not exist, positions or features are not finite, there are not two coordinates, a section has too
        few cells, or an argument does not fit the method.
    MemoryError
        If the result does not fit into memory.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_tissue(n_sections=2, n_rows=5, n_genes=50)
    >>> scgen.neighborhood_features(adata, "gradient", section_key="section").shape
    (950, 250)
    >>> scgen.neighborhood_features(adata, "composition", labels_key="cell_type", section_key="section").shape
    (950, 3)
    """
    setup = Setup(layer=layer, counts=False, spatial_key=spatial_key, section_key=section_key, use_rep=use_rep)
    check_types(adata, setup)
    method = check_choice("method", method, METHODS)
    if spatial_key is None:
        raise TypeError('spatial_key=None; it takes a key of adata.obsm, such as "spatial".')
    raise_errors(list(positions.findings(adata, setup)), "neighborhood_features")
    store, scale = _features(adata, method, setup, labels_key)
    parts = {"mean": 2, "gradient": 2 + len(FREQUENCIES), "pool": 2, "composition": 1}[method]
    n_cells, n_features = store.shape
    check_memory(
        "method", method, 4 * n_cells * parts * n_features, "Use fewer features, such as principal components."
    )
    places, sections = positions.coordinates_of(adata, setup), positions.sections_of(adata, setup)
    near = Neighbourhoods.of(places, sections, n_neighbors=n_neighbors, radius=radius)
    result = np.empty((n_cells, parts, n_features), np.float32)
    size = max(BLOCK // (near.index.shape[1] * n_features), 1)
    for start in range(0, n_cells, size):
        block = slice(start, start + size)
        rows, place = np.unique(near.index[block], return_inverse=True)
        x = store.rows(rows).numpy()
        if scale is not None:
            x = np.log1p(x * scale[rows, None])
        x = x[place.reshape(near.index[block].shape)]
        result[block] = _described(method, x, near.offsets[block], near.mask[block])
    return result.reshape(n_cells, -1)


def _features(
    adata: AnnData, method: str, setup: Setup, labels_key: str | None
) -> tuple[MemoryStore | BackedStore, np.ndarray | None]:
    """Return the features of the cells, and the factors by which counts are multiplied, (N,) float32; None for none."""
    if method == "composition":
        for name, value in (("use_rep", setup.use_rep), ("layer", setup.layer)):
            if value is not None:
                raise ValueError(f'{name}={value!r}: method="composition" reads labels_key alone. Leave {name} out.')
        if labels_key is None:
            raise ValueError('labels_key=None: method="composition" needs labels, such as labels_key="cell_type".')
        labels = groups_of(adata, "labels_key", labels_key)
        return MemoryStore(np.eye(len(labels.categories), dtype=np.float32)[labels.codes]), None
    if labels_key is not None:
        raise ValueError(f'labels_key={labels_key!r}: only method="composition" reads labels. Leave labels_key out.')
    if setup.use_rep is not None and setup.layer is not None:
        raise ValueError(f"use_rep={setup.use_rep!r} and layer={setup.layer!r}: give one of them.")
    matrix = matrix_of(adata, setup)
    if matrix is None and setup.use_rep is None:
        there = f"layers: {some(layers_of(adata), 12) or 'none'}; obsm: {some(adata.obsm, 12)}"
        raise ValueError(
            f"layer={setup.layer!r}: {setup.where} does not exist. There are {there}. Set layer= or use_rep=."
        )
    values = replace(setup, spatial_key=None, section_key=None)  # positions were checked before
    raise_errors(findings(adata, values), "neighborhood_features")
    store = open_store(matrix)
    if setup.use_rep is not None or not are_counts(matrix):
        return store, None
    sums = totals(store)
    return store, np.divide(np.median(sums[sums > 0]), sums, out=np.ones_like(sums), where=sums > 0).astype(np.float32)


def _described(method: str, x: np.ndarray, offsets: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the parts of the description of some cells, (n, parts, G).

    Parameters
    ----------
    method
        One of `METHODS`.
    x
        (n, J, G): the features of each cell, which is the first, and its neighbours.
    offsets, mask
        As in `Neighbourhoods`.
    """
    all_of_them = mask / mask.sum(1, keepdims=True)
    if method == "composition":
        return _sums(all_of_them[:, None], x)
    if method == "pool":
        largest = np.where(mask[:, :, None], x, -np.inf).max(1, keepdims=True)
        return np.concatenate([_sums(all_of_them[:, None], x), largest], axis=1)
    others = mask.copy()
    others[:, 0] = False
    others = others / np.maximum(others.sum(1, keepdims=True), 1)
    parts = [x[:, :1], _sums(others[:, None], x)]
    if method == "gradient":
        phi = np.arctan2(offsets[:, :, 1], offsets[:, :, 0])
        for m in FREQUENCIES:
            real, imaginary = (_sums((others * of(m * phi))[:, None], x) for of in (np.cos, np.sin))
            parts.append(np.hypot(real, imaginary))
    return np.concatenate(parts, axis=1)


def _sums(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return sums over the neighbours, (n, 1, G), weighted by (n, 1, J)."""
    return np.matmul(weights.astype(np.float32), x.astype(np.float32, copy=False))
