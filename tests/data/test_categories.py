"""A category has one name, whatever the dtype of the column that it stands in."""

import numpy as np
import pandas as pd
import pytest

import scgen
from scgen.analysis.comparisons import by_column
from scgen.data.advice import cramers_v
from scgen.data.categories import codes_of, name_of
from scgen.data.registry import Registry
from scgen.data.stores import totals

N = 90
INTEGERS = np.arange(N) % 3
#: The same values as other tables may hold them.
SAME = {
    "int64": INTEGERS,
    "int8": INTEGERS.astype(np.int8),
    "float64": INTEGERS.astype(float),
    "float32": INTEGERS.astype(np.float32),
    "Int64": pd.array(INTEGERS, dtype="Int64"),
    "Float64": pd.array(INTEGERS.astype(float), dtype="Float64"),
    "texts": INTEGERS.astype(str),
    "objects": np.array([int(value) for value in INTEGERS], dtype=object),
    "objects, floats": np.array([float(value) for value in INTEGERS], dtype=object),
}
CASES = [(name, categorical) for name in SAME for categorical in (False, True)]


def column(name, categorical, index):
    values = pd.Series(SAME[name], index=index)
    return values.astype("category") if categorical else values


@pytest.fixture(scope="module")
def template():
    adata = scgen.simulate_cells(n_cells=N, n_genes=20, n_batches=1, n_types=2, seed=0)
    adata.obs = pd.DataFrame({"run": INTEGERS}, index=adata.obs_names)
    return adata


@pytest.fixture(scope="module")
def model(template):
    adata = template.copy()
    scgen.setup_anndata(adata, batch_key="run")
    made = scgen.SCVI(adata, n_hidden=8)
    made.train(max_epochs=2, accelerator="cpu", progress=False)
    return made


@pytest.fixture(scope="module")
def older(template):
    """A model with the names that older versions gave to integral floats."""
    adata = template.copy()
    adata.obs["run"] = [f"{value}.0" for value in INTEGERS]
    scgen.setup_anndata(adata, batch_key="run")
    made = scgen.SCVI(adata, n_hidden=8)
    made.train(max_epochs=2, accelerator="cpu", progress=False)
    return made


@pytest.mark.parametrize(("name", "categorical"), CASES)
def test_a_column_of_another_dtype_has_the_same_batches(template, model, name, categorical):
    adata = template.copy()
    adata.obs["run"] = column(name, categorical, adata.obs_names)
    scgen.setup_anndata(adata, batch_key="run")
    registry = Registry.of(adata)
    assert sorted(registry.batches) == ["0", "1", "2"]
    codes = registry.columns(adata, totals(registry.store(adata)))["batch"].numpy()
    assert [registry.batches[code] for code in codes] == INTEGERS.astype(str).tolist()
    np.testing.assert_array_equal(model.get_latent_representation(adata), model.get_latent_representation())
    query = model.query(adata)
    assert not query.model.registry.known
    assert repr(query).endswith("taken for the reference's own in run: 0, 1, 2")


@pytest.mark.parametrize(("name", "categorical"), [case for case in CASES if case[0] != "texts"])
def test_a_model_with_older_names_answers(template, older, tmp_path, name, categorical):
    adata = template.copy()
    adata.obs["run"] = column(name, categorical, adata.obs_names)
    older.save(tmp_path)
    loaded = scgen.SCVI.load(tmp_path, adata)
    assert loaded.registry.batches == ["0.0", "1.0", "2.0"]
    np.testing.assert_array_equal(loaded.get_latent_representation(), older.get_latent_representation())
    for asked in (1, 1.0, "1.0", np.float32(1)):
        np.testing.assert_array_equal(
            loaded.get_normalized_expression(batch=asked, return_numpy=True),
            older.get_normalized_expression(batch="1.0", return_numpy=True),
        )
    assert not loaded.query(adata).model.registry.known


def test_a_merge_with_cells_that_have_no_batch(template, model):
    """What pandas makes of integers beside missing values, and the cells that have one afterwards."""
    parts = pd.concat([template.obs, pd.DataFrame({"age": [1.0]}, index=["other"])])
    assert parts["run"].dtype == float
    adata = template.copy()
    adata.obs["run"] = parts["run"].loc[adata.obs_names]
    np.testing.assert_array_equal(model.get_latent_representation(adata), model.get_latent_representation())


def test_new_batches_of_a_query_are_named_alike(template, model):
    adata = template.copy()
    adata.obs["run"] = (INTEGERS + 1).astype(float)
    query = model.query(adata)
    assert query.model.registry.known == {"run": 3}
    assert query.model.registry.batches == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(query._new_batch(), np.where(INTEGERS == 2, 0, -1))
    assert "new in run: 3; taken for the reference's own in run: 1, 2" in repr(query)


def test_days_are_new_batches_once(template, model):
    """Their names in obs.astype(str) are others than those of single values."""
    adata = template.copy()
    adata.obs["run"] = pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-03"]).take(INTEGERS)
    query = model.query(adata)
    assert len(query.model.registry.batches) == 6
    np.testing.assert_array_equal(query._new_batch(), INTEGERS)


@pytest.mark.parametrize("asked", [1, 1.0, "1", np.int8(1), np.float32(1), np.array(1.0)])
def test_a_name_asked_for_in_any_form(asked):
    assert codes_of("batch", ["0", "1"], asked) == [1]
    if not isinstance(asked, np.ndarray):
        assert codes_of("batch", ["0", "1"], [asked, 0.0]) == [1, 0]


@pytest.mark.parametrize("asked", [True, "True", 0.5, "1.0", None, float("nan"), float("inf"), 1 + 0j])
def test_names_that_are_others_stay_so(asked):
    with pytest.raises(ValueError, match="unknown to the model"):
        codes_of("batch", ["0", "1"], [asked])


@pytest.mark.parametrize(("name", "categorical"), CASES)
def test_groups_are_compared_by_name(name, categorical):
    obs = pd.DataFrame({"kind": column(name, categorical, None)})
    for one, other in (("1", "2"), (1, 2), (1.0, np.float32(2))):
        codes, (comparison,) = by_column(obs, "kind", one, other)
        assert (comparison.name1, comparison.name2) == ("1", "2")
        np.testing.assert_array_equal(codes, np.where(INTEGERS == 0, -1, INTEGERS - 1))


def test_values_written_alike_are_refused(template):
    adata = template.copy()
    adata.obs["run"] = pd.Series([1.0, "1", 2.0] * (N // 3), index=adata.obs_names, dtype=object)
    with pytest.raises(ValueError, match="different types with the same text") as refused:
        scgen.setup_anndata(adata, batch_key="run")
    assert '.astype(str).str.removesuffix(".0")' in str(refused.value)
    adata.obs["run"] = adata.obs["run"].astype(str).str.removesuffix(".0")
    scgen.setup_anndata(adata, batch_key="run")
    assert Registry.of(adata).batches == ["1", "2"]


def test_association_of_columns_of_mixed_dtypes():
    integers = pd.Series(INTEGERS)
    for name in SAME:
        assert cramers_v(integers, pd.Series(SAME[name])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1e20, "100000000000000000000"),
        (-3.0, "-3"),
        (0.1, "0.1"),
        (np.float32(0.1), "0.1"),
        (np.longdouble(4), "4"),
        (np.True_, "True"),
        (b"a", "b'a'"),
        (pd.Timestamp("2020-01-01"), "2020-01-01 00:00:00"),
        (10**400, "1" + "0" * 400),
    ],
)
def test_names(value, name):
    assert name_of(value) == name
    assert codes_of("batch", [name], [value]) == [0]
