"""log p(counts) of whole cells and its gradient on a GPU.

All computation is in float32, because many GPUs compute float64 at a sixty-fourth of the speed. `functions` says how
large counts keep their digits. Apart from the gradients, no array of the minibatch's size is written. Sums over cells
are computed for fixed parts, which torch then adds. There are no atomic operations, so results are reproducible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scgen.kernels.cuda.functions import (
    digamma_rest,
    excess,
    log_inflated_zero,
    log_non_zero,
    log_poisson,
    negative_binomial,
    shares,
    softplus,
)

POISSON, NEGATIVE_BINOMIAL, ZERO_INFLATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

#: Number of genes at a time in a program for one cell, and in a program for several cells.
ROW_BLOCK, COLUMN_BLOCK = 1024, 256


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

    Parameters and results are those of `scgen.kernels.cpu.likelihood.cells_log_prob`.
    """
    inputs = counts, logits, bias, log_library, log_theta, zi_logits, zi_bias
    value = _over_genes(*inputs, normalised, slope=False)[0]
    return value, () if weights is None else slopes(*inputs, normalised, weights)


def slopes(
    counts: Tensor,
    logits: Tensor,
    bias: Tensor,
    log_library: Tensor,
    log_theta: Tensor | None,
    zi_logits: Tensor | None,
    zi_bias: Tensor | None,
    normalised: bool,
    weights: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradient of the weighted sum of the values by each parameter, without the values."""
    inputs = counts, logits, bias, log_library, log_theta, zi_logits, zi_bias
    slope, log_total = _over_genes(*inputs, normalised, slope=True)
    (n_rows, n_genes), kind = logits.shape, _kind(log_theta, zi_logits)
    n_together = 16 if n_rows <= 4096 else 64  # rows per program: few sums to add, but programs for the whole device
    n_parts = triton.cdiv(n_rows, n_together)
    sums = torch.empty(3, n_parts, n_genes, device=logits.device)
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    d_zi_logits = torch.empty_like(d_logits) if kind == ZERO_INFLATED.value else d_logits
    n_thetas = 1 if log_theta is None else len(log_theta)
    d_theta = torch.empty(n_rows, n_genes, device=logits.device) if n_thetas > 1 else sums
    block = min(COLUMN_BLOCK, triton.next_power_of_2(n_genes))
    with torch.cuda.device_of(logits):
        _slopes[n_parts, triton.cdiv(n_genes, block)](
            *_pointers(*inputs),
            weights,
            slope,
            log_total,
            d_logits,
            d_zi_logits,
            d_theta,
            sums,
            len(counts),
            n_thetas,
            n_rows,
            n_genes,
            KIND=kind,
            NORMALISED=normalised,
            ROWS=n_together,
            BLOCK=block,
        )
    d_bias, d_zi_bias, d_one_theta = sums.sum(1)
    return (
        d_logits,
        d_bias,
        weights * slope,
        None if log_theta is None else d_one_theta[None] if n_thetas == 1 else _by_theta(d_theta, n_thetas),
        d_zi_logits if kind == ZERO_INFLATED.value else None,
        d_zi_bias if kind == ZERO_INFLATED.value else None,
    )


def _over_genes(
    counts, logits, bias, log_library, log_theta, zi_logits, zi_bias, normalised: bool, slope: bool
) -> tuple[Tensor, Tensor]:
    """Return, by row, the sum over genes of the log-probabilities or of their slopes by log mu, and log sum exp."""
    (n_rows, n_genes), kind = logits.shape, _kind(log_theta, zi_logits)
    total, log_total = torch.empty(2, n_rows, device=logits.device)
    with torch.cuda.device_of(logits):
        _sum_over_genes[(n_rows,)](
            *_pointers(counts, logits, bias, log_library, log_theta, zi_logits, zi_bias),
            total,
            log_total,
            len(counts),
            1 if log_theta is None else len(log_theta),
            n_genes,
            KIND=kind,
            NORMALISED=normalised,
            SLOPE=slope,
            BLOCK=min(ROW_BLOCK, triton.next_power_of_2(n_genes)),
        )
    return total, log_total


def _kind(log_theta: Tensor | None, zi_logits: Tensor | None) -> int:
    return (POISSON if log_theta is None else NEGATIVE_BINOMIAL if zi_logits is None else ZERO_INFLATED).value


def _pointers(counts, logits, bias, log_library, log_theta, zi_logits, zi_bias) -> tuple[Tensor, ...]:
    """Return a contiguous tensor for each argument; one that the kind lacks is a placeholder and never read."""
    some = counts, logits, bias, log_library, log_theta, zi_logits, zi_bias
    return tuple((bias if tensor is None else tensor).contiguous() for tensor in some)


def _by_theta(d_theta: Tensor, n_thetas: int) -> Tensor:
    """Return the slopes by each row of log theta, (K, G); rows r, r + K, ... share a row."""
    return d_theta if len(d_theta) == n_thetas else d_theta.view(-1, n_thetas, d_theta.shape[1]).sum(0)


@triton.jit
def _sum_over_genes(
    counts,
    logits,
    bias,
    log_library,
    log_theta,
    zi_logits,
    zi_bias,
    result,
    log_totals,
    n_cells,
    n_thetas,
    n_genes,
    KIND: tl.constexpr,
    NORMALISED: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row; see `_over_genes`."""
    row = tl.program_id(0).to(tl.int64)
    log_total = _log_sum_exp(logits + row * n_genes, bias, n_genes, BLOCK) if NORMALISED else 0.0
    shift = tl.load(log_library + row) - log_total
    terms = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_genes, BLOCK):
        gene = start + tl.arange(0, BLOCK)
        real = gene < n_genes
        x = tl.load(counts + row % n_cells * n_genes + gene, mask=real, other=0.0)
        log_mu = _sum_of_two(logits, bias, row * n_genes, gene, real) + shift
        if KIND == POISSON:
            term = x - tl.exp(log_mu) if SLOPE else log_poisson(x, log_mu)
        else:
            log_t = tl.load(log_theta + row % n_thetas * n_genes + gene, mask=real, other=0.0)
            t, d, softplus_d, slope = negative_binomial(x, log_mu, log_t)
            zero = -t * softplus_d
            term = slope
            if not SLOPE:
                term = tl.where(x == 0.0, zero, log_non_zero(x, t, d, softplus_d, slope))
            if KIND == ZERO_INFLATED:
                zi = _sum_of_two(zi_logits, zi_bias, row * n_genes, gene, real)
                if SLOPE:
                    own, _ = shares(x, zero, zi)
                    term = own * slope
                else:
                    term = tl.where(x == 0.0, log_inflated_zero(zero, zi), term - softplus(zi))
        terms += tl.where(real, term, 0.0)
    tl.store(result + row, tl.sum(terms, 0))
    tl.store(log_totals + row, log_total)


@triton.jit
def _slopes(
    counts,
    logits,
    bias,
    log_library,
    log_theta,
    zi_logits,
    zi_bias,
    weights,
    slopes,
    log_totals,
    d_logits,
    d_zi_logits,
    d_theta,
    sums,
    n_cells,
    n_thetas,
    n_rows,
    n_genes,
    KIND: tl.constexpr,
    NORMALISED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for some rows and a block of genes; ``slopes`` are the rows' sums of the slopes by log mu."""
    part = tl.program_id(0).to(tl.int64)
    n_parts = tl.num_programs(0)
    gene = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = gene < n_genes
    sum_bias, sum_zi_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    sum_theta = tl.zeros((BLOCK,), tl.float32)
    for row in range(part * ROWS, tl.minimum(part * ROWS + ROWS, n_rows)):
        w = tl.load(weights + row)
        x = tl.load(counts + row % n_cells * n_genes + gene, mask=real, other=0.0)
        log_rho = _sum_of_two(logits, bias, row * n_genes, gene, real)
        log_total = tl.load(log_totals + row)
        log_mu = log_rho + (tl.load(log_library + row) - log_total)
        if KIND == POISSON:
            slope = x - tl.exp(log_mu)
        else:
            log_t = tl.load(log_theta + row % n_thetas * n_genes + gene, mask=real, other=0.0)
            t, _, softplus_d, slope = negative_binomial(x, log_mu, log_t)
            by_theta = -t * excess(slope / t, tl.log(1.0 + x / t) - softplus_d)
            if KIND == ZERO_INFLATED:
                zi = _sum_of_two(zi_logits, zi_bias, row * n_genes, gene, real)
                own, by_zi = shares(x, -t * softplus_d, zi)
                slope, by_theta = own * slope, own * by_theta
                tl.store(d_zi_logits + row * n_genes + gene, w * by_zi, mask=real)
                sum_zi_bias += w * by_zi
            by_theta += tl.where(x == 0.0, 0.0, t * (digamma_rest(x + t) - digamma_rest(t)))
            if n_thetas > 1:
                tl.store(d_theta + row * n_genes + gene, w * by_theta, mask=real)
            sum_theta += w * by_theta
        if NORMALISED:
            slope -= tl.exp(log_rho - log_total) * tl.load(slopes + row)
        tl.store(d_logits + row * n_genes + gene, w * slope, mask=real)
        sum_bias += w * slope
    tl.store(sums + part * n_genes + gene, sum_bias, mask=real)
    if KIND == ZERO_INFLATED:
        tl.store(sums + (n_parts + part) * n_genes + gene, sum_zi_bias, mask=real)
    if KIND != POISSON:
        tl.store(sums + (2 * n_parts + part) * n_genes + gene, sum_theta, mask=real)


@triton.jit
def _sum_of_two(product, bias, offset, gene, real):
    """Return product + bias of some genes, in float32."""
    products = tl.load(product + offset + gene, mask=real, other=0.0).to(tl.float32)
    return products + tl.load(bias + gene, mask=real, other=0.0)


@triton.jit
def _log_sum_exp(logits, bias, n_genes, BLOCK: tl.constexpr):
    """Return log sum exp(logits + bias) over the genes of a row."""
    largest, total = -float("inf"), 0.0
    for start in range(0, n_genes, BLOCK):
        gene = start + tl.arange(0, BLOCK)
        real = gene < n_genes
        log_rho = tl.where(real, _sum_of_two(logits, bias, 0, gene, real), -float("inf"))
        larger = tl.maximum(largest, tl.max(log_rho, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(log_rho - larger), 0)
        largest = larger
    return largest + tl.log(total)
