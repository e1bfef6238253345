"""Draw cells where they lie in tissue, a panel for each section."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy.spatial import KDTree

from scgen.arguments import check_flag, check_names, check_whole, counted, did_you_mean
from scgen.data.annotations import column_of, features_of, groups_of
from scgen.data.categories import unhashable
from scgen.data.checks import Setup, check_types, some
from scgen.reporting import canvas

#: Panels of a row, and the largest width and height of each in inches.
MOST_IN_A_ROW, WIDTH, HEIGHT = 4, 3.6, 7.2
#: Length of an arrow, relative to the distance to the nearest other arrow, or to a tenth of the section.
ARROW = 0.8


def tissue(
    adata: AnnData,
    color: str | Sequence[str],
    *,
    section_key: str | None = None,
    spatial_key: str = "spatial",
    layer: str | None = None,
    rotation_key: str | None = None,
    y_down: bool = False,
    max_categories: int = 40,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes | Figure:
    """Draw cells at their positions in tissue, with a panel for each section.

    For other pictures of one section, use ``sc.pl.embedding(adata, basis="spatial", ...)`` of Scanpy. This function
    adds sections with common colours, equal units on both axes, and arrows.

    Parameters
    ----------
    adata
        The cells. They are not changed.
    color
        What colours the cells: a column of ``adata.obs`` or a gene, or a list of them. Each has a row of panels.
        Numbers have one scale for all sections. Missing and infinite values are light grey. Categories have the colours
        that Scanpy gives them: those in ``adata.uns[f"{color}_colors"]``, or else the default ones.
    section_key
        Column of ``adata.obs`` with the section; None draws all cells in one panel.
    spatial_key
        Key of the positions in ``adata.obsm``, two columns.
    layer
        Layer with the values of genes; None reads ``adata.X``. ``adata.raw`` is not read.
    rotation_key
        Column of ``adata.obs`` with angles in radians, such as those of `SpatialVAE.get_rotation`. Each cell has an
        arrow that points in the direction (cos, sin) of its angle. Cells at NaN have none.
    y_down
        Whether the y-axis points down, as in images and in ``squidpy.pl.spatial_scatter``. By default it points up, as
        in ``sc.pl.embedding``. Arrows are reflected with the positions.
    max_categories
        With more categories, there is no legend.
    ax
        Where to draw a single panel; None makes a figure.
    save
        File to write, such as "tissue.png"; None shows the picture instead.

    Returns
    -------
    The Axes of one panel, or the Figure of several.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be, a key does not exist, or ``ax`` is given for several panels.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_tissue(n_sections=2, n_rows=4, counts=False)
    >>> adata.obs["arrow"] = adata.obs["angle"].where(adata.obs["is_centre"])
    >>> figure = scgen.plots.tissue(adata, "niche", section_key="section", rotation_key="arrow")
    >>> [axes.get_title() for axes in figure.axes]
    ['section_1, by niche', 'section_2, by niche']
    """
    canvas.check_data_first("tissue", "adata", adata)
    check_types(adata, Setup(layer=layer))
    save = canvas.check_save(save)
    y_down, max_categories = check_flag("y_down", y_down), check_whole("max_categories", max_categories, 0)
    keys = check_names("color", [color] if isinstance(color, str) else color)
    if not keys or not adata.n_obs:
        raise ValueError("color=[]; it takes a column or a gene." if adata.n_obs else "adata has no cells to draw.")
    if layer is not None and layer not in adata.layers:
        names = list(adata.layers)
        raise ValueError(
            f"layer={layer!r} is not in adata.layers (it has: {some(names, 12) or 'none'}).{did_you_mean(layer, names)}"
        )
    xy = features_of(adata, "spatial_key", spatial_key)
    if xy.shape[1] != 2:
        text = f'adata.obsm["{spatial_key}"] has {counted(xy.shape[1], "column")}, but 2 are drawn.'
        raise ValueError(f"spatial_key={spatial_key!r}: {text}")
    sections = [("", np.arange(adata.n_obs))]
    if section_key is not None:
        groups = groups_of(adata, "section_key", section_key)
        sections = [(f"{name}, by ", np.flatnonzero(groups == name)) for name in groups.categories]
    columns = {key: _colours_of(adata, key, layer, max_categories) for key in keys}
    angles = None
    if rotation_key is not None:
        angles = Numbers("rotation_key", rotation_key, column_of(adata, "rotation_key", rotation_key)).values

    parts = np.array_split(np.arange(len(sections)), -(-len(sections) // MOST_IN_A_ROW))
    sizes = [len(part) for part in parts] * len(columns)
    canvas.check_ax(ax, sum(sizes))
    corners = [_corners(xy[rows]) for _, rows in sections]
    # Height divided by width, of the section for which it is largest.
    shape = max(0.3, *(height / width for width, height in np.ptp(corners, axis=1)))
    width = min(WIDTH, HEIGHT / shape)
    size = (
        max(sizes) * width + max(column.legend_width for column in columns.values()),
        len(sizes) * (width * shape + 0.5),
    )
    random = np.random.default_rng(0)
    with canvas.drawing(ax, *size, save) as figure:
        if ax is None:
            figure.set_layout_engine("compressed")  # for panels with a shape of their own
        panels = [axes for row in canvas.panels(figure, sizes) for axes in row] if ax is None else [ax]
        for i, axes in enumerate(panels):
            key, (section, rows) = keys[i // len(sections)], sections[i % len(sections)]
            rows = random.permutation(rows)
            columns[key].draw(axes, xy[rows], rows, canvas.plain(section + key))
            axes.set(aspect="equal", xlabel=canvas.plain(f"{spatial_key}1"), ylabel=canvas.plain(f"{spatial_key}2"))
            axes.update_datalim(corners[i % len(sections)])
            if angles is not None:
                _add_arrows(axes, xy[rows], angles[rows])
            if y_down:
                axes.yaxis.set_inverted(True)
            if i % len(sections) == sizes[0] - 1:
                columns[key].add_legend(axes)
        if ax is None:
            figure.draw_without_rendering()  # labels of panels may overlap until the layout is made a second time
    return panels[0] if len(panels) == 1 else figure


class Numbers:
    """Numbers of cells, with one scale of colours for all panels.

    Parameters
    ----------
    name, key
        The argument and its value, to name in errors.
    values
        Of the cells; those that are not finite are light grey.
    """

    legend_width = 0.9

    def __init__(self, name: str, key: str, values: pd.Series):
        if not pd.api.types.is_any_real_numeric_dtype(values):
            raise TypeError(f"{name}={key!r}: the column has dtype {values.dtype}; it takes numbers.")
        self.values = values.to_numpy(float, na_value=np.nan)
        finite = self.values[np.isfinite(self.values)]
        if not len(finite):
            raise ValueError(f"{name}={key!r} has no finite values.")
        self.norm = Normalize(finite.min(), finite.max())

    def draw(self, ax: Axes, xy: np.ndarray, order: np.ndarray, title: str) -> None:
        """Draw cells, which are in the given order, in the colours of their values, with the highest in front."""
        values = self.values[order]
        there, size = np.isfinite(values), canvas.dot_size(ax, len(xy))
        ax.scatter(*xy[~there].T, c=canvas.LIGHT_GREY, s=size, linewidths=0, rasterized=True)
        ascending = np.flatnonzero(there)[np.argsort(values[there])]
        ax.scatter(*xy[ascending].T, c=values[ascending], norm=self.norm, s=size, linewidths=0, rasterized=True)
        ax.set(title=title, xticks=[], yticks=[])
        ax.title.set_fontsize(11)

    def add_legend(self, ax: Axes) -> None:
        """Draw the scale of colours beside the Axes."""
        ax.figure.figure.colorbar(ScalarMappable(self.norm), cax=ax.inset_axes([1.03, 0, 0.04, 1]))


def _colours_of(adata: AnnData, key: str, layer: str | None, max_categories: int) -> "canvas.Categories | Numbers":
    """Return what colours the cells: a column of ``obs``, or else a gene."""
    columns, n_genes = [str(column) for column in adata.obs.columns], (adata.var_names == key).sum()
    if key not in columns and not n_genes:
        raise ValueError(
            f"color={key!r} is neither a column of adata.obs (it has: {some(columns, 12) or 'none'}) nor one of "
            f"adata.var_names.{did_you_mean(key, [*columns, *adata.var_names])}"
        )
    if key not in columns:
        if n_genes > 1:
            raise ValueError(
                f"color={key!r}: {n_genes} genes have this name. Call adata.var_names_make_unique() first."
            )
        return Numbers("color", key, pd.Series(adata.obs_vector(key, layer=layer)))
    column = column_of(adata, "color", key)
    if pd.api.types.is_any_real_numeric_dtype(column):
        return Numbers("color", key, column)
    if (row := unhashable(column)) is not None:
        raise ValueError(f"color={key!r}: the column holds a {type(column.iloc[row]).__name__}; it must hold names.")
    column = (column.astype(str) if column.dtype == bool else column).astype("category")
    names, stored = list(column.cat.categories), list(adata.uns.get(f"{key}_colors", []))
    if len(stored) < len(names) or not all(map(matplotlib.colors.is_color_like, stored)):
        stored = canvas.distinct_colours(len(names))
    return canvas.Categories(column, max_categories, dict(zip(names, stored, strict=False)))


def _corners(xy: np.ndarray) -> np.ndarray:
    """Return two corners of a box that holds the cells, (2, 2). Its sides differ by at most a factor of 6."""
    low, high = xy.min(0), xy.max(0)
    half = (high - low) / 2
    half = np.maximum(half, half.max() / 6 or 1.0)
    return (low + high) / 2 + np.stack([-half, half])


def _add_arrows(ax: Axes, xy: np.ndarray, angles: np.ndarray) -> None:
    """Draw an arrow at each cell that has an angle."""
    there = np.isfinite(angles)
    if not there.any():
        return
    otherwise = 0.1 * np.ptp(_corners(xy), axis=0).max()
    xy, angles = xy[there], angles[there]
    spacing = np.median(KDTree(xy).query(xy, 2)[0][:, 1]) if len(xy) > 1 else 0.0
    length = ARROW * (spacing or otherwise)
    how = {"angles": "xy", "scale_units": "xy", "scale": 1, "units": "xy", "width": 0.1 * length, "pivot": "mid"}
    ax.quiver(*xy.T, length * np.cos(angles), length * np.sin(angles), color="black", **how)
