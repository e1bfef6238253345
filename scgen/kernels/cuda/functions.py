"""Functions of one count for the log-likelihoods on CUDA. Triton inlines them.

With n = x + theta, d = log mu - log theta, e = x sigmoid(-d) - theta sigmoid(d), h(t) = t - log(1 + t), and Stirling's
formula made exact, lgamma(z) = (z - 1/2) log z - z + log(2 pi) / 2 + R(z),

    log NB(x) = R(n) - R(x) - R(theta) - log(2 pi x n / theta) / 2 - x h(-e / x) - theta h(e / theta)

(Loader 2000, "Fast and accurate computation of binomial probabilities"). The slope by log mu is e, and by log theta

    theta (S(n) - S(theta)) - theta h(e / theta),  S(z) = digamma(z) - log z.

Apart from logarithms, no term is larger than the result, so counts of a million keep their digits in float32. The form
for zeros is that of `scgen.kernels.cpu.genes`.
"""

import triton
import triton.language as tl

LOG_2_PI = tl.constexpr(1.8378770664093453)


@triton.jit
def negative_binomial(x, log_mu, log_theta):
    """Return theta, d = log mu - log theta, softplus(d), and the slope of log NB(x) by log mu."""
    t, d = tl.exp(log_theta), log_mu - log_theta
    m = tl.exp(-tl.abs(d))
    larger, small = 1.0 / (1.0 + m), m / (1.0 + m)
    slope = x * tl.where(d > 0.0, small, larger) - t * tl.where(d > 0.0, larger, small)
    return t, d, tl.maximum(d, 0.0) + log1p(m), slope


@triton.jit
def log_non_zero(x, t, d, softplus_d, slope):
    """Return log NB(x) for x > 0, by the formula at the top of this file."""
    x = tl.where(x < 1e-12, 1e-12, x)  # smaller ones would underflow; also avoids NaN if x is 0
    ratio = x / t
    near = stirling_rest(x + t) - stirling_rest(x) - stirling_rest(t) - 0.5 * (tl.log(x * (1.0 + ratio)) + LOG_2_PI)
    of_x = excess(-slope / x, tl.log(1.0 + t / x) - (softplus_d - d))
    return near - x * of_x - t * excess(slope / t, tl.log(1.0 + ratio) - softplus_d)


@triton.jit
def log_poisson(x, log_mu):
    """Return log Poisson(x)."""
    mu, some = tl.exp(log_mu), tl.where(x < 1e-12, 1e-12, x)
    near = -0.5 * (tl.log(some) + LOG_2_PI) - stirling_rest(some)
    return tl.where(x == 0.0, -mu, near - some * excess((mu - some) / some, log_mu - tl.log(some)))


@triton.jit
def log_inflated_zero(zero, zi):
    """Return log ZINB(0) = softplus(zero - zi) - softplus(-zi), where ``zero`` is log NB(0)."""
    m_zero, m_zi = tl.exp(-tl.abs(zero - zi)), tl.exp(-tl.abs(zi))
    # max(zero - zi, 0) - max(-zi, 0), which would lose digits for a large zi
    larger = tl.where(zero > zi, zero, tl.minimum(zi, 0.0))
    return larger + twice_artanh((m_zero - m_zi) / (2.0 + m_zero + m_zi))


@triton.jit
def shares(x, zero, zi):
    """Return the probability that an entry is from the negative binomial, and the slope of log ZINB(x) by zi."""
    m_zero, m_zi = tl.exp(-tl.abs(zero - zi)), tl.exp(-tl.abs(zi))
    own = tl.where(x == 0.0, tl.where(zero > zi, 1.0, m_zero) / (1.0 + m_zero), 1.0)
    return own, tl.where(zi > 0.0, m_zi, 1.0) / (1.0 + m_zi) - own


@triton.jit
def softplus(x):
    """Return log(1 + exp(x))."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def log1p(m):
    """Return log(1 + m) for m in [0, 1]."""
    return twice_artanh(m / (2.0 + m))


@triton.jit
def twice_artanh(s):
    """Return 2 artanh(s) for s within a third of 0; it is log((1 + m) / (1 + k)) at s = (m - k) / (2 + m + k)."""
    q = s * s
    series = q * (2 / 3 + q * (2 / 5 + q * (2 / 7 + q * (2 / 9 + q * (2 / 11 + q * (2 / 13))))))
    return s * (2.0 + series)


@triton.jit
def excess(t, log1p_t):
    """Return h(t) = t - log(1 + t); near 0, by a series in s = t / (2 + t) without the difference."""
    s = t / (2.0 + t)
    q = s * s
    series = 1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15))))))
    return tl.where(tl.abs(t) < 0.5, s * t - 2.0 * s * q * series, t - log1p_t)


@triton.jit
def stirling_rest(z):
    """Return R(z): its series from 4 on, below that by lgamma(z) = lgamma(z + 4) - log(z (z + 1) (z + 2) (z + 3))."""
    shifted = tl.where(z < 4.0, z + 4.0, z)
    i = 1.0 / shifted
    q = i * i
    series = i * (1 / 12 - q * (1 / 360 - q * (1 / 1260 - q * (1 / 1680))))
    product = (z + 1.0) * (z + 2.0) * (z + 3.0)
    below = (z + 3.5) * tl.log(shifted / z) + tl.log(z * z * z / product) - 4.0
    return series + tl.where(z < 4.0, below, 0.0)


@triton.jit
def digamma_rest(z):
    """Return S(z): its series from 4 on, below that by digamma(z) = digamma(z + 4) - 1/z - ... - 1/(z + 3)."""
    shifted = tl.where(z < 4.0, z + 4.0, z)
    i = 1.0 / shifted
    q = i * i
    series = -0.5 * i - q * (1 / 12 - q * (1 / 120 - q * (1 / 252 - q * (1 / 240 - q * (1 / 132)))))
    p = z * (z + 3.0)  # and p + 2 is (z + 1) (z + 2)
    below = tl.log(shifted / z) - (2.0 * z + 3.0) * (2.0 * p + 2.0) / (p * (p + 2.0))
    return series + tl.where(z < 4.0, below, 0.0)
