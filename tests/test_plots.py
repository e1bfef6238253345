"""Pictures show what they say, whatever the data are; measured by matplotlib's own objects."""

import itertools
import stat
import warnings
from pathlib import Path
from types import SimpleNamespace

import anndata
import matplotlib
import matplotlib.colors
import matplotlib.image
import matplotlib.quiver
import nbformat
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from nbclient import NotebookClient

import scgen
from scgen import plots
from scgen.reporting import canvas
from scgen.reporting import report as reporting


@pytest.fixture(autouse=True)
def no_figure_is_left():
    pyplot.close("all")
    yield
    pyplot.close("all")


def de_table(n_comparisons: int = 1, n_genes: int = 40) -> pd.DataFrame:
    """Return a table of `differential_expression`, of which the surest genes share one Bayes factor."""
    lfc = np.linspace(-3, 3, n_genes)
    columns = {"lfc_mean": lfc, "bayes_factor": np.minimum(5 * abs(lfc) - 5, 6.9), "delta": 0.25}
    table = pd.DataFrame(columns | {"is_de_fdr_0.1": abs(lfc) > 1}, index=[f"gene_{i}" for i in range(n_genes)])
    return pd.concat([table.assign(comparison=f"{i} vs rest") for i in range(n_comparisons)])


def history_of(n_epochs: int, validation: bool = True) -> pd.DataFrame:
    table = pd.DataFrame({"elbo_train": np.linspace(-900, -800, n_epochs)}, index=range(1, n_epochs + 1))
    return table.assign(elbo_validation=table["elbo_train"] - 5) if validation else table


def score_table() -> pd.DataFrame:
    values = {"uncorrected PCA": [0.6, 0.1, np.nan], "scgen": [0.7, 0.5, 0.9]}
    return pd.DataFrame(values, index=["KMeans NMI", "iLISI", "my own"])


def some_check() -> SimpleNamespace:
    def table(*names):
        return pd.DataFrame({f"{name}_{kind}": [1.0, 2.0] for name in names for kind in ("observed", "replicated")})

    genes, cells = table("mean", "variance", "zero_share"), table("library")
    return SimpleNamespace(genes=genes.assign(zero_share_within=True), cells=cells.assign(library_within=True))


def some_tissue() -> anndata.AnnData:
    """Return 200 cells in two sections, with one gene."""
    obs = {
        "kind": pd.Categorical(["a", "b"] * 100),
        "value": np.linspace(-1, 3, 200),
        "slide": ["s1"] * 80 + ["s2"] * 120,
    }
    obs = pd.DataFrame(obs, index=[f"cell_{i}" for i in range(200)])
    cells = anndata.AnnData(np.arange(200.0)[:, None], obs=obs, var=pd.DataFrame(index=["gene_1"]))
    cells.obsm["spatial"] = XY * [3.0, 1.0]
    return cells


XY = np.random.default_rng(0).normal(size=(200, 2))
KINDS = pd.Series(["a", "b"] * 100)
#: By name, the data of each picture of one panel, and of each of several.
ONE = {
    "scatters": ({"map": XY}, {"kind": KINDS}),
    "history": (history_of(9),),
    "scores": (score_table(),),
    "volcano": (de_table(),),
    "tissue": (some_tissue(), "kind"),
}
SEVERAL = {
    "scatters": ({"map": XY, "other": XY}, {"kind": KINDS}),
    "volcano": (de_table(2),),
    "tissue": (some_tissue(), ["kind", "value"]),
    "posterior_predictive": (some_check(),),
}
CALLS = [(name, data, Axes) for name, data in ONE.items()] + [(name, data, Figure) for name, data in SEVERAL.items()]


@pytest.mark.parametrize(("name", "data", "kind"), CALLS)
def test_what_is_returned_shown_and_written(tmp_path, name, data, kind):
    function, parameters = getattr(plots, name), dict(matplotlib.rcParams)
    returned = function(*data)
    assert isinstance(returned, kind)
    figure = returned if kind is Figure else returned.figure
    assert figure.number in pyplot.get_fignums()  # pyplot shows it
    pyplot.close("all")
    path = tmp_path / "picture.png"
    path.write_text("an earlier picture")
    written = function(*data, save=path)
    assert isinstance(written, kind)
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == parameters
    picture = matplotlib.image.imread(path)
    assert picture.std() > 0.01
    size = (written if kind is Figure else written.figure).get_size_inches()
    assert picture.shape[1::-1] == tuple((size * canvas.DPI).astype(int))
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "new").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "new").stat().st_mode)


@pytest.mark.parametrize("ending", ["pdf", "svg", "PNG"])
def test_the_ending_says_the_format(tmp_path, ending):
    path = tmp_path / f"picture.{ending}"
    plots.history(history_of(5), save=str(path))
    start = path.read_bytes()[:6]
    assert {"pdf": start[:4] == b"%PDF", "svg": start[:5] == b"<?xml", "PNG": start[1:4] == b"PNG"}[ending]


@pytest.mark.parametrize(("name", "data"), ONE.items())
def test_axes_of_ones_own(tmp_path, name, data):
    figure, (ax, other) = pyplot.subplots(1, 2)
    assert getattr(plots, name)(*data, ax=ax, save=tmp_path / "both.png") is ax
    assert pyplot.get_fignums() == [figure.number]
    assert ax.has_data()
    assert not other.has_data()
    height, width = matplotlib.image.imread(tmp_path / "both.png").shape[:2]
    assert (width, height) == tuple((figure.get_size_inches() * canvas.DPI).astype(int))


@pytest.mark.parametrize("name", ["scatters", "volcano", "tissue"])
def test_several_panels_take_no_axes(name):
    _, ax = pyplot.subplots()
    with pytest.raises(ValueError, match="ax= takes one panel, and there are 2 to draw"):
        getattr(plots, name)(*SEVERAL[name], ax=ax)
    assert not ax.has_data()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch, error):
    path = tmp_path / "picture.png"
    path.write_text("an earlier picture")

    def failing(self, file, **_):
        file.write_text("half")
        raise error

    monkeypatch.setattr(Figure, "savefig", failing)
    with pytest.raises(error):
        plots.history(history_of(5), save=path)
    assert path.read_text() == "an earlier picture"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", [*ONE, "posterior_predictive"])
def test_bad_calls_draw_nothing(tmp_path, name):
    function = getattr(plots, name)
    data = (ONE | SEVERAL)[name]
    with pytest.raises(TypeError, match=rf"The data come first: {name}\(\w+, save='old.png'\)"):
        function("old.png", *data[1:])
    for path, words in (
        ("picture.doc", "ends in .*png"),
        ("picture", "ends in"),
        (tmp_path / "nowhere" / "a.png", "no such folder"),
        (3, "takes a path"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"save=.*{words}"):
            function(*data, save=path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="that is a folder"):
        function(*data, save=tmp_path / "folder.png")
    if name in ONE:
        with pytest.raises(TypeError, match="it takes Axes of matplotlib"):
            function(*data, ax=pyplot.subplots(1, 2)[1])
        pyplot.close("all")
    assert pyplot.get_fignums() == []
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def gaps(table: pd.DataFrame, column: str, value) -> pd.DataFrame:
    """Return the table with this value in the last rows of a column."""
    changed = table.astype({column: object}) if isinstance(value, str) else table.copy()
    changed.iloc[-3:, changed.columns.get_loc(column)] = value
    return changed


def with_column(values) -> anndata.AnnData:
    cells = some_tissue()
    cells.obs["new"] = values
    return cells


def with_one_gene_twice() -> anndata.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's, of names that are not unique
        return some_tissue()[:, [0, 0]].copy()


DE, CHECK = de_table(), some_check()
#: Data that cannot be drawn, with what the error must say.
BAD_DATA = [
    ("scatters", ({"U": [[1, 2], [3]] * 100}, {"kind": KINDS}), r"maps\['U'\]=.*numbers of shape \(n, 2\)"),
    ("scatters", ({"U": pd.DataFrame(XY).astype(str)}, {"kind": KINDS}), r"maps\['U'\]\[0\] has dtype"),
    ("scatters", ({"U": XY * np.nan}, {"kind": KINDS}), r"maps\['U'\] has no cells with finite positions"),
    ("scatters", ({"U": XY, "V": XY[:9]}, {"kind": KINDS}), "different numbers of cells, {'U': 200, 'V': 9}"),
    ("scatters", ({"U": XY}, {"kind": pd.Series([["a"]] * 200)}), r"colours\['kind'\]=.*categories, not of lists"),
    ("history", (history_of(12) * np.nan,), "no finite ELBO"),
    ("history", (history_of(12) * np.inf,), "no finite ELBO"),
    ("history", (history_of(12).astype(str),), r"history\['elbo_train'\] has dtype .*; it takes numbers"),
    ("scores", (score_table().astype(str),), r"table\['uncorrected PCA'\] has dtype .*; it takes numbers"),
    ("scores", (score_table().astype(complex),), "has dtype complex128; it takes numbers"),
    ("volcano", (DE.astype({"lfc_mean": str}),), r"table\['lfc_mean'\] has dtype .*; it takes numbers"),
    ("volcano", (DE.assign(lfc_mean=np.nan),), "no gene with finite lfc_mean"),
    ("volcano", (DE.assign(delta=np.inf),), "no gene with finite lfc_mean"),
    ("volcano", (gaps(DE, "is_de_fdr_0.1", "yes"),), r"table\['is_de_fdr_0.1'\] must be True or False in every row"),
    ("volcano", (gaps(DE, "comparison", None),), r"table\['comparison'\] has missing values"),
    ("tissue", (some_tissue()[:0], "kind"), "adata has no cells to draw"),
    ("tissue", (some_tissue(), []), r"color=\[\]; it takes a column or a gene"),
    ("tissue", (some_tissue(), "kinds"), 'color=.kinds. is neither a column .*has: kind, value, .*Did you mean "kind"'),
    ("tissue", (some_tissue(), ["kind", "gene_2"]), 'color=.gene_2. is neither .*Did you mean "gene_1"'),
    ("tissue", (with_column(np.nan), "new"), "color='new' has no finite values"),
    ("tissue", (with_column([["a"]] * 200), "new"), "color='new': the column holds a list"),
    ("tissue", (with_one_gene_twice(), "gene_1"), "2 genes have this name"),
    ("posterior_predictive", (SimpleNamespace(genes=CHECK.cells, cells=CHECK.cells),), "check=.*it takes what"),
    ("posterior_predictive", (SimpleNamespace(genes=CHECK.genes.astype(str), cells=CHECK.cells),), "it takes numbers"),
    ("posterior_predictive", (SimpleNamespace(genes=CHECK.genes, cells=CHECK.cells[:0]),), "no finite values in one"),
]


@pytest.mark.parametrize(("name", "data", "words"), BAD_DATA)
def test_data_that_cannot_be_drawn_are_refused_first(monkeypatch, name, data, words):
    monkeypatch.setattr(canvas, "drawing", None)  # nothing is drawn before the data are checked
    with pytest.raises((TypeError, ValueError), match=words):
        getattr(plots, name)(*data)
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("name", "data", "kind"), CALLS)
def test_no_figure_stays_where_drawing_fails(monkeypatch, name, data, kind, error):
    function, (own, ax) = getattr(plots, name), pyplot.subplots()

    def failing(self, *_, **__):
        raise error

    for method in ("scatter", "plot", "barh"):
        monkeypatch.setattr(Axes, method, failing)
    with pytest.raises(error):
        function(*data)
    assert pyplot.get_fignums() == [own.number]
    if kind is Axes:  # the user's own figure stays
        with pytest.raises(error):
            function(*data, ax=ax)
        assert pyplot.get_fignums() == [own.number]


@pytest.mark.parametrize("name", ONE)
def test_axes_that_are_not_flat_are_refused(name):
    for projection in ("3d", "polar"):
        ax = Figure().add_subplot(projection=projection)
        with pytest.raises(ValueError, match=f"ax=.*projection '{projection}'; it takes plain Axes"):
            getattr(plots, name)(*ONE[name], ax=ax)
        assert not ax.has_data()
    ax = Figure().subplots()
    ax.remove()
    with pytest.raises(ValueError, match=r"ax=.*removed from its figure"):
        getattr(plots, name)(*ONE[name], ax=ax)


def test_a_notebook_shows_each_picture_once(tmp_path):
    several = "pd.concat([table.assign(comparison=name) for name in 'ab'])"
    cells = {
        f"import pandas as pd\nfrom scgen import plots\ntable = pd.read_pickle({str(tmp_path / 'table.pkl')!r})": 0,
        "plots.volcano(table)": 1,
        "figure = plots.volcano(table)": 1,
        f"plots.volcano({several})": 1,
        f"figure = plots.volcano({several})": 1,
        "figure": 1,
        f"plots.volcano({several})\nimport matplotlib.pyplot as plt\nplt.show()": 1,
        "plots.volcano(table)\nplots.volcano(table)": 2,
        f"plots.volcano(table, save={str(tmp_path / 'volcano.png')!r})": 0,
        "from matplotlib.axes import Axes\nAxes.axvline = None  # drawing fails half-way": 0,
        "try:\n    plots.volcano(table)\nexcept TypeError:\n    print('failed')": 0,
    }
    de_table().to_pickle(tmp_path / "table.pkl")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    NotebookClient(notebook, timeout=100).execute()
    for cell, expected in zip(notebook.cells, cells.values(), strict=True):
        shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(shown) == expected, cell.source
    assert (tmp_path / "volcano.png").exists()
    assert "failed" in notebook.cells[-1].outputs[0]["text"]


# Maps


def colours_of(axes) -> dict[tuple, tuple]:
    """Return the colour of each dot, by its position."""
    xy, colours = points(axes)
    return dict(zip(map(tuple, xy.tolist()), map(tuple, colours.tolist()), strict=True))


def legend_of(axes) -> dict[str, tuple]:
    """Return the colours in the legend, by their labels."""
    legend = axes.get_legend()
    texts = [text.get_text() for text in legend.get_texts()]
    return {
        text: matplotlib.colors.to_rgb(handle.get_color())
        for text, handle in zip(texts, legend.legend_handles, strict=True)
    }


@pytest.mark.parametrize("form", [pd.DataFrame, np.ndarray.tolist, lambda xy: pd.DataFrame(xy, dtype="Float64")])
def test_positions_of_any_form(form):
    xy = XY.copy()
    xy[3] = np.nan, np.inf
    for axes in (plots.scatters({"map": form(xy)}, {"kind": KINDS}), plots.scatters({"map": xy}, {"kind": KINDS})):
        axes.figure.draw_without_rendering()
        shown = points(axes)[0]
        np.testing.assert_array_equal(in_order(shown[np.isfinite(shown).all(1)]), in_order(np.delete(XY, 3, 0)))


def test_cells_are_split_by_categories_that_are_there():
    with pytest.raises(ValueError, match="split_by='none'; no cell has a category there"):
        plots.scatters({"map": XY, "other": XY}, {"none": pd.Series([None] * 200)}, split_by="none")
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("n_categories", [1, 2, 6, 14, 25, 30, 110])
def test_categories_are_counted_and_told_apart(tmp_path, n_categories):
    xy = np.random.default_rng(0).normal(size=(400, 2))
    labels = pd.Series(np.resize([f"c{i}" for i in range(n_categories)], 400), dtype="category")
    labels[:7] = np.nan
    labels = labels.cat.add_categories("empty")
    axes = plots.scatters({"map": xy}, {"kind": labels}, max_categories=200, save=tmp_path / "map.png")
    legend = legend_of(axes)
    grey = matplotlib.colors.to_rgb(canvas.LIGHT_GREY)
    counts = labels.value_counts()
    expected = {f"{name} ({counts[name]})" for name in counts.index if counts[name]} | {"NaN (7)"}
    assert legend.keys() == expected
    assert legend["NaN (7)"] == grey
    assert len(set(legend.values())) == n_categories + 1
    shown = colours_of(axes)
    for position, label in zip(map(tuple, xy.tolist()), labels, strict=True):
        wanted = grey if label != label else legend[f"{label} ({counts[label]})"]
        assert np.allclose(shown[position], wanted)


def test_large_numbers_long_names_and_odd_names(tmp_path):
    names = ["$x$ and $y$", "_hidden", "CD4-positive, alpha-beta memory T cell of blood, type 1"]
    names += [names[-1][:-1] + "2"]
    labels = pd.Series(np.repeat(names, [1204, 100, 100, 100]))
    xy = np.random.default_rng(0).normal(size=(len(labels), 2))
    axes = plots.scatters({"map": xy}, {"kind": labels}, save=tmp_path / "map.png")
    texts = axes.get_legend().get_texts()
    shown = [text.get_text() for text in texts]
    assert len(set(shown)) == 4
    assert any("(1,204)" in text for text in shown)
    assert all(len(text) < 50 for text in shown)
    axes.figure.draw_without_rendering()
    right = axes.figure.bbox.width
    assert all(text.get_window_extent().x1 <= right for text in texts)
    # The legend has its own room: the panel does not become narrow.
    assert axes.get_window_extent().width / axes.figure.dpi > 4


def test_cells_without_any_category():
    axes = plots.scatters({"map": XY}, {"kind": pd.Series([None] * 200, dtype="category")})
    assert legend_of(axes) == {"NaN (200)": matplotlib.colors.to_rgb(canvas.LIGHT_GREY)}
    assert len(points(axes)[0]) == 200
    with pytest.raises(ValueError, match="no cells"):
        plots.scatters({"map": XY[:0]}, {"kind": KINDS[:0]})


def test_axes_of_a_subfigure(tmp_path):
    figure = Figure()
    ax = figure.subfigures(1, 2)[0].subplots()
    plots.volcano(de_table(), ax=ax, save=tmp_path / "volcano.png")
    assert len(ax.texts) == 16
    assert matplotlib.image.imread(tmp_path / "volcano.png").shape[1] == int(figure.get_figwidth() * canvas.DPI)


def test_many_categories_have_no_legend(tmp_path):
    labels = pd.Series(np.arange(200) % 50)
    axes = plots.scatters({"map": XY}, {"kind": labels}, save=tmp_path / "map.png")
    assert axes.get_legend() is None


def test_columns_on_the_last_map_and_categories_apart(tmp_path):
    batch = pd.Series(np.resize(["x", "y", "z"], 200))
    maps = {"before": XY, "after": np.where(np.arange(200)[:, None] == 3, np.nan, -XY)}
    figure = plots.scatters(
        maps, {"batch": batch, "cluster": KINDS}, last_map_only=["cluster"], split_by="batch", save=tmp_path / "a.png"
    )
    panels = {axes.get_title(): axes for axes in figure.axes}
    rows = ["before, by batch", "after, by batch", "after, by cluster"]
    assert list(panels) == [*rows, "x (67)", "y (67)", "z (66)"]
    np.testing.assert_allclose(in_order(points(panels["before, by batch"])[0]), in_order(XY))
    grey, legend = matplotlib.colors.to_rgb(canvas.LIGHT_GREY), legend_of(panels["after, by batch"])
    for name in "xyz":
        title = next(title for title in panels if title.startswith(f"{name} ("))
        others, front = panels[title].collections
        there = (batch == name).to_numpy() & (np.arange(200) != 3)
        for dots, shown in ((front, there), (others, ~there & (np.arange(200) != 3))):
            xy = dots.get_offsets().data
            np.testing.assert_allclose(in_order(xy[np.isfinite(xy).all(1)]), in_order(-XY[shown]))
        assert front.zorder >= others.zorder
        assert np.allclose(front.get_facecolors()[:, :3], legend[title])
        assert np.allclose(others.get_facecolors()[:, :3], grey)


@pytest.mark.parametrize("n_batches", [2, 6, 14])
@pytest.mark.parametrize("labels", [["kind"], []])
@pytest.mark.parametrize("n_clusters", [3, 40])
def test_no_cell_of_the_layout_stays_empty(tmp_path, n_batches, labels, n_clusters):
    batch = pd.Series([f"number {i % n_batches}" for i in range(200)])
    cluster = pd.Series(np.arange(200) % n_clusters)
    colours = {"batch": batch, **dict.fromkeys(labels, KINDS), "cluster": cluster}
    options = {"last_map_only": ["cluster"], "split_by": "batch", "save": tmp_path / "a.png"}
    figure = plots.scatters({"before": XY, "after": -XY}, colours, **options)
    boxes = {axes.get_title(): axes.get_window_extent() for axes in figure.axes}
    rows = [[box for title, box in boxes.items() if f"by {key}" in title] for key in colours]
    for row in rows:  # in the middle of the same columns
        assert np.mean([box.x0 + box.x1 for box in row]) == pytest.approx(rows[0][0].x0 + rows[0][1].x1, abs=10)
        assert [box.width for box in row] == pytest.approx([rows[0][0].width] * len(row), rel=0.02)
    parts = [box for title, box in boxes.items() if title.startswith("number")]
    n_by_row = np.unique([round(box.y0) for box in parts], return_counts=True)[1]
    assert n_by_row[::-1].tolist() == {2: [2], 6: [6], 14: [5, 5, 4]}[n_batches]
    assert [box.width for box in parts] == pytest.approx([parts[0].width] * n_batches, rel=0.02)
    drawn = [axes.get_tightbbox() for axes in figure.axes]  # with titles and legends
    assert not any(a.overlaps(b) for a, b in itertools.combinations(drawn, 2))
    assert max(box.x1 for box in drawn) <= figure.bbox.x1


# Numbers and lengths of names; W is a wide letter.
@pytest.mark.parametrize("wide", [(25, "a" * 36), (25, "a" * 16), (20, "a" * 22), (40, "W" * 36), (12, "W" * 22)])
@pytest.mark.parametrize("n_maps", [2, 3])
def test_a_wide_legend_stands_beside_the_last_map(tmp_path, wide, n_maps):
    n_clusters, name = wide
    colours = {"batch": KINDS, "cluster": pd.Series([f"{i % n_clusters}{name}" for i in range(200)])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, that the layout does not fit
        maps = {f"map {i}": XY for i in range(n_maps)}
        figure = plots.scatters(maps, colours, last_map_only=["cluster"], save=tmp_path / "a.png")
    last, alone = (axes.get_window_extent() for axes in figure.axes[-2:])
    assert (alone.x0, alone.x1) == pytest.approx((last.x0, last.x1))
    assert_nothing_is_cut(tmp_path / "a.png", figure)


@pytest.mark.parametrize("n_columns", [1, 2])
def test_columns_that_are_all_on_the_last_map_only(tmp_path, n_columns):
    colours = dict.fromkeys(["cluster", "batch"][:n_columns], KINDS)
    options = {"last_map_only": list(colours), "save": tmp_path / "a.png"}
    picture = plots.scatters({"before": XY, "after": -XY}, colours, **options)
    assert isinstance(picture, Axes) == (n_columns == 1)
    for axes in picture.figure.axes:
        assert 0.8 < axes.get_window_extent().width / axes.get_window_extent().height < 1.25
    assert_nothing_is_cut(tmp_path / "a.png", picture.figure)


def test_one_column_on_the_last_map_only_is_drawn_on_given_axes():
    ax = Figure().subplots()
    assert plots.scatters({"before": XY, "after": -XY}, {"kind": KINDS}, last_map_only=["kind"], ax=ax) is ax
    np.testing.assert_allclose(in_order(points(ax)[0]), in_order(-XY))


def assert_nothing_is_cut(path: Path, figure: Figure) -> None:
    """Check that legends lie within a figure, and that the left and right edges of its file are white."""
    image = matplotlib.image.imread(path)
    assert (image[:, [0, -1]] == 1).all()
    figure.dpi = canvas.DPI  # with which the file was laid out
    legends = [axes.get_legend().get_window_extent() for axes in figure.axes if axes.get_legend()]
    assert legends
    for legend in legends:
        assert legend.x1 <= figure.bbox.x1 + 1
        assert not any(legend.overlaps(other.get_window_extent()) for other in figure.axes)


@pytest.mark.parametrize("n_batches", [1, 2, 7])
def test_the_report_shows_few_batches_apart(tmp_path, monkeypatch, trained, n_batches):
    adata = trained.adata.copy()
    adata.obsm["X_scgen"] = trained.get_latent_representation()
    adata.obsm["X_umap_scgen"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    adata.obs["batch"] = pd.Categorical(np.resize([f"batch_{i}" for i in range(n_batches)], adata.n_obs))
    adata.obs["leiden_scgen"] = pd.Categorical(np.resize(["0", "1"], adata.n_obs))
    figures, write = [], canvas.write
    monkeypatch.setattr(canvas, "write", lambda figure, path: figures.append(figure) or write(figure, path))
    paths = reporting.draw(trained, adata, adata.obsm["X_scgen"], tmp_path, ["batch", "cell_type", "leiden_scgen"])
    assert sorted(path.name for path in paths) == sorted(path.name for path in tmp_path.iterdir())
    titles = [axes.get_title() for axes in figures[0].axes]
    maps = ("uncorrected (PCA)", "scgen")
    expected = [f"{one}, by {key}" for key in ("batch", "cell_type") for one in maps] + ["scgen, by leiden_scgen"]
    sizes = adata.obs["batch"].value_counts()
    expected += [f"{name} ({size})" for name, size in sizes.sort_index().items()] if n_batches == 2 else []
    assert titles == expected


# Tissue


def panels_of(figure: Figure) -> dict[str, Axes]:
    """Return the Axes that have a title, without those of scales of colours."""
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def test_each_section_has_a_panel_with_equal_units():
    cells = some_tissue()
    panels = panels_of(plots.tissue(cells, ["kind", "value", "gene_1"], section_key="slide"))
    titles = [f"{section}, by {key}" for key in ("kind", "value", "gene_1") for section in ("s1", "s2")]
    assert list(panels) == titles
    xy = cells.obsm["spatial"]
    for title, axes in panels.items():
        rows = (cells.obs["slide"] == title[:2]).to_numpy()
        np.testing.assert_array_equal(in_order(points(axes)[0]), in_order(xy[rows]))
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("spatial1", "spatial2")
        axes.figure.draw_without_rendering()
        (x0, y0), (x1, y1) = axes.transData.transform([[0, 0], [1, 1]])
        assert x1 - x0 == pytest.approx(y1 - y0)
    assert legend_of(panels["s2, by kind"]).keys() == {"a (100)", "b (100)"}


@pytest.mark.parametrize(("key", "layer"), [("value", None), ("gene_1", None), ("gene_1", "reversed")])
def test_numbers_have_one_scale_for_all_sections(key, layer):
    cells = some_tissue()
    cells.layers["reversed"] = scipy.sparse.csr_matrix(3 * cells.X[::-1])
    cells.obs["value"] = cells.obs["value"].astype("Float64")
    cells.obs.iloc[[3, 100], 1] = pd.NA, np.inf
    genes = np.arange(200.0) if layer is None else 3 * np.arange(200.0)[::-1]
    values = cells.obs["value"].to_numpy(float, na_value=np.nan) if key == "value" else genes
    panels = panels_of(plots.tissue(cells, key, section_key="slide", layer=layer))
    finite = np.where(np.isfinite(values), values, np.nan)
    norm = matplotlib.colors.Normalize(np.nanmin(finite), np.nanmax(finite))
    expected = matplotlib.colormaps["viridis"](norm(finite))[:, :3]
    expected[np.isnan(finite)] = matplotlib.colors.to_rgb(canvas.LIGHT_GREY)
    for section, axes in zip(("s1", "s2"), panels.values(), strict=True):
        axes.figure.draw_without_rendering()
        rows = np.flatnonzero(cells.obs["slide"] == section)
        shown = colours_of(axes)
        for position, colour in zip(map(tuple, cells.obsm["spatial"][rows].tolist()), expected[rows], strict=True):
            np.testing.assert_allclose(shown[position], colour)
        front = axes.collections[-1].get_offsets().data
        order = [np.flatnonzero((cells.obsm["spatial"] == at).all(1))[0] for at in front]
        assert (np.diff(values[order]) >= 0).all()  # the highest are in front
    (scale,) = panels[f"s2, by {key}"].child_axes
    assert scale.get_ylim() == pytest.approx((norm.vmin, norm.vmax))


@pytest.mark.parametrize(
    "stored", [None, ["#ff0000", "gold"], ["#ff0000", "gold", "k"], ["#ff0000"], ["red", "none such"]]
)
@pytest.mark.parametrize("kind", [pd.Categorical(["a", "b"] * 100, ["a", "b"]), [True, False] * 100, ["x", "y"] * 100])
def test_categories_have_the_colours_of_scanpy(stored, kind):
    cells = some_tissue()
    cells.obs["kind"] = kind
    if stored:
        cells.uns["kind_colors"] = stored
    before = cells.copy()
    axes = plots.tissue(cells, "kind")
    assert cells.uns.keys() == before.uns.keys()
    assert cells.uns.get("kind_colors") is stored
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = scanpy.pl.embedding(before, "spatial", color="kind", show=False)
    ours, theirs = colours_of(axes), colours_of(theirs)
    assert ours.keys() == theirs.keys()
    for position, colour in ours.items():
        np.testing.assert_allclose(colour, theirs[position])


def test_a_category_that_no_cell_has_keeps_its_colour():
    cells = some_tissue()
    cells.obs["kind"] = pd.Categorical(["a", "c"] * 100, ["a", "b", "c"])
    for stored in (None, ["r", "g", "b"]):
        cells.uns = {"kind_colors": stored} if stored else {}
        legend = legend_of(plots.tissue(cells, "kind"))
        expected = stored or ["tab:blue", "tab:orange", "tab:green"]
        assert legend == {
            "a (100)": matplotlib.colors.to_rgb(expected[0]),
            "c (100)": matplotlib.colors.to_rgb(expected[2]),
        }


@pytest.mark.parametrize("y_down", [False, True])
def test_arrows_point_where_their_angles_do(y_down):
    cells = some_tissue()
    angles = np.random.default_rng(1).uniform(-np.pi, np.pi, 200)
    cells.obs["theta"] = np.where(np.arange(200) % 3, np.nan, angles)
    panels = panels_of(plots.tissue(cells, "kind", section_key="slide", rotation_key="theta", y_down=y_down))
    for section, axes in zip(("s1", "s2"), panels.values(), strict=True):
        (quiver,) = (one for one in axes.collections if isinstance(one, matplotlib.quiver.Quiver))
        rows = (cells.obs["slide"] == section).to_numpy() & np.isfinite(cells.obs["theta"]).to_numpy()
        # By position: where an arrow is, and where it points.
        expected = in_order(cells.obsm["spatial"][rows], np.cos(angles[rows]), np.sin(angles[rows]))
        length = np.hypot(quiver.U, quiver.V)
        np.testing.assert_allclose(in_order(quiver.XY, quiver.U / length, quiver.V / length), expected)
        distances = np.linalg.norm(quiver.XY[:, None] - quiver.XY, axis=2) + np.diag([np.inf] * rows.sum())
        np.testing.assert_allclose(length, 0.8 * np.median(distances.min(0)))
        assert quiver.angles == "xy"  # in the units of the axes, also where these point down
        assert axes.yaxis_inverted() == y_down


def test_sections_of_other_shapes_and_one_cell(tmp_path):
    cells = some_tissue()
    cells.obs["slide"] = pd.Categorical(["alone"] + ["$s$ 1"] * 9 + ["s2"] * 90 + ["s3"] * 50 + ["s4"] * 50)
    cells.obs["theta"] = np.where(np.arange(200) < 5, 0.3, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plots.tissue(
            cells, ["kind", "value"], section_key="slide", rotation_key="theta", save=tmp_path / "a.png"
        )
    assert len(panels_of(figure)) == 10
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert_nothing_is_cut(tmp_path / "a.png", figure)


@pytest.mark.parametrize("n_sections", [1, 2, 5])
@pytest.mark.parametrize("scale", [(1, 1), (5, 1), (1, 5)])
def test_legends_of_tissue_are_not_cut(tmp_path, n_sections, scale):
    cells = some_tissue()
    cells.obsm["spatial"] = np.random.default_rng(0).uniform(size=(200, 2)) * scale
    cells.obs["slide"] = np.resize([f"s{i}" for i in range(n_sections)], 200)
    cells.obs["name"] = np.resize([f"a rather long name {i}" for i in range(12)], 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, that the layout does not fit
        picture = plots.tissue(cells, ["value", "name"], section_key="slide", save=tmp_path / "a.png")
    assert_nothing_is_cut(tmp_path / "a.png", picture.figure)


@pytest.mark.parametrize("lengths", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_cells_in_a_line_and_a_single_cell_are_seen(tmp_path, lengths):
    cells = some_tissue()[: 30 if max(lengths) else 1].copy()
    cells.obsm["spatial"] = 1e4 + np.outer(np.arange(len(cells)), lengths)
    cells.obs["angle"] = np.where(np.arange(len(cells)) == 0, 0.0, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, that the layout does not fit
        axes = plots.tissue(cells, "value", rotation_key="angle", save=tmp_path / "a.png")
    box = axes.get_window_extent()
    assert min(box.width, box.height) > 0.3 * axes.figure.dpi
    assert all(box.contains(*place) for place in axes.transData.transform(cells.obsm["spatial"]))
    (arrow,) = [artist for artist in axes.collections if isinstance(artist, matplotlib.quiver.Quiver)]
    assert 0.01 < arrow.U[0] / max(np.diff(axes.get_xlim())[0], np.diff(axes.get_ylim())[0]) < 0.2


def test_labels_of_panels_do_not_overlap(tmp_path):
    cells = some_tissue()
    cells.obsm["spatial"] = XY
    picture = plots.tissue(cells, ["kind", "value"], save=tmp_path / "a.png")
    upper, lower = panels_of(picture).values()
    gap = (upper.get_position().y0 - lower.get_position().y1) * picture.get_figheight() * 72  # in points
    assert gap > upper.xaxis.label.get_size() + lower.title.get_size()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"section_key": "slides"}, 'section_key=.slides. is not a column .*Did you mean "slide"'),
        ({"spatial_key": "X_spatial"}, 'spatial_key=.X_spatial. is not in adata.obsm .*Did you mean "spatial"'),
        ({"layer": "counts"}, "layer='counts' is not in adata.layers .it has: none"),
        ({"rotation_key": "angle"}, "rotation_key='angle' is not a column of adata.obs"),
        ({"rotation_key": "kind"}, "rotation_key='kind': the column has dtype category; it takes numbers"),
    ],
)
def test_keys_of_tissue_that_are_not_there(given, words):
    with pytest.raises((TypeError, ValueError), match=words):
        plots.tissue(some_tissue(), "value", **given)
    assert pyplot.get_fignums() == []


# Trainings


@pytest.mark.parametrize("n_epochs", [1, 50])
@pytest.mark.parametrize("validation", [True, False])
def test_history(n_epochs, validation):
    table = history_of(n_epochs, validation)
    axes = plots.history(table)
    lines = axes.get_lines()
    assert len(lines) == 1 + validation  # of a table, nothing is marked
    for line, column in zip(lines, table, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), table.index)
        np.testing.assert_array_equal(line.get_ydata(), table[column])
    lower, upper = axes.get_ylim()
    assert lower < table.iloc[-1].min() <= table.iloc[-1].max() < upper


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [slice(5, 6), slice(2, None)])
def test_history_with_gaps(value, rows):
    table = history_of(12)
    table.iloc[rows] = value
    axes = plots.history(table)
    axes.figure.draw_without_rendering()
    finite = table.where(np.isfinite(table))
    for line, column in zip(axes.get_lines(), table, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), finite[column])
    lower, upper = axes.get_ylim()
    assert lower < finite.to_numpy()[1].min() < upper


def test_history_marks_the_kept_epoch_and_where_trainings_began(cells):
    model = scgen.SCVI(cells, n_latent=2, n_hidden=8)
    model.train(max_epochs=6, early_stopping=False, progress=False, accelerator="cpu")
    model.train(max_epochs=4, early_stopping=False, progress=False, accelerator="cpu", seed=1)
    axes = plots.history(model)
    *_, border, ring = axes.get_lines()
    assert border.get_xdata() == [6.5, 6.5]
    kept = model.history["elbo_validation"].iloc[8:].idxmax()
    np.testing.assert_array_equal(ring.get_xydata(), [[kept, model.history.loc[kept, "elbo_validation"]]])
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[2:] == ["train was called again", f"weights kept: epoch {kept}"]
    lower, upper = axes.get_ylim()
    assert lower < ring.get_ydata()[0] < upper
    # Models that were saved before this was known have no marks.
    del model.trainings[-1]["first_epoch"], model.trainings[-1]["kept_epoch"]
    assert len(plots.history(model).get_lines()) == 2


def test_history_names_the_unit_and_the_dropout_of_the_model(trained):
    first = plots.history(trained).get_lines()[0]
    assert (trained.arguments.dropout_rate > 0, first.get_label()) == (True, "training cells, with dropout")
    cells = scgen.simulate_tissue(n_sections=1, n_rows=3, counts=False)
    scgen.setup_anndata(cells, spatial_key="spatial", counts=False)
    model = scgen.SpatialVAE(cells, n_latent=2, n_hidden=4)
    model.train(max_epochs=2, progress=False, accelerator="cpu")
    axes = plots.history(model)
    assert axes.get_ylabel() == "ELBO (nats per niche)"
    assert axes.get_lines()[0].get_label() == "training cells"


def test_history_of_a_query_has_its_own_epochs_only(trained):
    new = trained.adata[:60].copy()
    new.obs["batch"] = "other"
    query = trained.query(new)
    with pytest.raises(ValueError, match="no epochs"):
        plots.history(query.model)
    query.train(max_epochs=2, progress=False, accelerator="cpu")
    axes = plots.history(query.model)
    assert axes.get_lines()[0].get_xdata().tolist() == [1, 2]
    kept = query.model.trainings[-1]["kept_epoch"]
    assert axes.get_lines()[-1].get_xdata() == [kept]


# Scores


def test_scores_are_bars_with_their_meaning():
    table = score_table()
    table.iloc[1, 0] = -0.2
    axes = plots.scores(table)
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers if hasattr(bars, "patches")]
    np.testing.assert_array_equal(np.transpose(widths), table.fillna(0))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(table)
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == [f"KMeans NMI\n{plots.MEANINGS['KMeans NMI']}", f"iLISI\n{plots.MEANINGS['iLISI']}", "my own"]
    assert "no value" in [text.get_text().strip() for text in axes.texts]
    assert "higher is better" in axes.get_title()
    assert axes.yaxis_inverted()  # in the order of the table, from above


def test_scores_that_are_missing_or_infinite_have_no_bar():
    table = pd.DataFrame({"a": [0.5, np.inf, -np.inf, np.nan], "b": [1.0, 0.25, 0.75, 0.1]}, index=list("wxyz"))
    with_gaps = table.astype({"b": "Float64"})
    with_gaps.iloc[3, 1] = pd.NA
    axes = plots.scores(with_gaps)
    axes.figure.draw_without_rendering()
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers if hasattr(bars, "patches")]
    assert widths == [[0.5, 0, 0, 0], [1, 0.25, 0.75, 0]]
    texts = [text.get_text().strip() for text in axes.texts]
    assert texts == ["0.50", "inf", "-inf", "no value", "1.00", "0.25", "0.75", "no value"]


@pytest.mark.parametrize("n_rows", [1, 13])
@pytest.mark.parametrize("n_columns", [1, 4])
def test_scores_of_any_size_fit(tmp_path, n_rows, n_columns):
    rng = np.random.default_rng(0)
    rows = list(plots.MEANINGS)[:n_rows]
    table = pd.DataFrame(rng.uniform(size=(n_rows, n_columns)), rows, [f"embedding {i}" for i in range(n_columns)])
    axes = plots.scores(table, save=tmp_path / "scores.png")
    figure = axes.figure
    figure.draw_without_rendering()
    extents = [text.get_window_extent() for text in (*axes.get_yticklabels(), *axes.get_legend().get_texts())]
    assert all(figure.bbox.containsx(one.x0) and figure.bbox.containsx(one.x1) for one in extents)
    assert all(figure.bbox.containsy(one.y0) and figure.bbox.containsy(one.y1) for one in extents)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(extents, 2))


def test_the_report_has_scores_as_numbers_and_as_a_picture(tmp_path, monkeypatch, trained):
    adata = trained.adata.copy()
    adata.obsm["X_scgen"] = trained.get_latent_representation()
    # scib-metrics is not installed everywhere.
    monkeypatch.setattr(reporting, "integration_scores", lambda *_: score_table())
    keys = {"batch_key": "batch", "labels_key": "cell_type"}
    table = reporting.scores(adata, adata.obsm["X_scgen"], tmp_path, **keys)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(reporting.SCORES)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "scores.csv", index_col=0), table)
    assert matplotlib.image.imread(tmp_path / "scores.png").std() > 0.01


# Genes


def test_volcano_shows_genes_where_they_are():
    table = de_table()
    axes = plots.volcano(table, n_labels=0)
    xy, colours = points(axes)
    np.testing.assert_allclose(in_order(xy), in_order(table["lfc_mean"], table["bayes_factor"]))
    red = (colours == matplotlib.colors.to_rgb("tab:red")).all(1)
    np.testing.assert_allclose(np.sort(xy[red, 0]), np.sort(table["lfc_mean"][table["is_de_fdr_0.1"]]))
    assert axes.get_title() == f"0 vs rest: {table['is_de_fdr_0.1'].sum()} called"
    assert len(axes.texts) == 0


@pytest.mark.parametrize("n_comparisons", [2, 4, 5])
def test_volcano_has_a_panel_for_each_comparison(n_comparisons):
    figure = plots.volcano(de_table(n_comparisons), n_labels=1)
    assert [axes.get_title().split(" vs")[0] for axes in figure.axes] == [str(i) for i in range(n_comparisons)]
    assert all(len(axes.texts) == 2 for axes in figure.axes)


def test_volcano_of_one_of_several_categories():
    table = de_table(3).astype({"comparison": "category"})
    axes = plots.volcano(table[table["comparison"] == "1 vs rest"])
    assert axes.get_title().startswith("1 vs rest: ")
    assert len(plots.volcano(table[table["comparison"] != "1 vs rest"]).axes) == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", ["lfc_mean", "bayes_factor"])
def test_genes_at_no_place_are_left_out(column, value):
    table = gaps(de_table(), column, value)
    axes = plots.volcano(table, n_labels=2)
    axes.figure.draw_without_rendering()
    xy = points(axes)[0]
    kept = table[np.isfinite(table[column])]
    np.testing.assert_array_equal(
        in_order(xy[np.isfinite(xy).all(1)]), in_order(kept["lfc_mean"], kept["bayes_factor"])
    )
    assert {text.get_text() for text in axes.texts} == {"gene_0", "gene_1", "gene_35", "gene_36"}


@pytest.mark.parametrize("n_genes", [40, 2000])
@pytest.mark.parametrize("dpi", [None, canvas.DPI])
def test_names_stand_near_their_dots_and_apart(n_genes, dpi):
    table = de_table(n_genes=n_genes)
    # As many genes share their place as in real tables.
    table["lfc_mean"] += np.random.default_rng(0).normal(size=n_genes) * 0.05
    axes = plots.volcano(table, n_labels=8)
    called = table[table["is_de_fdr_0.1"]].sort_values("lfc_mean")
    names = [text.get_text() for text in axes.texts]
    assert set(names) <= {*called.index[:8], *called.index[-8:]}
    assert len(names) == 16
    axes.figure.dpi = dpi or axes.figure.dpi
    axes.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent()
    for text, box in zip(axes.texts, boxes, strict=True):
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        assert text.xy == tuple(table.loc[text.get_text(), ["lfc_mean", "bayes_factor"]])
        dot = axes.transData.transform(text.xy)
        gap = np.maximum(np.maximum(box.min - dot, dot - box.max), 0)
        assert 0 < np.hypot(*gap) < 100 * axes.figure.dpi / 72
        # The line ends at the dot, up to the point that is left free around it.
        ends = text.arrow_patch.get_path().vertices
        ends = text.arrow_patch.get_transform().transform(ends)
        assert np.hypot(*(ends - dot).T).min() < 3 * axes.figure.dpi / 72


def test_names_that_find_no_place_are_left_out():
    _, ax = pyplot.subplots(figsize=(2, 2))
    table = de_table(n_genes=400)
    plots.volcano(table.rename(index=lambda name: f"a rather long name of {name}"), n_labels=50, ax=ax)
    ax.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert len(boxes) < 100
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_names_may_be_anything():
    table = de_table().rename(index={"gene_0": "$odd$", "gene_39": "_hidden"})
    axes = plots.volcano(table, n_labels=1)
    axes.figure.draw_without_rendering()
    assert {text.get_text() for text in axes.texts} == {"$odd$", "_hidden"}


@pytest.mark.parametrize("form", [dict, pd.Series])
def test_symbols_stand_for_names(form):
    symbols = form({"gene_0": "CD3E", "gene_1": None, "gene_38": "", "elsewhere": "CD4"})
    axes = plots.volcano(de_table(), n_labels=2, gene_symbols=symbols)
    assert sorted(text.get_text() for text in axes.texts) == ["CD3E", "gene_1", "gene_38", "gene_39"]
    with pytest.raises(TypeError, match=r'gene_symbols=adata.var\["symbol"\]'):
        plots.volcano(de_table(), gene_symbols="symbol")
    with pytest.raises(ValueError, match=r"none of the table's genes, such as 'gene_0'; its own are, .* 'ENSG1'"):
        plots.volcano(de_table(), gene_symbols={"ENSG1": "CD3E"})


@pytest.mark.parametrize("missing", ["is_de_fdr_0.1", "lfc_mean", "comparison"])
def test_volcano_asks_for_fold_changes(missing):
    with pytest.raises(ValueError, match=r"mode=.change"):
        plots.volcano(de_table().drop(columns=missing))
    with pytest.raises(ValueError, match="no genes"):
        plots.volcano(de_table()[:0])


# Checks


def points(axes) -> tuple[np.ndarray, np.ndarray]:
    """Return position and colour of all that was scattered, (n, 2) and (n, 3)."""
    xy = [collection.get_offsets().data for collection in axes.collections]
    colours = [
        np.broadcast_to(collection.get_facecolors(), (len(of), 4)) if len(of) else np.empty((0, 4))
        for collection, of in zip(axes.collections, xy, strict=True)
    ]
    return np.concatenate(xy), np.concatenate(colours)[:, :3]


def in_order(*columns) -> np.ndarray:
    rows = np.column_stack(columns)
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("covered", [True, False])
def test_posterior_predictive(tmp_path, covered):
    rng = np.random.default_rng(0)
    mean = np.append(rng.gamma(1, 2, 300), 0)  # the last gene is not expressed
    values = {"mean": mean, "variance": mean + mean**2, "zero_share": np.exp(-mean)}

    def table(name, of):
        return pd.DataFrame({f"{name}_observed": of, f"{name}_replicated": 1.3 * of, f"{name}_within": covered})

    library = rng.gamma(9, 200, 50)
    genes = pd.concat([table(name, of) for name, of in values.items()], axis=1)
    check = SimpleNamespace(genes=genes, cells=table("library", library))
    check.cells.loc[:9, "library_within"] = not covered
    figure = plots.posterior_predictive(check, save=tmp_path / "check.png")
    picture = matplotlib.image.imread(tmp_path / "check.png")
    assert picture.shape[1] > 2.5 * picture.shape[0]
    zeros, variances, libraries = figure.axes
    grey, red, orange = (np.array(matplotlib.colors.to_rgb(name)) for name in ("0.45", "tab:red", "tab:orange"))
    xy, colours = points(zeros)
    share = values["zero_share"]
    np.testing.assert_allclose(in_order(xy), in_order(share, 1.3 * share))
    assert (colours == (grey if covered else red)).all()
    xy, colours = points(libraries)
    np.testing.assert_allclose(in_order(xy), in_order(library, 1.3 * library))
    first = np.isin(xy[:, 0], library[:10])
    assert (colours[first] == (red if covered else grey)).all()
    assert (colours[~first] == (grey if covered else red)).all()
    xy, colours = points(variances)
    for colour, factor in ((grey, 1), (orange, 1.3)):
        of = (colours == colour).all(1)
        expected = in_order(factor * values["mean"][:300], factor * values["variance"][:300])
        np.testing.assert_allclose(in_order(xy[of]), expected)
    assert len(xy) == 600


def test_libraries_without_a_positive_one_are_drawn(tmp_path):
    check = some_check()
    check.cells["library_observed"] = 0.0
    figure = plots.posterior_predictive(check, save=tmp_path / "zero.png")
    np.testing.assert_array_equal(in_order(points(figure.axes[2])[0]), in_order([0, 0], [1, 2]))


def test_a_check_of_one_cell_is_drawn(tmp_path, trained):
    check = scgen.posterior_predictive_check(trained, indices=[0], n_samples=3)
    plots.posterior_predictive(check, save=tmp_path / "one.png")
    assert matplotlib.image.imread(tmp_path / "one.png").std() > 0.01
