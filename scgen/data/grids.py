"""Cells on a grid: spots or bins of tissue with the spots around them, and images with their pixels."""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import KDTree
from torch import Tensor

from scgen.arguments import check_choice, check_memory, check_whole, counted, shown
from scgen.data.stores import BackedStore, MemoryStore

#: Number of directions in which a spot of each lattice has neighbours.
GRIDS = {"square": 4, "hex": 6}
#: A spot may be so far from its place of the lattice, in distances between neighbours.
FARTHEST = 0.3
#: With fewer spots, the positions are not compared with Visium's array_row and array_col.
FEW = 30
#: Where the angle of a lattice is cut, in radians. Lattices rarely lie so; without it, the angle of those that lie
#: diagonally would be a matter of rounding.
CUT = 0.3
#: The largest side of a patch or an image.
MOST_SIDE = 1000


@dataclass(frozen=True)
class Patches:
    """Each spot of a lattice with the spots around it in the same section.

    Attributes
    ----------
    index
        (N, D^2) int64: rows of the spots of the patch, row by row. Where no spot is, it repeats the one in the middle.
    mask
        (N, D^2) bool: False where no spot is.

    Examples
    --------
    >>> grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0)), -1).reshape(-1, 2)
    >>> patches = Patches.of(grid, size=3)
    >>> patches.index[12].reshape(3, 3).tolist()
    [[6, 7, 8], [11, 12, 13], [16, 17, 18]]
    >>> patches.mask[0].reshape(3, 3).tolist()
    [[False, False, False], [False, True, True], [False, True, True]]
    """

    index: np.ndarray
    mask: np.ndarray

    @classmethod
    def of(
        cls, coordinates: np.ndarray, sections: np.ndarray | None = None, *, size: int = 7, grid: str = "square"
    ) -> "Patches":
        """Find the spots in the D x D places around each spot.

        Rows of a patch run along the direction of the lattice that is nearest to the first axis of the coordinates. On
        a square lattice, columns run along the other direction, on a hexagonal one along the direction at 60 degrees.
        There, the patch consists of the places that are at most (D - 1) / 2 steps away, and two opposite corners
        of it are empty.

        Parameters
        ----------
        coordinates
            (N, 2) positions, in any unit and orientation.
        sections
            (N,) codes or names of the sections; None if there is one.
        size
            D, an odd number.
        grid
            "square" or "hex".

        Raises
        ------
        ValueError
            If the spots of a section are not on such a lattice, or two of them are at the same place of it.
        """
        size, grid = check_patch_size(size), check_choice("grid", grid, tuple(GRIDS))
        n_bytes = 36 * len(coordinates) * size**2  # with the arrays that are only needed here
        check_memory("patch_size", size, n_bytes, "Use a smaller one.")
        sections = np.zeros(len(coordinates), int) if sections is None else np.unique(sections, return_inverse=True)[1]
        places = lattice_places(coordinates, sections, grid)
        half = size // 2
        # One number for each place of each section. Between two rows of it there are places without spots.
        _, height, width = np.append(sections.max() + 1, np.ptp(places, axis=0) + 1 + half)
        row, column = (places - places.min(0)).T
        number = (sections * height + row) * width + column
        order = np.argsort(number)
        ordered = number[order]
        if (twice := np.flatnonzero(ordered[1:] == ordered[:-1])).size:
            rows = sorted(order[twice[0] : twice[0] + 2].tolist())
            raise ValueError(
                f"{counted(twice.size, 'spot is', 'spots are')} at the same place of the lattice as another one "
                f"(first: rows {rows[0]} and {rows[1]}). Leave out the copies, or name the sections."
            )
        down, right = (step.ravel() for step in np.mgrid[-half : half + 1, -half : half + 1])
        wanted = number[:, None] + down * width + right
        found = np.searchsorted(ordered, wanted).clip(max=len(ordered) - 1)
        mask = ordered[found] == wanted
        if grid == "hex":
            mask &= np.abs(down + right) <= half
        return cls(np.where(mask, order[found], np.arange(len(places))[:, None]), mask)


def lattice_places(coordinates: np.ndarray, sections: np.ndarray, grid: str) -> np.ndarray:
    """Return row and column of each spot on the lattice of its section, (N, 2) int64.

    Each section has a lattice of its own, whose spacing and orientation are found from the coordinates. The rows and
    columns of a hexagonal lattice are at 60 degrees.

    Parameters
    ----------
    coordinates, sections, grid
        As in `Patches.of`.

    Raises
    ------
    ValueError
        If spots are too far from the places of the lattice, or the coordinates are Visium's array_row and array_col.

    Examples
    --------
    Two rows of a hexagonal lattice. The second one is shifted by half a spacing, and a spot of it is missing.

    >>> spots = np.array([[0, 0], [10, 0], [20, 0], [5, 8.66], [25, 8.66]])
    >>> lattice_places(spots, np.zeros(5), "hex").tolist()
    [[0, 0], [0, 1], [0, 2], [1, 0], [1, 2]]
    """
    if _are_array_positions(coordinates, sections):
        raise ValueError(
            "the positions look like Visium's array_row and array_col, which are not distances. Set up positions made "
            'of them, adata.obsm["spatial"] = adata.obs[["array_col", "array_row"]].to_numpy() * [0.5, 0.75**0.5], and '
            'pass grid="hex".'
        )
    places, off = np.zeros((len(coordinates), 2), np.int64), np.zeros(len(coordinates))
    for section in np.unique(sections):
        rows = np.flatnonzero(sections == section)
        places[rows], off[rows] = _fitted(np.asarray(coordinates[rows], np.float64), GRIDS[grid])
    if (wrong := np.flatnonzero(~(off <= FARTHEST))).size:
        other = next(name for name in GRIDS if name != grid)
        fits = all(
            (_fitted(np.asarray(coordinates[sections == section], np.float64), GRIDS[other])[1] <= FARTHEST).all()
            for section in np.unique(sections)
        )
        advice = "Bin the cells, or use SpatialVAE, whose cells may lie anywhere."
        if fits:
            advice = f'They lie on the other lattice: pass grid="{other}".'
        name = "hexagonal" if grid == "hex" else "square"
        raise ValueError(
            f"{counted(wrong.size, 'spot is', 'spots are')} not on a {name} lattice (first: row {wrong[0]}). {advice}"
        )
    return places


def _are_array_positions(coordinates: np.ndarray, sections: np.ndarray) -> bool:
    """Return whether the coordinates are Visium's array_row and array_col.

    In even rows, columns are even, and in odd rows odd. Some sections begin with a row of the other kind. To a fit,
    this is a square lattice that stands on its tip. Few spots may lie so by chance.
    """
    if len(coordinates) < FEW or (coordinates % 1 != 0).any():
        return False
    odd = coordinates % 2 == 1
    differ = odd[:, 0] != odd[:, 1]
    _, first, section = np.unique(sections, return_index=True, return_inverse=True)
    return bool((differ == differ[first][section]).all() and len(np.unique(odd[:, 0])) == 2)


def _fitted(coordinates: np.ndarray, n_directions: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of a section's spots on the lattice that fits best, and how far they are from these places."""
    n = len(coordinates)
    if n == 1:
        return np.zeros((1, 2), np.int64), np.zeros(1)
    coordinates = coordinates - coordinates.mean(0)
    tree = KDTree(coordinates)
    # Many spots may lack a direct neighbour, but not nine of ten.
    spacing = np.quantile(tree.query(coordinates, 2)[0][:, 1], 0.1)
    pairs = tree.query_pairs(1.2 * spacing, output_type="ndarray")
    x, y = coordinates.T / spacing
    steps = (x + 1j * y)[pairs[:, 1]] - (x + 1j * y)[pairs[:, 0]]
    # All steps between neighbours are one step, turned by multiples of 90 or 60 degrees.
    once = 2 * np.pi / n_directions
    angle = (np.angle((steps**n_directions).sum() * np.exp(-1j * CUT)) + CUT) / n_directions
    turns = np.round((np.angle(steps) - angle) / once)
    step = (steps * np.exp(-1j * once * turns)).mean() * spacing
    columns, rows = step, step * np.exp(1j * once)
    basis = np.array([[rows.real, rows.imag], [columns.real, columns.imag]])
    # From a spot with all neighbours outwards, since the error of the steps so far grows with the distance. The middle
    # of the section may be empty.
    n_neighbors = np.bincount(pairs.ravel(), minlength=n)
    surrounded = coordinates[n_neighbors == n_neighbors.max()]
    origin = surrounded[np.hypot(*surrounded.T).argmin()]
    distances, radius = np.hypot(*(coordinates - origin).T), 4 * spacing
    while True:
        near = coordinates[distances <= radius]
        places = np.rint((near - origin) @ np.linalg.pinv(basis))
        design = np.column_stack([np.ones(len(near)), places])
        change = np.linalg.lstsq(design, near - origin - places @ basis, rcond=None)[0]
        origin, basis = origin + change[0], basis + change[1:]
        if len(near) == n:
            break
        radius *= 2
    places = np.rint((coordinates - origin) @ np.linalg.pinv(basis))
    off = (coordinates - origin) @ np.linalg.pinv(basis) - places
    return (places - places.min(0)).astype(np.int64), np.abs(off).max(1)


def check_patch_size(size: int) -> int:
    """Check the side of a patch, an odd number, and return it."""
    size = check_whole("patch_size", size, 3, MOST_SIDE)
    if size % 2 == 0:
        raise ValueError(f"patch_size={size}; it takes an odd number, so that the spot is in the middle.")
    return size


def check_image_shape(shape: tuple[int, ...] | None, n_features: int | None = None) -> tuple[int, ...] | None:
    """Check the height, width and, if given, number of channels of images, and return them; None for no images.

    Examples
    --------
    >>> check_image_shape((28, 28), 700)
    Traceback (most recent call last):
    ValueError: image_shape=(28, 28) has 784 values, but adata has 700 features.
    """
    if shape is None:
        return None
    takes = (
        f"image_shape={shown(shape)}; it takes the height and width of the images, such as (28, 28), or (28, 28, 3)."
    )
    if not isinstance(shape, tuple | list):
        raise TypeError(takes)
    if len(shape) not in (2, 3):
        raise ValueError(takes)
    shape = tuple(check_whole("image_shape", side, 1, MOST_SIDE) for side in shape)
    if n_features is not None and np.prod(shape) != n_features:
        raise ValueError(
            f"image_shape={shape} has {np.prod(shape):,} values, but adata has {counted(n_features, 'feature')}."
        )
    return shape


def pixel_places(shape: tuple[int, ...]) -> np.ndarray:
    """Return x and y of the pixels of an image, row by row, (H W, 2) float32. y points up.

    The middle of the image is at 0, and half its longer side is 1.

    Examples
    --------
    >>> pixel_places((2, 3)).tolist()
    [[-1.0, 0.5], [0.0, 0.5], [1.0, 0.5], [-1.0, -0.5], [0.0, -0.5], [1.0, -0.5]]
    """
    height, width = shape[:2]
    row, column = (places.ravel() for places in np.mgrid[:height, :width])
    centred = np.column_stack([column - (width - 1) / 2, (height - 1) / 2 - row])
    return (centred / max((max(height, width) - 1) / 2, 1)).astype(np.float32)


class ImageStore:
    """The pixels of images, each of which is a row of a store: pixel by pixel, with the channels of each together.

    Parameters
    ----------
    store
        The values of all N images.
    shape
        Height, width and, if there are several, number of channels.
    """

    def __init__(self, store: MemoryStore | BackedStore, shape: tuple[int, ...]):
        self.store = store
        self.shape = (store.shape[0], shape[0] * shape[1], store.shape[1] // (shape[0] * shape[1]))

    def rows(self, index: np.ndarray, as_sparse: bool = False) -> Tensor:
        """Return some images, in their order, (n, H W, C) float32."""
        return self.store.rows(index).reshape(len(index), *self.shape[1:])
