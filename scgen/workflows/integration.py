"""Integrate batches in one call, with an interface like scanpy's, and cluster the cells."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scgen.arguments import MOST_SEED, check_flag, check_key, check_names, check_whole, counted, shown
from scgen.data.categories import names_of
from scgen.data.checks import Setup, check_types, check_writable, raise_errors
from scgen.data.counts import matrix_of
from scgen.data.findings import findings
from scgen.data.registry import setup_anndata
from scgen.data.stores import open_store, totals
from scgen.models import trainings
from scgen.models.scvi import SCVI
from scgen.workflows import tuning

#: The largest number of models. The embeddings of all are in memory at once.
MOST_MODELS = 100


def integrate(
    adata: AnnData,
    key: str | Sequence[str],
    *,
    layer: str | None = None,
    n_top_genes: int | None = None,
    n_models: int = 1,
    adjusted_basis: str = "X_scgen",
    labels_key: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    counts: bool = True,
    tune: bool | Sequence[str] | Mapping[str, Mapping] = False,
    n_latent: int | None = None,
    n_hidden: int | None = None,
    n_layers: int | None = None,
    dropout_rate: float | None = None,
    gene_likelihood: str | None = None,
    dispersion: str | None = None,
    use_observed_lib_size: bool | None = None,
    encode_covariates: bool | None = None,
    library_residual: bool | None = None,
    posterior: str | None = None,
    n_flows: int | None = None,
    prior: str | None = None,
    n_components: int | None = None,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    train_size: float | None = None,
    early_stopping: bool | None = None,
    patience: int | None = None,
    learning_rate: float | None = None,
    kl_start: float | None = None,
    batch_penalty: float | None = None,
    n_importance_samples: int | None = None,
    accelerator: str | None = None,
    devices: int | None = None,
    precision: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SCVI:
    """Train `SCVI` on ``adata`` and write an embedding without batch effects to ``obsm[adjusted_basis]``.

    Parameters
    ----------
    adata
        Cells x genes, with counts.
    key
        Column of ``adata.obs`` with the batch, or a list: the first is the batch, the others are covariates.
    layer
        Layer with the counts; None uses ``adata.X``.
    n_top_genes
        Number of highly variable genes to model, chosen within batches; None models all genes.
    n_models
        Number of models to train, up to 100, with the seeds ``seed``, ``seed + 1`` and so on. Their embeddings are put
        side by side, and the first principal components are written, as many as one embedding has dimensions. The
        result depends less on the seed, and takes ``n_models`` times as long. Ctrl-C in a training joins the models
        trained so far. New cells cannot be placed in this embedding: the returned model maps them into its own.
    adjusted_basis
        Key of the embedding. Only an earlier result of `integrate` is overwritten.
    labels_key, size_factor_key, categorical_covariate_keys, continuous_covariate_keys, counts
        As in `setup_anndata`.
    tune
        Whether `scgen.tune` chooses the settings of `SCVI`. True uses all presets. A list of names of presets, or a
        mapping of names to settings, uses only these.
    n_latent, n_hidden, n_layers, dropout_rate, gene_likelihood, dispersion, use_observed_lib_size, encode_covariates, \
library_residual, posterior, n_flows, prior, n_components
        As in `SCVI`; None uses its default.
    max_epochs, batch_size, train_size, early_stopping, patience, learning_rate, kl_start, batch_penalty, \
n_importance_samples, accelerator, devices, precision
        As in `SCVI.train`; None uses its default.
    seed
        Seed of the initial weights and of training.
    progress
        Whether to show a progress line.

    Returns
    -------
    The model of ``seed``. If there are several, its own embedding is one of those that were joined. ``model.adata``
    holds the cells and genes that it was trained on, and ``indices=`` are rows of it. Columns of ``obs``, such as
    groups to compare, are looked up in the ``adata`` passed here, at the time of the call. ``adata`` gets the embedding
    in ``obsm[adjusted_basis]`` and the parameters in ``uns["scgen"]["integrate"]``. Cells without counts in the
    modelled genes have NaN in the embedding; a warning names them.

    Raises
    ------
    TypeError, ValueError
        As `setup_anndata`, `SCVI` and `tune`; also if ``n_top_genes`` or ``n_models`` is out of its range, no gene
        varies, no cell is left, `integrate` did not write the present ``obsm[adjusted_basis]``, or ``tune`` is combined
        with settings that it chooses. ``adata`` is then unchanged.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
    >>> model = scgen.integrate(adata, "batch", n_top_genes=20, max_epochs=2, progress=False)
    >>> adata.obsm["X_scgen"].shape
    (100, 10)

    Columns that are added later can be used:

    >>> adata.obs["cluster"] = ["a", "b"] * 50
    >>> len(model.differential_expression("cluster", "a", "b"))
    20

    The model returns values for its own cells and genes. To make them a layer of ``adata``, match the names; cells and
    genes that were not modelled are NaN:

    >>> values = model.get_normalized_expression(batch="average")
    >>> values.shape
    (100, 20)
    >>> adata.layers["scgen"] = values.reindex(index=adata.obs_names, columns=adata.var_names).to_numpy()
    >>> adata.layers["scgen"].shape
    (100, 30)
    """
    # None means the default of the function that is called, so that each default is written only once.
    given = {name: value for name, value in locals().items() if value is not None}
    keys = [key] if isinstance(key, str) else check_names("key", key)
    if not keys:
        raise ValueError('key is empty. Name the column with the batches: integrate(adata, "batch").')
    adjusted_basis = check_key("adjusted_basis", adjusted_basis, "X_scgen")
    check_flag("counts", counts)
    if n_top_genes is not None:
        n_top_genes = check_whole("n_top_genes", n_top_genes, 1)
    n_models = check_whole("n_models", n_models, 1, MOST_MODELS)
    if n_top_genes is not None and not counts:
        raise ValueError("n_top_genes needs counts. With counts=False, select the genes before calling integrate.")
    columns = _settings(setup_anndata, given) | {"batch_key": keys[0]}
    for name in ("categorical_covariate_keys", "continuous_covariate_keys"):
        columns[name] = check_names(name, given.get(name, []))
    columns["categorical_covariate_keys"] = keys[1:] + columns["categorical_covariate_keys"]
    setup = Setup(**{name: tuple(value) if isinstance(value, list) else value for name, value in columns.items()})
    check_types(adata, setup)
    check_writable(adata)
    _check_basis(adata, adjusted_basis)
    chosen, training = _settings(SCVI, given), _settings(SCVI.train, given)
    SCVI.Arguments(**_defaults(SCVI) | chosen | {"seed": seed})
    seed = check_whole("seed", seed, 0, MOST_SEED + 1 - n_models)
    trainings.checked(**_defaults(SCVI.train) | training | {"seed": seed, "progress": progress})
    presets = None if isinstance(tune, bool | np.bool_) else tune
    is_tuned = bool(tune) if presets is None else True
    if is_tuned:
        tuning.check_presets("tune", presets)
        _check_tuned(chosen, training)
    raise_errors(findings(adata, setup, empty_cells=False), "integrate")
    modelled, kept = modelled_part(adata, setup, n_top_genes)
    setup_anndata(modelled, **columns)
    if is_tuned:
        tuned = tuning.tune(modelled, presets=presets, seed=seed, progress=progress, **training)
        model = tuned.model
    else:
        model = SCVI(modelled, seed=seed, **chosen)
        model.train(seed=seed, progress=progress, **training)
    model.source, model.source_rows = adata, kept
    latents = [model.get_latent_representation()]
    if model.trainings[-1]["finished"]:
        latents += _of_more_models(model, range(seed + 1, seed + n_models), training | {"progress": progress})
    latent = joined(latents)
    embedding = np.full((adata.n_obs, latent.shape[1]), np.nan, np.float32)
    embedding[kept] = latent
    adata.obsm[adjusted_basis] = embedding
    parameters = {name: value for name, value in asdict(model.arguments).items() if value is not None} | training
    parameters |= {name: value for name, value in columns.items() if value not in ([], None)}
    parameters |= {"key": keys, "n_genes": modelled.n_vars, "seed": seed, "epochs": len(model.history)}
    parameters |= {"n_models": len(latents)}
    parameters |= {"adjusted_basis": adjusted_basis, "written": sorted({*_written(adata), adjusted_basis})}
    parameters |= {"tuned": tuned.best} if is_tuned else {}
    adata.uns["scgen"] = {**adata.uns.get("scgen", {}), "integrate": parameters}
    return model


def _of_more_models(model: SCVI, seeds: Sequence[int], training: Mapping) -> list[np.ndarray]:
    """Return the embeddings of models like this one with other seeds, fewer after an interrupt or a failure."""
    latents = []
    for seed in seeds:
        other = SCVI(model.adata, **asdict(model.arguments) | {"seed": seed})
        try:
            other.train(seed=seed, **training)
            latents.append(other.get_latent_representation())
        except KeyboardInterrupt:  # before the end of the first epoch; a later one ends the training without an error
            break
        except tuning.FAILURES as error:
            warnings.warn(f"the model of seed {seed} is left out, because its training failed: {error}", stacklevel=3)
            continue
        if not other.trainings[-1]["finished"]:
            break
    return latents


def joined(embeddings: Sequence[np.ndarray]) -> np.ndarray:
    """Put several embeddings of the same n cells side by side, and return the first principal components.

    All embeddings are scaled to the same total variance, which is the mean of their variances. With all components, the
    squared distance between two cells would be the mean of those in the scaled embeddings. As many components are kept
    as the first embedding has dimensions, but at most n. A single embedding is returned as it is.

    Examples
    --------
    >>> import numpy as np
    >>> z = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    >>> turned = 5 * z[:, [2, 0, 1]]
    >>> both = joined([z, turned])
    >>> both.shape, float(both.var(0).sum() / z.var(0).sum()) > 1
    ((100, 3), True)
    """
    if len(embeddings) == 1:
        return embeddings[0]
    from sklearn.decomposition import PCA  # imported here, since it takes a second

    variances = [max(float(z.var(axis=0, dtype=np.float64).sum()), 1e-12) for z in embeddings]
    scales = np.sqrt(np.mean(variances) / np.array(variances) / len(embeddings))
    together = np.hstack([scale * z for scale, z in zip(scales, embeddings, strict=True)])
    n_kept = min(embeddings[0].shape)
    return PCA(n_kept, svd_solver="full").fit_transform(together).astype(np.float32)


def _settings(function: Callable, given: Mapping) -> dict:
    """Return the given values of a function's parameters, except those that `integrate` passes itself."""
    taken = inspect.signature(function).parameters.keys() - {"adata", "seed", "progress"}
    return {name: value for name, value in given.items() if name in taken}


def _defaults(function: Callable) -> dict:
    """Return the default values of a function's parameters, by name."""
    parameters = inspect.signature(function).parameters
    return {name: of.default for name, of in parameters.items() if of.default is not of.empty}


def _written(adata: AnnData) -> list[str]:
    """Return the keys of obsm that `integrate` has written; ValueError if its record is not from `integrate`."""
    record = adata.uns.get("scgen", {}).get("integrate", {})
    if not isinstance(record, Mapping) or not isinstance(record.get("written", []), list | np.ndarray):
        raise ValueError(
            f'adata.uns["scgen"]["integrate"] holds {shown(record)}, which is not from integrate: '
            'del adata.uns["scgen"]["integrate"] first.'
        )
    return list(record.get("written", []))


def _check_basis(adata: AnnData, adjusted_basis: str) -> None:
    """Raise ValueError if the embedding would overwrite something that `integrate` did not write."""
    if adjusted_basis in adata.obsm and adjusted_basis not in _written(adata):
        raise ValueError(
            f'adata.obsm["{adjusted_basis}"] exists, but integrate did not write it. Choose another key: '
            f'integrate(adata, ..., adjusted_basis="X_scgen_2"), or del adata.obsm["{adjusted_basis}"] first.'
        )


def _check_tuned(chosen: Mapping, training: Mapping) -> None:
    """Raise ValueError if settings are given that `tune` chooses or does not take."""
    wrong = [*chosen, *(training.keys() - inspect.signature(tuning.tune).parameters.keys())]
    if wrong:
        raise ValueError(
            f"tune chooses the model's settings and trains with the defaults. Leave out {', '.join(sorted(wrong))}, or "
            'give settings to choose from: tune={"a": {"n_latent": 10}, "b": {"n_latent": 20}}.'
        )


def modelled_part(adata: AnnData, setup: Setup, n_top_genes: int | None) -> tuple[AnnData, np.ndarray]:
    """Return a new AnnData with the cells and genes to model, and the rows of these cells in ``adata``.

    It has only the ``n_top_genes``, and only cells with counts in them; a warning names the other cells. The counts
    are in the same layer as in ``adata``, and obs and var have the columns that the model reads. The model can
    therefore be used with ``adata``, too.
    """
    matrix = matrix_of(adata, setup)
    if not (sparse.issparse(matrix) or isinstance(matrix, np.ndarray)):
        matrix = matrix[:]  # on disk
    if sparse.issparse(matrix):
        matrix = sparse.csr_matrix(matrix)  # scanpy does not take sparse arrays
    genes = np.arange(adata.n_vars)
    kept = _counted(matrix, setup)
    if len(kept) and n_top_genes is not None and n_top_genes < adata.n_vars:
        genes = highly_variable(matrix[kept], adata.obs[setup.batch_key].to_numpy()[kept], n_top_genes)
        if len(genes) < n_top_genes:
            vary = counted(len(genes), "gene varies", "genes vary")
            text = f"n_top_genes={n_top_genes}, but only {vary} within the batches; no others are modelled"
            warnings.warn(text, stacklevel=3)
        matrix = matrix[:, genes]
        kept = _counted(matrix, setup)
    elif n_top_genes is not None and n_top_genes > adata.n_vars:
        text = f"n_top_genes={n_top_genes}, but adata has {counted(adata.n_vars, 'gene')}; all are modelled"
        warnings.warn(text, stacklevel=3)
    if not len(kept):
        raise ValueError("no cell has any count in the modelled genes.")
    if len(kept) < adata.n_obs:
        empty = np.setdiff1d(np.arange(adata.n_obs), kept)
        names = ", ".join(adata.obs_names[empty[:10]]) + (", ..." if len(empty) > 10 else "")
        warnings.warn(
            f"{counted(len(empty), 'cell has', 'cells have')} no counts in the {counted(len(genes), 'modelled gene')}, "
            f"and NaN in the embedding: {names}",
            stacklevel=3,
        )
        matrix = matrix[kept]
    obs = adata.obs[[*setup.categorical.values(), *setup.numeric.values()]].iloc[kept]
    var = adata.var.iloc[genes]
    if setup.layer is None:
        return AnnData(matrix, obs=obs, var=var), kept
    return AnnData(obs=obs, var=var, layers={setup.layer: matrix}), kept


def _counted(matrix, setup: Setup) -> np.ndarray:
    """Return the rows that have counts; all rows if the values are not counts."""
    return np.flatnonzero(totals(open_store(matrix)) > 0) if setup.counts else np.arange(matrix.shape[0])


def highly_variable(matrix, batch: np.ndarray, n_top_genes: int) -> np.ndarray:
    """Return the sorted columns of the genes that vary most within batches, by scanpy's "seurat" flavour.

    Raises
    ------
    ValueError
        If no gene varies within any batch.
    """
    import scanpy as sc

    obs = pd.DataFrame({"batch": pd.Categorical(names_of(batch))}, index=np.arange(len(batch)).astype(str))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about this copy, which the user does not see
        copy = AnnData(matrix.astype(np.float32), obs=obs)
        sizes = copy.obs["batch"].value_counts()
        sc.pp.normalize_total(copy, target_sum=1e4)
        sc.pp.log1p(copy)
        # scanpy fails on a batch with few cells, or with equal cells. Such a batch has no information on variability.
        rows = obs.groupby("batch", observed=True).indices
        batches = [name for name in sizes.index[sizes >= min(10, sizes.max())] if _varies(copy.X[rows[name]])]
        if not batches:
            raise ValueError(
                f"n_top_genes={n_top_genes}: no gene varies within any batch of at least "
                f"{counted(min(10, sizes.max()), 'cell')}. Leave out n_top_genes to model all genes."
            )
        copy = copy[copy.obs["batch"].isin(batches)].copy()
        sc.pp.highly_variable_genes(
            copy, flavor="seurat", n_top_genes=n_top_genes, batch_key="batch" if len(batches) > 1 else None
        )
    return np.flatnonzero(copy.var["highly_variable"].to_numpy())


def _varies(values) -> bool:
    """Tell whether any gene differs between cells by more than the rounding of float32."""
    most, least = values.max(axis=0), values.min(axis=0)
    if sparse.issparse(values):
        most, least = most.toarray(), least.toarray()
    return bool((most - least > 1e-5 * most).any())
