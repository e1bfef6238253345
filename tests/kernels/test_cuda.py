"""The kernels for CUDA against the plain ones in float64, and against mpmath: on a GPU, or by Triton's interpreter."""

import os
import subprocess
import sys
import textwrap

import mpmath
import numpy as np
import pytest
import torch
from scipy import sparse, special

from scgen.kernels import dispatch, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
triton = pytest.importorskip("triton", reason="Triton is not installed: it comes with torch's CUDA builds")
if DEVICE == "cpu" and isinstance(triton.language.sum, triton.JITFunction):
    pytest.skip("Triton was imported by something else, not as an interpreter", allow_module_level=True)
from scgen.kernels.cuda import likelihood, rows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of branches not taken
KINDS = ["poisson", "negative binomial", "zero-inflated"]
N, G = 9, 70


@pytest.fixture(params=[False, True], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
    """Let genes and entries be more than a block of them, as they are in earnest, or fewer."""
    if request.param:
        monkeypatch.setattr(likelihood, "ROW_BLOCK", 32)
        monkeypatch.setattr(likelihood, "COLUMN_BLOCK", 32)
        monkeypatch.setattr(rows, "ENTRY_BLOCK", 16)


def inputs(kind, n_draws=1, n_thetas=1, normalised=True):
    """Return counts (9, 70), large and fractional ones among them, and the parameters of ``n_draws`` x 9 rows."""
    rng = np.random.default_rng(0)
    n = n_draws * N
    logits, bias, log_library = rng.normal(0, 2, (n, G)), rng.normal(-1, 1, G), rng.normal(6 if normalised else 0, 1, n)
    log_rho = logits + bias - (special.logsumexp(logits + bias, -1, keepdims=True) if normalised else 0)
    counts = rng.poisson(np.exp(log_rho + log_library[:, None])[:N].clip(max=1e6)).astype(float)
    counts[0, :40] = 10 ** rng.uniform(1, 6, 40).round()
    counts[1, :20] = rng.uniform(0, 30, 20)
    log_theta, zi_logits, zi_bias = rng.normal(0, 2, (n_thetas, G)), rng.normal(0, 4, (n, G)), rng.normal(0, 1, G)
    zi_logits[2, :6], logits[2, :4] = [1e6, -1e6, 90, -90, 0, 1e38], [-1e5, 8, -80, 5]
    everything = [counts, logits, bias, log_library, log_theta, zi_logits, zi_bias]
    kept = len(everything[: 4 + KINDS.index(kind) + (kind == KINDS[2])])
    return [torch.tensor(v, dtype=torch.float32, device=DEVICE) if i < kept else None for i, v in enumerate(everything)]


def truth(some, weights, normalised):
    """Return the plain kernel's values and gradients in float64; rows of draws and thetas are matched as documented."""
    counts, *parameters = (None if values is None else values.detach().double() for values in some)
    logits, bias, log_library, log_theta, zi_logits, zi_bias = parameters
    for values in parameters:
        _ = values is None or values.requires_grad_()
    rows = torch.arange(len(logits), device=DEVICE)
    value = reference.cells_log_prob(
        counts[rows % N],
        logits,
        bias,
        log_library[:, None],
        None if log_theta is None else log_theta[rows % len(log_theta)],
        zi_logits,
        zi_bias,
        normalised,
    )
    (value * weights.double()).sum().backward()
    return value.detach(), [None if values is None else values.grad for values in parameters]


def close(ours, true, tolerance=3e-6):
    """Compare with the largest of each: sums over cells and genes add the rounding of their terms."""
    assert (ours - true).abs().max() <= tolerance * true.abs().max()


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    ("n_draws", "n_thetas", "blocks"),
    [(1, 1, False), (1, N, True), (2, 1, True), (2, N, False), (2, 2 * N, True)],
    indirect=["blocks"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_plain_kernel_in_float64(kind, n_draws, n_thetas, normalised, blocks):
    some = inputs(kind, n_draws, n_thetas, normalised)
    weights = 0.1 + torch.arange(float(n_draws * N), device=DEVICE)
    value, slopes = likelihood.cells_log_prob(*some, normalised, weights)
    true_value, true_slopes = truth(some, weights, normalised)
    assert value.dtype == torch.float32
    assert ((value - true_value) / true_value).abs().max() < 3e-6
    for ours, true in zip(slopes, true_slopes, strict=True):
        assert (ours is None) == (true is None)
        if true is not None:
            assert ours.shape == true.shape
            close(ours, true)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_logits(kind):
    some = inputs(kind)
    for i in (1, 5):
        some[i] = None if some[i] is None else some[i].bfloat16()
    weights = torch.full((N,), -1 / N, device=DEVICE)
    value, slopes = likelihood.cells_log_prob(*some, True, weights)
    true_value, true_slopes = truth(some, weights, True)
    assert ((value - true_value) / true_value).abs().max() < 3e-6
    for ours, true, given in zip(slopes, true_slopes, some[1:], strict=True):
        if true is None:
            continue
        assert ours.dtype == given.dtype
        if ours.dtype == torch.bfloat16:
            # Rounded to 8 bits: by GPUs to the nearest, as the test of what is compiled holds; the interpreter cuts.
            rounding = 2**-8 if DEVICE == "cuda" else 2**-7
            assert ((ours - true).abs() < rounding * true.abs() + 1e-6 * true.abs().max()).all()
        else:
            close(ours, true)


def exact(x, log_mu, log_theta):
    """Return log NB(x), or Poisson's without ``log_theta``, and its slopes by log mu and log theta, by mpmath."""
    with mpmath.workdps(50):
        x, mu = mpmath.mpf(x), mpmath.exp(mpmath.mpf(log_mu))
        if log_theta is None:
            return x * mpmath.log(mu) - mu - mpmath.loggamma(x + 1), x - mu
        t = mpmath.exp(mpmath.mpf(log_theta))
        value = mpmath.loggamma(x + t) - mpmath.loggamma(t) - mpmath.loggamma(x + 1)
        value += x * mpmath.log(mu / (t + mu)) + t * mpmath.log(t / (t + mu))
        by_theta = mpmath.digamma(x + t) - mpmath.digamma(t) + mpmath.log(t / (t + mu)) + 1 - (x + t) / (t + mu)
        return value, (x - mu) * t / (t + mu), t * by_theta


@pytest.mark.parametrize("kind", KINDS[:2])
def test_single_counts_keep_their_digits(kind):
    rng = np.random.default_rng(0)
    n = 300
    x = np.r_[np.floor(10 ** rng.uniform(0, 6, n // 2)), 10 ** rng.uniform(-4, 1.5, n - n // 2 - 30), np.zeros(30)]
    near = np.log(np.maximum(x, 1)) + rng.normal(0, 1, n) * 10 ** rng.uniform(-4, 1, n)
    log_mu = np.where(rng.random(n) < 0.7, near, rng.uniform(-60, 18, n)).clip(-60, 18)
    columns = [x, log_mu, rng.uniform(-18.4, 18.4, n)]
    x, log_mu, log_theta = (torch.tensor(values, dtype=torch.float32, device=DEVICE)[:, None] for values in columns)
    if kind == KINDS[0]:
        log_theta = None
    nothing = torch.zeros(1, device=DEVICE), torch.zeros(n, device=DEVICE)
    ones = torch.ones(n, device=DEVICE)
    value, slopes = likelihood.cells_log_prob(x, log_mu, *nothing, log_theta, None, None, False, ones)
    rows = zip(x.tolist(), log_mu.tolist(), [[None]] * n if log_theta is None else log_theta.tolist(), strict=True)
    true = np.array([[float(part) for part in exact(a, b, c)] for (a,), (b,), (c,) in rows])
    scale = np.maximum(1, np.abs(true[:, 0]))
    # A float32 log mu near log 1e6 is itself off by 5e-7, which changes log p by as much times the slope.
    size = 2e-6 * np.abs(true[:, 1])
    assert (np.abs(value.double().cpu().numpy() - true[:, 0]) < 1e-5 * scale + size).all()
    steepness = np.abs(true[:, 1]) + x.double().cpu().numpy()[:, 0]
    assert (np.abs(slopes[0].double().cpu().numpy()[:, 0] - true[:, 1]) < 3e-6 * (1 + steepness)).all()
    if log_theta is not None:
        error = np.abs(slopes[3].double().cpu().numpy()[:, 0] - true[:, 2])
        assert (error < 3e-5 * np.maximum(1, np.abs(true[:, 2]))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_stays_so(kind):
    for i in range(sum(values is not None for values in inputs(kind))):
        some = inputs(kind)
        some[i][..., 0 if i == 3 else 7] = torch.nan
        value = likelihood.cells_log_prob(*some, True, None)[0]
        assert value.isnan().all() if i != 3 else value.isnan().tolist() == [True] + [False] * (N - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_of_any_weights_and_a_second_time(kind):
    some = inputs(kind)
    parameters = [None if values is None else values.requires_grad_() for values in some[1:]]
    value = dispatch._CellsLogProbOnCuda.apply(likelihood, True, some[0], *parameters)
    present = [values for values in parameters if values is not None]
    for weights in (torch.full((N,), -1 / N, device=DEVICE), 0.1 + torch.arange(float(N), device=DEVICE)):
        ours = torch.autograd.grad(value, present, weights, retain_graph=True)
        true = [slope for slope in truth(some, weights, True)[1] if slope is not None]
        for one, other in zip(ours, true, strict=True):
            close(one, other)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_rows_of_a_matrix_on_the_device(dtype, blocks):
    rng = np.random.default_rng(0)
    dense = (rng.integers(1, 200, (30, G)) * (rng.random((30, G)) < 0.3)).astype(dtype)
    dense[[0, 7, 29]] = 0
    matrix, asked = sparse.csr_array(dense), np.array([29, 3, 3, 0, 11, 28, 7])
    parts = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data, asked
    ours = rows.dense_rows(*(torch.from_numpy(part).to(DEVICE) for part in parts), G)
    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours.cpu().numpy(), dense[asked].astype(np.float32))
    assert rows.dense_rows(*(torch.from_numpy(part).to(DEVICE) for part in (*parts[:3], asked[:0])), G).shape == (0, G)


def test_the_kernels_compile_for_gpus():
    # To machine code, by Triton and ptxas, which need no GPU: the interpreter takes more than the compiler does.
    code = """
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from scgen.kernels.cuda import likelihood, rows

        def check(kernel, pointers, **constants):
            kinds = {"logits": "*bf16", "zi_logits": "*bf16", "d_logits": "*bf16", "d_zi_logits": "*bf16"} | pointers
            kinds |= {name: "i32" for name in kernel.arg_names if name.startswith("n_")}
            kinds |= dict.fromkeys(constants, "constexpr")
            signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
            made = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
            assert len(made.asm["cubin"]) > 1000
            assert ".f64" not in made.asm["ptx"]
            assert "atom" not in made.asm["ptx"]
            return made.asm["ptx"]

        for kind in (0, 2):
            for slope in (False, True):
                check(likelihood._sum_over_genes, {}, KIND=kind, NORMALISED=True, SLOPE=slope, BLOCK=1024)
            assert "cvt.rn.bf16" in check(likelihood._slopes, {}, KIND=kind, NORMALISED=True, ROWS=16, BLOCK=256)
        check(rows._fill_rows, {"indptr": "*i64", "indices": "*i32", "values": "*u8", "rows": "*i64"}, BLOCK=256)
        print("done")
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["done"], done.stderr
