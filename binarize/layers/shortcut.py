"""Shortcuts around a binary layer, for any change of width and size.

A shortcut carries the full-precision signal past the sign. It is the identity if the layer keeps its shape. Otherwise
the spatial size is average-pooled (2 x 2 for a stride of 2), and so are neighbouring channels, which repeats channels
where the layer widens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.kernels.binary_conv import OutputTransform, Shortcut
from binarize.layers.parts import LayerPart, LayerSpec, Site, register_part


def pool_channels(x: Tensor, channels: int, channel_dim: int = 1) -> Tensor:
    """Average-pool (or repeat) the channels of ``(B, C, [D,] H, W)``, or of ``(..., C)`` with ``channel_dim`` -1."""
    width = x.shape[channel_dim]
    if width == channels:
        return x
    if torch.onnx.is_in_onnx_export():
        return _pool_axis(x, channel_dim, channels)
    if channel_dim == 1:
        planes = x.flatten(3)
        pooled = F.adaptive_avg_pool3d(planes.unsqueeze(1), (channels, *planes.shape[2:])).squeeze(1)
        return pooled.reshape(-1, channels, *x.shape[2:])
    return F.adaptive_avg_pool1d(x.reshape(-1, 1, width), channels).reshape(*x.shape[:-1], channels)


def _pool_size(x: Tensor, size: torch.Size) -> Tensor:
    """Average-pool ``(B, C, [D,] H, W)`` to a size."""
    if x.shape[2:] == size:
        return x
    if torch.onnx.is_in_onnx_export():
        for axis, side in enumerate(size, start=2):
            x = _pool_axis(x, axis, side)
        return x
    pool: Any = F.adaptive_avg_pool2d if x.dim() == 4 else F.adaptive_avg_pool3d
    return cast(Tensor, pool(x, tuple(size)))


def _pool_axis(x: Tensor, axis: int, size: int) -> Tensor:
    """Average-pool one axis to any size, by selections or a matrix product; ONNX has no adaptive pooling."""
    length = x.shape[axis]
    if isinstance(length, int) and isinstance(size, int):  # not symbolic
        firsts = [i * length // size for i in range(size)]
        widths = {-(-(i + 1) * length // size) - first for i, first in enumerate(firsts)}
        if len(widths) == 1:
            width = widths.pop()
            places = torch.tensor(firsts, device=x.device)
            parts = [x.index_select(axis, places + offset) for offset in range(width)]
            return torch.stack(parts).mean(0) if width > 1 else parts[0]
    start = torch.arange(size, device=x.device).unsqueeze(1)
    sizes, places = torch.full_like(start, size), torch.arange(length, device=x.device)
    first, end = start * length // sizes, (start * length + length + size - 1) // sizes
    inside = ((places >= first) & (places < end)).to(x.dtype)
    return (x.movedim(axis, -1) @ (inside / (end - first)).mT).movedim(-1, axis)


class PoolShortcut(LayerPart):
    """Adds the input, average-pooled to the output's shape; a plain identity where shapes agree."""

    def __init__(self, out_channels: int, channel_dim: int = 1) -> None:
        super().__init__()
        self.out_channels, self.channel_dim = out_channels, channel_dim

    def lower(self, transform: OutputTransform, site: Site) -> OutputTransform | None:
        """Add the layer's input if the shortcut is the identity."""
        if not site.adds_input:
            return None
        return transform.then_shortcut(Shortcut.FIRST if site.post_follows else Shortcut.LAST)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + the shortcut of x."""
        if self.channel_dim == 1:
            x = _pool_size(x, y.shape[2:])
        return y + pool_channels(x, self.out_channels, self.channel_dim)


class ScaledShortcut(PoolShortcut):
    """Adds a learnable number times the input, average-pooled to the output's shape (BinaryDM and BiDM).

    The number starts at ``start``; with ``magnitude`` its absolute value multiplies, as in BinaryDM.
    """

    def __init__(self, out_channels: int, channel_dim: int = 1, start: float = 0.0, magnitude: bool = False) -> None:
        super().__init__(out_channels, channel_dim)
        self.factor = nn.Parameter(torch.tensor(float(start)))
        self.magnitude = magnitude

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + the shortcut of x."""
        factor = self.factor.abs() if self.magnitude else self.factor
        return super().forward(y, x * factor.to(x.dtype))


class ProjectionShortcut(nn.Module):
    """AvgPool -> full-precision 1x1 convolution -> BatchNorm where the shape changes (Bi-Real Net, section 3.3)."""

    def __init__(self, in_channels: int, out_channels: int, dimensions: int = 2) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dimensions == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.conv = conv(in_channels, out_channels, 1, bias=False)
        self.norm = norm(out_channels)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + the shortcut of x."""
        return y + self.norm(self.conv(_pool_size(x, y.shape[2:])))


@register_part("shortcut", "pool")
def _pool(spec: LayerSpec) -> nn.Module:
    return PoolShortcut(spec.out_channels, spec.channel_dim)


@register_part("shortcut", "scaled")
def _scaled(spec: LayerSpec, start: float = 0.0, magnitude: bool = False) -> nn.Module:
    return ScaledShortcut(spec.out_channels, spec.channel_dim, start, magnitude)


@register_part("shortcut", "projection")
def _projection(spec: LayerSpec) -> nn.Module:
    same = spec.in_channels == spec.out_channels and set(spec.stride) == {1}
    if same or spec.kind == "linear":  # a projection of a linear layer would be that layer again, in full precision
        return _pool(spec)
    return ProjectionShortcut(spec.in_channels, spec.out_channels, len(spec.stride))
