"""Neighbourhoods of cells in tissue: which cells are near each cell, and where."""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import KDTree
from torch import Tensor

from scgen.arguments import check_memory, check_number, check_whole, counted
from scgen.data.stores import BackedStore, MemoryStore

#: Distances that differ by less than this share are equal: a rotation rounds them.
EQUAL = 1e-6


@dataclass(frozen=True)
class Neighbourhoods:
    """Each cell with the cells near it in the same section.

    The neighbourhoods have different sizes. J is the size of the largest, and the others are padded.

    Attributes
    ----------
    index
        (N, J) int64: rows of the cells. The first is the cell itself. Padding repeats it.
    offsets
        (N, J, 2) float32: positions relative to the cell, divided by ``radius``. They lie in the unit disc.
    mask
        (N, J) bool: False for padding.
    radius
        (N,) float64: the distance to the farthest neighbour, or the radius that was asked for, in the unit of the
        coordinates.

    Examples
    --------
    A square grid has no 2 or 3 nearest cells: there are 4 at the same distance.

    >>> grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0)), -1).reshape(-1, 2)
    >>> near = Neighbourhoods.of(grid, n_neighbors=3)
    >>> near.index[12].tolist(), near.radius[12].item()
    ([12, 7, 11, 13, 17], 1.0)
    >>> near.offsets[12].tolist()
    [[0.0, 0.0], [0.0, -1.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """

    index: np.ndarray
    offsets: np.ndarray
    mask: np.ndarray
    radius: np.ndarray

    @classmethod
    def of(
        cls,
        coordinates: np.ndarray,
        sections: np.ndarray | None = None,
        *,
        n_neighbors: int = 18,
        radius: float | None = None,
    ) -> "Neighbourhoods":
        """Find the nearest cells of each cell, or all cells within a radius, in its own section.

        Cells at the same distance as the last of the nearest are neighbours, too. On a grid, a neighbourhood therefore
        consists of whole shells, and a rotation of the section does not change it.

        Parameters
        ----------
        coordinates
            (N, 2) positions, in any unit.
        sections
            (N,) codes or names of the sections; None if there is one.
        n_neighbors
            Number of nearest cells, without the cell itself.
        radius
            If given, the neighbours are the cells within this distance, in the unit of ``coordinates``, and
            ``n_neighbors`` is not used.

        Raises
        ------
        ValueError
            If a coordinate is not finite, two cells of a section are at the same place, a section has too few cells,
            or no cell has a neighbour within the radius.
        """
        n_neighbors = check_whole("n_neighbors", n_neighbors, 1)
        if radius is not None:
            radius = check_number("radius", radius, "a distance, a number above 0", above=0)
        # What a rotation in the precision of the coordinates changes.
        precision = np.finfo(coordinates.dtype).eps if coordinates.dtype.kind == "f" else 0.0
        rounding = 8 * precision * np.abs(coordinates).max(initial=0)
        coordinates = np.asarray(coordinates, dtype=np.float64)
        sections = np.zeros(len(coordinates), int) if sections is None else np.unique(sections, return_inverse=True)[1]
        parts = []
        for section in range(sections.max() + 1):
            rows = np.flatnonzero(sections == section)
            near, farthest = _near(KDTree(coordinates[rows]), n_neighbors, radius, rounding)
            # A row number too many stands for none.
            parts.append((rows, np.append(rows, -1)[near], farthest))
        n_most = max(near.shape[1] for _, near, _ in parts)
        index, scale = np.full((len(coordinates), n_most), -1), np.empty(len(coordinates))
        for rows, near, farthest in parts:
            index[rows, : near.shape[1]], scale[rows] = near, farthest
        mask = index >= 0
        if not mask[:, 1:].any():
            raise ValueError(
                f"radius={radius:g}, but no cell has another one within this distance. The nearest one is at "
                f"{_spacing(coordinates, sections):.3g} (median). Give the radius in the unit of the coordinates."
            )
        itself = np.arange(len(coordinates))[:, None]
        index = np.where(mask, index, itself)
        offsets = (coordinates[index] - coordinates[itself]) / scale[:, None, None]
        return cls(index, offsets.astype(np.float32), mask, scale)


def _near(tree: KDTree, n_neighbors: int, radius: float | None, rounding: float) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each cell of a section, the rows of cells near it, itself first, and the farthest distance.

    The rows are (n, J); the number of cells of the section stands for none.
    """
    if radius is None and tree.n <= n_neighbors:
        raise ValueError(
            f"a section has {counted(tree.n, 'cell')}, but each cell needs {n_neighbors} neighbours. Leave out the "
            "section, or make a model with fewer n_neighbors, or with a radius."
        )
    n_asked = 2 * n_neighbors + 1
    if radius is None:
        n_bytes = 16 * tree.n * min(n_asked, tree.n)
        check_memory("n_neighbors", n_neighbors, n_bytes, "Ask for fewer neighbours.")
    else:
        n_most = max(tree.query_ball_point(tree.data, radius, return_length=True))
        text = "A radius in the unit of the coordinates holds far fewer cells."
        check_memory("radius", radius, 24 * tree.n * n_most, text)
    while True:
        distances, near = tree.query(tree.data, np.arange(1, min(n_asked, tree.n) + 1))
        farthest = np.full(tree.n, radius) if radius is not None else distances[:, n_neighbors]
        inside = distances <= farthest[:, None] * (1 + EQUAL) + rounding
        if (distances[:, 1:] == 0).any():
            raise ValueError(
                "two cells of a section are at the same place. Leave out one of them, or name the sections."
            )
        if n_asked >= tree.n or not inside[:, -1].any():
            break
        n_asked *= 2
    # In the order of the rows, but for the cell itself: equal distances have no order.
    near = np.where(inside, near, tree.n)
    near[near == np.arange(tree.n)[:, None]] = -1
    near = np.sort(near, axis=1)[:, : inside.sum(1).max()]
    near[:, 0] = np.arange(tree.n)
    return near, farthest


def _spacing(coordinates: np.ndarray, sections: np.ndarray) -> float:
    """Return the median distance of a cell to the nearest other one of its section."""
    trees = (KDTree(coordinates[sections == section]) for section in np.unique(sections))
    distances = np.concatenate(
        [tree.query(tree.data, np.arange(1, min(2, tree.n) + 1))[0][:, 1:].ravel() for tree in trees]
    )
    return float(np.median(distances)) if len(distances) else np.nan


class NeighbourStore:
    """The values of the cells of each neighbourhood, read from the store of all cells.

    Parameters
    ----------
    store
        The values of all N cells.
    index
        (N, J): rows of the cells of each neighbourhood.
    """

    def __init__(self, store: MemoryStore | BackedStore, index: np.ndarray):
        self.store, self.index = store, index
        self.shape = (*index.shape, store.shape[1])

    def rows(self, index: np.ndarray, as_sparse: bool = False) -> Tensor:
        """Return the values of the cells of some neighbourhoods, in their order, (n, J, F) float32."""
        near = self.index[index]
        return self.store.rows(near.ravel()).reshape(*near.shape, -1)
