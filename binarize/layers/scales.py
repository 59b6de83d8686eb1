"""Scales of the product, norms and plain activation functions."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.binary_conv import OutputTransform
from binarize.layers.parts import LayerPart, LayerSpec, Scale, Site, feature_dims, per_channel, register_part


class ChannelScale(Scale):
    """y * o[C], or y * o[C] h[H] w[W] if the output's size is given; learnable, starting at 1 (XNOR-Net++).

    ``height`` and ``width`` are those of the largest output. A smaller one uses the leading entries of h and w, as
    BiBench does. ``channel_dim`` is the dimension of the channels.
    """

    def __init__(
        self, channels: int, height: int | None = None, width: int | None = None, channel_dim: int = 1
    ) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.scale = nn.Parameter(torch.ones(channels))
        self.row_scale = nn.Parameter(torch.ones(height, 1)) if height is not None else None
        self.column_scale = nn.Parameter(torch.ones(width)) if width is not None else None

    def lower(self, transform: OutputTransform, site: Site) -> OutputTransform | None:
        """Append the channel factor, unless there are factors of rows and columns."""
        channels_only = self.row_scale is None and self.column_scale is None
        return transform.then_affine(factor=self.scale) if channels_only else None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Scale the product ``y``; ``x`` is not used."""
        y = y * (per_channel(self.scale, y) if self.channel_dim == 1 else self.scale).to(y.dtype)
        if self.row_scale is not None:
            y = y * self._leading(self.row_scale, y.shape[-2], "high").to(y.dtype)
        if self.column_scale is not None:
            y = y * self._leading(self.column_scale, y.shape[-1], "wide").to(y.dtype)
        return y

    @staticmethod
    def _leading(scale: Tensor, size: int, word: str) -> Tensor:
        if size > scale.shape[0]:
            raise BinarizeError(
                f"an XNOR-Net++ scale was made for outputs up to {scale.shape[0]} pixels {word}; got {size}. "
                "Give a larger size=(H, W), or none for the channel factor alone."
            )
        return scale[:size]


class InputMeanScale(Scale):
    """y * mean |x|, detached, of each sample, or of each token with ``channel_dim`` -1 (BiBench's form of XNOR-Net)."""

    def __init__(self, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Scale the product ``y`` by the mean magnitude of the input ``x`` before its sign."""
        return y * x.detach().abs().mean(feature_dims(x, self.channel_dim), keepdim=True).to(y.dtype)


class KMapScale(Scale):
    """y * conv(mean_c |x|, k), one learnable k x k kernel, starting as a box filter (XNOR-Net's K map; BiDM learns it).

    The geometry is that of the binary convolution; ``pad`` (left, right, top, bottom) replaces ``padding`` if opposite
    sides differ. ``of_input`` computes the map from the layer's input (BiDM), not from the input of the sign, after
    shift or BatchNorm. Unless ``learned``, the kernel stays a box filter and no gradient flows through the map.
    """

    def __init__(
        self, kernel_size: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
        dilation: tuple[int, ...], pad: tuple[int, ...] | None = None, padding_mode: str = "zeros",
        of_input: bool = False, learned: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.pad, self.pad_mode = pad, "constant" if padding_mode == "zeros" else padding_mode
        self.of_input = of_input
        self.shape, self.start = (1, 1, *kernel_size), 1 / math.prod(kernel_size)
        self.weight = nn.Parameter(torch.full(self.shape, self.start)) if learned else None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Scale the product ``y`` ``(B, C_out, H', W')`` by the map of ``x`` ``(B, C_in, H, W)``; or with a depth."""
        if self.weight is None:
            x, weight = x.detach(), x.new_full(self.shape, self.start)
        else:
            weight = self.weight.to(x.dtype)
        magnitude, padding = x.abs().mean(1, keepdim=True), self.padding
        if self.pad is not None:
            magnitude, padding = F.pad(magnitude, self.pad, self.pad_mode), (0,) * len(padding)
        convolve: Any = F.conv2d if x.dim() == 4 else F.conv3d
        return y * convolve(magnitude, weight, None, self.stride, padding, self.dilation)


class _FoldedNorm(LayerPart):
    """A BatchNorm that a kernel applies as factor and offset in evaluation mode."""

    def lower(self, transform: OutputTransform, site: Site) -> OutputTransform | None:
        """Append the normalisation with the running statistics."""
        norm = cast(nn.BatchNorm2d, self)
        mean, variance = norm.running_mean, norm.running_var
        if self.training or not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
            return None
        dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
        factor = torch.rsqrt(variance.to(dtype) + norm.eps)
        factor = factor if norm.weight is None else factor * norm.weight.to(dtype)
        offset = -mean.to(dtype) * factor
        return transform.then_affine(factor, offset if norm.bias is None else offset + norm.bias.to(dtype))


class BatchNorm2d(_FoldedNorm, nn.BatchNorm2d):
    """BatchNorm2d as a part."""


class BatchNorm3d(_FoldedNorm, nn.BatchNorm3d):
    """BatchNorm3d as a part."""


class TokenBatchNorm(_FoldedNorm, nn.BatchNorm1d):
    """BatchNorm1d over the last dimension of ``(..., C)``, for linear layers."""

    lower = _FoldedNorm.lower

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every channel over all other dimensions."""
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)


class Hardtanh(LayerPart, nn.Hardtanh):
    """Hardtanh as a part."""

    def lower(self, transform: OutputTransform, site: Site) -> OutputTransform | None:
        """Append the clamp."""
        return transform.then_clamp(float(self.min_val), float(self.max_val))


class ReLU(LayerPart, nn.ReLU):
    """ReLU as a part."""

    def lower(self, transform: OutputTransform, site: Site) -> OutputTransform | None:
        """Append the clamp."""
        return transform.then_clamp(low=0.0)


def _batch_norm(channels: int, spec: LayerSpec) -> nn.Module:
    kinds = {"conv2d": BatchNorm2d, "conv3d": BatchNorm3d, "linear": TokenBatchNorm}
    return kinds[spec.kind](channels)


register_part("pre", "batch_norm")(lambda spec: _batch_norm(spec.in_channels, spec))
register_part("norm", "batch_norm")(lambda spec: _batch_norm(spec.out_channels, spec))
register_part("post", "hardtanh")(lambda spec: Hardtanh())
register_part("post", "relu")(lambda spec: ReLU())
register_part("scale", "input_mean")(lambda spec: InputMeanScale(spec.channel_dim))


class _TokenMap(Scale):
    def __init__(self, of_input: bool) -> None:
        super().__init__()
        self.of_input = of_input
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y * (x.abs().mean(-1, keepdim=True) * self.weight.to(x.dtype))


@register_part("scale", "channel")
def _channel_scale(spec: LayerSpec, height: int | None = None, width: int | None = None) -> nn.Module:
    if spec.kind == "linear":  # tokens have no rows and columns
        height = width = None
    return ChannelScale(spec.out_channels, height, width, spec.channel_dim)


@register_part("scale", "k_map")
def _k_map(spec: LayerSpec, of_input: bool = False, learned: bool = True) -> nn.Module:
    if spec.kind == "linear":
        # A linear layer is a 1x1 convolution: its K map is mean |x|, times one learnable number.
        return _TokenMap(of_input) if learned or of_input else InputMeanScale(spec.channel_dim)
    kernel, options = tuple(spec.weight.shape[2:]), {"of_input": of_input, "learned": learned}
    return KMapScale(kernel, spec.stride, spec.padding, spec.dilation, spec.pad, spec.padding_mode, **options)
