"""Functions of one number for the compiled kernels. numba inlines them."""

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

from scgen.kernels.cpu.rows import COMPILED

float32, int32, uint16, uint32 = np.float32, np.int32, np.uint16, np.uint32

#: For counts up to this, ratios of gamma functions are computed as products.
SMALL = 16.0
LOG_FACTORIAL = np.array([math.lgamma(k + 1) for k in range(int(SMALL) + 1)])


@njit(inline="always", **COMPILED)
def exp(x):
    """Return exp(x) to float32's precision, without a branch; x is limited to +-87."""
    x = max(min(x, float32(87)), float32(-87))
    n = np.floor(x * float32(1.4426950408889634) + float32(0.5))
    r = x - n * float32(0.693359375) + n * float32(2.12194440e-4)  # ln 2 in two parts
    p = float32(1 / 720)
    p = p * r + float32(1 / 120)
    p = p * r + float32(1 / 24)
    p = p * r + float32(1 / 6)
    p = p * r + float32(1 / 2)
    p = p * r * r + r + float32(1)
    return p * int32((int32(n) + int32(127)) << int32(23)).view(float32)


@njit(inline="always", **COMPILED)
def twice_artanh(s):
    """Return 2 artanh(s) to float32's relative precision, for s within a third of 0.

    It is log((1 + m) / (1 + k)) at s = (m - k) / (2 + m + k), for m and k in [0, 1].
    """
    q = s * s
    p = float32(2 / 13)
    p = p * q + float32(2 / 11)
    p = p * q + float32(2 / 9)
    p = p * q + float32(2 / 7)
    p = p * q + float32(2 / 5)
    p = p * q + float32(2 / 3)
    p = p * q + float32(2)
    return p * s


@njit(inline="always", **COMPILED)
def log1p(x):
    """Return log(1 + x) to float32's relative precision, without a branch, for x from 0 to 1e38.

    With 1 + x = 2^n m and m within a third of 1, m - 1 = x / 2^n + (1 / 2^n - 1). For x up to a third, the first term
    is x itself.
    """
    n = int32(int32(float32(float32(1) + x).view(int32) - int32(0x3F2AAAAB)) >> int32(23))
    scale = int32(int32(int32(127) - n) << int32(23)).view(float32)
    r = x * scale + (scale - float32(1))
    n = float32(n)
    return twice_artanh(r / (r + float32(2))) + n * float32(-2.12194440e-4) + n * float32(0.693359375)


@njit(**COMPILED)
def log_factorial(x):
    """Return log(x!)."""
    return LOG_FACTORIAL[int(x)] if x <= SMALL and x == math.floor(x) else math.lgamma(x + 1.0)


@njit(**COMPILED)
def digamma(x):
    """Return the derivative of lgamma: the recurrence up to 8, then the asymptotic series."""
    below = 0.0
    while x < 8.0:
        below += 1.0 / x
        x += 1.0
    q = 1.0 / (x * x)
    return math.log(x) - 0.5 / x - q * (1 / 12 - q * (1 / 120 - q * (1 / 252 - q * (1 / 240 - q / 132)))) - below


@njit(**COMPILED)
def log_rising(x, theta):
    """Return lgamma(x + theta) - lgamma(theta)."""
    if x > SMALL or x != math.floor(x):
        return math.lgamma(x + theta) - math.lgamma(theta)
    product, k = theta, 1.0
    while k < x:
        product *= theta + k
        k += 1.0
    return math.log(product)


@njit(**COMPILED)
def rising_slope(x, theta):
    """Return the derivative of `log_rising` by log theta."""
    if x > SMALL or x != math.floor(x):
        return theta * (digamma(x + theta) - digamma(theta))
    total, k = 1.0, 1.0
    while k < x:
        total += theta / (theta + k)
        k += 1.0
    return total


@njit(**COMPILED)
def log_coefficient(x, log_theta, theta):
    """Return lgamma(x + theta) - lgamma(theta) - log(x!), x > 0; theta in float32 is enough for small counts."""
    if x == 1.0:
        return log_theta
    return log_rising(x, theta if x <= SMALL else math.exp(log_theta)) - log_factorial(x)


@njit(**COMPILED)
def log_powers(x, log_mu, log_theta, theta, log1p_m):
    """Return x d - (x + theta) softplus(d), d = log mu - log theta; the last two in float32, enough for small x."""
    d = log_mu - log_theta
    if x > SMALL:
        theta, log1p_m = math.exp(log_theta), math.log1p(math.exp(-abs(d)))
    # This form avoids a difference of large terms.
    return -x * (max(-d, 0.0) + log1p_m) - theta * (max(d, 0.0) + log1p_m)


def read(value):
    """Return a float32, which may be stored as the upper half of its bits (bfloat16)."""


@overload(read, inline="always")
def _(value):
    if value == types.uint16:
        return lambda value: uint32(uint32(value) << uint32(16)).view(float32)
    return lambda value: value


def write(array, g, value):
    """Write a float32; if the array holds bfloat16 bits, round it to the nearest, ties to even."""


@overload(write, inline="always")
def _(array, g, value):
    if array.dtype == types.uint16:

        def rounded(array, g, value):
            bits = float32(value).view(uint32)
            array[g] = uint16((bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16))

        return rounded

    def as_it_is(array, g, value):
        array[g] = value

    return as_it_is
