"""The compiled kernels against the plain ones in float64, which scipy holds, and their gradients."""

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from scipy import sparse, special, stats
from torch.autograd import gradcheck

from scgen.kernels import dispatch, reference
from scgen.kernels.cpu import likelihood

KINDS = ["poisson", "negative binomial", "zero-inflated"]

pytestmark = pytest.mark.usefixtures("several_threads")


def inputs(kind, n_draws=1, theta_shape=(700,), normalised=True, seed=0):
    """Return counts (40, 700), with large and fractional ones among them, and the parameters of ``n_draws`` x 40."""
    rng = np.random.default_rng(seed)
    shape = (40, 700) if n_draws == 1 else (n_draws, 40, 700)
    logits, bias = rng.normal(0, 2, shape), rng.normal(-1, 1, 700)
    log_library = rng.normal(7 if normalised else 0, 1, (*shape[:-1], 1))
    log_rho = logits + bias - (special.logsumexp(logits + bias, -1, keepdims=True) if normalised else 0)
    counts = rng.poisson(np.exp(log_rho + log_library).reshape(-1, 40, 700)[0].clip(max=1e6)).astype(float)
    counts[0, :50] = 10 ** rng.uniform(1, 6, 50).round()
    counts[1, :20] = rng.uniform(0, 30, 20)
    log_theta, zi_logits, zi_bias = rng.normal(0, 2, theta_shape), rng.normal(0, 4, shape), rng.normal(0, 1, 700)
    zi_logits[..., 2, :6] = [1e6, -1e6, 90, -90, 0, 1e38]
    logits[..., 2, :4] = [-1e5, 8, -80, 5]
    n_parameters = 3 + KINDS.index(kind) + (kind == "zero-inflated")
    everything = [counts, logits, bias, log_library, log_theta, zi_logits, zi_bias][: 1 + n_parameters]
    return [torch.tensor(values, dtype=torch.float32) for values in everything]


def value_and_gradients(counts, parameters, weights, normalised):
    parameters = [values.detach().requires_grad_() for values in parameters]
    optional = [None] * (6 - len(parameters))
    value = dispatch.cells_log_prob(counts, *parameters, *optional, normalised)
    (value * weights).sum().backward()
    return value.detach(), [values.grad for values in parameters]


@pytest.fixture
def fused(monkeypatch):
    """Take note of the compiled kernel's calls."""
    calls, original = [], likelihood.cells_log_prob
    monkeypatch.setattr(likelihood, "cells_log_prob", lambda *args: calls.append(1) or original(*args))
    return calls


def close(ours, truth, tolerance=1e-5):
    """Compare with the largest of each: sums over cells and genes add the rounding of their terms."""
    assert (ours - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("weights", ["of the mean", "of each cell"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    ("n_draws", "theta_shape"), [(1, (700,)), (1, (40, 700)), (3, (700,)), (3, (40, 700)), (3, (3, 40, 700))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_plain_kernel_in_float64(
    kind, n_draws, theta_shape, normalised, weights, fused
):
    counts, *parameters = inputs(kind, n_draws, theta_shape, normalised)
    shape = parameters[0].shape[:-1]
    n = shape.numel()
    weight = torch.full(shape, -1 / n) if weights == "of the mean" else 0.1 + torch.arange(float(n)).view(shape)
    ours, gradients = value_and_gradients(counts, parameters, weight, normalised)
    assert fused
    wide = [values.double() for values in (counts, *parameters, weight)]
    truth, true_gradients = value_and_gradients(wide[0], wide[1:-1], wide[-1], normalised)
    assert ((ours - truth) / truth).abs().max() < 1e-5
    for one, other in zip(gradients, true_gradients, strict=True):
        assert one.shape == other.shape
        close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_logits(kind):
    counts, *parameters = inputs(kind)
    for i in {0, 4} & set(range(len(parameters))):
        parameters[i] = parameters[i].bfloat16()
    weight = torch.full((40,), -1 / 40)
    ours, gradients = value_and_gradients(counts, parameters, weight, True)
    wide = [values.double() for values in (counts, *parameters, weight)]  # the same numbers, which bfloat16 has
    truth, true_gradients = value_and_gradients(wide[0], wide[1:-1], wide[-1], True)
    assert ((ours - truth) / truth).abs().max() < 1e-5
    for one, other, parameter in zip(gradients, true_gradients, parameters, strict=True):
        assert one.dtype == parameter.dtype
        if parameter.dtype != torch.bfloat16:
            close(one, other)
            continue
        # Rounded to 8 bits, to the nearest: an error of half of the last at most, and none on average.
        assert ((one - other).abs() < 2**-8 * other.abs() + 1e-6 * other.abs().max()).all()
        assert (one / other - 1)[other.abs() > 1e-4 * other.abs().max()].mean().abs() < 2**-11


@pytest.mark.parametrize("kind", KINDS)
def test_plain_gradients_are_right(kind):  # the oracle of the tests above
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([[0.0, 1, 2, 30, 0.5, 0]], dtype=torch.float64)
    shapes = [(1, 6), (6,), (1, 1), (6,), (1, 6), (6,)][: 3 + KINDS.index(kind) + (kind == "zero-inflated")]
    parameters = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    assert gradcheck(lambda *p: reference.cells_log_prob(counts, *p), parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_scipy(kind):
    counts, *parameters = inputs(kind)
    ours = dispatch.cells_log_prob(counts, *parameters)
    x, logits, bias, log_library, *others = (values.double().numpy() for values in (counts, *parameters))
    mu = np.exp(log_library) * special.softmax(logits + bias, -1)
    if kind == "poisson":
        each = stats.poisson.logpmf(x, mu)
    else:
        theta = np.exp(others[0])
        each = stats.nbinom.logpmf(x, theta, theta / (theta + mu))
    if kind == "zero-inflated":
        pi = special.expit(others[1] + others[2])
        with np.errstate(divide="ignore"):
            each = np.where(x == 0, np.logaddexp(np.log(pi), np.log1p(-pi) + each), np.log1p(-pi) + each)
    rows = [i for i in range(40) if i not in (1, 2)]  # but for fractional counts, and values beyond scipy's range
    truth = each[rows].sum(1)
    assert np.abs(ours.numpy()[rows] / truth - 1).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_stays_so(kind):
    n = len(inputs(kind))
    for i in range(n):
        values = inputs(kind)
        at = (slice(None), 0) if i == 3 else (..., 7)  # the library has one column
        values[i][at] = torch.nan
        assert dispatch.cells_log_prob(*values).isnan().all()
    values = inputs(kind)
    values[1][5, 3] = torch.nan
    assert dispatch.cells_log_prob(*values).isnan().sum() == 1


def test_the_number_of_threads_changes_neither_values_nor_torch():
    before = torch.get_num_threads()
    values = inputs(KINDS[2])
    results = []
    for n_threads in (1, before):
        torch.set_num_threads(n_threads)
        results.append(dispatch.cells_log_prob(*values))
        assert torch.get_num_threads() == n_threads
    assert torch.equal(*results)


def test_threads_in_a_fresh_process():
    code = """
        import numba, torch
        torch.set_num_threads(1)
        from scgen.kernels.cpu.likelihood import cells_log_prob
        cells_log_prob(torch.ones(4, 9), torch.ones(4, 9), torch.ones(9), torch.ones(4), *[None] * 3, True, None)
        print(torch.get_num_threads(), numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "True"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint16", "int64", "bool"])
@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array])
def test_rows_of_sparse_matrices(kind, dtype):
    rng = np.random.default_rng(0)
    dense = (rng.poisson(1, (200, 300)) * (rng.random((200, 300)) < 0.2)).astype(dtype)
    rows = rng.integers(0, 200, 100)
    result = dispatch.dense_rows(kind(dense), rows)
    assert result.dtype == torch.float32
    np.testing.assert_array_equal(result.numpy(), dense[rows].astype("float32"))


def test_an_entry_stored_twice_counts_twice():
    matrix = sparse.csr_matrix((np.ones(3, "f"), np.array([1, 1, 0]), np.array([0, 2, 3])), shape=(2, 9000))
    np.testing.assert_array_equal(dispatch.dense_rows(matrix, np.array([0, 1]))[:, :2].numpy(), [[0, 2], [1, 0]])


@pytest.mark.parametrize("theta_shape", [(700,), (40, 700)])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_gradients_of_small_counts(kind, theta_shape):
    # Beside those of a million, whose slopes are as large, a count of 2 would not be noticed.
    counts, *parameters = inputs(kind, theta_shape=theta_shape)
    counts = torch.from_numpy(
        np.random.default_rng(1).poisson(0.3 * 1.02 ** np.arange(700) / 2, (40, 700)).clip(max=20)
    )
    assert len(counts.unique()) == 21
    parameters[2][:] = 7  # libraries
    if kind == KINDS[2]:
        parameters[4].clamp_(-10, 10)
    weights = torch.full((40,), -1 / 40)
    _, ours = value_and_gradients(counts.float(), parameters, weights, True)
    wide = [values.double() for values in (counts, *parameters, weights)]
    _, truth = value_and_gradients(wide[0], wide[1:-1], wide[-1], True)
    for one, other in zip(ours, truth, strict=True):
        assert ((one - other).abs() <= 1e-4 * other.abs() + 1e-6).all()


def as_csr(counts, dtype=np.int32):
    """Return counts as CSR, with some of their zeros stored."""
    kept = sparse.csr_array((counts != 0).numpy() | (np.random.default_rng(0).random(counts.shape) < 0.05))
    values = counts[kept.nonzero()].contiguous()
    ends, genes = (torch.from_numpy(part.astype(dtype)) for part in (kept.indptr, kept.indices))
    return torch.sparse_csr_tensor(ends, genes, values, counts.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_counts_are_the_dense_ones(kind, fused):
    counts, *parameters = inputs(kind, n_draws=3)
    weights = torch.full((3, 40), -1 / 120)
    optional = [None] * (6 - len(parameters))
    with torch.no_grad():
        assert torch.equal(
            dispatch.cells_log_prob(as_csr(counts), *parameters, *optional),
            dispatch.cells_log_prob(counts, *parameters, *optional),
        )
    # Columns out of order would have the kernel write where it must not.
    of_int64 = as_csr(counts, np.int64)
    reversed_rows = [slice(*ends) for ends in itertools.pairwise(of_int64.crow_indices().tolist())]
    genes, values = (
        torch.cat([part[rows].flip(0) for rows in reversed_rows])
        for part in (of_int64.col_indices(), of_int64.values())
    )
    disordered = torch.sparse_csr_tensor(of_int64.crow_indices(), genes, values, counts.shape, check_invariants=False)
    plain = dispatch.cells_log_prob(counts, *parameters, *optional)
    for form in (of_int64, disordered):
        assert torch.equal(dispatch.cells_log_prob(form, *parameters, *optional), plain)
    dense, sparse_ones = (value_and_gradients(some, parameters, weights, True) for some in (counts, as_csr(counts)))
    assert len(fused) == 7
    for one, other in zip(dense[1], sparse_ones[1], strict=True):
        assert torch.equal(one, other)
    # What the fused kernel does not know is made dense.
    wide = [values.double() for values in parameters]
    truth = reference.cells_log_prob(counts.double(), *wide)
    assert torch.equal(dispatch.cells_log_prob(as_csr(counts.double()), *wide), truth)


@pytest.mark.parametrize("form", [torch.clone, as_csr], ids=["dense", "csr"])
def test_log1p(form):
    values = np.concatenate([np.arange(3000), np.logspace(-9, 8, 5000), [1 / 3, 1e30], np.zeros(12_000)])
    counts = torch.tensor(np.random.default_rng(0).permutation(values)[:20_000], dtype=torch.float32).view(40, 500)
    truth = np.log1p(counts.double().numpy())
    ours = dispatch.log1p(form(counts), torch.float32)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), truth, rtol=2.5e-7, atol=0)
    reduced = dispatch.log1p(form(counts), torch.bfloat16)
    assert torch.equal(reduced, torch.from_numpy(truth).float().bfloat16())
    assert torch.equal(dispatch.log1p(form(counts.double()), torch.float64), torch.log1p(counts.double()))
    assert dispatch.log1p(form(torch.full((40, 500), torch.nan)), torch.float32).isnan().all()


def test_dispatch(monkeypatch):
    values = inputs(KINDS[0])
    fused = dispatch.cells_log_prob(*values)
    monkeypatch.setenv("SCGEN_KERNELS", "reference")
    plain = dispatch.cells_log_prob(*values)
    assert torch.equal(plain, reference.cells_log_prob(*values))
    assert not torch.equal(fused, plain)  # or the line above says nothing
    monkeypatch.delenv("SCGEN_KERNELS")
    wide = [value.double() for value in values]
    assert torch.equal(dispatch.cells_log_prob(*wide), reference.cells_log_prob(*wide))


def test_a_backward_without_the_expected_weights_or_a_second_time():
    counts, *parameters = inputs(KINDS[2])
    parameters = [values.requires_grad_() for values in parameters]
    value = dispatch.cells_log_prob(counts, *parameters)
    weights = torch.full((40,), -1 / 40), torch.linspace(0.1, 2, 40), torch.full((40,), -1 / 40)
    gradients = [torch.autograd.grad((value * w).sum(), parameters, retain_graph=True) for w in weights]
    wide = [values.detach().double() for values in (counts, *parameters)]
    for weight, ours in zip(weights, gradients, strict=True):
        _, truth = value_and_gradients(wide[0], wide[1:], weight.double(), True)
        for one, other in zip(ours, truth, strict=True):
            close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_kernel_does_not_know_is_left_to_the_plain_one(kind, fused):
    counts, *parameters = inputs(kind)
    several = counts.expand(2, 40, 700)  # counts of two draws
    wide = [values.double() for values in (several, *parameters)]
    truth = reference.cells_log_prob(*wide)
    assert ((dispatch.cells_log_prob(several, *parameters) / truth - 1).abs() < 1e-5).all()
    narrow = [values.bfloat16() for values in parameters]
    assert dispatch.cells_log_prob(counts, *narrow).isfinite().all()
    assert not fused


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="without workers there is one process")
def test_workers_compile_into_folders_of_their_own():
    folder = Path(numba.config.CACHE_DIR)
    if not folder.parent.name.startswith("scgen-kernels-"):
        pytest.skip("NUMBA_CACHE_DIR was set by hand")
    assert folder.name == os.environ["PYTEST_XDIST_WORKER"]
