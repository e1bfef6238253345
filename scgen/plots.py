"""Pictures: arrays in, PNG out."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd


def scatters(
    path: Path, maps: Mapping[str, np.ndarray], colours: Mapping[str, pd.Series], max_categories: int = 40
) -> None:
    """Draw each map (n, 2), a column, coloured by each category, a row; NaN positions are left out.

    Cells are drawn in random order, so that no category hides another; beyond ``max_categories`` there is no legend.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(maps) + 2.5, 4.6 * len(colours)), layout="constrained")
    grid = figure.subplots(len(colours), len(maps), squeeze=False)
    order = np.random.default_rng(0).permutation(len(next(iter(maps.values()))))
    for row, (name, values) in zip(grid, colours.items(), strict=True):
        column = values.astype("category").cat.remove_unused_categories().cat
        categories = [*map(str, column.categories), *(["NaN"] if values.isna().any() else [])]
        codes = np.where(column.codes < 0, len(categories) - 1, column.codes)
        palette = colormaps["tab10" if len(categories) <= 10 else "tab20" if len(categories) <= 20 else "nipy_spectral"]
        shades = palette(
            np.linspace(0.03, 0.97, len(categories)) if len(categories) > 20 else np.arange(len(categories))
        )
        for axes, (title, xy) in zip(row, maps.items(), strict=True):
            size = float(np.clip(60_000 / len(xy), 1, 25))
            axes.scatter(*xy[order].T, c=shades[codes[order]], s=size, linewidths=0, rasterized=True)
            axes.set(title=f"{title}, by {name}", xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
        if len(categories) <= max_categories:
            handles = [
                row[-1].plot([], [], "o", color=shade, label=category)[0]
                for shade, category in zip(shades, categories, strict=True)
            ]
            row[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def training_curve(path: Path, history: pd.DataFrame) -> None:
    """Draw the evidence lower bound of training and validation cells, by epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for column, label in (("elbo_train", "training cells, with dropout"), ("elbo_validation", "validation cells")):
        if column in history:
            axes.plot(history.index, history[column], label=label, marker="." if len(history) < 20 else None)
    # The first epochs are far below the rest and would flatten it.
    last = history.filter(like="elbo").iloc[len(history) // 4 :]
    span = float(np.ptp(last.to_numpy())) or 1.0
    axes.set_ylim(float(last.min().min()) - 0.3 * span, float(last.max().max()) + 0.1 * span)
    axes.set(xlabel="epoch", ylabel="ELBO (nats per cell)", title="Training")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
