"""Places on a lattice, found from positions that were made from known places."""

import numpy as np
import pytest

from scgen.data.grids import Patches, lattice_places

STEPS = {"square": np.array([[0, 1], [1, 0]]), "hex": np.array([[0.5, np.sqrt(0.75)], [1, 0]])}  # of a row, a column


def spots(grid: str, angle=0.0, spacing=1.0, n_rows=40, share=0.8, noise=0.0, seed=0):
    """Return rows and columns of spots, some of them missing, and their positions."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(np.arange(n_rows), np.arange(50), indexing="ij"), -1).reshape(-1, 2)
    if grid == "hex":  # Visium's capture area is a rectangle, not a rhombus
        places[:, 1] -= places[:, 0] // 2
    places = rng.permutation(places)[: int(share * len(places))]
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    xy = spacing * (places @ STEPS[grid] @ turn) + [1234.0, -77.0]
    return places, xy + noise * rng.standard_normal(xy.shape)


@pytest.mark.parametrize("grid", ["square", "hex"])
@pytest.mark.parametrize("angle", [0.0, 0.3, -0.37])
@pytest.mark.parametrize(("spacing", "noise", "share"), [(1, 0, 1), (137.3, 1, 0.8), (1e-4, 4e-6, 0.3), (9.7, 0.5, 1)])
def test_places_are_those_that_the_positions_were_made_of(grid, angle, spacing, noise, share):
    places, xy = spots(grid, angle, spacing, share=share, noise=noise)
    found = lattice_places(xy, np.zeros(len(xy)), grid)
    assert np.array_equal(found - found[0], places - places[0])


@pytest.mark.parametrize("grid", ["square", "hex"])
def test_rounded_pixels_of_a_wide_capture_area(grid):
    places, xy = spots(grid, 0.1, 11.3, n_rows=128)
    found = lattice_places(np.rint(xy).astype(int), np.zeros(len(xy)), grid)
    assert np.array_equal(found - found[0], places - places[0])


@pytest.mark.parametrize("grid", ["square", "hex"])
def test_places_of_tissue_without_a_middle(grid):
    places, xy = spots(grid, 0.1, 137.0, n_rows=60, share=1)
    kept = np.abs(places[:, 0] - 30) > 22
    # Registration of images may stretch a section a little.
    places, xy = places[kept], np.rint(xy[kept] @ [[1.02, 0.01], [0.0, 1.0]])
    found = lattice_places(xy, np.zeros(len(xy)), grid)
    assert np.array_equal(found - found[0], places - places[0])


def test_a_hexagonal_lattice_that_stands_on_its_tip_has_one_orientation():
    _, xy = spots("hex", np.pi / 6, 100.0)  # its steps are at 30 and 90 degrees, and 30 is as near to x as -30
    ways = set()
    for seed in range(10):
        noisy = xy + np.random.default_rng(seed).standard_normal(xy.shape)
        ways.add(str(np.diff(lattice_places(noisy, np.zeros(len(xy)), "hex")[:50], axis=0)))
    assert len(ways) == 1


def test_a_line_of_spots_and_a_single_spot():
    xy = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [12.0, 16.0], [5.0, 5.0]])
    found = lattice_places(xy, np.array([0, 0, 0, 0, 1]), "square")
    assert np.abs(np.diff(found[:4], axis=0)).sum(1).tolist() == [1, 1, 2]
    assert found[4].tolist() == [0, 0]


@pytest.mark.parametrize("grid", ["square", "hex"])
def test_patches_are_those_found_by_looking_at_every_pair(grid):
    places, xy = spots(grid, 0.2, 10.0, n_rows=12, share=0.7, noise=0.3)
    sections = np.random.default_rng(1).integers(2, size=len(xy))
    patches = Patches.of(xy, sections, size=5, grid=grid)
    assert patches.index.shape == patches.mask.shape == (len(xy), 25)
    for i in range(len(xy)):
        row = 0
        for down in range(-2, 3):
            for right in range(-2, 3):
                step = np.array([down, right])
                there = (places == places[i] + step).all(1) & (sections == sections[i])
                distance = np.hypot(*(step @ STEPS[grid]))
                near = grid == "square" or distance < 2.01  # two steps of a hexagonal lattice reach as far as 2
                assert patches.mask[i, row] == (there.any() and near)
                assert patches.index[i, row] == (np.flatnonzero(there)[0] if patches.mask[i, row] else i)
                row += 1


def test_what_is_not_a_lattice_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"spots are not on a square lattice \(first: row \d+\).*use SpatialVAE"):
        Patches.of(rng.random((500, 2)))
    for grid, other in (("square", "hex"), ("hex", "square")):
        with pytest.raises(ValueError, match=f'They lie on the other lattice: pass grid="{grid}"'):
            Patches.of(spots(grid)[1], grid=other)
    row, column = spots("hex")[0].T
    array = np.column_stack([2 * column + row, row])  # Visium's array_col and array_row
    sections = np.arange(len(array)) % 2
    for positions in (array, array[:, ::-1].astype(np.uint16), array + np.outer(sections, [1, 0])):
        for grid in ("hex", "square"):
            with pytest.raises(ValueError, match=r'array_row and array_col.*adata.obs\[\["array_col", "array_row"\]\]'):
                Patches.of(positions, sections, grid=grid)
    found = lattice_places(array * [0.5, 0.75**0.5], np.zeros(len(array)), "hex")
    assert np.array_equal(found - found[0], np.column_stack([row, column]) - [row[0], column[0]])
    twice = np.vstack([spots("square")[1], spots("square")[1][5] + 0.01])
    with pytest.raises(ValueError, match=r"1 spot is at the same place .* rows 5 and 1600"):
        Patches.of(twice)


@pytest.mark.parametrize("size", [4, 1, 2.5, "7", None])
def test_sides_of_patches_are_odd(size):
    with pytest.raises((ValueError, TypeError), match="patch_size="):
        Patches.of(spots("square")[1], size=size)
