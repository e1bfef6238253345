"""For CPUs, compiled by numba: log p(counts) of whole cells, and its gradient, in float32.

A row of genes goes through small loops over blocks that stay in the innermost cache; nothing of the size of the
minibatch is written but the gradients themselves. Zeros, nine tenths of the entries, run through loops without
branches, which the compiler vectorises. Non-zeros are put right after that, one by one in float64 (their slopes but
for the log-gamma part are float32), and up to a count of 16 without log-gamma functions.

With d = log mu - log theta and u = -theta softplus(d) - zi, a zero has log NB = -theta softplus(d) and log ZINB =
softplus(u) - softplus(-zi); every softplus and sigmoid is made of m = exp(-|x|) and log(1 + m).
"""

import math

import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload
from torch import Tensor

from scgen.kernels.functions import SMALL, exp, log_factorial, non_zero, rising_slope, twice_artanh
from scgen.kernels.rows import COMPILED, threads

float32, float64, int64, uint16, uint32 = np.float32, np.float64, np.int64, np.uint16, np.uint32
ZERO, ONE, TWO = float32(0), float32(1), float32(2)
POISSON, NEGATIVE_BINOMIAL, ZERO_INFLATED = range(3)

#: Genes at a time: what the loops keep of so many fits into the innermost cache.
BLOCK = 512


def cells_log_prob(
    counts: Tensor,
    logits: Tensor,
    bias: Tensor,
    log_library: Tensor,
    log_theta: Tensor | None,
    zi_logits: Tensor | None,
    zi_bias: Tensor | None,
    normalised: bool,
    weights: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the values of `reference.cells_log_prob`, (R,), and the gradient of their sum by each parameter.

    Parameters
    ----------
    counts, logits, bias, log_library, log_theta, zi_logits, zi_bias, normalised
        As there, contiguous; the logits float32 or bfloat16, all else float32.
    weights
        (R,) weights of the values in that sum; None leaves the gradient out.
    """
    gradient, n_rows, n_genes = weights is not None, *logits.shape
    kind = POISSON if log_theta is None else NEGATIVE_BINOMIAL if zi_logits is None else ZERO_INFLATED
    inflated = kind == ZERO_INFLATED
    nothing, nothing_of_logits = counts.new_empty(1, n_genes), logits[:1]
    value = counts.new_empty(n_rows)
    d_library = counts.new_empty(n_rows)
    with threads() as n_parts:
        # Sums over cells are taken by each thread for itself.
        sums = counts.new_zeros(3, n_parts, n_genes) if gradient else nothing.expand(3, 1, n_genes).contiguous()
        d_bias, d_zi_bias, d_theta = sums
        d_logits = torch.empty_like(logits) if gradient else nothing_of_logits
        d_zi_logits = torch.empty_like(zi_logits) if gradient and inflated else nothing_of_logits
        if gradient and kind != POISSON and len(log_theta) > 1:
            d_theta = counts.new_zeros(n_rows, n_genes)
        inputs = (
            counts,
            logits,
            bias,
            log_library,
            nothing if kind == POISSON else log_theta,
            nothing if kind == POISSON else log_theta.exp(),
            zi_logits if inflated else nothing_of_logits,
            zi_bias if inflated else bias,
            weights if gradient else value,
        )
        outputs = value, d_logits, d_bias, d_library, d_theta, d_zi_logits, d_zi_bias
        _cells(n_parts, kind, normalised, gradient, *map(_array, inputs), *map(_array, outputs))
    if not gradient:
        return value, ()
    if kind != POISSON:
        d_theta = d_theta.sum(0, keepdim=True) if len(log_theta) == 1 else d_theta.view(-1, *log_theta.shape).sum(0)
    return value, (
        d_logits,
        d_bias.sum(0),
        d_library,
        None if kind == POISSON else d_theta,
        d_zi_logits if inflated else None,
        d_zi_bias.sum(0) if inflated else None,
    )


def _array(tensor: Tensor) -> np.ndarray:
    """Return the tensor's own memory; numpy has no bfloat16, which therefore comes as its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


@njit(parallel=True, **COMPILED)
def _cells(
    n_parts,
    kind,
    normalised,
    gradient,
    counts,
    logits,
    bias,
    log_library,
    log_theta,
    theta,
    zi_logits,
    zi_bias,
    weights,
    value,
    d_logits,
    d_bias,
    d_library,
    d_theta,
    d_zi_logits,
    d_zi_bias,
):
    (n_rows, n_genes), inflated = logits.shape, kind == ZERO_INFLATED
    for index in prange(n_parts):
        part = int64(index)  # it is unsigned, and with signed numbers would become a float
        # One by one: the parts of an unpacked array count as not contiguous, and their loops do not become vectors.
        log_mu, share, d_mu = np.empty(n_genes, float32), np.zeros(n_genes, float32), np.empty(n_genes, float32)
        v, d_lt = np.empty(BLOCK, float32), np.empty(BLOCK, float32)
        zi, dz = np.empty(BLOCK, float32), np.empty(BLOCK, float32)
        room = np.empty((8, BLOCK), float32)
        for r in range(n_rows * part // n_parts, n_rows * (part + 1) // n_parts):
            w = weights[r]
            _add(logits[r], bias, log_mu)
            shift, scale = log_library[r], ZERO
            if normalised:
                largest = _largest(log_mu)
                _exponentials(log_mu, largest, share)
                total = _sum(share)
                shift, scale = shift - largest - float32(math.log(total)), float32(1 / total)
            _shift(log_mu, shift)
            sum_of_values = 0.0
            for start in range(0, n_genes, BLOCK):
                stop = min(start + BLOCK, n_genes)
                n = stop - start
                x, lm, dm = counts[r % len(counts)][start:stop], log_mu[start:stop], d_mu[start:stop]
                if kind == POISSON:
                    _poisson(x, lm, v[:n], dm)
                else:
                    row = r % len(log_theta)
                    lt, t = log_theta[row][start:stop], theta[row][start:stop]
                    if inflated:
                        _add(zi_logits[r][start:stop], zi_bias[start:stop], zi[:n])
                    _negative_binomial(x, lm, lt, t, zi[:n], inflated, gradient, v[:n], dm, d_lt[:n], dz[:n], room)
                    if gradient:
                        _accumulate(w, d_lt[:n], d_theta[part if len(log_theta) == 1 else r][start:stop])
                        if inflated:
                            _store(w, dz[:n], d_zi_logits[r][start:stop], d_zi_bias[part][start:stop])
                sum_of_values += _sum(v[:n])
            value[r] = sum_of_values
            if gradient:
                slope = float32(_sum(d_mu))
                d_library[r] = w * slope
                _subtract(d_mu, share, scale * slope)
                _store(w, d_mu, d_logits[r], d_bias[part])


@njit(**COMPILED)
def _negative_binomial(x, lm, lt, t, zi, inflated, gradient, v, dm, dt, dz, room):
    """Write log NB or ZINB, and its slopes by log mu, log theta and zi, of some genes of one cell.

    The loops are many because a compiler that cannot tell which arrays overlap gives up on more than some in one.
    """
    n_genes = len(x)
    d, m, log1p_m, larger = room[0][:n_genes], room[1][:n_genes], room[2][:n_genes], room[3][:n_genes]
    own, m_zero, m_zi, inverse = room[4][:n_genes], room[5][:n_genes], room[6][:n_genes], room[7][:n_genes]
    for g in range(n_genes):
        d[g] = lm[g] - lt[g]
        m[g] = exp(-abs(d[g]))
    for g in range(n_genes):
        product = ONE / ((ONE + m[g]) * (TWO + m[g]))
        log1p_m[g] = twice_artanh(m[g] * (ONE + m[g]) * product)
        larger[g] = (TWO + m[g]) * product
    for g in range(n_genes):
        v[g] = -t[g] * (max(d[g], ZERO) + log1p_m[g])
    if inflated:
        for g in range(n_genes):
            m_zero[g], m_zi[g] = exp(-abs(v[g] - zi[g])), exp(-abs(zi[g]))
        for g in range(n_genes):
            a, b = ONE + m_zero[g], ONE + m_zi[g]
            inverse[g] = ONE / (a * b * (a + b))
        if gradient:
            for g in range(n_genes):
                b = ONE + m_zi[g]
                # The share of a zero that is the negative binomial's own; what is not zero is all its own.
                share = (ONE if v[g] > zi[g] else m_zero[g]) * (b * (ONE + m_zero[g] + b) * inverse[g])
                own[g] = ONE if x[g] != ZERO else share
            for g in range(n_genes):
                a = ONE + m_zero[g]
                dz[g] = (m_zi[g] if zi[g] > ZERO else ONE) * (a * (a + ONE + m_zi[g]) * inverse[g]) - own[g]
        for g in range(n_genes):
            # max(u, 0) - max(-zi, 0), which would lose digits to a large zi
            larger_term = v[g] if v[g] > zi[g] else min(zi[g], ZERO)
            s = (m_zero[g] - m_zi[g]) * ((ONE + m_zero[g]) * (ONE + m_zi[g]) * inverse[g])
            v[g] = larger_term + twice_artanh(s)
    else:
        own[:] = ONE
    if gradient:
        for g in range(n_genes):
            small = m[g] * larger[g]
            sigmoid, rest = (larger[g], small) if d[g] > ZERO else (small, larger[g])
            dm[g] = x[g] * rest - own[g] * t[g] * sigmoid
        for g in range(n_genes):
            dt[g] = -dm[g] - own[g] * t[g] * (max(d[g], ZERO) + log1p_m[g])
    for g in range(n_genes):
        if x[g] != ZERO:
            wide = float64(x[g])
            v[g] = non_zero(wide, float64(lm[g]), float64(lt[g]), float64(t[g]), float64(log1p_m[g]))
            if inflated:
                v[g] -= max(zi[g], ZERO) + twice_artanh(m_zi[g] / (TWO + m_zi[g]))
            if gradient:
                dt[g] += rising_slope(wide, float64(t[g]))


@njit(**COMPILED)
def _poisson(x, lm, v, dm):
    """Write the log-probability, and its slope by log mu, of some genes of one cell."""
    for g in range(len(x)):
        v[g] = -exp(lm[g])
        dm[g] = x[g] + v[g]
    for g in range(len(x)):
        if x[g] != ZERO:
            wide, log_m = float64(x[g]), float64(lm[g])
            mu = math.exp(log_m) if wide > SMALL else -float64(v[g])
            v[g] = wide * log_m - mu - log_factorial(wide)


@njit(**COMPILED)
def _add(product, bias, result):
    """Write product + bias, where the product may be the bits of bfloat16 numbers."""
    for g in range(len(result)):
        result[g] = _read(product[g]) + bias[g]


@njit(**COMPILED)
def _shift(values, shift):
    for g in range(len(values)):
        values[g] += shift


@njit(**COMPILED)
def _exponentials(values, largest, result):
    for g in range(len(values)):
        result[g] = exp(values[g] - largest)


@njit(**COMPILED)
def _subtract(values, share, scale):
    for g in range(len(values)):
        values[g] -= share[g] * scale


@njit(**COMPILED)
def _store(weight, slopes, result, sums):
    """Write weighted slopes, as bfloat16 bits where the result is of those, and add them to their sums."""
    for g in range(len(slopes)):
        weighted = weight * slopes[g]
        sums[g] += weighted
        _write(result, g, weighted)


@njit(**COMPILED)
def _accumulate(weight, slopes, sums):
    for g in range(len(slopes)):
        sums[g] += weight * slopes[g]


def _read(value):
    """Return a float32, which the upper half of its bits may stand for."""


@overload(_read, inline="always")
def _(value):
    if value == types.uint16:
        return lambda value: uint32(uint32(value) << uint32(16)).view(float32)
    return lambda value: value


def _write(array, g, value):
    """Write a float32, rounded to the nearest even upper half of its bits where those are what the array has."""


@overload(_write, inline="always")
def _(array, g, value):
    if array.dtype == types.uint16:

        def rounded(array, g, value):
            bits = float32(value).view(uint32)
            array[g] = uint16((bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16))

        return rounded

    def as_it_is(array, g, value):
        array[g] = value

    return as_it_is


@njit(**COMPILED)
def _largest(values):
    """Return the maximum, by way of 16 maxima side by side, which become vectors."""
    largest, n = np.full(16, values[0]), len(values) // 16 * 16
    for start in range(0, n, 16):
        for k in range(16):
            largest[k] = values[start + k] if values[start + k] > largest[k] else largest[k]
    for g in range(n, len(values)):
        largest[0] = max(largest[0], values[g])
    return largest.max()


# The order of a sum does not matter, which lets it become vectors.
@njit(**(COMPILED | {"fastmath": {"reassoc", "nsz", "contract"}}))
def _sum(values):
    total = 0.0
    for g in range(len(values)):
        total += float64(values[g])
    return total
