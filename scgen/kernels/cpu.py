"""For CPUs, compiled by numba: rows of a sparse matrix, and the log-likelihoods of `reference`, fused, in float32.

Zeros, nine tenths of the entries, run through loops without branches, which the compiler vectorises. Non-zeros are put
right after that, one by one in float64 (their slopes but for the log-gamma part are float32), and up to a count of 16
without log-gamma functions. Value and gradient come from one pass.

With d = log mu - log theta and u = -theta softplus(d) - zi, a zero has log NB = -theta softplus(d) and log ZINB =
softplus(u) - softplus(-zi); every softplus and sigmoid is made of m = exp(-|x|) and log(1 + m).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numba import config, get_num_threads, njit, prange, set_num_threads
from scipy import sparse
from torch import Tensor
from torch.autograd.function import once_differentiable


def _can_cache() -> bool:
    """Say whether numba finds a folder that it may write compiled code to."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


# "numpy": division without a check for zero, which would keep loops from being vectorised.
COMPILED = {"error_model": "numpy", "fastmath": {"contract", "nsz", "arcp"}, "nogil": True, "cache": _can_cache()}
float32, float64, int32, int64 = np.float32, np.float64, np.int32, np.int64
ZERO, ONE, TWO = float32(0), float32(1), float32(2)

#: Up to here, ratios of gamma functions are products.
SMALL = 16.0
LOG_FACTORIAL = np.array([math.lgamma(k + 1) for k in range(int(SMALL) + 1)])


def poisson_log_prob(counts: Tensor, log_mu: Tensor) -> Tensor:
    """Return what the function of this name in `reference` returns."""
    shape = torch.broadcast_shapes(counts.shape, log_mu.shape)
    return _Poisson.apply(_rows(counts, shape), _rows(log_mu.expand(shape), shape)).reshape(shape)


def negative_binomial_log_prob(counts: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """Return what the function of this name in `reference` returns."""
    shape = torch.broadcast_shapes(counts.shape, log_mu.shape, log_theta.shape)
    parameters = _rows(log_mu.expand(shape), shape), _theta_rows(log_theta, shape)
    return _NegativeBinomial.apply(_rows(counts, shape), *parameters, None).reshape(shape)


def zero_inflated_negative_binomial_log_prob(
    counts: Tensor, log_mu: Tensor, log_theta: Tensor, zi_logits: Tensor
) -> Tensor:
    """Return what the function of this name in `reference` returns."""
    shape = torch.broadcast_shapes(counts.shape, log_mu.shape, log_theta.shape, zi_logits.shape)
    parameters = (
        _rows(log_mu.expand(shape), shape),
        _theta_rows(log_theta, shape),
        _rows(zi_logits.expand(shape), shape),
    )
    return _NegativeBinomial.apply(_rows(counts, shape), *parameters).reshape(shape)


def dense_rows(matrix: sparse.csr_matrix | sparse.csr_array, rows: np.ndarray) -> Tensor:
    """Return the rows of a CSR matrix, in the order asked for, as a dense float32 tensor (n, G)."""
    dense = np.empty((len(rows), matrix.shape[1]), float32)
    with _threads():
        _fill_rows(matrix.indptr, matrix.indices, matrix.data, rows, dense)
    return torch.from_numpy(dense)


def dense(rows: Tensor) -> Tensor:
    """Return a CSR tensor (n, G) as a dense one."""
    result = np.empty(rows.shape, float32)
    parts = (part.numpy() for part in (rows.crow_indices(), rows.col_indices(), rows.values()))
    with _threads():
        _fill_rows(*parts, np.arange(len(rows)), result)
    return torch.from_numpy(result)


def row_sums(matrix: sparse.csr_matrix | sparse.csr_array) -> np.ndarray:
    """Return the sum of each row, (n,) float64, added in float64."""
    sums = np.empty(matrix.shape[0])
    with _threads():
        _sum_rows(matrix.indptr, matrix.data, sums)
    return sums


@njit(parallel=True, **COMPILED)
def _sum_rows(indptr, data, sums):
    for i in prange(len(sums)):
        total = 0.0
        for k in range(indptr[i], indptr[i + 1]):
            total += float64(data[k])
        sums[i] = total


@njit(parallel=True, **COMPILED)
def _fill_rows(indptr, indices, data, rows, dense):
    for i in prange(len(rows)):
        out = dense[i]
        out[:] = ZERO
        for k in range(indptr[rows[i]], indptr[rows[i] + 1]):
            out[indices[k]] += float32(data[k])


@njit(inline="always", **COMPILED)
def _exp(x):
    """Return exp(x) to float32's precision, without a branch, for x within +-87 (outside, of +-87)."""
    x = max(min(x, float32(87)), float32(-87))
    n = np.floor(x * float32(1.4426950408889634) + float32(0.5))
    r = x - n * float32(0.693359375) + n * float32(2.12194440e-4)  # ln 2 in two parts
    p = float32(1 / 720)
    p = p * r + float32(1 / 120)
    p = p * r + float32(1 / 24)
    p = p * r + float32(1 / 6)
    p = p * r + float32(1 / 2)
    p = p * r * r + r + ONE
    return p * int32((int32(n) + int32(127)) << int32(23)).view(float32)


@njit(inline="always", **COMPILED)
def _log_ratio(m, k):
    """Return log((1 + m) / (1 + k)) for m and k in [0, 1], to float32's relative precision.

    It is 2 artanh of s = (m - k) / (2 + m + k), which is within a third of 0.
    """
    s = (m - k) / (TWO + m + k)
    q = s * s
    p = float32(2 / 13)
    p = p * q + float32(2 / 11)
    p = p * q + float32(2 / 9)
    p = p * q + float32(2 / 7)
    p = p * q + float32(2 / 5)
    p = p * q + float32(2 / 3)
    p = p * q + TWO
    return p * s


@njit(**COMPILED)
def _log_factorial(x):
    return LOG_FACTORIAL[int(x)] if x <= SMALL and x == math.floor(x) else math.lgamma(x + 1.0)


@njit(**COMPILED)
def _digamma(x):
    """Return the derivative of lgamma: the recurrence up to 8, then the asymptotic series."""
    below = 0.0
    while x < 8.0:
        below += 1.0 / x
        x += 1.0
    q = 1.0 / (x * x)
    return math.log(x) - 0.5 / x - q * (1 / 12 - q * (1 / 120 - q * (1 / 252 - q * (1 / 240 - q / 132)))) - below


@njit(**COMPILED)
def _log_rising(x, theta):
    """Return lgamma(x + theta) - lgamma(theta)."""
    if x > SMALL or x != math.floor(x):
        return math.lgamma(x + theta) - math.lgamma(theta)
    product, k = theta, 1.0
    while k < x:
        product *= theta + k
        k += 1.0
    return math.log(product)


@njit(**COMPILED)
def _rising_slope(x, theta):
    """Return the derivative of `_log_rising` by log theta."""
    if x > SMALL or x != math.floor(x):
        return theta * (_digamma(x + theta) - _digamma(theta))
    total, k = 1.0, 1.0
    while k < x:
        total += theta / (theta + k)
        k += 1.0
    return total


@njit(**COMPILED)
def _non_zero(x, log_mu, log_theta, theta, log1p_m):
    """Return log NB(x), where theta and log(1 + exp(-|d|)) come in float32, enough for small counts."""
    d = log_mu - log_theta
    if x > SMALL:
        theta, log1p_m = math.exp(log_theta), math.log1p(math.exp(-abs(d)))
    # x d - (x + theta) softplus(d), without a difference of large terms.
    power = -x * (max(-d, 0.0) + log1p_m) - theta * (max(d, 0.0) + log1p_m)
    return power + log_theta if x == 1.0 else power + _log_rising(x, theta) - _log_factorial(x)


@njit(parallel=True, **COMPILED)
def _poisson(counts, log_mu, gradient, value, d_log_mu):
    n_rows, n_genes = log_mu.shape
    for r in prange(n_rows):
        x, lm, v = counts[r % len(counts)], log_mu[r], value[r]
        for g in range(n_genes):
            v[g] = -_exp(lm[g])
        if gradient:
            dm = d_log_mu[r]
            for g in range(n_genes):
                dm[g] = x[g] + v[g]
        for g in range(n_genes):
            if x[g] != ZERO:
                wide, log_m = float64(x[g]), float64(lm[g])
                mu = math.exp(log_m) if wide > SMALL else -float64(v[g])
                v[g] = wide * log_m - mu - _log_factorial(wide)


@njit(parallel=True, **COMPILED)
def _negative_binomial(
    n_parts,
    counts,
    log_mu,
    log_theta,
    theta,
    zi_logits,
    inflated,
    gradient,
    value,
    d_log_mu,
    d_log_theta,
    d_zi_logits,
):
    n_rows, n_genes = log_mu.shape
    for index in prange(n_parts):
        part = int64(index)  # it is unsigned, and with signed numbers would become a float
        m, log1p_m, m_zero, m_zi, own = np.ones((5, n_genes), float32)
        for r in range(n_rows * part // n_parts, n_rows * (part + 1) // n_parts):
            x, lm, zi, v = counts[r % len(counts)], log_mu[r], zi_logits[r % len(zi_logits)], value[r]
            lt, t = log_theta[r % len(log_theta)], theta[r % len(theta)]
            for g in range(n_genes):
                d = lm[g] - lt[g]
                m[g] = _exp(-abs(d))
                log1p_m[g] = _log_ratio(m[g], ZERO)
                v[g] = -t[g] * (max(d, ZERO) + log1p_m[g])
            if inflated:
                for g in range(n_genes):
                    u = v[g] - zi[g]
                    m_zero[g], m_zi[g] = _exp(-abs(u)), _exp(-abs(zi[g]))
                    # max(u, 0) - max(-zi, 0), which would lose digits to a large zi
                    v[g] = (v[g] if u > ZERO else min(zi[g], ZERO)) + _log_ratio(m_zero[g], m_zi[g])
            if gradient:
                dm, dt, dz = d_log_mu[r], d_log_theta[r], d_zi_logits[r % len(d_zi_logits)]
                if inflated:
                    for g in range(n_genes):
                        d = lm[g] - lt[g]
                        u = -t[g] * (max(d, ZERO) + log1p_m[g]) - zi[g]
                        # The share of a zero that is the negative binomial's own; what is not zero is all its own.
                        own[g] = ONE if x[g] != ZERO else (ONE if u > ZERO else m_zero[g]) / (ONE + m_zero[g])
                        dz[g] = (m_zi[g] if zi[g] > ZERO else ONE) / (ONE + m_zi[g]) - own[g]
                for g in range(n_genes):
                    d = lm[g] - lt[g]
                    larger = ONE / (ONE + m[g])
                    sigmoid, rest = (larger, m[g] * larger) if d > ZERO else (m[g] * larger, larger)
                    dm[g] = x[g] * rest - own[g] * t[g] * sigmoid
                    dt[g] = own[g] * t[g] * (sigmoid - max(d, ZERO) - log1p_m[g]) - x[g] * rest
            for g in range(n_genes):
                if x[g] != ZERO:
                    wide = float64(x[g])
                    v[g] = _non_zero(wide, float64(lm[g]), float64(lt[g]), float64(t[g]), float64(log1p_m[g]))
                    if inflated:
                        v[g] -= max(zi[g], ZERO) + _log_ratio(m_zi[g], ZERO)
                    if gradient:
                        dt[g] += _rising_slope(wide, float64(t[g]))


@contextmanager
def _threads() -> Iterator[int]:
    """Within the block, let numba use as many threads as torch does; neither's setting is changed by it."""
    n_torch, n_numba = torch.get_num_threads(), get_num_threads()
    n_threads = min(n_torch, config.NUMBA_NUM_THREADS)
    set_num_threads(n_threads)
    if torch.get_num_threads() != n_torch:  # numba's first launch sets the number of the pool that they share
        torch.set_num_threads(n_torch)
    try:
        yield n_threads
    finally:
        set_num_threads(n_numba)


def _rows(values: Tensor, shape: torch.Size) -> Tensor:
    """Return ``values`` as rows of genes: those there are if they repeat along the first dimensions, else all."""
    if values.shape != shape[len(shape) - values.dim() :]:
        values = values.expand(shape)
    return values.reshape(-1, shape[-1]).contiguous()


def _theta_rows(log_theta: Tensor, shape: torch.Size) -> Tensor:
    """Return log theta as one row where it is a gene's own, else as all of them."""
    return log_theta[None] if log_theta.shape == shape[-1:] else _rows(log_theta.expand(shape), shape)


class _Poisson(torch.autograd.Function):
    """Counts (n, G) and log_mu (R, G), where R is a multiple of n; value and gradient are computed at once."""

    @staticmethod
    def forward(ctx, counts: Tensor, log_mu: Tensor) -> Tensor:
        gradient = ctx.needs_input_grad[1]
        value = torch.empty_like(log_mu)
        d_log_mu = torch.empty_like(log_mu) if gradient else value
        inputs = (tensor.detach().numpy() for tensor in (counts, log_mu))
        with _threads():
            _poisson(*inputs, gradient, value.numpy(), d_log_mu.numpy())
        ctx.save_for_backward(d_log_mu)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return None, grad * ctx.saved_tensors[0]


class _NegativeBinomial(torch.autograd.Function):
    """Counts (n, G), parameters (R, G), where R is a multiple of n; log_theta may be (1, G), zi_logits None."""

    @staticmethod
    def forward(ctx, counts: Tensor, log_mu: Tensor, log_theta: Tensor, zi_logits: Tensor | None) -> Tensor:
        inflated, gradient = zi_logits is not None, any(ctx.needs_input_grad)
        inputs = counts, log_mu, log_theta, log_theta.exp(), zi_logits if inflated else log_theta
        value = torch.empty_like(log_mu)
        slopes = [torch.empty_like(log_mu) for _ in range(2 + inflated)] if gradient else [value]
        inputs, outputs = ([t.detach().numpy() for t in tensors] for tensors in (inputs, (value, *slopes)))
        unused = outputs[-1:] * (4 - len(outputs))  # arrays that are not written
        with _threads() as n_threads:
            _negative_binomial(n_threads, *inputs, inflated, gradient, *outputs, *unused)
        ctx.save_for_backward(*slopes)
        ctx.one_theta = len(log_theta) == 1
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        d_log_mu, d_log_theta, *d_zi_logits = ctx.saved_tensors
        if ctx.one_theta and grad.stride(1) == 0:  # a sum over genes: one weight a row
            d_log_theta = grad[:, :1].T @ d_log_theta
        else:
            d_log_theta = (grad * d_log_theta).sum_to_size(1 if ctx.one_theta else len(grad), grad.shape[1])
        return None, grad * d_log_mu, d_log_theta, grad * d_zi_logits[0] if d_zi_logits else None
