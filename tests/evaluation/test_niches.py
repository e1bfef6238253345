"""Scores of representations of niches, against scikit-learn's cross-validation and known answers."""

import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scgen


@pytest.fixture(scope="module")
def cells():
    """300 cells of three sections and three niches, with the niches apart, partly apart, or not at all."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"slide": rng.choice(["a", "b", "c"], 300), "niche": rng.choice(["x", "y", "z"], 300)})
    obs.index = [f"cell_{i}" for i in range(300)]
    centres = np.eye(3, 4)[obs["niche"].map({"x": 0, "y": 1, "z": 2})]
    noise = rng.normal(size=(300, 4))
    adata = AnnData(obs=obs)
    adata.obsm["apart"], adata.obsm["noise"] = 30 * centres + noise, noise
    adata.obsm["partly"] = 2 * centres + noise * [1, 1, 1, 5]
    return adata


def test_known_answers(cells):
    table = scgen.score_niches(cells, "niche", dict.fromkeys(["apart"], "apart") | {"n": "noise"}, section_key="slide")
    assert table.loc["apart"].tolist() == [1] * 5
    accuracies = [name for name in table.columns if "accuracy" in name]
    assert table.loc["n", accuracies].tolist() == pytest.approx([1 / 3] * 3, abs=0.12)
    assert table.loc["n", ["kmeans_ari", "kmeans_ari_scaled"]].abs().max() < 0.05


def test_scaling_makes_up_for_units(cells):
    """In the sum of squares, a column of noise with a large unit hides the niches."""
    x = cells.obsm["apart"] / 5
    x[:, 3] *= 1e4
    table = scgen.score_niches(cells, "niche", {"x": x}, section_key="slide")
    assert table.loc["x", ["knn_accuracy_scaled", "logistic_accuracy"]].min() > 0.95
    assert table.loc["x", "kmeans_ari_scaled"] > 0.9
    assert table.loc["x", "knn_accuracy"] < 0.5
    assert abs(table.loc["x", "kmeans_ari"]) < 0.1


def test_cross_validation_of_scikit_learn_gives_the_same(cells):
    x, y, sections = cells.obsm["partly"], cells.obs["niche"], cells.obs["slide"]
    table = scgen.score_niches(cells, "niche", {"partly": x}, section_key="slide", n_neighbors=9)
    by_section = {"groups": sections, "cv": LeaveOneGroupOut()}
    knn = cross_val_score(KNeighborsClassifier(9), x, y, **by_section).mean()
    assert table.loc["partly", "knn_accuracy"] == pytest.approx(knn, abs=1e-12)
    scaled = make_pipeline(StandardScaler(), KNeighborsClassifier(9))
    scaled = cross_val_score(scaled, x, y, **by_section).mean()
    assert table.loc["partly", "knn_accuracy_scaled"] == pytest.approx(scaled, abs=1e-12)
    by_hand = []
    for section in "abc":
        train, test = sections != section, sections == section
        scaler = StandardScaler().fit(x[train])
        fitted = LogisticRegression(max_iter=1000).fit(scaler.transform(x[train]), y[train])
        by_hand.append((fitted.predict(scaler.transform(x[test])) == y[test]).mean())
    assert table.loc["partly", "logistic_accuracy"] == pytest.approx(np.mean(by_hand), abs=1e-12)


def test_clusters_are_compared_over_all_sections():
    """Two niches, of which each is at another place in each section: four places for two clusters."""
    places = np.repeat([0.0, 1.0, 100.0, 101.0], 25)[:, None]
    obs = pd.DataFrame({"slide": np.repeat(list("abab"), 25), "niche": np.repeat(list("xyyx"), 25)})
    obs.index = obs.index.astype(str)
    adata = AnnData(obs=obs, obsm={"z": places})
    table = scgen.score_niches(adata, "niche", {"z": "z"}, section_key="slide", n_neighbors=5)
    expected = adjusted_rand_score(obs["niche"], np.repeat([0, 0, 1, 1], 25))
    assert table.loc["z", "kmeans_ari"] == pytest.approx(expected)


def test_only_the_cells_asked_for_count(cells):
    some = np.arange(0, 300, 2)
    z = cells.obsm["partly"].copy()
    z[1::2] = np.nan
    mask = np.isin(np.arange(300), some)
    alone = scgen.score_niches(cells[some].copy(), "niche", {"z": "partly"}, section_key="slide")
    for indices in (some, mask):
        part = scgen.score_niches(cells, "niche", {"z": z}, section_key="slide", indices=indices)
        pd.testing.assert_frame_equal(part, alone)


def test_twice_the_same_and_nothing_global_changes(cells):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    one, two = (scgen.score_niches(cells, "niche", {"z": "partly"}, section_key="slide") for _ in range(2))
    pd.testing.assert_frame_equal(one, two)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_arrangement_is_seen_by_gradients_alone():
    adata = scgen.simulate_tissue(3, 12, counts=False, seed=0)
    features = {
        method: scgen.neighborhood_features(
            adata, method, section_key="section", labels_key="cell_type" if method == "composition" else None
        )
        for method in ("mean", "gradient", "composition")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Number of distinct clusters")  # compositions are few
        centres = adata.obs["is_centre"].to_numpy()
        table = scgen.score_niches(adata, "niche", features, section_key="section", indices=centres)
    assert list(table.index) == ["mean", "gradient", "composition"]
    accuracies = table[["knn_accuracy_scaled", "logistic_accuracy"]]
    assert accuracies.loc["gradient"].min() > 0.45
    assert accuracies.loc[["mean", "composition"]].max(axis=None) < 0.3


def test_what_is_wrong_is_said(cells):
    def raises(match, kind=ValueError, change=lambda adata: None, features=None, **given):
        adata = cells.copy()
        change(adata)
        asked = {"labels_key": "niche", "features": features or {"z": "noise"}, "section_key": "slide"} | given
        with pytest.raises(kind, match=match):
            scgen.score_niches(adata, **asked)

    def one_section(adata):
        adata.obs["slide"] = "a"

    def one_label_outside(adata):
        adata.obs.loc[adata.obs["slide"] != "a", "niche"] = "x"

    raises('Did you mean "niche"', labels_key="niches")
    raises("section_key='slide': the cells have one value, 'a'; at least two", change=one_section)
    raises("the cells outside section 'a' all have the label 'x'", change=one_label_outside)
    raises(r"features\['z'\] has NaN or infinite values for 300 cells", features={"z": np.full((300, 2), np.nan)})
    raises(r"features\['z'\] has shape \(4, 2\) and dtype float64", features={"z": np.zeros((4, 2))})
    raises(r"features\['z'\]='noises' is not in adata.obsm", features={"z": "noises"})
    raises("n_neighbors=299, but the cells outside section 'a' are only", n_neighbors=299)
    raises("it takes representations by name", TypeError, features=["noise"])
