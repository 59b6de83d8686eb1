"""Real 1-bit inference: packed weights, kernels that compute with them, and a pure-torch oracle."""

from __future__ import annotations

from binarize.kernels import backends
from binarize.packed.layers import PackedConv2d, PackedLinear

__all__ = ["PackedConv2d", "PackedLinear", "backends"]
