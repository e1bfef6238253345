"""Integration in one call, shaped like scanpy's own, and the clustering that follows it."""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scgen.arguments import MOST_EPOCHS, check_choice, check_flag, check_key, check_names, check_number, check_whole
from scgen.data.categories import names_of
from scgen.data.checks import Setup, check_types, raise_errors
from scgen.data.findings import findings, matrix_of
from scgen.data.registry import check_writable, setup_anndata
from scgen.data.stores import open_store, totals
from scgen.models.scvi import SCVI
from scgen.training import choose_device


def integrate(
    adata: AnnData,
    key: str | Sequence[str],
    *,
    layer: str | None = None,
    n_top_genes: int | None = None,
    adjusted_basis: str = "X_scgen",
    n_latent: int = 10,
    gene_likelihood: str = "zinb",
    max_epochs: int | None = None,
    accelerator: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> SCVI:
    """Train `SCVI` on ``adata`` and write its embedding, free of the batches' effect, to ``obsm[adjusted_basis]``.

    Parameters
    ----------
    adata
        Cells x genes, with counts.
    key
        Column of ``adata.obs`` with the batches, or several: the first is the batch, the others are covariates.
    layer
        Layer of the counts; None reads ``adata.X``.
    n_top_genes
        Model only so many highly variable genes, chosen within batches; None models all.
    adjusted_basis
        Key of the embedding.
    n_latent, gene_likelihood
        As in `SCVI`.
    max_epochs, accelerator, progress
        As in `SCVI.train`.
    seed
        Seed of the initial weights and of training.

    Returns
    -------
    The model. Its own ``adata`` holds the cells and genes it was trained on. ``adata`` itself gets
    ``obsm[adjusted_basis]``, NaN for cells without any count in the modelled genes (a warning names them), and the
    parameters in ``uns["scgen"]["integrate"]``.

    Raises
    ------
    TypeError, ValueError
        As `setup_anndata` and `SCVI`; also if ``n_top_genes`` is below 1 or no cell is left. ``adata`` is unchanged.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
    >>> model = scgen.integrate(adata, "batch", max_epochs=2, progress=False)
    >>> adata.obsm["X_scgen"].shape
    (100, 10)
    """
    keys = [key] if isinstance(key, str) else check_names("key", key)
    if not keys:
        raise ValueError('key is empty; name the column of the batches: integrate(adata, "batch").')
    adjusted_basis = check_key("adjusted_basis", adjusted_basis, "X_scgen")
    settings = SCVI.checked({"n_latent": n_latent, "gene_likelihood": gene_likelihood, "seed": seed})
    n_latent, gene_likelihood, seed = settings.values()
    choose_device(accelerator)
    check_flag("progress", progress)
    if n_top_genes is not None:
        n_top_genes = check_whole("n_top_genes", n_top_genes, 1)
    if max_epochs is not None:
        max_epochs = check_whole("max_epochs", max_epochs, 1, MOST_EPOCHS)
    setup = Setup(layer=layer, batch_key=keys[0], categorical_covariate_keys=tuple(keys[1:]))
    check_types(adata, setup)
    check_writable(adata)
    raise_errors(findings(adata, setup, empty_cells=False), "integrate")
    modelled, kept = modelled_part(adata, layer, keys, n_top_genes)
    setup_anndata(modelled, batch_key=keys[0], categorical_covariate_keys=keys[1:] or None)
    model = SCVI(modelled, n_latent=n_latent, gene_likelihood=gene_likelihood, seed=seed)
    model.train(max_epochs, accelerator=accelerator, seed=seed, progress=progress)
    embedding = np.full((adata.n_obs, n_latent), np.nan, np.float32)
    embedding[kept] = model.get_latent_representation()
    adata.obsm[adjusted_basis] = embedding
    parameters = {"key": keys, "adjusted_basis": adjusted_basis, "n_genes": modelled.n_vars, "seed": seed}
    parameters |= {"n_latent": n_latent, "gene_likelihood": gene_likelihood, "epochs": len(model.history)}
    parameters |= {"layer": layer} if layer is not None else {}
    adata.uns["scgen"] = {**adata.uns.get("scgen", {}), "integrate": parameters}
    return model


def modelled_part(
    adata: AnnData, layer: str | None, keys: Sequence[str], n_top_genes: int | None
) -> tuple[AnnData, np.ndarray]:
    """Return the cells and genes that are modelled, as an AnnData of their own, and the rows of these cells.

    Left out are genes not among the ``n_top_genes``, and then cells without counts, which a warning names.
    """
    matrix = matrix_of(adata, layer)
    if not (sparse.issparse(matrix) or isinstance(matrix, np.ndarray)):
        matrix = matrix[:]  # on disk
    if sparse.issparse(matrix):
        matrix = sparse.csr_matrix(matrix)  # scanpy does not take sparse arrays
    genes = np.arange(adata.n_vars)
    kept = np.flatnonzero(totals(open_store(matrix)) > 0)
    if len(kept) and n_top_genes is not None and n_top_genes < adata.n_vars:
        genes = highly_variable(matrix[kept], adata.obs[keys[0]].to_numpy()[kept], n_top_genes)
        matrix = matrix[:, genes]
        kept = np.flatnonzero(totals(open_store(matrix)) > 0)
    if not len(kept):
        raise ValueError("no cell has any count in the modelled genes.")
    if len(kept) < adata.n_obs:
        empty = np.setdiff1d(np.arange(adata.n_obs), kept)
        names = ", ".join(adata.obs_names[empty[:10]]) + (", ..." if len(empty) > 10 else "")
        warnings.warn(
            f"{len(empty)} cells have no counts in the {len(genes)} modelled genes; their embedding is NaN: {names}",
            stacklevel=3,
        )
        matrix = matrix[kept]
    obs = adata.obs[list(keys)].iloc[kept]
    return AnnData(matrix, obs=obs, var=pd.DataFrame(index=adata.var_names[genes])), kept


def highly_variable(matrix, batch: np.ndarray, n_top_genes: int) -> np.ndarray:
    """Return the columns of the genes that vary most within batches, by scanpy's "seurat" flavour, in order."""
    import scanpy as sc

    copy = AnnData(matrix.astype(np.float32), obs=pd.DataFrame({"batch": pd.Categorical(names_of(batch))}))
    sizes = copy.obs["batch"].value_counts()
    # A batch of a few cells says nothing about variability, and scanpy fails on it.
    copy = copy[copy.obs["batch"].isin(sizes.index[sizes >= min(10, sizes.max())])].copy()
    sc.pp.normalize_total(copy, target_sum=1e4)
    sc.pp.log1p(copy)
    several = copy.obs["batch"].nunique() > 1
    sc.pp.highly_variable_genes(copy, flavor="seurat", n_top_genes=n_top_genes, batch_key="batch" if several else None)
    return np.flatnonzero(copy.var["highly_variable"].to_numpy())


def cluster(
    adata: AnnData, basis: str = "X_scgen", *, suffix: str = "scgen", resolution: float = 1.0, seed: int = 0
) -> None:
    """Find neighbours, Leiden clusters and a UMAP of an embedding, of the cells for which it is finite.

    Written with ``suffix``, so that nothing that was there is lost: ``uns["neighbors_scgen"]`` with its matrices in
    ``obsp``, ``obs["leiden_scgen"]``, ``obsm["X_umap_scgen"]``; NaN, or no neighbours, for the other cells.

    Parameters
    ----------
    adata, basis
        The cells, and the key of the embedding in ``obsm``.
    suffix
        Ends the names of all that is written.
    resolution
        Of the Leiden algorithm: more is more clusters.
    seed
        Seed of neighbours, clusters and UMAP.
    """
    import scanpy as sc

    check_whole("seed", seed, 0, 2**32 - 1)  # of NumPy's older generators, which are scanpy's
    resolution = check_number("resolution", resolution, "a number from 0", least=0)
    suffix = check_key("suffix", suffix, "scgen")
    check_types(adata, Setup())
    check_choice("basis", basis, list(adata.obsm) or ["X_scgen"])
    if basis not in adata.obsm:
        raise ValueError(f'basis={basis!r} is not in adata.obsm: integrate(adata, "batch") writes it.')
    kept = np.flatnonzero(np.isfinite(adata.obsm[basis]).all(axis=1))
    part = AnnData(obs=pd.DataFrame(index=adata.obs_names[kept]), obsm={basis: np.asarray(adata.obsm[basis])[kept]})
    key = f"neighbors_{suffix}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        sc.pp.neighbors(part, n_neighbors=min(15, len(kept)), use_rep=basis, key_added=key, random_state=seed)
        # UMAP's own start needs more cells than dimensions.
        sc.tl.umap(part, neighbors_key=key, random_state=seed, init_pos="spectral" if len(kept) > 10 else "random")
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


def _spread(graph: sparse.coo_matrix, kept: np.ndarray, n: int) -> sparse.csr_matrix:
    """Return a graph over some cells as one over all n."""
    return sparse.csr_matrix((graph.data, (kept[graph.row], kept[graph.col])), shape=(n, n))
