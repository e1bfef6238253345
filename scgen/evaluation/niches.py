"""Compare representations of niches: how well each predicts the labels of sections that it was not fitted to."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from scgen.arguments import check_whole, shown
from scgen.data.annotations import features_of, finite_matrix, groups_of
from scgen.data.checks import Setup, check_types
from scgen.data.loader import rows_asked_for


def score_niches(
    adata: AnnData,
    labels_key: str,
    features: Mapping[str, np.ndarray | str],
    *,
    section_key: str,
    indices: Sequence[int] | Sequence[bool] | np.ndarray | None = None,
    n_neighbors: int = 15,
) -> pd.DataFrame:
    """Score how well representations of cells tell known niches apart.

    If "composition" or "mean" of `neighborhood_features` score as well as "gradient" or a model of the arrangement, the
    arrangement of the cells does not matter in this tissue.

    Parameters
    ----------
    adata, labels_key
        The cells, and the column of ``adata.obs`` with the labels of their niches.
    features
        Representations by name: arrays (N, D) with one row for each cell, or keys of ``adata.obsm``.
    section_key
        Column of ``adata.obs`` with the section. Each section is predicted from all others.
    indices
        Row numbers, or a mask, of the cells to score; None means all. The features of other cells may be NaN.
    n_neighbors
        Number of neighbours that vote in the classification by nearest neighbours.

    Returns
    -------
    A table with one row for each representation. Accuracies are shares of correctly predicted labels, averaged over the
    sections. Clusters are found in the cells of all sections together.

    "knn_accuracy"
        By the nearest neighbours among the cells of all other sections, in Euclidean distance.
    "kmeans_ari"
        Adjusted Rand index of the labels and as many k-means clusters as there are labels; 0 is expected by chance.
    "knn_accuracy_scaled", "kmeans_ari_scaled"
        The same with standardised features. They suit representations with parts of different scales, such as those of
        `neighborhood_features`, in which a cell's own features vary most. The scores without scaling suit the latents
        of a model: scaling would enlarge those that it does not use.
    "logistic_accuracy"
        By logistic regression on the cells of all other sections, with standardised features.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If a key does not exist, a representation is not numeric or not finite, there are fewer than two labels or two
        sections, or the other sections have too few cells or only one label.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_tissue(n_sections=3, n_rows=8, counts=False)
    >>> features = {
    ...     method: scgen.neighborhood_features(adata, method, section_key="section") for method in ("mean", "gradient")
    ... }
    >>> table = scgen.score_niches(
    ...     adata, "niche", features, section_key="section", indices=adata.obs["is_centre"].to_numpy()
    ... )
    >>> table["knn_accuracy_scaled"].idxmax()
    'gradient'
    """
    from sklearn.cluster import KMeans
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import adjusted_rand_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_types(adata, Setup())
    labels, sections = groups_of(adata, "labels_key", labels_key), groups_of(adata, "section_key", section_key)
    rows = rows_asked_for(indices, adata.n_obs)
    n_neighbors = check_whole("n_neighbors", n_neighbors, 1)
    matrices = _matrices(adata, features, rows)
    labels, sections = labels[rows].remove_unused_categories(), sections[rows].remove_unused_categories()
    for name, key, groups in (("labels_key", labels_key, labels), ("section_key", section_key, sections)):
        if len(groups.categories) < 2:
            raise ValueError(f"{name}={key!r}: the cells have one value, {shown(groups[0])}; at least two are needed.")
    folds = _folds(labels, sections, n_neighbors)
    knn, kmeans = KNeighborsClassifier(n_neighbors), KMeans(len(labels.categories), n_init=10, random_state=0)
    classifiers = {
        "knn_accuracy": knn,
        "knn_accuracy_scaled": make_pipeline(StandardScaler(), knn),
        "logistic_accuracy": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    }
    clusterings = {"kmeans_ari": kmeans, "kmeans_ari_scaled": make_pipeline(StandardScaler(), kmeans)}
    scores = {}
    for name, x in matrices.items():
        accuracies = {
            score: np.mean([of.fit(x[~out], labels.codes[~out]).score(x[out], labels.codes[out]) for out in folds])
            for score, of in classifiers.items()
        }
        scores[name] = accuracies | {
            score: adjusted_rand_score(labels.codes, of.fit_predict(x)) for score, of in clusterings.items()
        }
    return pd.DataFrame.from_dict(scores, orient="index")


def _matrices(adata: AnnData, features: Mapping[str, np.ndarray | str], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Check the representations and return these rows of each, (n, D) float64."""
    takes = f'features={shown(features)}; it takes representations by name: {{"gradient": array}}.'
    if not isinstance(features, Mapping):
        raise TypeError(takes)
    if not features or not all(isinstance(name, str) for name in features):
        raise ValueError(takes)
    matrices = {}
    for name, values in features.items():
        where = f"features[{name!r}]"
        if isinstance(values, str):
            matrices[name] = features_of(adata, where, values, rows=rows)
        else:
            matrices[name] = finite_matrix(where, values, adata.obs_names, rows)
    return matrices


def _folds(labels: pd.Categorical, sections: pd.Categorical, n_neighbors: int) -> list[np.ndarray]:
    """Return, for each section, a mask of its cells, (n,), after checking that the others can predict them."""
    folds = [sections == section for section in sections.categories]
    for section, out in zip(sections.categories, folds, strict=True):
        others = f"the cells outside section {section!r}"
        if (~out).sum() < n_neighbors:
            raise ValueError(
                f"n_neighbors={n_neighbors}, but {others} are only {(~out).sum()}. Ask for fewer: "
                f"n_neighbors={(~out).sum()}."
            )
        if len(np.unique(labels.codes[~out])) < 2:
            raise ValueError(f"{others} all have the label {labels[~out][0]!r}. At least two are needed to predict it.")
    return folds
