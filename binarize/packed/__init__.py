"""Inference with bits: packed layers and blocks, and the file format."""

from __future__ import annotations

from binarize.kernels import backends
from binarize.packed.layers import PackedConv2d, PackedLinear

__all__ = ["PackedConv2d", "PackedLinear", "backends"]
