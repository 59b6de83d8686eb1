"""Inference with bits: packed layers and blocks, and the file format."""

from __future__ import annotations

from binarize.kernels import backends
from binarize.packed.conv_nd import PackedConv1d, PackedConv3d
from binarize.packed.layers import PackedConv2d, PackedLayer, PackedLinear

__all__ = ["PackedConv1d", "PackedConv2d", "PackedConv3d", "PackedLayer", "PackedLinear", "backends"]
