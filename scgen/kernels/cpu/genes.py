"""The likelihood of some genes of one cell, in loops that the compiler vectorises. `likelihood` calls them.

Nine tenths of the entries are zeros. All entries first go through loops for zeros, without branches. The non-zero
entries are then corrected one by one, from a list, in float64 (slopes in float32, except their log-gamma part). For
small counts, products replace log-gamma functions. If theta is per gene, the terms without mu are looked up in a table.

With d = log mu - log theta and u = -theta softplus(d) - zi, a zero has log NB = -theta softplus(d) and log ZINB =
softplus(u) - softplus(-zi); every softplus and sigmoid is made of m = exp(-|x|) and log(1 + m).
"""

import math

import numpy as np
from numba import njit, prange

from scgen.kernels.cpu.functions import (
    LOG_FACTORIAL,
    SMALL,
    digamma,
    exp,
    log_coefficient,
    log_factorial,
    log_powers,
    rising_slope,
    twice_artanh,
)
from scgen.kernels.cpu.rows import COMPILED

float32, float64, int64 = np.float32, np.float64, np.int64
ZERO, ONE, TWO = float32(0), float32(1), float32(2)


@njit(**COMPILED)
def negative_binomial(
    start, where, x, lm, lt, t, zi, inflated, gradient, coefficients, rising_slopes, v, dm, dt, dz, room
):
    """Write log NB or ZINB, and its slopes by log mu, log theta and zi, of the genes from ``start`` on of one cell.

    All entries are first treated as zeros; ``own`` is the probability that a zero is from the negative binomial. There
    are many loops because the compiler cannot vectorise a loop with many arrays that might overlap.
    """
    n_genes = len(lm)
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
                own[g] = (ONE if v[g] > zi[g] else m_zero[g]) * (b * (ONE + m_zero[g] + b) * inverse[g])
            for g in range(n_genes):
                a = ONE + m_zero[g]
                dz[g] = (m_zi[g] if zi[g] > ZERO else ONE) * (a * (a + ONE + m_zi[g]) * inverse[g])
        for g in range(n_genes):
            # max(u, 0) - max(-zi, 0), which would lose digits for a large zi
            larger_term = v[g] if v[g] > zi[g] else min(zi[g], ZERO)
            s = (m_zero[g] - m_zi[g]) * ((ONE + m_zero[g]) * (ONE + m_zi[g]) * inverse[g])
            v[g] = larger_term + twice_artanh(s)
    else:
        own[:] = ONE
    if gradient:
        for i in range(len(x)):
            if x[i] != ZERO:  # stored entries may be zero
                own[where[i] - start] = ONE
        for g in range(n_genes):
            dm[g] = -own[g] * t[g] * (larger[g] if d[g] > ZERO else m[g] * larger[g])
        for g in range(n_genes):
            dt[g] = -dm[g] - own[g] * t[g] * (max(d[g], ZERO) + log1p_m[g])
        if inflated:
            for g in range(n_genes):
                dz[g] -= own[g]
    n_tabulated = coefficients.shape[1]
    for i in range(len(x)):
        if x[i] == ZERO:
            continue
        g, wide = where[i] - start, float64(x[i])
        log_theta, theta = float64(lt[g]), float64(t[g])
        tabulated = 0 < wide < n_tabulated and wide == math.floor(wide)
        k = int64(wide) if tabulated else 0
        powers = log_powers(wide, float64(lm[g]), log_theta, theta, float64(log1p_m[g]))
        v[g] = powers + (coefficients[g, k] if tabulated else log_coefficient(wide, log_theta, theta))
        if inflated:
            v[g] -= max(zi[g], ZERO) + twice_artanh(m_zi[g] / (TWO + m_zi[g]))
        if gradient:
            risen = x[i] * (m[g] * larger[g] if d[g] > ZERO else larger[g])
            dm[g] += risen
            if tabulated:
                dt[g] += rising_slopes[g, k] - risen
            elif n_tabulated:
                dt[g] += theta * (digamma(wide + theta) - rising_slopes[g, 0]) - risen
            else:
                dt[g] += rising_slope(wide, theta) - risen


@njit(**COMPILED)
def poisson(start, where, x, lm, v, dm):
    """Write the log-probability, and its slope by log mu, of the genes from ``start`` on of one cell."""
    for g in range(len(lm)):
        v[g] = -exp(lm[g])
        dm[g] = v[g]
    for i in range(len(x)):
        if x[i] != ZERO:
            g, wide = where[i] - start, float64(x[i])
            log_m = float64(lm[g])
            mu = math.exp(log_m) if wide > SMALL else -float64(v[g])
            v[g] = wide * log_m - mu - log_factorial(wide)
            dm[g] += x[i]


@njit(parallel=True, **COMPILED)
def tabulate(log_theta, theta, coefficients, rising_slopes):
    """Write `log_coefficient` and `rising_slope` of 1, 2, ..., (G, 1 + counts); at 0, digamma(theta) for the latter."""
    for g in prange(len(theta)):
        wide = float64(theta[g])
        product, slope = wide, 1.0
        coefficients[g, 1], rising_slopes[g, 0], rising_slopes[g, 1] = log_theta[g], digamma(wide), slope
        for k in range(2, coefficients.shape[1]):
            product *= wide + (k - 1)
            slope += wide / (wide + (k - 1))
            coefficients[g, k], rising_slopes[g, k] = math.log(product) - LOG_FACTORIAL[k], slope
