"""Pictures of cells, trainings, scores and genes.

Each function takes its data first and returns the Axes that it drew on, or the Figure where there are several panels.
In a notebook the picture is shown, as those of matplotlib's pyplot are. With ``save=`` it is written to a file, and
pyplot is not used: nothing is shown, and no figure stays open.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scgen.arguments import check_names, check_whole, shown
from scgen.reporting import canvas
from scgen.reporting.point_labels import label_points
from scgen.reporting.tissue import tissue as tissue

#: What the scores of scib-metrics mean, by their names there.
MEANINGS = {
    "Isolated labels": "cells of types that few batches have are near each other",
    "KMeans NMI": "k-means clusters and cell types agree (shared information)",
    "Leiden NMI": "Leiden clusters and cell types agree (shared information)",
    "KMeans ARI": "k-means clusters and cell types agree (pairs of cells)",
    "Leiden ARI": "Leiden clusters and cell types agree (pairs of cells)",
    "Silhouette label": "cells are nearer to their own type than to others",
    "cLISI": "the neighbours of a cell are of its type",
    "Silhouette batch": "within a type, cells are as near to other batches as to their own",
    "BRAS": "within a type, cells are as near to other batches as to their own",
    "iLISI": "the neighbours of a cell come from many batches, whatever their types",
    "KBET": "the batches have the same shares near every cell",
    "Graph connectivity": "the cells of a type are connected through their neighbours",
    "PCR comparison": "batches, or their shares of types, explain less of the variance than before",
    "bio": "mean of the scores that compare with cell types",
    "batch": "mean of the scores that compare batches",
    "total": "0.6 bio + 0.4 batch",
}
#: More names could not be read.
MOST_LABELS = 50


def scatters(
    maps: Mapping[str, np.ndarray | pd.DataFrame | Sequence],
    colours: Mapping[str, pd.Series],
    *,
    last_map_only: Sequence[str] = (),
    split_by: str | None = None,
    max_categories: int = 40,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes | Figure:
    """Draw maps of cells, such as UMAPs, side by side, once for each column that colours them.

    Cells are drawn in random order, so that no category hides another. Cells without a category are light grey and lie
    behind the others. Legends have the number of cells of each category.

    Parameters
    ----------
    maps
        Positions of the cells by title: an array, DataFrame or list of shape (n, 2) each. Cells at NaN are left out.
    colours
        A Series of n categories for each row of panels, by title.
    last_map_only
        Titles of ``colours`` that are drawn on the last map only, such as clusters that were found there. This map is
        then in the middle of its row, or at its right end if the legend is wide.
    split_by
        A title of ``colours``. A further row has the last map once for each of its categories, with all other cells in
        light grey behind.
    max_categories
        With more categories, there is no legend.
    ax
        Where to draw a single panel; None makes a figure.
    save
        File to write, such as "maps.png"; None shows the picture instead.

    Returns
    -------
    The Axes of one panel, or the Figure of several.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be, or ``ax`` is given for several panels.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from scgen import plots
    >>> xy = np.random.default_rng(0).normal(size=(100, 2))
    >>> cell_type = pd.Series(["B", "T"] * 50)
    >>> axes = plots.scatters({"UMAP": xy}, {"cell type": cell_type})
    >>> [text.get_text() for text in axes.get_legend().get_texts()]
    ['B (50)', 'T (50)']
    """
    canvas.check_data_first("scatters", "maps", maps)
    save = canvas.check_save(save)
    max_categories = check_whole("max_categories", max_categories, 0)
    maps = _check_maps(maps, colours)
    last_map_only = check_names("last_map_only", last_map_only)
    for name, titles in (("last_map_only", last_map_only), ("split_by", [] if split_by is None else [split_by])):
        for one in titles:
            if not isinstance(one, str) or one not in colours:
                known = ", ".join(map(shown, colours))
                raise ValueError(f"{name}={shown(one)}; it takes titles of colours, which are {known}.")
    columns = {name: canvas.Categories(values, max_categories) for name, values in colours.items()}
    parts = [] if split_by is None else columns[split_by].labels
    if split_by is not None and not parts:
        raise ValueError(f"split_by={shown(split_by)}; no cell has a category there: leave split_by out.")
    title, last = list(maps.items())[-1]
    shown_on = [[(title, last)] if name in last_map_only else list(maps.items()) for name in columns]
    sizes = [len(on) for on in shown_on]
    n_panels = sum(sizes) + len(parts)
    canvas.check_ax(ax, n_panels)
    order = np.random.default_rng(0).permutation(len(last))
    width = 4.8 * max(sizes) + max(column.legend_width for column in columns.values())
    heights = [4.6 * len(columns)]
    if parts:
        in_rows = [len(some) for some in np.array_split(parts, -(-len(parts) // 6))]
        heights.append(0.4 + min(width / in_rows[0], 4.6) * len(in_rows))
    with canvas.drawing(ax, width, sum(heights), save) as figure:
        upper, lower = figure.subfigures(2, 1, height_ratios=heights) if parts else (figure, None)
        rows = [[ax]] if ax is not None else canvas.panels(upper, sizes)
        for i, (row, on, (name, column)) in enumerate(zip(rows, shown_on, columns.items(), strict=True)):
            for axes, (of, xy) in zip(row, on, strict=True):
                column.draw(axes, xy[order], order, canvas.plain(f"{of}, by {name}"))
            column.add_legend(row[-1])
            if len(row) < max(sizes):
                canvas.place_alone(row[0], i)
        if parts:
            lower.suptitle(canvas.plain(f"{title}, each {split_by} with all other cells in grey"), fontsize=11)
            panels = [axes for row in canvas.panels(lower, in_rows) for axes in row]
            for i, (axes, label) in enumerate(zip(panels, parts, strict=True)):
                columns[split_by].draw(axes, last[order], order, label, only=i)
    return rows[0][0] if n_panels == 1 else figure


def history(model, *, ax: Axes | None = None, save: str | Path | None = None) -> Axes:
    """Draw the evidence lower bound (ELBO) of training and validation cells, by epoch.

    A ring marks the epoch whose weights the model has: the one with the best ELBO of validation cells in the second
    half of the planned epochs. Dotted lines mark where the second and later trainings began.

    Parameters
    ----------
    model
        A trained model, or a table like its ``history``, which is drawn without the marks.
    ax
        Where to draw; None makes a figure.
    save
        File to write, such as "history.png"; None shows the picture instead.

    Returns
    -------
    The Axes.

    Raises
    ------
    TypeError
        If ``model`` is neither a model nor such a table of numbers.
    ValueError
        If the history has no epochs or no finite ELBO, ``ax`` is 3D or polar, or ``save`` cannot be written.

    Examples
    --------
    >>> import scgen
    >>> from scgen import plots
    >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
    >>> scgen.setup_anndata(adata, batch_key="batch")
    >>> model = scgen.SCVI(adata)
    >>> model.train(max_epochs=4, progress=False)
    >>> axes = plots.history(model)
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('epoch', 'ELBO (nats per cell)')
    """
    canvas.check_data_first("history", "model", model)
    save = canvas.check_save(save)
    canvas.check_ax(ax)
    table = model if isinstance(model, pd.DataFrame) else getattr(model, "history", None)
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"model={shown(model)}; it takes a trained model, or its table model.history.")
    if not len(table) or "elbo_train" not in table:
        raise ValueError("the history has no epochs, or no column elbo_train: train the model first: model.train().")
    table = canvas.numbers("history", table.filter(["elbo_train", "elbo_validation"]))
    table = table.where(np.isfinite(table))
    # The first epochs are far below the rest and would flatten it.
    last = table.iloc[len(table) // 4 :]
    last = last if last.notna().any(axis=None) else table
    least, most = float(last.min().min()), float(last.max().max())
    if np.isnan(least):
        raise ValueError("the history has no finite ELBO: train the model again, with a lower learning_rate.")
    span = most - least or 1.0
    with canvas.drawing(ax, 6.4, 4, save) as figure:
        ax = figure.subplots() if ax is None else ax
        marker = "." if len(table) < 20 else None
        dropout = ", with dropout" if getattr(getattr(model, "arguments", None), "dropout_rate", 0) else ""
        for column, label in (("elbo_train", f"training cells{dropout}"), ("elbo_validation", "validation cells")):
            if column in table and table[column].notna().any():
                ax.plot(table.index, table[column], label=label, marker=marker)
        ax.set_ylim(least - 0.3 * span, most + 0.1 * span)
        _mark_trainings(ax, table, getattr(model, "trainings", []))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="epoch", ylabel=f"ELBO (nats per {getattr(model, '_unit', 'cell')})", title="Training")
        ax.legend(frameon=False)
    return ax


def scores(table: pd.DataFrame, *, ax: Axes | None = None, save: str | Path | None = None) -> Axes:
    """Draw the scores of embeddings beside each other, with what each score means; higher is better.

    Parameters
    ----------
    table
        A row for each score, a column for each embedding, as in the ``scores.csv`` of a report. The names of scores are
        those of scib-metrics; others are drawn without their meaning. Missing and infinite scores have no bar.
    ax
        Where to draw; None makes a figure.
    save
        File to write, such as "scores.png"; None shows the picture instead.

    Returns
    -------
    The Axes.

    Raises
    ------
    TypeError
        If ``table`` is no table of numbers.
    ValueError
        If ``table`` is empty, ``ax`` is 3D or polar, or ``save`` cannot be written.

    Examples
    --------
    >>> import pandas as pd
    >>> from scgen import plots
    >>> table = pd.DataFrame({"uncorrected PCA": [0.6, 0.1], "scgen": [0.7, 0.5]}, index=["KMeans NMI", "iLISI"])
    >>> axes = plots.scores(table)
    >>> [text.get_text() for text in axes.get_legend().get_texts()]
    ['uncorrected PCA', 'scgen']
    """
    canvas.check_data_first("scores", "table", table)
    save = canvas.check_save(save)
    canvas.check_ax(ax)
    if not isinstance(table, pd.DataFrame):
        raise TypeError(
            f"table={shown(table)}; it takes a table of numbers: a row for each score, a column for each embedding."
        )
    if not table.size:
        raise ValueError("table is empty; it takes a row for each score, and a column for each embedding.")
    table = canvas.numbers("table", table)
    lengths = table.where(np.isfinite(table), 0)  # what is not finite has no bar
    height = 0.7 / table.shape[1]
    places = np.arange(len(table))
    shades = ["0.7", *canvas.distinct_colours(max(table.shape[1] - 1, 1))]
    with canvas.drawing(ax, 8.5, 0.9 + 0.42 * len(table), save) as figure:
        ax = figure.subplots() if ax is None else ax
        for i, name in enumerate(table):
            where = places + (i - (table.shape[1] - 1) / 2) * height
            bars = ax.barh(where, lengths.iloc[:, i], height, color=shades[i], label=name)
            texts = [" no value" if np.isnan(value) else f" {value:.2f}" for value in table.iloc[:, i]]
            ax.bar_label(bars, texts, fontsize=7)
        names = [f"{name}\n{MEANINGS[name]}" if name in MEANINGS else str(name) for name in table.index]
        ax.set_yticks(places, names, fontsize=7)
        ax.invert_yaxis()
        ax.margins(y=0.02)
        least, most = min(0.0, lengths.min().min()), max(1.0, lengths.max().max())
        ax.set_xlim(least - 0.1 * (least < 0), most + 0.06)
        ax.set_title("Scores: higher is better", fontsize=10)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.04 - 0.4 / len(table))}
        ax.legend(frameon=False, ncols=table.shape[1], fontsize=8, **place)
        ax.spines[["top", "right"]].set_visible(False)
    return ax


def volcano(
    table: pd.DataFrame,
    *,
    n_labels: int = 8,
    gene_symbols: Mapping[str, str] | pd.Series | None = None,
    ax: Axes | None = None,
    save: str | Path | None = None,
) -> Axes | Figure:
    """Draw the Bayes factors of genes against their log2 fold changes, a panel for each comparison.

    Genes that are called are red. Dotted lines are at the fold change that was of interest, ``delta``.

    Parameters
    ----------
    table
        What `ExpressionModel.differential_expression` returns in mode "change". Genes at NaN are left out.
    n_labels
        Genes named on each side, at most 50: of those called, the ones that fall and rise most. A name is left out
        where it would overlap another.
    gene_symbols
        Symbols by the names that the table has, such as ``adata.var["symbol"]``. A gene without one keeps its name.
    ax
        Where to draw a single comparison; None makes a figure.
    save
        File to write, such as "volcano.png"; None shows the picture instead.

    Returns
    -------
    The Axes of one comparison, or the Figure of several.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be, the table is not of mode "change", or ``ax`` is given for several
        comparisons.

    Examples
    --------
    >>> import scgen
    >>> from scgen import plots
    >>> adata = scgen.simulate_cells(n_cells=200, n_genes=30, seed=0)
    >>> scgen.setup_anndata(adata, batch_key="batch")
    >>> model = scgen.SCVI(adata)
    >>> model.train(max_epochs=10, progress=False)
    >>> table = model.differential_expression("cell_type", "type_1", "type_2")
    >>> axes = plots.volcano(table)
    >>> axes.get_xlabel()
    'log2 fold change'
    """
    canvas.check_data_first("volcano", "table", table)
    save = canvas.check_save(save)
    n_labels = check_whole("n_labels", n_labels, 0, MOST_LABELS)
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"table={shown(table)}; it takes a table of model.differential_expression(...).")
    called = next((name for name in table if str(name).startswith("is_de_fdr_")), None)
    if called is None or not {"comparison", "delta", "lfc_mean", "bayes_factor"} <= set(table):
        raise ValueError('the table has no fold changes: it takes one of differential_expression(mode="change").')
    if not len(table):
        raise ValueError("the table has no genes; it takes all rows of a comparison, called or not.")
    if not table[called].isin([True, False]).all():
        raise ValueError(f"table[{called!r}] must be True or False in every row. Draw tables of several FDRs apart.")
    if table["comparison"].isna().any():
        raise ValueError("table['comparison'] has missing values; it takes the name of a comparison in every row.")
    values = canvas.numbers("table", table[["lfc_mean", "bayes_factor", "delta"]])
    if not np.isfinite(values).all(axis=1).any():
        raise ValueError("the table has no gene with finite lfc_mean, bayes_factor and delta.")
    table = values.assign(comparison=table["comparison"], called=table[called].astype(bool))
    symbols = _symbols(gene_symbols, table.index)
    comparisons = list(table.groupby("comparison", sort=False, observed=True))
    canvas.check_ax(ax, len(comparisons))
    n_columns = 2 if len(comparisons) == 4 else min(len(comparisons), 3)
    n_rows = -(-len(comparisons) // n_columns)
    size = (6, 4.8) if len(comparisons) == 1 else (5 * n_columns, 4.4 * n_rows)
    with canvas.drawing(ax, *size, save) as figure:
        panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel() if ax is None else [ax]
        for axes, (name, rows) in zip(panels, comparisons, strict=False):
            for chosen, colour in ((~rows["called"], "0.75"), (rows["called"], "tab:red")):
                xy = rows.loc[chosen, ["lfc_mean", "bayes_factor"]].to_numpy()
                axes.scatter(*xy.T, s=6, c=colour, linewidths=0, rasterized=True)
            for sign in (-1, 1):
                axes.axvline(sign * rows["delta"].iloc[0], color="0.4", linewidth=0.8, linestyle=":")
            title = canvas.plain(f"{name}: {rows['called'].sum()} called")
            axes.set(title=title, xlabel="log2 fold change", ylabel="Bayes factor (log)")
            # The surest genes share one height, the largest that so many draws can show. Their names need room above.
            bottom, top = axes.get_ylim()
            if n_labels:
                axes.margins(x=0.1)
                axes.set_ylim(bottom, top + 0.3 * (top - bottom))
        for axes in panels[len(comparisons) :]:
            axes.remove()
        for axes, (_, rows) in zip(panels, comparisons, strict=False):
            drawn = rows[np.isfinite(rows[["lfc_mean", "bayes_factor"]]).all(axis=1)]
            ascending = drawn[drawn["called"]].sort_values("lfc_mean")
            falls, rises = (ascending[ascending["lfc_mean"] * sign > 0] for sign in (-1, 1))
            named = pd.concat([falls.head(n_labels), rises.tail(n_labels)])
            named = named.iloc[np.argsort(-named["lfc_mean"].abs().to_numpy(), kind="stable")]
            every, some = (of[["lfc_mean", "bayes_factor"]].to_numpy() for of in (drawn, named))
            label_points(axes, [symbols.get(gene, gene) for gene in named.index], some, every)
    return panels[0] if len(comparisons) == 1 else figure


def posterior_predictive(check, *, save: str | Path | None = None) -> Figure:
    """Draw observed counts against replicates of them: zeros, variances and libraries, a panel each.

    Parameters
    ----------
    check
        What `scgen.posterior_predictive_check` returns.
    save
        File to write, such as "check.png"; None shows the picture instead.

    Returns
    -------
    The Figure.

    Raises
    ------
    TypeError
        If ``check`` is something else.
    ValueError
        If a column of ``check`` has no finite values, or ``save`` cannot be written.

    Examples
    --------
    >>> import scgen
    >>> from scgen import plots
    >>> adata = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
    >>> scgen.setup_anndata(adata, batch_key="batch")
    >>> model = scgen.SCVI(adata)
    >>> model.train(max_epochs=4, progress=False)
    >>> figure = plots.posterior_predictive(scgen.posterior_predictive_check(model))
    >>> [axes.get_title() for axes in figure.axes]
    ['Share of zeros of each gene', 'Mean and variance of each gene', 'Library of each cell']
    """
    canvas.check_data_first("posterior_predictive", "check", check)
    save = canvas.check_save(save)
    kinds = {"observed": "0.45", "replicated": "tab:orange"}
    for part, names in (("genes", ("zero_share", "mean", "variance")), ("cells", ("library",))):
        table, drawn = getattr(check, part, None), [f"{name}_{kind}" for name in names for kind in kinds]
        if not isinstance(table, pd.DataFrame) or not {*drawn, f"{names[0]}_within"} <= set(table):
            raise TypeError(f"check={shown(check)}; it takes what scgen.posterior_predictive_check(model) returns.")
        if not np.isfinite(canvas.numbers(f"check.{part}", table[drawn])).any().all():
            raise ValueError(f"check.{part} has no finite values in one of the columns {', '.join(drawn)}.")
    with canvas.drawing(None, 13, 4.3, save) as figure:
        zeros, variances, libraries = figure.subplots(1, 3)
        _against_observed(zeros, check.genes, "zero_share")
        _against_observed(libraries, check.cells, "library")
        zeros.set(title="Share of zeros of each gene", aspect="equal")
        # Logarithmic axes need a value above zero.
        scale = "log" if (check.cells[[f"library_{kind}" for kind in kinds]] > 0).any().all() else "linear"
        libraries.set(title="Library of each cell", xscale=scale, yscale=scale, aspect="equal")
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
    return figure


def _check_maps(maps: Mapping, colours: Mapping[str, pd.Series]) -> dict[str, np.ndarray]:
    """Return the maps of `scatters` as arrays; raise an error unless maps and categories are of the same cells."""
    for name, value in (("maps", maps), ("colours", colours)):
        if not isinstance(value, Mapping) or not len(value):
            raise TypeError(f"{name}={shown(value)}; it takes a mapping of one title or more to what is drawn.")
    maps = {name: canvas.positions(f"maps[{name!r}]", xy) for name, xy in maps.items()}
    n_cells = {name: len(xy) for name, xy in maps.items()}
    if len(set(n_cells.values())) > 1:
        raise ValueError(f"maps have different numbers of cells, {shown(n_cells)}; all must show the same cells.")
    for name, values in colours.items():
        if not isinstance(values, pd.Series) or len(values) not in n_cells.values():
            raise ValueError(
                f"colours[{name!r}]={shown(values)}; it takes a Series of as many values as maps have rows."
            )
        if values.dtype == object and not values.map(pd.api.types.is_hashable).all():
            raise TypeError(f"colours[{name!r}]={shown(values)}; it takes a Series of categories, not of lists.")
    return maps


def _mark_trainings(ax: Axes, table: pd.DataFrame, trainings: Sequence[Mapping]) -> None:
    """Mark the epoch whose weights are kept, and where later trainings began; models of older versions lack these."""
    own = []  # trainings of the same history: the trainings of a reference are not those of a model that maps onto it
    for one in reversed(trainings):
        if "first_epoch" not in one:
            break
        own.insert(0, one)
        if one["first_epoch"] == 1:
            break
    for i, one in enumerate(own[1:]):
        label = "train was called again" if i == 0 else None
        ax.axvline(one["first_epoch"] - 0.5, color="0.4", linewidth=0.8, linestyle=":", label=label)
    kept = own[-1].get("kept_epoch") if own else None
    if kept is not None and kept in table.index:
        column = "elbo_validation" if "elbo_validation" in table else "elbo_train"
        how = {"markersize": 9, "markerfacecolor": "none", "color": "black", "linestyle": "none"}
        ax.plot([kept], [table.loc[kept, column]], "o", label=f"weights kept: epoch {kept}", **how)


def _symbols(gene_symbols: Mapping[str, str] | pd.Series | None, genes: pd.Index) -> dict[str, str]:
    """Return the symbols that are there, by genes' names."""
    if gene_symbols is None:
        return {}
    if not isinstance(gene_symbols, Mapping | pd.Series):
        raise TypeError(
            f"gene_symbols={shown(gene_symbols)}; it takes a mapping or Series from the table's gene names to symbols: "
            'gene_symbols=adata.var["symbol"].'
        )
    symbols = {gene: str(symbol) for gene, symbol in gene_symbols.items() if isinstance(symbol, str) and symbol}
    if not symbols.keys() & set(genes):
        raise ValueError(
            f"gene_symbols has none of the table's genes, such as {shown(genes[0])}; its own are, for example, "
            f"{shown(next(iter(symbols), None))}."
        )
    return symbols


def _against_observed(axes, table: pd.DataFrame, name: str) -> None:
    """Draw replicated values against observed ones; those outside of the replicates' interval are red."""
    observed, replicated = table[f"{name}_observed"], table[f"{name}_replicated"]
    within = table[f"{name}_within"].astype(bool)
    for chosen, colour, where in ((within, "0.45", "within"), (~within, "tab:red", "outside")):
        label = f"{where} the replicates' interval: {chosen.mean():.0%}"
        axes.scatter(observed[chosen], replicated[chosen], s=3, c=colour, linewidths=0, rasterized=True)
        axes.scatter([], [], s=12, c=colour, linewidths=0, label=label)
    ends = min(observed.min(), replicated.min()), max(observed.max(), replicated.max())
    axes.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="observed", ylabel="replicated")
    axes.legend(frameon=False, loc="upper left", fontsize=8)
