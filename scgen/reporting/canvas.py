"""What pictures are drawn on and with: figures, the files that they are written to, and the colours of categories."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from scgen import atomic
from scgen.arguments import check_path, shown

#: Dots per inch of a file.
DPI = 150
#: What is missing, or in the background.
LIGHT_GREY = "0.83"
#: Names of categories are cut to so many letters.
LONGEST_NAME = 36
#: Wider legends, in inches, do not fit beside a panel in the middle of a row. Half a panel is free there.
LEGEND_BESIDE = 2.2


class NotebookFigure(Figure):
    """A figure of pyplot that a notebook shows once.

    Jupyter shows the figures of pyplot when a cell has run. A figure that is also the cell's result would be shown
    twice.
    """

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        if "inline" in matplotlib.get_backend():
            from matplotlib import pyplot

            pyplot.close(self)
        return {}  # matplotlib's own formatter shows it


def check_save(path: str | Path | None) -> Path | None:
    """Return where a picture is to be written; raise an error if it cannot be written there.

    Examples
    --------
    >>> check_save("nowhere/volcano.png")
    Traceback (most recent call last):
    ValueError: save='nowhere/volcano.png': no such folder.
    """
    if path is None:
        return None
    path = check_path("save", path)
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"save={shown(str(path))}; it takes a file that ends in .{', .'.join(sorted(formats))}.")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"save={shown(str(path))}: " + ("that is a folder." if path.is_dir() else "no such folder."))
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"save={shown(str(path))}: the folder cannot be written to.")
    return path


def check_ax(ax: Axes | None, n_panels: int = 1) -> None:
    """Raise an error if ``ax`` is not plain Axes of a figure, or is given for several panels."""
    if ax is None:
        return
    if not isinstance(ax, Axes):
        raise TypeError(f"ax={shown(ax)}; it takes Axes of matplotlib: _, ax = plt.subplots().")
    if ax.name != "rectilinear":
        raise ValueError(f"ax={shown(ax)} has the projection {ax.name!r}; it takes plain Axes: _, ax = plt.subplots().")
    if ax.figure is None:
        raise ValueError(f"ax={shown(ax)} was removed from its figure; it takes new Axes: _, ax = plt.subplots().")
    if n_panels > 1:
        raise ValueError(f"ax= takes one panel, and there are {n_panels} to draw: leave ax out, or draw one at a time.")


def check_data_first(call: str, name: str, value) -> None:
    """Raise TypeError if a path is given as the data.

    Examples
    --------
    >>> check_data_first("volcano", "table", "volcano.png")
    Traceback (most recent call last):
    TypeError: table='volcano.png' is a path. The data come first: volcano(table, save='volcano.png').
    """
    if isinstance(value, str | Path):
        path = shown(str(value))
        raise TypeError(f"{name}={path} is a path. The data come first: {call}({name}, save={path}).")


def numbers(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """Return a table as floats, with NaN where it has no value; raise TypeError where a column has no numbers.

    Examples
    --------
    >>> numbers("table", pd.DataFrame({"scgen": [True]}))
    Traceback (most recent call last):
    TypeError: table['scgen'] has dtype bool; it takes numbers, such as table['scgen'].astype(float).
    """
    for column, dtype in table.dtypes.items():
        if not pd.api.types.is_any_real_numeric_dtype(dtype):
            of = f"{name}[{shown(column)}]"
            raise TypeError(f"{of} has dtype {dtype}; it takes numbers, such as {of}.astype(float).")
    return table.astype(float)


def positions(name: str, xy) -> np.ndarray:
    """Return positions of cells, (n, 2), as an array; raise an error if they are not positions, or none is finite.

    Examples
    --------
    >>> positions("xy", [[0, 1], [2]])
    Traceback (most recent call last):
    ValueError: xy=[[0, 1], [2]]; it takes numbers of shape (n, 2).
    """
    try:
        array = np.asarray(numbers(name, xy) if isinstance(xy, pd.DataFrame) else xy)
    except ValueError:  # NumPy's, of rows of different lengths
        array = np.empty(0)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iuf":
        raise ValueError(f"{name}={shown(xy)}; it takes numbers of shape (n, 2).")
    if not np.isfinite(array).all(axis=1).any():
        raise ValueError(f"{name} has no cells with finite positions; it takes numbers of shape (n, 2).")
    return array


@contextlib.contextmanager
def drawing(ax: Axes | None, width: float, height: float, save: Path | None) -> Iterator[Figure]:
    """Yield the figure to draw on, and write it afterwards where ``save`` is given.

    It is the figure of ``ax``, or a new one of this size, in inches. A new one belongs to pyplot, which shows it, but
    not where it is written to a file. If drawing fails, it is closed: a notebook would show the half-drawn picture.
    """
    if ax is not None or save is not None:
        figure = Figure(figsize=(width, height), layout="constrained") if ax is None else ax.figure.figure
        yield figure
        write(figure, save)
        return
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(width, height), layout="constrained", FigureClass=NotebookFigure)
    try:
        yield figure
    except BaseException:  # an interrupt of the user's as well
        pyplot.close(figure)
        raise


def panels(figure: FigureBase, sizes: Sequence[int]) -> list[list[Axes]]:
    """Return new Axes of equal width in rows of so many. A row with fewer than the longest one is centred.

    Examples
    --------
    >>> [len(row) for row in panels(Figure(), [2, 2, 1])]
    [2, 2, 1]
    """
    most = max(sizes)
    grid = figure.add_gridspec(len(sizes), 2 * most)  # in half panels
    return [
        [figure.add_subplot(grid[row, start : start + 2]) for start in range(most - n, most + n, 2)]
        for row, n in enumerate(sizes)
    ]


def place_alone(axes: Axes, row: int) -> None:
    """Keep the only panel of a row in its middle, or move it to the right end if its legend is wide."""
    legend = axes.get_legend()
    if legend and legend.get_window_extent().width > LEGEND_BESIDE * axes.figure.figure.dpi:
        axes.set_subplotspec(axes.get_gridspec()[row, -2:])
        return
    # The layout would make the panels of other rows narrower for them.
    for artist in filter(None, (axes.yaxis.label, legend)):
        artist.set_in_layout(False)


def write(figure: Figure, path: Path | None) -> None:
    """Write a figure in one step, so that the file is never half a picture; None writes nothing."""
    if path is None:
        return
    with atomic.beside(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=DPI)
        atomic.permit(temporary)
        atomic.replace(temporary, path)


def plain(text: str) -> str:
    """Return a text that matplotlib writes as it is, also where it has dollar signs."""
    return text.replace("$", r"\$")


def distinct_colours(n: int) -> list:
    """Return n colours. The more there are, the more alike they look."""
    if n <= 10:
        return list(matplotlib.colormaps["tab10"].colors[:n])
    if n > 102:
        return list(matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, n)))
    from scanpy.plotting import palettes  # loaded here, since scanpy takes seconds to load

    return next(list(of[:n]) for of in (palettes.default_20, palettes.default_28, palettes.default_102) if len(of) >= n)


def dot_size(ax: Axes, n_cells: int) -> float:
    """Return the size of the dots of so many cells, in square points, so that they fill the Axes and stay apart."""
    inches = ax.get_window_extent().width / ax.figure.figure.dpi
    return float(np.clip(3000 * inches**2 / n_cells, 1, 25))


class Categories:
    """Categories of cells, with a colour and a label for each; cells without one are light grey.

    Parameters
    ----------
    values
        The category of each cell.
    max_categories
        With more categories, there is no legend.
    colours
        The colour of each category; None chooses them.

    Attributes
    ----------
    labels, shades
        Of the categories: names with numbers of cells, and colours.
    codes
        (n,) of the cells; -1 for those without a category.
    """

    def __init__(self, values: pd.Series, max_categories: int, colours: Mapping | None = None):
        column = values.astype("category").cat.remove_unused_categories().cat
        self.codes = column.codes.to_numpy()
        self.shades = distinct_colours(len(column.categories))
        if colours is not None:
            self.shades = [colours[category] for category in column.categories]
        names = [str(name) for name in column.categories]
        names = [name if len(name) <= LONGEST_NAME else f"{name[:22]}…{name[-13:]}" for name in names]
        # matplotlib leaves names that begin with "_" out of legends.
        names = [plain(f" {name}" if name.startswith("_") else name) for name in names]
        counts = np.bincount(self.codes + 1, minlength=len(names) + 1)
        self.labels = [f"{name} ({count:,})" for name, count in zip(names, counts[1:], strict=True)]
        self.legend = [*zip(self.labels, self.shades, strict=True)]
        if counts[0]:
            self.legend.append((f"NaN ({counts[0]:,})", LIGHT_GREY))
        if len(self.legend) > max_categories:
            self.legend = []
        self.n_columns = -(-len(self.legend) // 20)
        letters = max((len(label) for label, _ in self.legend), default=0)
        self.legend_width = self.n_columns * (0.4 + 0.07 * letters)

    def draw(self, ax: Axes, xy: np.ndarray, order: np.ndarray, title: str, only: int | None = None) -> None:
        """Draw cells, which are in the given order, in the colours of their categories, or of one of them only."""
        codes = self.codes[order]
        size = dot_size(ax, len(xy))
        coloured = codes >= 0 if only is None else codes == only
        for chosen, colour in ((~coloured, LIGHT_GREY), (coloured, None)):
            shades = colour or [self.shades[code] for code in codes[chosen]]
            ax.scatter(*xy[chosen].T, c=shades, s=size, linewidths=0, rasterized=True)
        ax.set_title(title, fontsize=11 if only is None else 9)
        ax.set(xticks=[], yticks=[])
        if only is None:
            ax.set(xlabel="UMAP 1", ylabel="UMAP 2")

    def add_legend(self, ax: Axes) -> None:
        """Write names and numbers of cells beside the Axes."""
        handles = [ax.plot([], [], "o", color=shade, label=label)[0] for label, shade in self.legend]
        if handles:
            place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "ncols": self.n_columns}
            ax.legend(handles=handles, frameon=False, fontsize=8, columnspacing=1, **place)
