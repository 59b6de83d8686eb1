"""Arithmetic on tensors: the operators, their definition in plain PyTorch, and compiled kernels for CPUs and GPUs."""
