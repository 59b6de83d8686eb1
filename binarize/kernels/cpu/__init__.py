"""Kernels for CPUs, compiled by numba for the processor at hand."""
