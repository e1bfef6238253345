"""Picks the kernel for a device. There is one so far: plain torch, which runs everywhere."""

from scgen.kernels.reference import (
    negative_binomial_log_prob,
    poisson_log_prob,
    zero_inflated_negative_binomial_log_prob,
)

__all__ = ["negative_binomial_log_prob", "poisson_log_prob", "zero_inflated_negative_binomial_log_prob"]
