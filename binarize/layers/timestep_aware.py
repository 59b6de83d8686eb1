"""Shifts and activations around the binary product, in stacked (K, C) form with a per-sample gather.

A timestep-aware part holds K rows, one for each timestep group, and gathers each sample's row: a batch of mixed
timesteps is right, nothing is read back to the host, and torch.compile sees one graph. Rows that no sample of a batch
selected get a zero gradient (not None), so an optimiser's momentum still moves them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.layers.parts import LayerSpec, feature_dims, register_part
from binarize.timestep import TimestepContext


class _Stacked(nn.Module):
    """Holds parameters of shape (K, C) and shapes the rows of a batch for broadcasting."""

    def __init__(
        self, channels: int, groups: int = 1, context: TimestepContext | None = None, channel_dim: int = 1
    ) -> None:
        super().__init__()
        if groups > 1 and context is None:
            raise BinarizeError(
                f"{type(self).__name__} with {groups} timestep groups needs a TimestepContext; got None. Use groups=1."
            )
        self.channels, self.groups, self.channel_dim = channels, groups, channel_dim
        self.context = context

    def gather(self, parameter: Tensor) -> Tensor:
        """Return the parameter's rows for the batch that is running, ``(B, C)`` or ``(1, C)``."""
        if self.groups == 1 or self.context is None:
            return parameter
        return F.embedding(self.context.group(self.groups).to(parameter.device), parameter)

    def rows(self, parameter: Tensor, x: Tensor) -> Tensor:
        """Return the parameter's rows for the batch of ``x``, broadcastable against it, in its dtype."""
        rows = self.gather(parameter)
        shape = [1] * x.dim()
        shape[0], shape[self.channel_dim] = rows.shape[0], self.channels
        return rows.reshape(shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}"


class Shift(_Stacked):
    """x + b_g: ReActNet's RSign shift with one group, BI-DiffSR's TaR with K groups. Zero at the start.

    Args:
        channels: C.
        groups: K, how many timestep groups.
        context: Where the timestep group comes from; needed if K > 1.
        channel_dim: Which dimension of the input holds the channels.
    """

    def __init__(
        self, channels: int, groups: int = 1, context: TimestepContext | None = None, channel_dim: int = 1
    ) -> None:
        super().__init__(channels, groups, context, channel_dim)
        self.bias = nn.Parameter(torch.zeros(groups, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Shift ``(B, C, ...)`` (or ``(..., C)``) channel by channel; the shape stays."""
        return x + self.rows(self.bias, x)


class RPReLU(_Stacked):
    """PReLU(x + b0) + b1 with a slope per channel: ReActNet's RPReLU, and BI-DiffSR's TaA with K groups.

    Shifts start at 0 and slopes at 0.25.

    Args:
        channels: C.
        groups: K, how many timestep groups.
        context: Where the timestep group comes from; needed if K > 1.
        channel_dim: Which dimension of the input holds the channels.
    """

    def __init__(
        self, channels: int, groups: int = 1, context: TimestepContext | None = None, channel_dim: int = 1
    ) -> None:
        super().__init__(channels, groups, context, channel_dim)
        self.shift_in = nn.Parameter(torch.zeros(groups, channels))
        self.slope = nn.Parameter(torch.full((groups, channels), 0.25))
        self.shift_out = nn.Parameter(torch.zeros(groups, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Activate ``(B, C, ...)`` (or ``(..., C)``); the shape stays."""
        x = x + self.rows(self.shift_in, x)
        # Strictly positive, as in nn.PReLU: dot products of signs are often exactly 0, and there the slope counts.
        return torch.where(x > 0, x, x * self.rows(self.slope, x)) + self.rows(self.shift_out, x)

    def gather_all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows of the batch that is running: first shift, slope, last shift."""
        return self.gather(self.shift_in), self.gather(self.slope), self.gather(self.shift_out)

    def fold_bias_(self, bias: Tensor) -> None:
        """Add a convolution's bias to the first shift of every group, which is exact."""
        with torch.no_grad():
            self.shift_in.add_(bias)


class ChannelScale(nn.Module):
    """y * o[C], or y * o[C] h[H] w[W] where the output's size is given; learnable, starting at 1 (XNOR-Net++).

    A smaller output uses the leading entries of h and w, as BiBench does.

    Args:
        channels: C.
        height: H of the largest output, or None to leave its factor out.
        width: W of the largest output, or None to leave its factor out.
        channel_dim: Which dimension holds the channels.
    """

    def __init__(
        self, channels: int, height: int | None = None, width: int | None = None, channel_dim: int = 1
    ) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.scale = nn.Parameter(torch.ones(channels))
        self.row_scale = nn.Parameter(torch.ones(height, 1)) if height is not None else None
        self.column_scale = nn.Parameter(torch.ones(width)) if width is not None else None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Scale the product ``y``; ``x``, the input before its sign, is not used.

        Raises:
            BinarizeError: If ``y`` is larger than the size that the scale was made for.
        """
        y = y * (self.scale.view(-1, 1, 1) if self.channel_dim == 1 else self.scale).to(y.dtype)
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


class InputMeanScale(nn.Module):
    """y * mean |x| of each sample, detached (BiBench's form of XNOR-Net).

    Args:
        channel_dim: 1 takes the mean over each sample, -1 over the last dimension, each token of a linear layer.
    """

    def __init__(self, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Scale the product ``y`` by the mean magnitude of the input ``x`` before its sign, sample by sample."""
        return y * x.detach().abs().mean(feature_dims(x, self.channel_dim), keepdim=True).to(y.dtype)


class KMapScale(nn.Module):
    """y * conv(mean_c |x|, k), one learnable k x k kernel, starting as a box filter (XNOR-Net's K map; BiDM learns it).

    Args:
        kernel_size: Of the binary convolution.
        stride: Of the binary convolution.
        padding: Of the binary convolution, (height, width).
        dilation: Of the binary convolution.
        pad: (left, right, top, bottom) where ``padding`` cannot say it.
        padding_mode: Of the binary convolution.
        of_input: Take the map of the layer's input (BiDM) rather than of what goes into the sign, which a shift or a
            BatchNorm has changed.
    """

    def __init__(
        self,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        pad: tuple[int, int, int, int] | None = None,
        padding_mode: str = "zeros",
        of_input: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.pad, self.pad_mode = pad, "constant" if padding_mode == "zeros" else padding_mode
        self.of_input = of_input
        self.weight = nn.Parameter(torch.full((1, 1, *kernel_size), 1 / (kernel_size[0] * kernel_size[1])))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Scale the product ``y`` ``(B, C_out, H', W')`` by the map of ``x`` ``(B, C_in, H, W)``."""
        magnitude, padding = x.abs().mean(1, keepdim=True), self.padding
        if self.pad is not None:
            magnitude, padding = F.pad(magnitude, self.pad, self.pad_mode), (0, 0)
        return y * F.conv2d(magnitude, self.weight.to(x.dtype), None, self.stride, padding, self.dilation)


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the last dimension of ``(..., C)``, for linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every channel over all other dimensions."""
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)


@register_part("pre", "shift")
def _shift(spec: LayerSpec) -> nn.Module:
    return Shift(spec.in_channels, channel_dim=spec.channel_dim)


@register_part("pre", "tar", timestep_aware=True)
def _tar(spec: LayerSpec) -> nn.Module:
    return Shift(spec.in_channels, spec.groups, spec.context, spec.channel_dim)


def _batch_norm(channels: int, spec: LayerSpec) -> nn.Module:
    return nn.BatchNorm2d(channels) if spec.kind == "conv2d" else TokenBatchNorm(channels)


@register_part("pre", "batch_norm")
def _pre_norm(spec: LayerSpec) -> nn.Module:
    return _batch_norm(spec.in_channels, spec)


@register_part("norm", "batch_norm")
def _norm(spec: LayerSpec) -> nn.Module:
    return _batch_norm(spec.out_channels, spec)


@register_part("scale", "channel")
def _channel_scale(spec: LayerSpec, height: int | None = None, width: int | None = None) -> nn.Module:
    if spec.kind == "linear":  # tokens have no rows and columns
        height = width = None
    return ChannelScale(spec.out_channels, height, width, spec.channel_dim)


@register_part("scale", "input_mean")
def _input_mean(spec: LayerSpec) -> nn.Module:
    return InputMeanScale(spec.channel_dim)


@register_part("scale", "k_map")
def _k_map(spec: LayerSpec, of_input: bool = False) -> nn.Module:
    if spec.kind != "conv2d":
        # A linear layer is a 1x1 convolution: its K map is mean |x|, times one learnable number.
        return _TokenMap(of_input)
    kernel = (spec.weight.shape[2], spec.weight.shape[3])
    return KMapScale(kernel, spec.stride, spec.padding, spec.dilation, spec.pad, spec.padding_mode, of_input)


class _TokenMap(nn.Module):
    def __init__(self, of_input: bool) -> None:
        super().__init__()
        self.of_input = of_input
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y * (x.abs().mean(-1, keepdim=True) * self.weight.to(x.dtype))


@register_part("post", "rprelu")
def _rprelu(spec: LayerSpec) -> nn.Module:
    return RPReLU(spec.out_channels, channel_dim=spec.channel_dim)


@register_part("post", "taa", timestep_aware=True)
def _taa(spec: LayerSpec) -> nn.Module:
    return RPReLU(spec.out_channels, spec.groups, spec.context, spec.channel_dim)


@register_part("post", "hardtanh")
def _hardtanh(spec: LayerSpec) -> nn.Module:
    return nn.Hardtanh()


@register_part("post", "relu")
def _relu(spec: LayerSpec) -> nn.Module:
    return nn.ReLU()
