"""The loader gives every cell once, in minibatches of nearly equal size; the split gives every batch its share."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scgen
from scgen.data.cells import Cells
from scgen.data.loader import CellLoader, split
from scgen.data.stores import DeviceStore, MemoryStore

N = 50


def loader(index=None, batch_size=8, seed=None, on_device=False):
    """Return a loader over N cells every field of which tells the cell's row."""
    rows = torch.arange(N)
    columns = {"library": rows[:, None] / 2, "batch": rows + 1, "labels": rows + 2}
    columns |= {"categorical": torch.stack([rows, -rows], 1), "continuous": rows[:, None] * 3.0}
    rng = None if seed is None else np.random.default_rng(seed)
    store = MemoryStore(np.arange(2 * N).reshape(N, 2))
    return CellLoader(DeviceStore(store, "cpu") if on_device else store, columns, index, batch_size, rng)


def order(cells_loader):
    return [int(i) for cells in cells_loader for i in cells.index]


@given(n=st.integers(0, N), batch_size=st.integers(3, 20), seed=st.none() | st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_sizes_and_every_cell_once(n, batch_size, seed):
    index = np.random.default_rng(n).permutation(N)[:n]
    cells_loader = loader(index, batch_size, seed)
    sizes = [len(cells) for cells in cells_loader]
    assert len(sizes) == len(cells_loader) == -(-len(index) // batch_size)
    assert sum(sizes) == len(index)
    assert max(sizes, default=0) <= batch_size
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert 1 not in sizes or len(index) == 1
    assert sorted(order(cells_loader)) == sorted(index)
    if seed is None:
        assert order(cells_loader) == list(index)


def test_minibatches_of_two_are_refused():
    # An odd number of cells leaves one over, of which batch normalisation has no variance.
    adata = scgen.simulate_cells(n_cells=21, n_genes=10, n_batches=1, seed=0)
    scgen.setup_anndata(adata)
    model = scgen.SCVI(adata, n_hidden=8)
    with pytest.raises(ValueError, match="batch_size=2"):
        model.train(max_epochs=1, batch_size=2, train_size=1, accelerator="cpu", progress=False)


@pytest.mark.parametrize("seed", [None, 3])
def test_fields_stay_with_their_cell(seed):
    index = np.array([7, 3, 41, 3, 0, 49, 12])
    for cells in loader(index, 3, seed):
        i = cells.index
        assert torch.equal(cells.counts, torch.stack([2.0 * i, 2.0 * i + 1], 1))
        assert torch.equal(cells.library, i[:, None] / 2)
        assert torch.equal(cells.batch, i + 1)
        assert torch.equal(cells.labels, i + 2)
        assert torch.equal(cells.categorical, torch.stack([i, -i], 1))
        assert torch.equal(cells.continuous, i[:, None] * 3.0)


@pytest.mark.parametrize("seed", [None, 3])
def test_cells_from_a_device_are_the_same(seed):
    index = np.arange(N)[::3]
    for one, other in zip(loader(index, seed=seed), loader(index, seed=seed, on_device=True), strict=True):
        for field in dataclasses.fields(one):
            if field.name != "imputed_counts":  # None: all genes were measured
                assert torch.equal(getattr(one, field.name), getattr(other, field.name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedCells(Cells):
    """Cells of a model that reads one thing more about each of them."""

    coordinates: torch.Tensor


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (slice(10, 30, 3), np.arange(10, 30, 3)),
        (torch.tensor([4, 40, 4, 0]), np.array([4, 40, 4, 0])),
        (torch.arange(N) % 7 == 2, np.arange(2, N, 7)),
        (slice(5, 5), np.array([], int)),
    ],
    ids=["slice", "row numbers", "mask", "none"],
)
@pytest.mark.parametrize("as_sparse", [False, True])
def test_some_rows_of_a_minibatch(rows, expected, as_sparse):
    matrix = np.random.default_rng(0).poisson(0.5, (N, 6)).astype(np.float32)
    i = np.arange(N)
    values = {
        "counts": matrix,
        "library": i[:, None] / 2,
        "batch": i + 1,
        "labels": i + 2,
        "categorical": np.stack([i, -i], 1),
        "continuous": i[:, None] * 3.0,
        "index": i,
        "coordinates": np.stack([i * 5.0, i * 7.0], 1),
    }
    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    if as_sparse:
        tensors["counts"] = tensors["counts"].to_sparse_csr()
    some = PlacedCells(**tensors)[rows]
    assert isinstance(some, PlacedCells)
    assert len(some) == len(expected)
    assert some.imputed_counts is None
    assert some.counts.layout == tensors["counts"].layout
    for name, value in values.items():
        np.testing.assert_array_equal(getattr(some, name).to_dense(), value[expected], err_msg=name)
    imputed = dataclasses.replace(PlacedCells(**tensors), imputed_counts=torch.from_numpy(matrix))[rows]
    np.testing.assert_array_equal(imputed.imputed_counts, matrix[expected])


def test_all_cells_by_default():
    assert order(loader()) == list(range(N))


def test_a_new_order_every_pass_and_the_same_for_the_same_seed():
    shuffled, again = loader(seed=5), loader(seed=5)
    passes = [order(shuffled) for _ in range(4)]
    assert all(one != other for one, other in itertools.combinations(passes, 2))
    assert passes == [order(again) for _ in range(4)]
    assert passes[0] != order(loader(seed=6))


def test_orders_are_uniform():
    # Each of 4 cells comes first in a quarter of 4000 passes: 1000 +- 5 standard deviations of 27.
    shuffled = loader(np.arange(4), 4, seed=0)
    first = np.bincount([order(shuffled)[0] for _ in range(4000)], minlength=4)
    assert np.abs(first - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


@given(n=st.integers(1, 200), n_batches=st.integers(1, 8), train_size=st.floats(0.01, 1), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_split(n, n_batches, train_size, seed):
    # Squares make the later batches small.
    batch = (np.random.default_rng(seed).random(n) ** 2 * n_batches).astype(int)
    training, validation = split(batch, train_size, np.random.default_rng(seed))
    np.testing.assert_array_equal(np.sort(np.r_[training, validation]), np.arange(n))
    # The nearest whole number, but two cells at least, without which batch normalisation has no variance.
    assert abs(len(training) - n * train_size) <= 0.5 or len(training) == min(n, 2)
    np.testing.assert_array_equal(training, np.sort(training))
    np.testing.assert_array_equal(validation, np.sort(validation))
    for code in np.unique(batch):
        share = (batch == code).sum() * len(validation) / n
        assert abs((batch[validation] == code).sum() - share) < 1 + 1e-9


@pytest.mark.parametrize("n", [1, 2, 3, 100])
def test_nothing_is_held_out_at_train_size_1(n):
    training, validation = split(np.zeros(n, int), 1, np.random.default_rng(0))
    assert training.tolist() == list(range(n))
    assert validation.tolist() == []


def test_split_draws_every_cell_alike():
    # 3 of 30 cells, 4000 times: each cell 400 times, +- 5 standard deviations, in batches however small.
    batch = np.repeat([0, 1, 2], [3, 24, 3])
    drawn = np.zeros(30)
    rng = np.random.default_rng(0)
    for _ in range(4000):
        drawn[split(batch, 0.9, rng)[1]] += 1
    assert np.abs(drawn - 400).max() < 5 * np.sqrt(4000 * 0.1 * 0.9)


def test_split_follows_the_seed():
    batch = np.repeat([0, 1], 50)
    one, same, other = (split(batch, 0.8, np.random.default_rng(seed))[1].tolist() for seed in (1, 1, 2))
    assert one == same != other
