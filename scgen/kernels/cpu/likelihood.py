"""log p(counts) of whole cells and its gradient on a CPU, in float32.

A row of genes goes through small loops over blocks that stay in the innermost cache. Apart from the gradients, no array
of the minibatch's size is written. `genes` has the loops over a block.
"""

import math

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from scgen.kernels.cpu.functions import exp, read, write
from scgen.kernels.cpu.genes import negative_binomial, poisson, tabulate
from scgen.kernels.cpu.listing import as_array, non_zeros
from scgen.kernels.cpu.rows import ADDING, COMPILED, threads

float32, float64, int64 = np.float32, np.float64, np.int64
ZERO = float32(0)
POISSON, NEGATIVE_BINOMIAL, ZERO_INFLATED = range(3)

#: Number of genes in a block. The loops' arrays for a block fit into the innermost cache.
BLOCK = 512

#: Counts up to this are tabulated if theta is per gene. A few per cent of the non-zero counts are larger.
TABULATED = 8


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
        As there, contiguous. Logits are float32 or bfloat16, all others float32. Counts may also be a CSR tensor.
    weights
        (R,) weights of the values in that sum; None computes no gradient.
    """
    gradient, n_rows, n_genes = weights is not None, *logits.shape
    kind = POISSON if log_theta is None else NEGATIVE_BINOMIAL if zi_logits is None else ZERO_INFLATED
    inflated = kind == ZERO_INFLATED
    nothing, nothing_of_logits = bias.new_empty(1, n_genes), logits[:1]
    value, d_library = bias.new_empty(n_rows), bias.new_empty(n_rows)
    with threads() as n_parts:
        # Each thread sums over its own cells.
        sums = bias.new_zeros(3, n_parts, n_genes) if gradient else nothing.expand(3, 1, n_genes).contiguous()
        d_bias, d_zi_bias, d_theta = sums
        d_logits = torch.empty_like(logits) if gradient else nothing_of_logits
        d_zi_logits = torch.empty_like(zi_logits) if gradient and inflated else nothing_of_logits
        if gradient and kind != POISSON and len(log_theta) > 1:
            d_theta = bias.new_zeros(n_rows, n_genes)
        tabulated = kind != POISSON and len(log_theta) == 1
        tables = np.empty((2, n_genes, TABULATED + 1 if tabulated else 0))
        theta = nothing if kind == POISSON else log_theta.exp()
        if tabulated:
            tabulate(as_array(log_theta[0]), as_array(theta[0]), *tables)
        inputs = (
            logits,
            bias,
            log_library,
            nothing if kind == POISSON else log_theta,
            theta,
            zi_logits if inflated else nothing_of_logits,
            zi_bias if inflated else bias,
            weights if gradient else value,
        )
        outputs = value, d_logits, d_bias, d_library, d_theta, d_zi_logits, d_zi_bias
        _cells(
            n_parts,
            kind,
            normalised,
            gradient,
            *non_zeros(counts),
            *map(as_array, inputs),
            *tables,
            *map(as_array, outputs),
        )
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


@njit(parallel=True, **COMPILED)
def _cells(
    n_parts,
    kind,
    normalised,
    gradient,
    ends,
    genes,
    values,
    logits,
    bias,
    log_library,
    log_theta,
    theta,
    zi_logits,
    zi_bias,
    weights,
    coefficients,
    rising_slopes,
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
        part = int64(index)  # unsigned and signed integers together would become floats
        # One by one: numba treats the parts of an unpacked array as not contiguous and does not vectorise their loops.
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
            cell = r % (len(ends) - 1)
            after, last = ends[cell], ends[cell + 1]
            for start in range(0, n_genes, BLOCK):
                stop = min(start + BLOCK, n_genes)
                n = stop - start
                first = after
                while after < last and genes[after] < stop:
                    after += 1
                where, x = genes[first:after], values[first:after]
                lm, dm = log_mu[start:stop], d_mu[start:stop]
                if kind == POISSON:
                    poisson(start, where, x, lm, v[:n], dm)
                else:
                    row = r % len(log_theta)
                    lt, t = log_theta[row][start:stop], theta[row][start:stop]
                    if inflated:
                        _add(zi_logits[r][start:stop], zi_bias[start:stop], zi[:n])
                    some = coefficients[start:stop], rising_slopes[start:stop]
                    negative_binomial(
                        start, where, x, lm, lt, t, zi[:n], inflated, gradient, *some, v[:n], dm, d_lt[:n], dz[:n], room
                    )
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
def _add(product, bias, result):
    """Write product + bias; the product may be bits of bfloat16 numbers."""
    for g in range(len(result)):
        result[g] = read(product[g]) + bias[g]


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
    """Write weighted slopes, as bfloat16 bits if the result holds these, and add them to their sums."""
    for g in range(len(slopes)):
        weighted = weight * slopes[g]
        sums[g] += weighted
        write(result, g, weighted)


@njit(**COMPILED)
def _accumulate(weight, slopes, sums):
    for g in range(len(slopes)):
        sums[g] += weight * slopes[g]


@njit(**COMPILED)
def _largest(values):
    """Return the maximum, computed as 16 parallel maxima, which can be vectorised."""
    largest, n = np.full(16, values[0]), len(values) // 16 * 16
    for start in range(0, n, 16):
        for k in range(16):
            largest[k] = values[start + k] if values[start + k] > largest[k] else largest[k]
    for g in range(n, len(values)):
        largest[0] = max(largest[0], values[g])
    return largest.max()


@njit(**ADDING)
def _sum(values):
    total = 0.0
    for g in range(len(values)):
        total += float64(values[g])
    return total
