"""The CPU backend: what the operators and the training step call."""

from binarize.kernels.cpu import elementwise, norm_training, winograd
from binarize.kernels.cpu.conv import run
from binarize.kernels.cpu.norm import norm_factors, norm_silu, pixel_shuffle, shuffle

__all__ = ["elementwise", "norm_factors", "norm_silu", "norm_training", "pixel_shuffle", "run", "shuffle", "winograd"]
