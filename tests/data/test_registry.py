"""`setup_anndata` and `check`: what is refused, in which words, and that nothing but the record is ever written."""

import copy
import warnings
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, ImplicitModificationWarning
from scipy import sparse
from scipy.stats.contingency import association

import scgen
from scgen.data.advice import cramers_v
from scgen.data.counts import layers_of
from scgen.data.loader import CellLoader
from scgen.data.registry import Registry
from scgen.data.stores import totals

N, G = 60, 20


@pytest.fixture(scope="module")
def template():
    adata = scgen.simulate_cells(n_cells=N, n_genes=G, n_batches=2, seed=4)
    rng = np.random.default_rng(0)
    adata.obs["donor"] = pd.Categorical(rng.choice(["d1", "d2", "d3"], N))
    adata.obs["percent_mito"] = rng.uniform(0, 20, N)
    adata.obs["size_factor"] = rng.uniform(0.5, 2, N)
    adata.uns["kept"] = {"a": [1, 2], "b": np.arange(3)}
    return adata


@pytest.fixture
def good(template):
    return template.copy()


def in_memory(thing):
    return thing.to_memory(copy=True) if isinstance(thing, AnnData) else copy.deepcopy(thing)


# AnnData's own words about what is done here on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Variable names are not unique"),
    pytest.mark.filterwarnings("ignore:Writing zarr v2"),
]


def assert_same_values(one, other):
    if one is None or other is None:
        assert one is other
    else:
        assert type(one) is type(other)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(*(m.toarray() if sparse.issparse(m) else np.asarray(m) for m in (one, other)))


def assert_unchanged(now, before):
    """Assert that two AnnData, or whatever was given in its place, are equal in all their parts."""
    assert type(now) is type(before)
    if not isinstance(now, AnnData):
        np.testing.assert_array_equal(now, before)
        return
    now = in_memory(now)
    assert_same_values(now.X, before.X)
    pd.testing.assert_frame_equal(now.obs, before.obs)
    pd.testing.assert_frame_equal(now.var, before.var)
    for name in ("layers", "obsm", "varm", "obsp", "varp"):
        mine, theirs = getattr(now, name), getattr(before, name)
        assert list(mine) == list(theirs)
        for key in theirs:
            assert_same_values(mine[key], theirs[key])
    # Written out, since arrays within dictionaries have no equality.
    assert repr(dict(now.uns)) == repr(dict(before.uns))
    assert (now.raw is None) == (before.raw is None)
    if now.raw is not None:
        assert_same_values(now.raw.X, before.raw.X)


# Damages: each spoils a good AnnData in place and returns the arguments of setup_anndata, or another object as "adata".


def given_(**arguments):
    """Leave the cells as they are: the arguments are what is wrong."""
    return lambda adata: arguments


def counts_with(value, cell=7, dense=False):
    """Put a value where a cell has its first count."""

    def damage(adata):
        adata.X.data[adata.X.indptr[cell]] = value
        if dense:
            adata.X = adata.X.toarray()
        return {}

    return damage


def column_with(key, values, role, cells=(3, 9)):
    """Put values into some cells of a column, and give it a role."""

    def damage(adata):
        column = adata.obs[key].astype(object) if isinstance(values, str) else adata.obs[key]
        column = column.copy()
        column.iloc[list(cells)] = values
        adata.obs[key] = column
        return {role: [key] if role.endswith("keys") else key}

    return damage


def object_batch(adata):
    adata.obs["batch"] = adata.obs["batch"].astype(object)
    return column_with("batch", None, "batch_key")(adata)


def logged(adata):
    x = adata.X.toarray()
    adata.X = sparse.csr_matrix(np.log1p(x / x.sum(1, keepdims=True) * 1e4))
    return {}


def per_million(adata):
    x = adata.X.toarray()
    adata.X = x / x.sum(1, keepdims=True) * 1e6
    return {}


def logged_only(adata):
    adata.X = adata.X.log1p()
    adata.uns["log1p"] = {"base": None}
    return {}


def scaled(adata):
    x = adata.X.toarray()
    adata.X = (x - x.mean(0)) / (x.std(0) + 1)
    return {}


def logged_beside_counts(adata):
    adata.layers["raw_counts"] = adata.X.copy()
    return logged(adata)


def logged_layer(adata):
    adata.layers["norm"] = adata.X.log1p()
    return {"layer": "norm"}


def logged_with_raw(adata):
    adata.raw = adata.copy()
    return logged(adata)


def beside_a_layer_of_texts(adata):
    adata.layers["calls"] = np.full(adata.shape, "A", dtype=object)
    return logged(adata)


def empty_cells(adata):
    x = adata.X.toarray()
    x[[3, 9]] = 0
    adata.X = sparse.csr_matrix(x)
    return {}


def empty_cells_of_layer(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.layers["counts"].data[: adata.X.indptr[1]] = 0  # zeros that are stored
    return {"layer": "counts"}


def near_layer(adata):
    adata.layers["counts"] = adata.X.copy()
    return {"layer": "count"}


def no_x(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.X = None
    return {}


def no_x_at_all(adata):
    del adata.layers["true_scale"]
    adata.X = None
    return {}


def genes_twice(adata):
    adata.var_names = ["gene_1", "gene_1", *adata.var_names[2:]]
    return {}


def no_cells(adata):
    return {"adata": adata[:0].copy(), "batch_key": "batch", "labels_key": "cell_type"}


def mixed_types(adata):
    adata.obs["plate"] = pd.Series([1, "1", 2] * (N // 3), index=adata.obs_names, dtype=object)
    return {"batch_key": "plate"}


def column_twice(adata):
    adata.obs = pd.concat([adata.obs, adata.obs[["batch"]]], axis=1)
    return {"batch_key": "batch"}


def of_dtype(dtype):
    def damage(adata):
        adata.X = adata.X.toarray().astype(dtype)
        return {}

    return damage


def texts(adata):
    adata.X = adata.X.toarray().astype(int).astype(object)
    adata.X[0, 0] = "3"
    return {}


def negative_layer(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.layers["counts"].data[adata.X.indptr[5]] = -2
    return {"layer": "counts"}


def last_of_many(value):
    """Spoil the last of 20,000 cells, which no sample of them would see."""

    def damage(adata):
        x = np.random.default_rng(0).poisson(1, (20_000, 12)).astype(np.float32) + np.eye(12, dtype=np.float32)[0]
        x[-1, -1] = value
        return {"adata": AnnData(sparse.csr_matrix(x) if value < 0 else x)}

    return damage


def several(adata):
    counts_with(-1)(adata)
    adata.obs["size_factor"] = 0.0
    return {"batch_key": "bach", "size_factor_key": "size_factor"}


def nullable(adata):
    adata.obs["age"] = pd.array([None, *range(1, N)], dtype="Int64")
    return {"continuous_covariate_keys": ["age"]}


def number_as_category(adata):
    adata.obs["age"] = pd.Categorical([30, 40] * (N // 2))
    return {"continuous_covariate_keys": ["age"]}


WRONG_VALUES = {
    "fraction": (counts_with(0.5), ["adata.X has 1 value that is not an integer", 'cell "cell_8"', "counts=False"]),
    "fraction, dense": (counts_with(0.5, dense=True), ["adata.X has 1 value that is not an integer", 'cell "cell_8"']),
    "fraction, first cell": (counts_with(2.5, cell=0), ["1 value that is not an integer", 'cell "cell_1"']),
    "negative": (counts_with(-1), ["adata.X has 1 negative value (first", 'cell "cell_8"', "Raw counts are needed"]),
    "negative in a layer": (
        negative_layer,
        ['adata.layers["counts"] has 1 negative', 'cell "cell_6"', "adata.X looks like counts"],
    ),
    "NaN": (counts_with(np.nan), ["adata.X has 1 NaN or infinite value (", 'cell "cell_8"', "numpy.isfinite"]),
    "NaN, dense": (counts_with(np.nan, dense=True), ["adata.X has 1 NaN or infinite value (", 'cell "cell_8"']),
    "infinity": (counts_with(np.inf), ["adata.X has 1 NaN or infinite value (", 'cell "cell_8"']),
    "log1p of CP10K": (logged, ["not integers", "look like log1p of counts scaled to 10000 per cell", "counts=False"]),
    "CPM": (
        per_million,
        ["not integers", "look like counts scaled to 1e+06 per cell", 'SCVI(adata, gene_likelihood="normal")'],
    ),
    "log1p, unscaled": (
        logged_only,
        ["not integers", "they look like log1p of counts", 'adata.layers["counts"] = adata.X.expm1().rint()'],
    ),
    "z-scores": (scaled, ["negative values", "not integers", "Raw counts are needed"]),
    "counts in a layer": (logged_beside_counts, ['setup_anndata(adata, layer="raw_counts")', "log1p of counts"]),
    "counts in X": (
        logged_layer,
        ['adata.layers["norm"] has', "adata.X looks like counts: setup_anndata(adata), without layer"],
    ),
    "counts in raw": (logged_with_raw, ["adata.raw looks like counts", 'setup_anndata(adata, layer="counts")']),
    "a layer of texts beside": (beside_a_layer_of_texts, ["look like log1p of counts scaled to 10000 per cell"]),
    "empty cells": (
        empty_cells,
        ["2 cells have no counts in adata.X", "cell_4, cell_10", "sc.pp.filter_cells(adata, min_counts=1)"],
    ),
    "empty cells of a layer": (
        empty_cells_of_layer,
        ["1 cell has no counts", 'adata.layers["counts"]', "cell_1", "filter_cells"],
    ),
    "the last of 20,000": (last_of_many(1.5), ["1 value that is not an integer", 'cell "19999"']),
    "the last of 20,000, sparse": (last_of_many(-1), ["1 negative value (first", 'cell "19999"']),
    "complex": (of_dtype(complex), ["adata.X does not hold real numbers", "complex128", "Convert it"]),
    "objects": (of_dtype(object), ["adata.X does not hold real numbers", "object", "Convert it"]),
    "strings": (of_dtype(str), ["adata.X does not hold real numbers", "<U", "Convert it"]),
    "texts": (texts, ["adata.X does not hold real numbers", "object", "Convert it"]),
    "no X": (no_x, ["adata.X is empty (None)", 'setup_anndata(adata, layer="counts")']),
    "no X, no layer": (no_x_at_all, ["adata.X is empty (None)", "adata.X = counts"]),
    "no such layer": (
        near_layer,
        ['layer="count" is not a layer of adata', "it has: true_scale, counts", 'layer="counts"'],
    ),
    "no layer like it": (
        given_(layer="zzz"),
        ['layer="zzz" is not a layer', "it has: true_scale", "Leave layer out to read adata.X"],
    ),
    "gene names twice": (
        genes_twice,
        ["adata.var_names has 1 duplicate name (gene_1)", "adata.var_names_make_unique()"],
    ),
    "no cells": (no_cells, ["adata has no cells", "filter"]),
    "no genes": (lambda a: {"adata": a[:, :0].copy()}, ["adata has no genes", "filter"]),
}
WRONG_COLUMNS = {
    "no batch column": (
        given_(batch_key="bach"),
        [
            'batch_key="bach" is not a column of adata.obs',
            "it has: batch, cell_type",
            'setup_anndata(adata, batch_key="batch")',
        ],
    ),
    "nothing like it": (
        given_(batch_key="zzz"),
        ['batch_key="zzz" is not a column', "it has: batch", "Name one of these"],
    ),
    "in obsm": (given_(batch_key="true_z"), ['batch_key="true_z" is not a column', '"true_z" is in adata.obsm']),
    "in var": (given_(batch_key="zi_logit"), ['batch_key="zi_logit" is not a column', '"zi_logit" is in adata.var']),
    "no labels": (
        given_(labels_key="celltype"),
        ['labels_key="celltype"', 'setup_anndata(adata, labels_key="cell_type")'],
    ),
    "no size factor": (
        given_(size_factor_key="sizefactor"),
        ['size_factor_key="sizefactor"', 'setup_anndata(adata, size_factor_key="size_factor")'],
    ),
    "no categorical covariate": (
        given_(categorical_covariate_keys=["doner"]),
        ['"doner" is not a column', 'setup_anndata(adata, categorical_covariate_keys=["donor"])'],
    ),
    "no continuous covariate": (
        given_(continuous_covariate_keys=["percent_mit"]),
        ['"percent_mit" is not a column', 'setup_anndata(adata, continuous_covariate_keys=["percent_mito"])'],
    ),
    "NaN in batch": (
        column_with("batch", np.nan, "batch_key"),
        [
            'batch_key: adata.obs["batch"] is NaN for 2 cells',
            "cell_4, cell_10",
            '.fillna("missing")',
            "remove these cells",
        ],
    ),
    "None in batch": (object_batch, ['batch_key: adata.obs["batch"] is NaN for 2 cells', "cell_4, cell_10"]),
    "NaN in labels": (
        column_with("cell_type", np.nan, "labels_key", [0]),
        ['labels_key: adata.obs["cell_type"] is NaN for 1 cell ', "(first: cell_1)", '.fillna("missing")'],
    ),
    "NaN in covariate": (
        column_with("donor", np.nan, "categorical_covariate_keys"),
        ['categorical_covariate_keys: adata.obs["donor"] is NaN for 2 cells', "cell_4, cell_10"],
    ),
    "size factor 0": (
        column_with("size_factor", 0.0, "size_factor_key"),
        ['adata.obs["size_factor"] has 2 values that are not positive', "cell_4, cell_10", "above 0"],
    ),
    "size factor negative": (
        column_with("size_factor", -1.0, "size_factor_key", [5]),
        ["1 value that is not positive", "cell_6"],
    ),
    "size factor NaN": (
        column_with("size_factor", np.nan, "size_factor_key"),
        ["2 NaN or infinite values", "cell_4, cell_10"],
    ),
    "size factor infinite": (
        column_with("size_factor", np.inf, "size_factor_key"),
        ["2 NaN or infinite values", "cell_4"],
    ),
    "size factor a text": (
        column_with("size_factor", "1", "size_factor_key"),
        ["size_factor_key", "is not numeric", "object"],
    ),
    "covariate a text": (
        given_(continuous_covariate_keys=["donor"]),
        ['adata.obs["donor"] is not numeric', "category", 'categorical_covariate_keys=["donor"]'],
    ),
    "covariate numbers as categories": (number_as_category, ['adata.obs["age"] is not numeric (dtype category)']),
    "covariate NaN": (
        column_with("percent_mito", np.nan, "continuous_covariate_keys"),
        ["2 NaN or infinite", "cell_4, cell_10"],
    ),
    "covariate missing": (
        nullable,
        ['adata.obs["age"] has 1 NaN or infinite value ', "cell_1", "Replace such"],
    ),
    "covariate infinite": (
        column_with("percent_mito", -np.inf, "continuous_covariate_keys"),
        ["2 NaN or infinite", "cell_4"],
    ),
    "one column, two roles": (
        given_(batch_key="batch", categorical_covariate_keys=["batch"]),
        ['"batch" is named twice', "one argument only"],
    ),
    "one covariate twice": (given_(categorical_covariate_keys=["donor", "donor"]), ['"donor" is named twice']),
    "1 and '1'": (
        mixed_types,
        ['adata.obs["plate"] has values of different types with the same text', ".astype(str)"],
    ),
    "two columns of one name": (column_twice, ["batch", "it must have one"]),
    "several": (several, ["found 3 problems", 'batch_key="bach"', "not positive", "1 negative value (first"]),
}
WRONG_TYPES = {
    "a table": (lambda a: {"adata": a.to_df()}, ["adata is a DataFrame, not an AnnData", "AnnData(X)", "read_h5ad"]),
    "an array": (lambda a: {"adata": a.X.toarray()}, ["adata is a ndarray, not an AnnData", "AnnData(X)"]),
    "a text for categories": (
        given_(categorical_covariate_keys="donor"),
        ["'donor' is a string; it takes a list", "categorical_covariate_keys=['donor']"],
    ),
    "a text for numbers": (
        given_(continuous_covariate_keys="percent_mito"),
        ["is a string; it takes a list", "continuous_covariate_keys=['percent_mito']"],
    ),
    "a list for the batch": (
        given_(batch_key=["batch", "donor"]),
        ["batch_key=['batch', 'donor'] is a list", "one name, a string", "categorical_covariate_keys=[...]"],
    ),
    "a list for the layer": (given_(layer=["true_scale"]), ["layer=['true_scale'] is a list", "one name, a string"]),
    "a number for labels": (given_(labels_key=3), ["labels_key=3 is a int", "one name, a string"]),
    "a column for the size factor": (
        lambda a: {"size_factor_key": a.obs["size_factor"]},
        ["size_factor_key", "Series", "one name"],
    ),
    "a number in a list": (
        given_(categorical_covariate_keys=["donor", 3]),
        ["categorical_covariate_keys=['donor', 3]", "column names"],
    ),
    "a number for a list": (given_(continuous_covariate_keys=3), ["continuous_covariate_keys=3", "list"]),
    "counts a text": (given_(counts="no"), ["counts='no' must be True or False"]),
}
WRONG = {name: (damage, ValueError, words) for name, (damage, words) in (WRONG_VALUES | WRONG_COLUMNS).items()}
WRONG |= {name: (damage, TypeError, words) for name, (damage, words) in WRONG_TYPES.items()}


@pytest.mark.parametrize(("damage", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_in_words_and_left_alone(good, damage, error, words):
    arguments = damage(good)
    adata = arguments.pop("adata", good)
    before = in_memory(adata)
    x = getattr(adata, "X", None)
    with pytest.raises(error) as refused:
        scgen.setup_anndata(adata, **arguments)
    for word in words:
        assert word in str(refused.value)
    assert_unchanged(adata, before)
    assert getattr(adata, "X", None) is x
    if error is ValueError:
        # One sentence or more on a line, or one line a problem: never a traceback of pandas or scipy within.
        assert refused.value.__cause__ is None


@pytest.mark.parametrize(("damage", "error", "words"), WRONG.values(), ids=WRONG)
def test_check_finds_the_same_without_raising(good, damage, error, words):
    arguments = damage(good)
    adata = arguments.pop("adata", good)
    before = in_memory(adata)
    if error is TypeError:
        with pytest.raises(TypeError) as refused:
            scgen.check(adata, **arguments)
        said = str(refused.value)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = scgen.check(adata, **arguments)
        errors = table[table["level"] == "error"]
        said = " ".join(errors["finding"] + ". " + errors["suggestion"])
        assert list(table) == ["level", "where", "finding", "n", "suggestion"]
        assert (errors["n"] >= 0).all()
        words = [word for word in words if word != "found 3 problems"]
        with pytest.raises(ValueError, match=r".") as refused:
            scgen.setup_anndata(adata, **arguments)
        # Neither says anything that the other leaves out.
        assert all(finding in str(refused.value) for finding in errors["finding"])
        assert len(errors) == max(1, str(refused.value).count("\n- "))
    for word in words:
        assert word in said
    assert_unchanged(adata, before)


def test_x_is_no_layer():
    # What anndata 0.13 lists, whichever version is installed; the tests above fail on it otherwise.
    assert layers_of(SimpleNamespace(layers={None: np.ones((2, 2)), "counts": np.ones((2, 2))})) == ["counts"]


def test_the_corrected_calls_work(good):
    with pytest.raises(ValueError, match=r'obs\["batch"\] is NaN'):
        scgen.setup_anndata(good, **column_with("batch", np.nan, "batch_key")(good))
    good.obs["batch"] = good.obs["batch"].astype(object).fillna("missing")
    with pytest.warns(UserWarning, match="missing: 2"):
        scgen.setup_anndata(good, batch_key="batch")
    mixed_types(good)
    good.obs["plate"] = good.obs["plate"].astype(str)
    scgen.setup_anndata(good, batch_key="plate")
    logged_with_raw(good)
    good.layers["counts"] = good.raw[:, good.var_names].X
    scgen.setup_anndata(good, layer="counts")
    genes_twice(good)
    good.var_names_make_unique()
    scgen.setup_anndata(good, layer="counts")


@pytest.mark.parametrize("form", ["csr", "dense"])
def test_bad_values_in_a_file(good, tmp_path, form):
    good.X.data[-1] = -3
    if form == "dense":
        good.X = good.X.toarray()
    good.write_h5ad(tmp_path / "cells.h5ad")
    content = (tmp_path / "cells.h5ad").read_bytes()
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.raises(ValueError, match=r'adata.X has 1 negative value \(first at cell "cell_60"\)'):
        scgen.setup_anndata(backed)
    assert "scgen" not in backed.uns
    backed.file.close()
    assert (tmp_path / "cells.h5ad").read_bytes() == content


def test_a_view_of_a_file_is_refused(good, tmp_path):
    good.write_h5ad(tmp_path / "cells.h5ad")
    view = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")[:30]
    with pytest.raises(ValueError, match=r"view of a backed AnnData.*adata = adata\.to_memory\(\)"):
        scgen.setup_anndata(view, batch_key="batch")
    assert view.is_view
    assert "scgen" not in view.uns
    assert scgen.check(view, batch_key="batch").empty
    scgen.setup_anndata(view.to_memory(), batch_key="batch")


# Warnings


def tiny_batch(adata):
    adata.obs["batch"] = ["tiny"] * 3 + ["other"] * (N - 3)
    return {"batch_key": "batch"}


def barcodes(adata):
    adata.obs["code"] = adata.obs_names.to_numpy()
    return {"labels_key": "code"}


def constant(adata):
    adata.obs["age"] = 7
    return {"continuous_covariate_keys": ["age"]}


@pytest.mark.parametrize(
    ("doubt", "words"),
    [
        (tiny_batch, r'adata.obs\["batch"\] has 1 batch of fewer than 10 cells \(tiny: 3\)'),
        (barcodes, r'adata.obs\["code"\] has 60 values for 60 cells, nearly one value per cell'),
        (constant, r'adata.obs\["age"\] has one value, 7, for all cells'),
    ],
)
def test_doubts_are_warned_of(good, doubt, words):
    arguments = doubt(good)
    table = scgen.check(good, **arguments)
    assert table["level"].tolist() == ["warning"]
    assert table["finding"].str.contains(words).all()
    with pytest.warns(UserWarning, match=words) as caught:
        scgen.setup_anndata(good, **arguments)
    assert len(caught) == 1
    # It points to the user's own line.
    assert caught[0].filename == __file__
    assert "setup" in good.uns["scgen"]


EVERYTHING = {
    "batch_key": "batch",
    "labels_key": "cell_type",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["percent_mito", "log_library"],
    "size_factor_key": "size_factor",
}


def test_good_cells_pass_in_silence(good):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scgen.check(good).empty
        assert set(scgen.check(good, **EVERYTHING)["level"]) == {"note"}
        scgen.setup_anndata(good, **EVERYTHING)


# What is accepted


def dense_counts(adata):
    # Within int8, which the smallest of the formats holds.
    return adata.X.toarray().clip(max=120)


FORMATS = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "csc_array": sparse.csc_array,
    "C order": np.ascontiguousarray,
    "F order": np.asfortranarray,
    # AnnData itself refuses COO; it comes in as CSR.
    "coo": lambda x: sparse.coo_matrix(x).tocsr(),
    **{
        f"dense {dtype}": lambda x, dtype=dtype: x.astype(dtype)
        for dtype in ("int8", "int16", "int32", "int64", "uint8", "uint16")
    },
    **{
        f"csr {dtype}": lambda x, dtype=dtype: sparse.csr_matrix(x.astype(dtype))
        for dtype in ("int8", "uint8", "uint16", "int64")
    },
    "dense float64": lambda x: x.astype("float64"),
    "csr float64": lambda x: sparse.csr_matrix(x.astype("float64")),
    "dense float16": lambda x: x.astype("float16"),
}
BACKED = {"backed csr": sparse.csr_matrix, "backed csc": sparse.csc_matrix, "backed dense": np.asarray}


def assert_cells(adata, x):
    """Assert that the models see, of the first rows, what NumPy and pandas make of a dense matrix and obs."""
    registry = Registry.of(adata)
    store = registry.store(adata)
    rows = np.arange(10)
    (cells,) = CellLoader(store, registry.columns(adata, totals(store)), rows)
    obs = adata.obs
    assert cells.counts.numpy().dtype == np.float32
    np.testing.assert_array_equal(cells.counts.numpy(), x[rows].astype(np.float32))
    np.testing.assert_array_equal(
        cells.library.numpy(), np.log(x.sum(1, dtype=np.float64))[rows, None].astype(np.float32)
    )
    np.testing.assert_array_equal(cells.batch.numpy(), obs["batch"].cat.codes[:10])
    np.testing.assert_array_equal(cells.labels.numpy(), obs["cell_type"].cat.codes[:10])
    np.testing.assert_array_equal(cells.categorical.numpy(), obs[["donor"]].apply(lambda c: c.cat.codes)[:10])
    share = obs["percent_mito"]
    np.testing.assert_allclose(
        cells.continuous.numpy()[:, 0], ((share - share.mean()) / share.std(ddof=0))[:10], rtol=1e-5
    )
    np.testing.assert_array_equal(cells.index.numpy(), rows)
    assert registry.genes == adata.var_names.tolist()
    assert registry.batches == ["batch_1", "batch_2"]
    assert registry.n_categories == [2, 3]


ACCEPTED = {
    "batch_key": "batch",
    "labels_key": "cell_type",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["percent_mito"],
}


@pytest.mark.parametrize("layer", [None, "counts"])
@pytest.mark.parametrize("convert", FORMATS.values(), ids=FORMATS)
def test_formats_give_the_same_cells(good, convert, layer):
    x = dense_counts(good)
    held = convert(x)
    if layer is None:
        good.X = held
    else:
        good.X, good.layers[layer] = None, held
    scgen.setup_anndata(good, layer=layer, **ACCEPTED)
    assert_cells(good, x)
    assert (good.X if layer is None else good.layers[layer]) is held


@pytest.mark.parametrize("convert", BACKED.values(), ids=BACKED)
def test_files_give_the_same_cells(good, tmp_path, convert):
    x = dense_counts(good)
    good.X = convert(x)
    good.write_h5ad(tmp_path / "cells.h5ad")
    content = (tmp_path / "cells.h5ad").read_bytes()
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    scgen.setup_anndata(backed, **ACCEPTED)
    assert_cells(backed, x)
    assert backed.isbacked
    backed.file.close()
    assert (tmp_path / "cells.h5ad").read_bytes() == content


@pytest.mark.parametrize("convert", [np.asarray, sparse.csr_matrix])
def test_booleans_are_counts(good, convert):
    x = good.X.toarray() > 0
    good.X = convert(x)
    scgen.setup_anndata(good, **ACCEPTED)
    assert_cells(good, x)


def test_size_factors_replace_the_library(good):
    scgen.setup_anndata(good, size_factor_key="size_factor")
    registry = Registry.of(good)
    library = registry.columns(good, totals(registry.store(good)))["library"].numpy()[:, 0]
    np.testing.assert_allclose(library, np.log(good.obs["size_factor"]), rtol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        ["b", "a", "c"],
        [10, 9, 1],
        [True, False, True],
        [1.5, 0.1, 2.0],
        np.array([1.5, 0.1, 2.0], np.float32),
        pd.to_datetime(["2020-01-02", "2020-01-01", "2021-06-30"]),
        pd.to_datetime(["2020-01-02 10:00", "2020-01-01 00:00", "2021-06-30 00:00"]),
        pd.array(["b", "a", "c"], dtype="string"),
        pd.array([3, 2, 1], dtype="Int64"),
        [b"b", b"a", b"c"],
        pd.interval_range(0, 3),
    ],
    ids=[
        "texts",
        "integers",
        "booleans",
        "floats",
        "float32",
        "days",
        "times",
        "string",
        "Int64",
        "bytes",
        "intervals",
    ],
)
@pytest.mark.parametrize("categorical", [False, True])
def test_batches_of_any_type(good, values, categorical):
    column = pd.Series(values).take(np.arange(N) % 3).set_axis(good.obs_names)
    good.obs["run"] = column.astype("category") if categorical else column
    scgen.setup_anndata(good, batch_key="run")
    registry = Registry.of(good)
    codes = registry.columns(good, totals(registry.store(good)))["batch"].numpy()
    # Two cells have the same code if, and only if, they have the same value.
    np.testing.assert_array_equal(codes[:, None] == codes, column.to_numpy()[:, None] == column.to_numpy())
    assert len(set(registry.batches)) == len(set(values))


def test_unused_categories_are_dropped(good):
    good.obs["batch"] = (
        good.obs["batch"].cat.add_categories(["unused"]).cat.reorder_categories(["unused", "batch_2", "batch_1"])
    )
    before = good.obs.copy()
    scgen.setup_anndata(good, batch_key="batch")
    registry = Registry.of(good)
    assert registry.batches == ["batch_2", "batch_1"]
    codes = registry.columns(good, totals(registry.store(good)))["batch"].numpy()
    np.testing.assert_array_equal(codes, (good.obs["batch"] == "batch_1").astype(int))
    pd.testing.assert_frame_equal(good.obs, before)


def test_a_view_becomes_actual_with_one_warning(good):
    before = good.copy()
    view = good[::2, 3:]
    expected = view.X.toarray()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scgen.setup_anndata(view, batch_key="batch")
    assert [warning.category for warning in caught] == [ImplicitModificationWarning]
    assert not view.is_view
    np.testing.assert_array_equal(view.X.toarray(), expected)
    assert Registry.of(view).genes == before.var_names[3:].tolist()
    assert_unchanged(good, before)


# The record


@pytest.mark.parametrize(
    "arguments", [{}, {"layer": "counts"}, {"counts": False}, EVERYTHING], ids=["least", "layer", "values", "all"]
)
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_the_record_survives_files_and_is_all_that_is_written(good, tmp_path, arguments, suffix):
    good.layers["counts"] = good.X.copy()
    before, x = good.copy(), good.X
    scgen.setup_anndata(good, **arguments)
    assert good.uns["scgen"]["setup"] == {"counts": True, **arguments}
    registry = Registry.of(good)
    getattr(good, f"write_{suffix}")(tmp_path / "cells")
    read = getattr(anndata, f"read_{suffix}")(tmp_path / "cells")
    assert Registry.of(read) == registry
    assert set(good.uns) == {"kept", "scgen", "simulation"}
    assert good.X is x
    del good.uns["scgen"]
    assert_unchanged(good, before)


def test_a_second_setup_replaces_the_first(good):
    good.uns["scgen"] = {"integrate": {"key": ["batch"]}}
    scgen.setup_anndata(good, **EVERYTHING)
    scgen.setup_anndata(good, labels_key="cell_type")
    assert good.uns["scgen"] == {"integrate": {"key": ["batch"]}, "setup": {"labels_key": "cell_type", "counts": True}}
    with pytest.raises(ValueError, match="not a column"):
        scgen.setup_anndata(good, batch_key="bach")
    assert good.uns["scgen"]["setup"] == {"labels_key": "cell_type", "counts": True}


@pytest.mark.parametrize("make", [tuple, pd.Index, np.array, lambda names: dict.fromkeys(names).keys()])
def test_names_in_any_kind_of_sequence(good, make):
    scgen.setup_anndata(good, categorical_covariate_keys=make(["donor", "batch"]))
    assert good.uns["scgen"]["setup"]["categorical_covariate_keys"] == ["donor", "batch"]


def test_values_that_are_no_counts(good):
    scaled(good)
    scgen.setup_anndata(good, batch_key="batch", counts=False)
    with pytest.raises(
        ValueError, match=r'gene_likelihood="zinb" needs counts, but the data were set up with counts=False'
    ):
        scgen.SCVI(good)
    model = scgen.SCVI(good, gene_likelihood="normal", n_hidden=8)
    model.train(max_epochs=1, accelerator="cpu", progress=False)
    assert np.isfinite(model.get_latent_representation()).all()
    good.X[4, 0] = np.nan
    with pytest.raises(ValueError, match=r'adata.X has 1 NaN or infinite value \(first at cell "cell_5"\)'):
        scgen.setup_anndata(good, batch_key="batch", counts=False)


# The constructor


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (counts_with(0.5), "not an integer"),
        (counts_with(np.nan), "NaN or infinite"),
        (empty_cells, "2 cells have no counts"),
        (object_batch, r'obs\["batch"\] is NaN for 2 cells'),
        (genes_twice, "1 duplicate name"),
        (lambda a: a.obs.__delitem__("donor"), '"donor" is not a column'),
        (column_with("size_factor", 0.0, "size_factor_key"), "not positive"),
        (lambda a: a.uns.__delitem__("scgen"), r"was not set up: .* Call scgen\.setup_anndata"),
    ],
)
def test_cells_changed_since_setup_are_refused(good, change, words):
    scgen.setup_anndata(good, **EVERYTHING)
    change(good)
    with pytest.raises(ValueError, match=words):
        scgen.SCVI(good)


def test_only_anndata_makes_a_model(good):
    with pytest.raises(TypeError, match="DataFrame, not an AnnData"):
        scgen.SCVI(good.to_df())


# Confounding


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (4, 6)])
@pytest.mark.parametrize("dependence", [0.0, 0.5, 1.0])
def test_cramers_v_is_scipys(shape, dependence):
    rng = np.random.default_rng(1)
    one = np.r_[np.arange(shape[0]), rng.integers(shape[0], size=200)]
    other = np.where(rng.random(len(one)) < dependence, one % shape[1], rng.integers(shape[1], size=len(one)))
    table = pd.crosstab(one, other).to_numpy()
    expected = association(table, method="cramer")
    np.testing.assert_allclose(cramers_v(pd.Series(one), pd.Series(other)), expected, rtol=1e-12)


def test_check_tells_of_confounding(good):
    table = scgen.check(good, batch_key="batch", labels_key="cell_type", categorical_covariate_keys=["donor"])
    assert table["level"].tolist() == ["note"] * 3
    for one, other in (("batch", "cell_type"), ("batch", "donor"), ("cell_type", "donor")):
        v = association(pd.crosstab(good.obs[one], good.obs[other]).to_numpy(), method="cramer")
        assert f'Cramer\'s V of "{one}" and "{other}" is {v:.2f}' in table["finding"].tolist()


def test_check_tells_of_a_design_without_full_rank(good):
    # Four donors, two in each batch: 1 + 1 + 3 columns, of which the batch's is the sum of two donors'.
    good.obs["batch"] = np.repeat(["b1", "b2"], N // 2)
    good.obs["donor"] = np.repeat(["d1", "d2", "d3", "d4"], N // 4)
    table = scgen.check(good, batch_key="batch", categorical_covariate_keys=["donor"])
    assert table["level"].tolist() == ["warning", "warning"]
    assert 'Cramer\'s V of "batch" and "donor" is 1.00' in table["finding"][0]
    assert table["finding"][1] == "the design matrix of batch, donor has rank 4; full rank is 5"
    assert table["n"][1] == 1
    # The labels are no part of the design.
    assert len(scgen.check(good, batch_key="batch", labels_key="donor")) == 1


def test_check_of_columns_with_one_value(good):
    good.obs["batch"] = "only"
    table = scgen.check(good, batch_key="batch", labels_key="cell_type")
    assert table["level"].tolist() == ["warning", "note"]
    assert table["finding"][0] == 'batch_key: adata.obs["batch"] has one value (only) for all cells'
    assert table["finding"][1] == 'Cramer\'s V of "batch" and "cell_type" is 0.00'


def test_check_without_doubts_is_an_empty_table(good):
    table = scgen.check(good, batch_key="batch")
    assert list(table) == ["level", "where", "finding", "n", "suggestion"]
    assert table.empty


def test_the_setup_as_a_table(good):
    good.layers["raw"] = good.X.copy()
    covariates = {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["percent_mito"]}
    scgen.setup_anndata(
        good, layer="raw", batch_key="batch", labels_key="cell_type", size_factor_key="size_factor", **covariates
    )
    model = scgen.SCVI(good, dispersion="gene-label")
    table = model.view_anndata_setup()
    assert table["where"].tolist()[:3] == ['adata.layers["raw"]', "adata.obs_names", "adata.var_names"]
    assert table.loc["counts", "what"] == f"{N} cells x {G} genes"
    for part, key in (("batch_key", "batch"), ("labels_key", "cell_type"), (table.index[5], "donor")):
        sizes = good.obs[key].value_counts().sort_index()
        told = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        assert table.loc[part].tolist() == [f'adata.obs["{key}"]', f"{len(sizes)}: {told}"]
    for part, key in (("size_factor_key", "size_factor"), (table.index[-1], "percent_mito")):
        low, high, mean = good.obs[key].agg(["min", "max", "mean"])
        assert table.loc[part].tolist() == [f'adata.obs["{key}"]', f"{low:g} to {high:g}, mean {mean:g}"]
    # Of other cells, and of what they lack.
    some = good[good.obs["batch"] == "batch_1"].copy()
    assert model.view_anndata_setup(some).loc["batch_key", "what"] == f"1: batch_1 ({some.n_obs})"
    assert model.view_anndata_setup(some[:0].copy()).loc["size_factor_key", "what"] == "none"
    del some.obs["donor"]
    with pytest.raises(ValueError, match='0 columns named "donor"'):
        model.view_anndata_setup(some)
    with pytest.raises(ValueError, match="lacks 1 of the model's 20 genes"):
        model.view_anndata_setup(good[:, 1:].copy())


def test_large_numbers_of_the_setup_have_commas():
    adata = scgen.simulate_cells(n_cells=1200, n_genes=1001, n_batches=1, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    table = scgen.SCVI(adata).view_anndata_setup()
    assert table.loc[["cells", "genes", "batch_key"], "what"].str.split(":").str[0].tolist() == ["1,200", "1,001", "1"]
    assert table.loc["batch_key", "what"] == "1: batch_1 (1,200)"


def test_the_setup_of_a_model_without_batches(good):
    scgen.setup_anndata(good)
    assert scgen.SCVI(good).view_anndata_setup().index.tolist() == ["counts", "cells", "genes"]
