"""Simulated tissue is arranged as its description says, measured from positions and types alone."""

import numpy as np
import pandas as pd
import pytest
import torch

import scgen


@pytest.fixture(scope="module")
def tissue():
    return scgen.simulate_tissue(3, 14, counts=False, seed=2)


def lattice(n_rows):
    """Return the centres of a section's motifs."""
    return np.array([[2.1 * (c + (0.5 if r % 2 else 0)), 1.82 * r] for r in range(n_rows) for c in range(n_rows)])


def unrotated(adata, n_rows):
    """Yield the niche of each motif, and the positions and types of its outer cells before the rotation."""
    centres = np.tile(lattice(n_rows), (adata.obs["section"].nunique(), 1))
    outer = adata[~adata.obs["is_centre"]]
    for motif, cells in outer.obs.groupby("motif"):
        angle = -cells["angle"].iloc[0]
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        yield cells["niche"].iloc[0], (outer[cells.index].obsm["spatial"] - centres[motif]) @ turn.T, cells["cell_type"]


def test_sizes_and_names(tissue):
    obs = tissue.obs
    assert tissue.shape == (3 * 14 * 14 * 19, 10)
    assert tissue.X.dtype == np.float32
    assert tissue.obsm["spatial"].dtype == np.float64
    assert (obs.groupby("motif").size() == 19).all()
    assert (obs.groupby("motif")["is_centre"].sum() == 1).all()
    assert (obs.groupby("motif")[["section", "niche", "angle"]].nunique() == 1).all(axis=None)
    assert obs.groupby("section", observed=True)["motif"].nunique().to_dict() == {
        f"section_{i}": 196 for i in (1, 2, 3)
    }
    assert tissue.uns["simulation"] == {
        **{"n_sections": 3, "n_rows": 14, "n_genes": 200, "counts": False, "random_types": 0.0},
        **{"mean_library": 300.0, "seed": 2},
    }


def test_composition_tells_nothing(tissue):
    outer = tissue.obs[~tissue.obs["is_centre"]]
    assert (pd.crosstab(outer["motif"], outer["cell_type"]) == 6).all(axis=None)
    centres = tissue.obs[tissue.obs["is_centre"]]
    assert (centres["niche"].value_counts() > 588 / 6 - 4 * np.sqrt(588 * 5 / 36)).all()
    assert (pd.crosstab(centres["niche"], centres["cell_type"], normalize="index") > 0.15).all(axis=None)


def test_the_nearest_cells_of_a_centre_are_its_motif(tissue):
    same = []
    for _, cells in tissue.obs.groupby("section", observed=True):
        positions, motifs = tissue[cells.index].obsm["spatial"], cells["motif"].to_numpy()
        for i in np.flatnonzero(cells["is_centre"]):
            nearest = np.argsort(((positions - positions[i]) ** 2).sum(1))[1:19]
            same.append(motifs[nearest] == motifs[i])
    assert np.mean(same) >= 0.99


def test_angles_are_uniform(tissue):
    angle = tissue.obs.loc[tissue.obs["is_centre"], "angle"].to_numpy()
    assert (-np.pi < angle).all()
    assert (angle <= np.pi).all()
    assert abs(np.exp(1j * angle).mean()) < 4 / np.sqrt(len(angle))
    assert abs(np.exp(2j * angle).mean()) < 4 / np.sqrt(len(angle))


def test_unrotated_motifs_are_as_described(tissue):
    n_mixed = 0
    for niche, position, types in unrotated(tissue, 14):
        names = types.str[-1].to_numpy()
        turned = np.degrees(np.arctan2(position[:, 1], position[:, 0])) % 360
        order = {"sectors": turned, "mirrored": -turned}.get(niche, position[:, 0])
        if niche == "mixed":
            by_angle, by_x = ("".join(names[np.argsort(of)]) for of in (turned, position[:, 0]))
            n_mixed += not {by_angle, by_x, by_angle[::-1]} & {"111111222222333333"}
            continue
        expected = niche.removeprefix("bands ").split("|") if "|" in niche else ["1", "2", "3"]
        assert names[np.argsort(order)].tolist() == list(np.repeat(expected, 6))
    assert n_mixed == (tissue.obs.loc[tissue.obs["is_centre"], "niche"] == "mixed").sum()


def test_a_sector_is_a_third_of_the_circle(tissue):
    """Type 2 of a motif with sectors lies around 180 degrees before the rotation, and around 180 + angle after it."""
    centres = np.tile(lattice(14), (3, 1))[tissue.obs["motif"]]
    chosen = ((tissue.obs["niche"] == "sectors") & (tissue.obs["cell_type"] == "type_2")).to_numpy()
    chosen &= ~tissue.obs["is_centre"].to_numpy()
    x, y = (tissue.obsm["spatial"] - centres)[chosen].T
    from_middle = np.angle(np.exp(1j * (np.arctan2(y, x) - np.pi - tissue.obs["angle"].to_numpy()[chosen])))
    assert np.abs(np.degrees(from_middle)).max() < 60 + 45  # an inner cell of 18 may lie a little aside
    assert np.abs(np.degrees(from_middle)).mean() == pytest.approx(30, abs=3)


def test_features_have_unit_noise_around_centroids_that_are_4_apart():
    adata = scgen.simulate_tissue(2, 40, counts=False, seed=1)
    by_type = pd.DataFrame(adata.X).groupby(adata.obs["cell_type"].to_numpy())
    means = by_type.mean().to_numpy()
    distances = np.linalg.norm(means[:, None] - means, axis=-1)
    np.testing.assert_allclose(distances[~np.eye(3, dtype=bool)], 4, atol=0.05)
    np.testing.assert_allclose(by_type.std(), 1, atol=0.05)


def test_counts():
    adata = scgen.simulate_tissue(2, 12, n_genes=150, mean_library=200, seed=3)
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    x = adata.X.toarray().astype(float)
    assert ((x >= 0) & (x == x.round())).all()
    assert x.sum(1).min() > 0
    assert 200 / 2.5 < np.exp(np.log(x.sum(1)).mean()) < 200 * 2.5
    rates = np.stack([x[adata.obs["cell_type"] == f"type_{i}"].mean(0) for i in (1, 2, 3)])
    changes = np.log(rates[[0, 0, 1]] / rates[[1, 2, 2]])
    assert 0.8 < changes.std() < 1.2
    one = x[adata.obs["cell_type"] == "type_1"]
    assert ((one.var(0) > 1.2 * one.mean(0)) | (one.mean(0) < 1)).all()  # more than Poisson's


def test_a_cell_without_counts_is_given_one():
    adata = scgen.simulate_tissue(1, 5, n_genes=5, mean_library=0.1, seed=1)
    assert adata.X.sum(1).min() == 1


def test_random_types(tissue):
    kept = scgen.simulate_tissue(3, 14, counts=False, random_types=0.3, seed=2)
    changed = (kept.obs["cell_type"] != tissue.obs["cell_type"]).mean()
    assert changed == pytest.approx(0.3 * 2 / 3, abs=0.02)
    assert np.array_equal(kept.obsm["spatial"], tissue.obsm["spatial"])


def test_seeds():
    state, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, two, other = (scgen.simulate_tissue(1, 4, n_genes=20, seed=seed) for seed in (0, 0, 1))
    assert (one.X != two.X).nnz == 0
    assert np.array_equal(one.obsm["spatial"], two.obsm["spatial"])
    assert one.obs.equals(two.obs)
    assert (one.X != other.X).nnz > 0
    assert not np.allclose(one.obsm["spatial"], other.obsm["spatial"])
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpys, np.random.get_state()[1])  # noqa: NPY002


def test_a_file_holds_it(tmp_path):
    import anndata

    adata = scgen.simulate_tissue(1, 3, n_genes=20, random_types=0.1)
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert again.obs["niche"].tolist() == adata.obs["niche"].tolist()
    assert again.uns["simulation"]["random_types"] == 0.1


@pytest.mark.parametrize("wrong", [{"n_sections": 0}, {"n_rows": 2.5}, {"random_types": 1.1}, {"mean_library": 0}])
def test_wrong_values(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        scgen.simulate_tissue(**wrong)
