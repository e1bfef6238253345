"""Neighbourhoods against distances between all pairs of cells, and under rotation."""

import numpy as np
import pytest

from scgen import arguments
from scgen.data.neighbourhoods import Neighbourhoods


@pytest.fixture(scope="module")
def tissue():
    rng = np.random.default_rng(0)
    return rng.uniform(0, 1000, (400, 2)), np.resize(["left", "right"], 400)


@pytest.mark.parametrize("asked", [{"n_neighbors": 5}, {"n_neighbors": 199}, {"radius": 80.0}], ids=str)
def test_all_pairs(tissue, asked):
    coordinates, sections = tissue
    near = Neighbourhoods.of(coordinates, sections, **asked)
    distances = np.linalg.norm(coordinates[:, None] - coordinates, axis=-1)
    distances[sections[:, None] != sections] = np.inf
    for i in range(400):
        others = np.argsort(distances[i])[1:]
        expected = (
            others[distances[i, others] <= asked["radius"]] if "radius" in asked else others[: asked["n_neighbors"]]
        )
        assert near.index[i, 0] == i
        assert sorted(near.index[i, 1:][near.mask[i, 1:]]) == sorted(expected)
        scale = asked.get("radius", distances[i, expected].max(initial=0))
        assert near.radius[i] == pytest.approx(scale)
        np.testing.assert_allclose(near.offsets[i] * scale, coordinates[near.index[i]] - coordinates[i], atol=1e-3)
    assert not near.offsets[~near.mask].any()


@pytest.mark.parametrize("angle", [0.3, 1.1, np.pi / 2, 4.0])
def test_neighbours_on_a_grid_are_whole_shells_and_stay_under_rotation(angle):
    grid = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0)), -1).reshape(-1, 2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    before, after = Neighbourhoods.of(grid), Neighbourhoods.of(1000 + grid @ turn)
    inner = ((grid >= 3) & (grid <= 16)).all(1)
    assert set(before.mask[inner].sum(1)) == {21}  # itself, and shells of 4, 4, 4 and 8
    assert np.array_equal(before.index, after.index)
    np.testing.assert_allclose(before.offsets @ turn, after.offsets, atol=1e-5)


def test_a_grid_in_float32_stays_under_rotation():
    grid = 0.1 * np.stack(np.meshgrid(np.arange(9.0), np.arange(9.0)), -1).reshape(-1, 2)
    turn = np.array([[np.cos(0.3), np.sin(0.3)], [-np.sin(0.3), np.cos(0.3)]])
    before = Neighbourhoods.of(grid, n_neighbors=4)
    after = Neighbourhoods.of((1000 + grid @ turn).astype(np.float32), n_neighbors=4)
    assert np.array_equal(before.index, after.index)


def test_a_cell_alone_in_its_section_has_no_neighbour(tissue):
    coordinates, _ = tissue
    near = Neighbourhoods.of(coordinates, np.arange(400) > 0, radius=100.0)
    assert near.mask[0].sum() == 1
    assert near.index[0].tolist() == [0] * near.index.shape[1]
    assert not near.offsets[0].any()


def test_what_cannot_be_found_is_said(tissue):
    coordinates, sections = tissue
    with pytest.raises(ValueError, match="a section has 200 cells, but each cell needs 200 neighbours"):
        Neighbourhoods.of(coordinates, sections, n_neighbors=200)
    with pytest.raises(ValueError, match=r"radius=0.001, but no cell has another one within this distance\. The near"):
        Neighbourhoods.of(coordinates, sections, radius=1e-3)
    with pytest.raises(ValueError, match="two cells of a section are at the same place"):
        Neighbourhoods.of(np.concatenate([coordinates, coordinates[:1]]))
    with pytest.raises(ValueError, match="radius=0"):
        Neighbourhoods.of(coordinates, radius=0)
    with pytest.raises(ValueError, match="n_neighbors=0"):
        Neighbourhoods.of(coordinates, n_neighbors=0)


@pytest.mark.parametrize("asked", [{"n_neighbors": 60}, {"radius": 1e3}], ids=["number", "radius"])
def test_more_neighbours_than_memory_holds(monkeypatch, asked):
    (name,) = asked
    coordinates = np.random.default_rng(0).random((200, 2))
    monkeypatch.setattr(arguments, "_memory", lambda: 1e5)
    assert Neighbourhoods.of(coordinates, n_neighbors=6).index.shape == (200, 7)
    with pytest.raises(MemoryError, match=rf"^{name}=.* needs about"):
        Neighbourhoods.of(coordinates, **asked)
