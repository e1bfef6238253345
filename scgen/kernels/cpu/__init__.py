"""Kernels for CPUs, compiled by numba: cells in parallel, genes in loops that the compiler vectorises."""
