"""Features of neighbourhoods against plain loops over cells, and under rotation."""

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse

import scgen
from scgen import arguments
from scgen.analysis import neighborhood_features as module

METHODS = ("mean", "gradient", "pool", "composition")


@pytest.fixture(scope="module")
def tissue():
    """Two sections of 80 and 120 cells at random places, with counts, components and types."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {"section": np.repeat(["left", "right"], [80, 120]), "type": rng.choice(["a", "b", "c"], 200)},
        index=[f"cell_{i}" for i in range(200)],
    ).sample(frac=1, random_state=1)
    adata = AnnData(sparse.csr_matrix(rng.poisson(1.5, (200, 7)).astype(np.float32)), obs=obs)
    adata.obsm["X_pca"] = rng.normal(size=(200, 5))
    adata.obsm["spatial"] = rng.uniform(0, 100, (200, 2))
    return adata


def loop(adata, features, method, n_neighbors=None, radius=None):
    """Return the features of neighbourhoods, computed for one cell after the other."""
    places, sections = adata.obsm["spatial"], adata.obs["section"].to_numpy()
    rows = []
    for i in range(adata.n_obs):
        others = [j for j in range(adata.n_obs) if j != i and sections[j] == sections[i]]
        distance = {j: np.hypot(*(places[j] - places[i])) for j in others}
        near = sorted(others, key=distance.get)[:n_neighbors] if radius is None else others
        near = near if radius is None else [j for j in others if distance[j] <= radius]
        mean = features[near].mean(0) if near else np.zeros(features.shape[1])
        with_itself = features[[i, *near]]
        if method == "mean":
            row = [features[i], mean]
        elif method == "pool":
            row = [with_itself.mean(0), with_itself.max(0)]
        elif method == "composition":
            row = [with_itself.mean(0)]
        else:
            row = [features[i], mean]
            for m in (1, 2, 3):
                waves = [features[j] * np.exp(1j * m * np.arctan2(*(places[j] - places[i])[::-1])) for j in near]
                row.append(np.abs(np.mean(waves, axis=0)) if near else mean)
        rows.append(np.concatenate(row))
    return np.array(rows)


def features(adata, method):
    return pd.get_dummies(adata.obs["type"]).to_numpy(float) if method == "composition" else adata.obsm["X_pca"]


def read(method):
    return {"labels_key": "type"} if method == "composition" else {"use_rep": "X_pca"}


@pytest.mark.parametrize("asked", [{"n_neighbors": 6}, {"radius": 14.0}, {"radius": 5.0}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_loop_over_cells_gives_the_same(tissue, monkeypatch, method, asked):
    monkeypatch.setattr(module, "BLOCK", 2000)  # several blocks
    found = scgen.neighborhood_features(tissue, method, section_key="section", **read(method), **asked)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, loop(tissue, features(tissue, method), method, **asked), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_rotation_and_reflection_change_nothing(tissue, method):
    turned = tissue.copy()
    one = (tissue.obs["section"] == "left").to_numpy()
    before = scgen.neighborhood_features(tissue, method, section_key="section", **read(method))
    for rows in (np.ones(200, bool), one):
        turn = np.array([[np.cos(0.7), np.sin(0.7)], [-np.sin(0.7), np.cos(0.7)]])
        turned.obsm["spatial"][rows] = turned.obsm["spatial"][rows] @ turn - 30
        after = scgen.neighborhood_features(turned, method, section_key="section", **read(method))
        np.testing.assert_allclose(before, after, atol=1e-4)
    turned.obsm["spatial"][:, 0] *= -1
    mirrored = scgen.neighborhood_features(turned, method, section_key="section", **read(method))
    np.testing.assert_allclose(before, mirrored, atol=1e-4)


def test_gradients_tell_a_half_from_a_mixture():
    """Around the centre: a type on one side has a gradient of 2 / pi / 2, and none if it is everywhere."""
    phi = (np.arange(360) + 0.5) / 360 * 2 * np.pi
    circle = np.vstack([[0, 0], np.column_stack([np.cos(phi), np.sin(phi)])])
    adata = AnnData(obs=pd.DataFrame(index=[str(i) for i in range(361)]), obsm={"spatial": circle})
    adata.obsm["side"] = np.column_stack([np.r_[0, phi < np.pi], np.ones(361)])
    found = scgen.neighborhood_features(adata, "gradient", use_rep="side", n_neighbors=360)[0].reshape(5, 2)
    np.testing.assert_allclose(found, [[0, 1], [0.5, 1], [1 / np.pi, 0], [0, 0], [1 / (3 * np.pi), 0]], atol=1e-4)


def test_padding_has_no_influence(tissue):
    """One crowded place gives every other cell hundreds of places that are padding."""
    obs = pd.DataFrame({"section": "crowd", "type": "c"}, index=[f"more_{i}" for i in range(300)])
    crowd = AnnData(sparse.csr_matrix((300, 0), dtype=np.float32), obs=obs)
    crowd.obsm["spatial"] = np.random.default_rng(1).uniform(0, 5, (300, 2))
    crowd.obsm["X_pca"] = np.full((300, 5), 1e6)
    alone = tissue[:, :0].copy()
    both = sc.concat([alone, crowd])
    for method in METHODS:
        asked = {"radius": 10.0, "section_key": "section"} | read(method)
        expected = scgen.neighborhood_features(alone, method, **asked)
        np.testing.assert_allclose(scgen.neighborhood_features(both, method, **asked)[:200], expected, atol=1e-6)


@pytest.mark.parametrize("form", ["csr", "csc", "dense", "integers", "layer"])
def test_counts_are_normalised_as_by_scanpy(tissue, form):
    adata = tissue.copy()
    adata.X[3] = 0  # a cell without counts
    adata.X.eliminate_zeros()
    expected = adata.copy()
    sc.pp.normalize_total(expected)
    sc.pp.log1p(expected)
    counts = {"csc": adata.X.tocsc(), "dense": adata.X.toarray(), "integers": adata.X.astype(np.int32)}.get(
        form, adata.X
    )
    asked = {"layer": "raw"} if form == "layer" else {}
    if form == "layer":
        adata.layers["raw"], adata.X = counts, expected.X
    else:
        adata.X = counts
    before = [(part.toarray() if sparse.issparse(part) else part).copy() for part in (adata.X, counts)]
    found = scgen.neighborhood_features(adata, "mean", section_key="section", n_neighbors=4, **asked)
    np.testing.assert_allclose(found, loop(adata, expected.X.toarray(), "mean", n_neighbors=4), atol=1e-5)
    for part, kept in zip((adata.X, counts), before, strict=True):
        np.testing.assert_array_equal(part.toarray() if sparse.issparse(part) else part, kept)


def test_other_values_are_used_as_they_are(tissue):
    adata = tissue.copy()
    adata.X = np.random.default_rng(0).normal(size=(200, 7)).astype(np.float32)
    found = scgen.neighborhood_features(adata, "mean", section_key="section")
    np.testing.assert_array_equal(found[:, :7], adata.X)


def test_a_file_is_read(tissue, tmp_path):
    import anndata

    tissue.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    found = scgen.neighborhood_features(backed, "gradient", section_key="section")
    np.testing.assert_allclose(found, scgen.neighborhood_features(tissue, "gradient", section_key="section"), rtol=1e-6)


def test_a_result_that_memory_does_not_hold(tissue, monkeypatch):
    monkeypatch.setattr(arguments, "_memory", lambda: 200 * 5 * 7 * 4 - 1)
    scgen.neighborhood_features(tissue, "mean", n_neighbors=3)  # few, so that the search needs less than the result
    with pytest.raises(MemoryError, match=r"method='gradient' needs about 2\.8e-05 GB"):
        scgen.neighborhood_features(tissue, "gradient")


def test_what_is_wrong_is_said(tissue):
    def raises(match, change=lambda adata: None, method="mean", **given):
        adata = tissue.copy()
        change(adata)
        with pytest.raises(ValueError, match=match):
            scgen.neighborhood_features(adata, method, **given)

    def without_a_position(adata):
        adata.obsm["spatial"][3, 0] = np.nan

    def in_space(adata):
        adata.obsm["spatial"] = np.zeros((200, 3))

    def without_a_section(adata):
        adata.obs.loc["cell_7", "section"] = None

    raises(r'obsm."spatial". has 1 cell without coordinates.*cell_', without_a_position)
    raises(r"has the shape \(200, 3\), but positions in a section are x and y", in_space)
    raises('obs."section". names no section for 1 cell .first: cell_7', without_a_section, section_key="section")
    raises('use_rep=.pca. is not in adata.obsm .it has: X_pca, spatial.*Did you mean "X_pca"', use_rep="pca")
    raises("spatial_key=.X_umap. is not in adata.obsm", spatial_key="X_umap")
    raises('section_key=.Section. is not a column.*Did you mean "section"', section_key="Section")
    raises("layer='raw': adata.layers.\"raw\". does not exist", layer="raw")
    raises("needs labels", method="composition")
    raises('only method="composition" reads labels', labels_key="type")
    raises("give one of them", use_rep="X_pca", layer="raw")
    raises("a section has 80 cells, but each cell needs 80 neighbours", section_key="section", n_neighbors=80)
