"""Stores: whatever the format and wherever it lies, rows and sums are those of the dense matrix."""

import anndata
import h5py
import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from scgen.data.stores import BackedStore, DeviceStore, MemoryStore, on_device, open_store, totals
from scgen.kernels import dispatch

N, G = 23, 11
SPARSE = ("csr_matrix", "csc_matrix", "coo_matrix", "csr_array", "csc_array", "coo_array", "lil_matrix")
ON_DISK = ("h5ad_csr", "h5ad_csc", "h5ad_dense", "zarr_csr", "zarr_dense")
FORMATS = ("c_order", "f_order", *SPARSE, "uncanonical", *ON_DISK)
#: Rows in any order, with repeats; and columns likewise, but each once, or all of them.
ROWS = st.lists(st.integers(0, N - 1), min_size=1, max_size=40).map(np.array)
COLUMNS = st.none() | st.lists(st.integers(0, G - 1), min_size=1, max_size=G, unique=True).map(np.array)


@pytest.fixture(params=[0, 2**14], ids=["compiled", "plain"])
def smallest(request):
    """Let the compiled kernels, made for large matrices, do these small ones too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "SMALLEST", request.param)
        yield


@pytest.fixture(scope="module")
def dense():
    counts = np.random.default_rng(0).poisson(0.7, (N, G)).astype(np.float32)
    # Rows and columns without any value, first and last too, are where sparse formats go wrong.
    counts[[0, 9, 10, N - 1]] = 0
    counts[:, [0, 5, G - 1]] = 0
    return counts


@pytest.fixture(scope="module")
def matrices(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    made = {"c_order": dense, "f_order": np.asfortranarray(dense)}
    made |= {name: getattr(sparse, name)(dense) for name in SPARSE}
    rows, columns = dense.nonzero()
    halves = np.tile(dense[rows, columns] / 2, 2)
    # Every value in two halves, the columns of a row in descending order: legal, and rare enough to be forgotten.
    order = np.lexsort((-np.tile(columns, 2), np.tile(rows, 2)))
    ends = np.r_[0, np.cumsum(np.bincount(np.tile(rows, 2), minlength=N))]
    made["uncanonical"] = sparse.csr_matrix((halves[order], np.tile(columns, 2)[order], ends), shape=(N, G))
    for name, matrix in (("csr", sparse.csr_matrix(dense)), ("csc", sparse.csc_matrix(dense)), ("dense", dense)):
        anndata.AnnData(matrix).write_h5ad(folder / f"{name}.h5ad")
        made[f"h5ad_{name}"] = anndata.read_h5ad(folder / f"{name}.h5ad", backed="r").X
    anndata.AnnData(sparse.csr_matrix(dense)).write_zarr(folder / "csr.zarr")
    made["zarr_csr"] = anndata.io.sparse_dataset(zarr.open_group(folder / "csr.zarr", mode="r")["X"])
    made["zarr_dense"] = zarr.open_array(folder / "dense.zarr", mode="w", shape=dense.shape, dtype="f4", chunks=(7, 5))
    made["zarr_dense"][:] = dense
    return made


@pytest.mark.parametrize("name", FORMATS)
def test_store_by_where_the_matrix_lies(matrices, name):
    assert type(open_store(matrices[name])) is (BackedStore if name in ON_DISK else MemoryStore)


@pytest.mark.parametrize("name", FORMATS)
@given(rows=ROWS, columns=COLUMNS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_those_of_the_dense_matrix(matrices, dense, smallest, name, rows, columns):
    store = open_store(matrices[name], columns)
    expected = (dense if columns is None else dense[:, columns])[rows]
    values = store.rows(rows)
    assert store.shape == (N, expected.shape[1])
    assert values.numpy().dtype == np.float32
    assert values.is_contiguous()
    np.testing.assert_array_equal(values.numpy(), expected)
    # A function of the stored entries must be one of the values.
    as_stored = store.rows(rows, as_sparse=True)
    assert as_stored.dtype == torch.float32
    np.testing.assert_allclose(torch.log1p(as_stored).to_dense().numpy(), np.log1p(expected), rtol=1e-6)
    if as_stored.layout == torch.sparse_csr:
        np.testing.assert_array_equal(as_stored.to_dense().numpy(), expected)


def test_entries_stored_twice_add_up_beyond_their_dtype():
    twice = sparse.csr_matrix(
        (np.array([200, 100, 7], np.uint8), np.array([1, 1, 0]), np.array([0, 2, 3])), shape=(2, 3)
    )
    for store in (MemoryStore(twice), DeviceStore(MemoryStore(twice), "cpu")):
        for as_sparse in (False, True):
            rows = store.rows(np.array([1, 0]), as_sparse=as_sparse).to_dense()
            np.testing.assert_array_equal(rows.numpy(), [[7, 0, 0], [0, 300, 0]])
    assert twice.data.tolist() == [200, 100, 7]


@pytest.mark.parametrize("first", [0, 3])
def test_consecutive_rows_are_not_copied(matrices, dense, first):
    matrix = matrices["csr_matrix"]
    some = MemoryStore(matrix).rows(np.arange(first, first + 12), as_sparse=True)
    assert np.shares_memory(some.values().numpy(), matrix.data)
    np.testing.assert_array_equal(some.to_dense().numpy(), dense[first : first + 12])


@pytest.mark.parametrize("name", FORMATS)
@given(columns=COLUMNS, n_rows=st.integers(1, N + 2))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_and_totals(matrices, dense, smallest, name, columns, n_rows):
    store = open_store(matrices[name], columns)
    expected = dense if columns is None else dense[:, columns]
    blocks = list(store.blocks(n_rows))
    assert [start for start, _ in blocks] == list(range(0, N, n_rows))
    arrays = [block.toarray() if sparse.issparse(block) else block for _, block in blocks]
    np.testing.assert_array_equal(np.concatenate(arrays), expected)
    np.testing.assert_array_equal(totals(store), expected.sum(axis=1, dtype=np.float64))


@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_array])
@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.uint16, np.int64, np.uint64, np.float32, np.float64])
def test_dtypes(make, dtype):
    # The largest values overflow a sum in their own dtype; a float32 sum of 2**24 + 1 ones would stop at 2**24.
    largest = 1 if dtype is bool else 2**24 if np.dtype(dtype).itemsize > 2 else np.iinfo(dtype).max
    values = np.array([[largest, 1, 1, 1], [0, 0, 0, 0], [1, 0, largest, largest]], dtype=dtype)
    store = open_store(make(values))
    np.testing.assert_array_equal(store.rows(np.array([2, 0, 2])).numpy(), values[[2, 0, 2]].astype(np.float32))
    np.testing.assert_array_equal(totals(store), [sum(int(value) for value in row) for row in values])


@pytest.mark.parametrize("name", ["c_order", "csr_matrix", "csr_array"])
def test_memory_is_read_in_place(matrices, name):
    held, given_ = MemoryStore(matrices[name]).matrix, matrices[name]
    assert np.shares_memory(getattr(held, "data", held), getattr(given_, "data", given_))


@pytest.mark.parametrize("name", FORMATS)
def test_changing_the_rows_leaves_the_matrix_alone(matrices, dense, name):
    open_store(matrices[name]).rows(np.arange(N)).fill_(-1)
    np.testing.assert_array_equal(open_store(matrices[name]).rows(np.arange(N)).numpy(), dense)


def test_only_the_rows_asked_for_are_read(tmp_path, dense):
    # A dataset of 40 GB that was never written: reading all of it could not succeed.
    with h5py.File(tmp_path / "huge.h5", "w") as file:
        huge = file.create_dataset("X", (10**6, 10**4), dtype=np.float32, chunks=(1, 10**4))
        huge[[3, 999_999], :3] = dense[1:3, :3]
        store = open_store(huge, np.array([2, 0]))
        values = store.rows(np.array([999_999, 3, 5])).numpy()
    np.testing.assert_array_equal(values, [*dense[[2, 1]][:, [2, 0]], [0, 0]])


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ON_DISK])
@given(rows=ROWS, columns=COLUMNS, as_tensor=st.booleans())
@settings(max_examples=15, deadline=None)
def test_rows_from_a_device_are_those_of_the_dense_matrix(matrices, dense, name, rows, columns, as_tensor):
    before = matrices[name].copy()
    store = DeviceStore(MemoryStore(matrices[name], columns), "cpu")
    expected = (dense if columns is None else dense[:, columns])[rows]
    index = torch.from_numpy(rows) if as_tensor else rows
    assert store.shape == (N, expected.shape[1])
    values = store.rows(index)
    assert values.dtype == torch.float32
    np.testing.assert_array_equal(values.numpy(), expected)
    as_stored = store.rows(index, as_sparse=True)
    assert as_stored.layout == torch.sparse_csr
    np.testing.assert_array_equal(as_stored.to_dense().numpy(), expected)
    assert (before != matrices[name]).sum() == 0


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 255], torch.uint8),
        ([True, True], torch.uint8),
        ([1, 256], torch.int16),
        ([-3, 2], torch.int16),
        ([1, 32767], torch.int16),
        ([1, 32768], torch.float32),
        ([1, 1e6], torch.float32),
        ([0.5, 2], torch.float32),
        ([np.nan, 2], torch.float32),
        ([-np.inf, 2], torch.float32),
        ([], torch.uint8),
    ],
)
@pytest.mark.parametrize("sparsely", [True, False])
def test_the_smallest_dtype_that_holds_all_values(values, dtype, sparsely):
    dense = np.zeros((10_000, 3), dtype=np.asarray(values).dtype)  # more than a block
    dense[9_000 : 9_000 + len(values), 1] = values
    store = DeviceStore(MemoryStore(sparse.csr_matrix(dense) if sparsely else dense), "cpu")
    assert store.values.dtype == dtype
    assert (store.indptr.dtype, store.indices.dtype) == (torch.int64, torch.int32)
    np.testing.assert_array_equal(store.rows(np.arange(10_000)).numpy(), dense.astype(np.float32))


def test_a_device_store_is_canonical_where_its_source_is_not(matrices):
    source = matrices["uncanonical"]
    entries = source.data.copy(), source.indices.copy()
    store = DeviceStore(MemoryStore(source), "cpu")
    made = sparse.csr_array((store.values.numpy(), store.indices.numpy(), store.indptr.numpy()), shape=store.shape)
    assert made.has_canonical_format
    np.testing.assert_array_equal(source.data, entries[0])
    np.testing.assert_array_equal(source.indices, entries[1])


def test_values_stay_where_they_are_but_for_a_gpu_with_room(matrices, monkeypatch):
    store = MemoryStore(matrices["csr_matrix"])
    assert on_device(store, torch.device("cpu")) is store
    needed = 8 * (matrices["csr_matrix"].nnz + N + 1)
    monkeypatch.setattr("scgen.data.stores.DeviceStore", lambda store, device: "there")
    for free, there in ((2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert (on_device(store, torch.device("cuda")) == "there") == there
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    backed = BackedStore(matrices["h5ad_csr"])
    assert on_device(backed, torch.device("cuda")) is backed
