"""What follows an integration: neighbours, clusters and a UMAP of the embedding."""

import warnings

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scgen.arguments import check_choice, check_key, check_number, check_whole
from scgen.data.checks import Setup, check_types


def names_of_results(suffix: str = "scgen") -> dict[str, list[str]]:
    """Return, by attribute of AnnData, the keys that `integrate` and `cluster` write with this suffix.

    Examples
    --------
    >>> names_of_results()["obsm"]
    ['X_scgen', 'X_umap_scgen']
    """
    neighbors = f"neighbors_{suffix}"
    return {
        "obs": [f"leiden_{suffix}"],
        "obsm": [f"X_{suffix}", f"X_umap_{suffix}"],
        "obsp": [f"{neighbors}_distances", f"{neighbors}_connectivities"],
        "uns": [neighbors],
    }


def cluster(
    adata: AnnData, basis: str = "X_scgen", *, suffix: str = "scgen", resolution: float = 1.0, seed: int = 0
) -> None:
    """Compute neighbours, Leiden clusters and a UMAP of an embedding, for the cells where it is finite.

    The results are ``uns["neighbors_scgen"]`` with its matrices in ``obsp``, ``obs["leiden_scgen"]`` and
    ``obsm["X_umap_scgen"]``. The suffix keeps them apart from earlier results. Other cells have NaN or no neighbours.

    Parameters
    ----------
    adata, basis
        The cells, and the key of the embedding in ``obsm``.
    suffix
        End of the names of all results.
    resolution
        Resolution of the Leiden algorithm; a larger value gives more clusters.
    seed
        Seed of neighbours, clusters and UMAP.
    """
    import scanpy as sc

    check_whole("seed", seed, 0, 2**32 - 1)  # the range of NumPy's older generators, which scanpy uses
    resolution = check_number("resolution", resolution, "a number from 0", least=0)
    suffix = check_key("suffix", suffix, "scgen")
    check_types(adata, Setup())
    check_choice("basis", basis, list(adata.obsm) or ["X_scgen"])
    if basis not in adata.obsm:
        raise ValueError(f'basis={basis!r} is not in adata.obsm. Call integrate(adata, "batch") to write it.')
    kept = np.flatnonzero(np.isfinite(adata.obsm[basis]).all(axis=1))
    part = AnnData(obs=pd.DataFrame(index=adata.obs_names[kept]), obsm={basis: np.asarray(adata.obsm[basis])[kept]})
    key = f"neighbors_{suffix}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        add_umap(part, basis, key, seed)
        sc.tl.leiden(
            part, resolution, neighbors_key=key, flavor="igraph", n_iterations=2, directed=False, random_state=seed
        )
    adata.uns[key] = part.uns[key]
    for name, graph in part.obsp.items():
        adata.obsp[name] = _spread(graph.tocoo(), kept, adata.n_obs)
    umap = np.full((adata.n_obs, 2), np.nan, np.float32)
    umap[kept] = part.obsm["X_umap"]
    adata.obsm[f"X_umap_{suffix}"] = umap
    clusters = part.obs["leiden"].cat
    codes = np.full(adata.n_obs, -1)
    codes[kept] = clusters.codes
    adata.obs[f"leiden_{suffix}"] = pd.Categorical.from_codes(codes, clusters.categories)


def add_umap(adata: AnnData, basis: str, key: str, seed: int) -> None:
    """Compute the neighbours of an embedding, under this key, and its UMAP, in ``obsm["X_umap"]``."""
    import scanpy as sc

    sc.pp.neighbors(adata, n_neighbors=min(15, adata.n_obs), use_rep=basis, key_added=key, random_state=seed)
    # UMAP's spectral initialisation needs more cells than dimensions.
    sc.tl.umap(adata, neighbors_key=key, random_state=seed, init_pos="spectral" if adata.n_obs > 10 else "random")


def _spread(graph: sparse.coo_matrix, kept: np.ndarray, n: int) -> sparse.csr_matrix:
    """Return a graph over some cells as a graph over all n cells."""
    return sparse.csr_matrix((graph.data, (kept[graph.row], kept[graph.col])), shape=(n, n))
