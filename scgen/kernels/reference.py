"""The count log-likelihoods in plain torch: their definition, against which every faster kernel is tested.

All functions use logarithms, without added epsilons. Zeros, nine tenths of the entries, are treated separately, because
they need no log-gamma function. Non-zero entries are computed in float64, because ``x log(mu)`` and ``lgamma(x + 1)``
cancel: at ``x = 1e6`` each is near 1e7 and their difference near 10, which float32 cannot resolve.

Shapes: all arguments broadcast to (..., n, G); ``log_theta`` is usually (G,).
Values and gradients are finite for counts up to 1e6, ``log_mu`` in [-1e5, 18.5], ``log_theta`` in [-18.5, 18.5] and any
finite ``zi_logits``.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softplus


def cells_log_prob(
    counts: Tensor,
    logits: Tensor,
    bias: Tensor,
    log_library: Tensor,
    log_theta: Tensor | None = None,
    zi_logits: Tensor | None = None,
    zi_bias: Tensor | None = None,
    normalised: bool = True,
) -> Tensor:
    """Return log p(counts) of each cell, (..., n): the sum over its genes, at mu = l softmax(logits + bias).

    Parameters
    ----------
    counts
        (n, G).
    logits, bias
        (..., n, G) and (G,); without ``normalised``, their sum is log(mu / l).
    log_library
        (..., n, 1): log l.
    log_theta
        None for Poisson counts.
    zi_logits, zi_bias
        (..., n, G) and (G,); their sum is the log odds of an additional zero. None means no zero inflation.
    """
    log_mu = log_mean(logits, bias, log_library, normalised)
    if log_theta is None:
        return poisson_log_prob(counts, log_mu).sum(-1)
    if zi_logits is None:
        return negative_binomial_log_prob(counts, log_mu, log_theta).sum(-1)
    return zero_inflated_negative_binomial_log_prob(counts, log_mu, log_theta, zi_logits + zi_bias).sum(-1)


def log_mean(logits: Tensor, bias: Tensor, log_library: Tensor, normalised: bool) -> Tensor:
    """Return log mu, (..., n, G), as `cells_log_prob` defines it."""
    log_rho = logits + bias
    return log_library + (log_softmax(log_rho, -1) if normalised else log_rho)


def poisson_log_prob(counts: Tensor, log_mu: Tensor) -> Tensor:
    """Return x log(mu) - mu - log(x!)."""
    log_mu = log_mu.expand(torch.broadcast_shapes(counts.shape, log_mu.shape))
    where, x = _non_zeros(counts, log_mu.shape)
    log_m = _take(log_mu, where, log_mu.shape)
    return _put(-log_mu.exp(), where, x * log_m - log_m.exp() - torch.lgamma(x + 1))


def negative_binomial_log_prob(counts: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """Return log NB(x; mu, theta), with mean mu and variance mu + mu^2 / theta."""
    log_mu = log_mu.expand(torch.broadcast_shapes(counts.shape, log_mu.shape, log_theta.shape))
    where, x = _non_zeros(counts, log_mu.shape)
    return _put(_log_zero(log_mu, log_theta), where, _at_non_zeros(where, x, log_mu, log_theta))


def zero_inflated_negative_binomial_log_prob(
    counts: Tensor, log_mu: Tensor, log_theta: Tensor, zi_logits: Tensor
) -> Tensor:
    """Return log of pi [x = 0] + (1 - pi) NB(x; mu, theta), where pi = sigmoid(zi_logits)."""
    log_mu = log_mu.expand(torch.broadcast_shapes(counts.shape, log_mu.shape, log_theta.shape, zi_logits.shape))
    where, x = _non_zeros(counts, log_mu.shape)
    minus_log_pi = softplus(-zi_logits)
    log_not_pi = -zi_logits - minus_log_pi
    zeros = torch.logaddexp(-minus_log_pi, log_not_pi + _log_zero(log_mu, log_theta))
    return _put(zeros, where, _take(log_not_pi, where, log_mu.shape) + _at_non_zeros(where, x, log_mu, log_theta))


def _log_zero(log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """Return log NB(0) = -theta log(1 + mu / theta)."""
    return -log_theta.exp() * softplus(log_mu - log_theta)


def _at_non_zeros(where: Tensor, x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """Return log NB(x) at the entries ``where``, in float64."""
    log_m, log_t = _take(log_mu, where, log_mu.shape), _take(log_theta, where, log_mu.shape)
    theta = log_t.exp()
    # If theta is per gene, lgamma(theta) is computed per gene, not per entry.
    lgamma_theta = _take(torch.lgamma(log_theta.double().exp()), where, log_mu.shape)
    rising = torch.lgamma(x + theta) - lgamma_theta - x * log_t
    return rising - torch.lgamma(x + 1) + x * log_m - (x + theta) * softplus(log_m - log_t)


def _non_zeros(counts: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the flat indices and, in float64, the values of the non-zero counts."""
    flat = counts.expand(shape).reshape(-1)
    where = flat.nonzero().squeeze(1)
    return where, flat[where].double()


def _take(values: Tensor, where: Tensor, shape: torch.Size) -> Tensor:
    """Return ``values``, (G,) or broadcasting to ``shape``, at flat indices, in float64."""
    if values.shape == shape[-1:]:
        return values.index_select(0, where % shape[-1]).double()
    return values.expand(shape).reshape(-1).index_select(0, where).double()


def _put(zeros: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Return ``zeros`` with ``values`` at flat indices; no gradient reaches what was replaced."""
    return zeros.reshape(-1).scatter(0, where, values.to(zeros.dtype)).reshape(zeros.shape)
