"""The compiled kernels against the plain ones in float64, which scipy holds, and their gradients."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from scipy import sparse, stats
from torch.autograd import gradcheck

from scgen.kernels import cpu, dispatch, reference

NAMES = ["poisson", "negative_binomial", "zero_inflated_negative_binomial"]


def inputs(name, shape=(40, 300), theta_shape=(300,), seed=0):
    """Return counts, with large and fractional ones among them, and the parameters."""
    rng = np.random.default_rng(seed)
    log_mu = rng.normal(-1, 2, shape)
    log_theta = rng.normal(0, 2, theta_shape)
    counts = rng.poisson(np.exp(log_mu.reshape(-1, *shape[-2:])[0])).astype(float)
    counts[0, :50] = 10 ** rng.uniform(1, 6, 50).round()
    log_mu[..., 0, :50] = np.log(counts[0, :50]) + rng.normal(0, 0.1, 50)
    counts[1, :20] = rng.uniform(0, 30, 20)
    zi_logits = rng.normal(0, 4, shape)
    log_mu[..., 2, :6], zi_logits[..., 2, :6] = [-1e5, 18.5, -80, 5, -20, 0], [1e6, -1e6, 90, -90, 0, 3e38]
    everything = [torch.tensor(values, dtype=torch.float32) for values in (counts, log_mu, log_theta, zi_logits)]
    return everything[: 2 + NAMES.index(name)]


def both(name):
    return getattr(cpu, f"{name}_log_prob"), getattr(reference, f"{name}_log_prob")


def close(ours, truth, tolerance=2e-5):
    scale = truth.abs().clamp(min=1)
    assert ((ours - truth).abs() / scale).max() < tolerance


@pytest.mark.parametrize("weights", ["rows", "entries"])
@pytest.mark.parametrize(
    ("shape", "theta_shape"),
    [((40, 300), (300,)), ((40, 300), (40, 300)), ((3, 40, 300), (300,)), ((3, 40, 300), (40, 300))],
)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_plain_kernel_in_float64(name, shape, theta_shape, weights):
    fused, plain = both(name)
    counts, *parameters = inputs(name, shape, theta_shape)
    narrow = [values.requires_grad_() for values in parameters]
    wide = [values.detach().double().requires_grad_() for values in parameters]
    ours, truth = fused(counts, *narrow), plain(counts.double(), *wide)
    close(ours, truth)
    weight = torch.from_numpy(np.random.default_rng(1).normal(size=shape)).float()
    if weights == "rows":
        weight = weight[..., :1]
    (ours * weight).sum(-1).sum().backward()
    (truth * weight.double()).sum(-1).sum().backward()
    for one, other in zip(narrow, wide, strict=True):
        # Sums over cells add rounding of their terms, which the largest bounds.
        close(one.grad, other.grad, 2e-5 if one.grad.shape == shape else 1e-6 * float(other.grad.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_plain_gradients_are_right(name):  # the oracle of the test above
    _, plain = both(name)
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([[0.0, 1, 2, 30, 0.5, 0]], dtype=torch.float64)
    parameters = [torch.randn(1, 6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    assert gradcheck(lambda *p: plain(counts, *p), parameters[: 1 + NAMES.index(name)])


def test_values_are_those_of_scipy():
    counts, log_mu, log_theta, zi_logits = inputs(NAMES[2])
    keep = (counts == counts.round()) & (log_mu > -30) & (zi_logits.abs() < 80)
    x, mu, theta, pi = (
        values.double().numpy()
        for values in (counts, log_mu.double().exp(), log_theta.double().exp(), torch.sigmoid(zi_logits.double()))
    )
    nb = stats.nbinom.logpmf(x, theta, theta / (theta + mu))
    zinb = np.where(x == 0, np.log(pi + (1 - pi) * np.exp(nb)), np.log1p(-pi) + nb)
    for ours, truth in (
        (cpu.poisson_log_prob(counts, log_mu), stats.poisson.logpmf(x, mu)),
        (cpu.negative_binomial_log_prob(counts, log_mu, log_theta), nb),
        (cpu.zero_inflated_negative_binomial_log_prob(counts, log_mu, log_theta, zi_logits), zinb),
    ):
        close(ours[keep].double(), torch.from_numpy(truth)[keep])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_number_stays_so(name):
    fused, _ = both(name)
    for i in range(2 + NAMES.index(name)):
        values = inputs(name)
        values[i][..., 7] = torch.nan
        value = fused(*values)
        assert value[:, 7].isnan().all()
        assert value[:, 8].isfinite().all()


def test_the_number_of_threads_changes_neither_values_nor_torch():
    before = torch.get_num_threads()
    values = inputs(NAMES[2])
    results = []
    for n_threads in (1, before):
        torch.set_num_threads(n_threads)
        results.append(cpu.zero_inflated_negative_binomial_log_prob(*values))
        assert torch.get_num_threads() == n_threads
    assert torch.equal(*results)


def test_threads_in_a_fresh_process():
    code = """
        import numba, torch
        torch.set_num_threads(1)
        from scgen.kernels import cpu
        cpu.poisson_log_prob(torch.ones(4, 9), torch.ones(4, 9))
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


def test_dispatch(monkeypatch):
    counts, log_mu = (values.repeat(3, 1) for values in inputs(NAMES[0]))
    fused = dispatch.poisson_log_prob(counts, log_mu)
    assert torch.equal(fused, cpu.poisson_log_prob(counts, log_mu))
    monkeypatch.setenv("SCGEN_KERNELS", "reference")
    assert torch.equal(dispatch.poisson_log_prob(counts, log_mu), reference.poisson_log_prob(counts, log_mu))
    monkeypatch.delenv("SCGEN_KERNELS")
    wide = dispatch.poisson_log_prob(counts.double(), log_mu.double())
    assert torch.equal(wide, reference.poisson_log_prob(counts.double(), log_mu.double()))
    assert not torch.equal(fused, reference.poisson_log_prob(counts, log_mu))  # or the lines above say nothing
