"""Pictures: arrays in, PNG out."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from scgen.arguments import check_path, check_whole, shown


def scatters(
    path: Path, maps: Mapping[str, np.ndarray], colours: Mapping[str, pd.Series], max_categories: int = 40
) -> None:
    """Draw each map (n, 2), a column, coloured by each category, a row; NaN positions are left out.

    Cells are drawn in random order, so that no category hides another; beyond ``max_categories`` there is no legend.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    path = _picture(path)
    max_categories = check_whole("max_categories", max_categories, 0)
    for name, value in (("maps", maps), ("colours", colours)):
        if not isinstance(value, Mapping) or not len(value):
            raise TypeError(f"{name}={shown(value)}; it takes a mapping of titles to what is drawn, and one at least.")
    for name, xy in maps.items():
        if np.ndim(xy) != 2 or np.shape(xy)[1] != 2 or np.asarray(xy).dtype.kind not in "iuf":
            raise ValueError(f"maps[{name!r}]={shown(xy)}; it takes numbers of shape (n, 2).")
    n_cells = {len(xy) for xy in maps.values()}
    for name, values in colours.items():
        if not isinstance(values, pd.Series) or n_cells != {len(values)}:
            raise ValueError(
                f"colours[{name!r}]={shown(values)}; it takes a Series of as many values as maps have rows."
            )
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

    path = _picture(path)
    if not isinstance(history, pd.DataFrame) or not len(history) or "elbo_train" not in history:
        raise TypeError(f"history={shown(history)}; it takes the table model.history of a trained model.")
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


def volcano(path: Path, table: pd.DataFrame, n_labels: int = 8) -> None:
    """Draw the Bayes factors of genes against their log2 fold changes, a panel for each comparison.

    Parameters
    ----------
    path
        Where the PNG goes.
    table
        What `Model.differential_expression` returns in mode "change".
    n_labels
        Genes named in each lower corner: of those called, the ones that fall and rise most.

    Raises
    ------
    ValueError
        If the table is not of mode "change".
    """
    from matplotlib.figure import Figure

    path = _picture(path)
    n_labels = check_whole("n_labels", n_labels, 0)
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"table={shown(table)}; it takes a table of model.differential_expression(...).")
    called = next((name for name in table if str(name).startswith("is_de_fdr_")), None)
    if called is None:
        raise ValueError('the table has no fold changes: it takes one of differential_expression(mode="change").')
    comparisons = list(table.groupby("comparison", sort=False))
    n_columns = min(len(comparisons), 3)
    n_rows = -(-len(comparisons) // n_columns)
    figure = Figure(figsize=(5 * n_columns, 4.2 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for axes, (name, rows) in zip(panels, comparisons, strict=False):
        for chosen, colour in ((~rows[called], "0.75"), (rows[called], "tab:red")):
            axes.scatter(*rows.loc[chosen, ["lfc_mean", "bayes_factor"]].to_numpy().T, s=6, c=colour)
        for sign in (-1, 1):
            axes.axvline(sign * rows["delta"].iloc[0], color="0.4", linewidth=0.8, linestyle=":")
        # The surest share one height, where their names would lie over each other: they stand in the corners.
        ascending = rows[rows[called]].sort_values("lfc_mean")["lfc_mean"]
        falls, rises = ascending[ascending < 0].head(n_labels), ascending[ascending > 0].tail(n_labels)[::-1]
        axes.text(0.02, 0.02, "\n".join(falls.index), transform=axes.transAxes, fontsize=7, va="bottom")
        axes.text(0.98, 0.02, "\n".join(rises.index), transform=axes.transAxes, fontsize=7, va="bottom", ha="right")
        axes.set(title=f"{name}: {rows[called].sum()} called", xlabel="log2 fold change", ylabel="Bayes factor (log)")
    for axes in panels[len(comparisons) :]:
        axes.remove()
    figure.savefig(path, dpi=110)


def posterior_predictive(path: Path, check) -> None:
    """Draw observed counts against replicates of them: zeros, variances and libraries, a panel each.

    Parameters
    ----------
    path
        Where the PNG goes.
    check
        What `scgen.posterior_predictive_check` returns.
    """
    from matplotlib.figure import Figure

    path = _picture(path)
    if not all(isinstance(getattr(check, name, None), pd.DataFrame) for name in ("genes", "cells")):
        raise TypeError(f"check={shown(check)}; it takes what scgen.posterior_predictive_check(model) returns.")
    figure = Figure(figsize=(13, 4.3), layout="constrained")
    zeros, variances, libraries = figure.subplots(1, 3)
    _against_observed(zeros, check.genes, "zero_share")
    _against_observed(libraries, check.cells, "library")
    zeros.set(title="Share of zeros of each gene", aspect="equal")
    libraries.set(title="Library of each cell", xscale="log", yscale="log", aspect="equal")
    kinds = {"observed": "0.45", "replicated": "tab:orange"}
    points = np.concatenate([check.genes[[f"mean_{kind}", f"variance_{kind}"]] for kind in kinds])
    colours = np.repeat(list(kinds.values()), len(check.genes))
    # In random order, so that neither hides the other; what is not expressed has no place on logarithmic axes.
    order = np.random.default_rng(0).permutation(np.flatnonzero((points > 0).all(1)))
    variances.scatter(*points[order].T, s=3, c=colours[order], linewidths=0, rasterized=True)
    for kind, colour in kinds.items():
        variances.scatter([], [], s=12, c=colour, linewidths=0, label=kind)
    if len(order):  # of one cell, no variance is above zero
        ends = points[order, 0].min(), points[order, 0].max()
        variances.plot(ends, ends, color="black", linewidth=0.8, linestyle=":", label="Poisson")
        variances.set(xscale="log", yscale="log")
    variances.set(title="Mean and variance of each gene", xlabel="mean", ylabel="variance")
    variances.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _picture(path: str | Path) -> Path:
    """Return where a picture goes; raise before it is drawn where it could not be written."""
    from matplotlib.figure import Figure

    path = check_path("path", path)
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"path={shown(str(path))}; it takes a file that ends in .{', .'.join(sorted(formats))}.")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"path={shown(str(path))}: " + ("that is a folder." if path.is_dir() else "no such folder."))
    return path


def _against_observed(axes, table: pd.DataFrame, name: str) -> None:
    """Draw replicated values against observed ones; those outside of the replicates' interval are red."""
    observed, replicated = table[f"{name}_observed"], table[f"{name}_replicated"]
    within = table[f"{name}_within"]
    for chosen, colour, where in ((within, "0.45", "within"), (~within, "tab:red", "outside")):
        label = f"{where} the replicates' interval: {chosen.mean():.0%}"
        axes.scatter(observed[chosen], replicated[chosen], s=3, c=colour, linewidths=0, rasterized=True)
        axes.scatter([], [], s=12, c=colour, linewidths=0, label=label)
    ends = min(observed.min(), replicated.min()), max(observed.max(), replicated.max())
    axes.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="observed", ylabel="replicated")
    axes.legend(frameon=False, loc="upper left", fontsize=8)
