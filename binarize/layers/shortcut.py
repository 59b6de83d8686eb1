"""Shortcuts around a binary layer, for any change of width and size.

A shortcut carries the full-precision signal past the sign. It is the identity if the layer keeps its shape. Otherwise
the spatial size is average-pooled (2 x 2 for a stride of 2), and so are neighbouring channels, which repeats channels
where the layer widens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.kernels.binary_conv import OutputTransform, Shortcut
from binarize.layers.parts import LayerPart, LayerSpec, Site, register_part


def pool_channels(x: Tensor, channels: int, channel_dim: int = 1) -> Tensor:
    """Average-pool (or repeat) the channels of ``(B, C, H, W)``, or of ``(..., C)`` with ``channel_dim`` -1."""
    width = x.shape[channel_dim]
    if width == channels:
        return x
    if channel_dim == 1:
        return F.adaptive_avg_pool3d(x.unsqueeze(1), (channels, x.shape[2], x.shape[3])).squeeze(1)
    return F.adaptive_avg_pool1d(x.reshape(-1, 1, width), channels).reshape(*x.shape[:-1], channels)


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
        if self.channel_dim == 1 and x.shape[2:] != y.shape[2:]:
            x = F.adaptive_avg_pool2d(x, (y.shape[2], y.shape[3]))
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

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + the shortcut of x."""
        if x.shape[2:] != y.shape[2:]:
            x = F.adaptive_avg_pool2d(x, (y.shape[2], y.shape[3]))
        return y + self.norm(self.conv(x))


@register_part("shortcut", "pool")
def _pool(spec: LayerSpec) -> nn.Module:
    return PoolShortcut(spec.out_channels, spec.channel_dim)


@register_part("shortcut", "scaled")
def _scaled(spec: LayerSpec, start: float = 0.0, magnitude: bool = False) -> nn.Module:
    return ScaledShortcut(spec.out_channels, spec.channel_dim, start, magnitude)


@register_part("shortcut", "projection")
def _projection(spec: LayerSpec) -> nn.Module:
    same = spec.in_channels == spec.out_channels and spec.stride == (1, 1)
    if same or spec.kind == "linear":  # a projection of a linear layer would be that layer again, in full precision
        return _pool(spec)
    return ProjectionShortcut(spec.in_channels, spec.out_channels)
