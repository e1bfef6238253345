"""Kernels for CUDA GPUs, compiled by Triton."""
