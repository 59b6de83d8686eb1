"""The definition of every operator in plain PyTorch, for any device. Compiled kernels are tested against it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from binarize.kernels.binary_conv import BinaryConv, Shortcut, channel_coefficients
from binarize.kernels.bitpack import WORD, to_bits
from binarize.kernels.checks import check_inputs
from binarize.kernels.row_sums import RowSums


def run(
    x: Tensor, conv: BinaryConv, timestep_group: Tensor | None = None, input_norm: Tensor | None = None,
    channel_bias: Tensor | None = None, residual: Tensor | None = None, row_sums: RowSums | None = None,
) -> Tensor:  # fmt: skip
    """Apply a binary convolution; see `binarize.kernels.ops.binary_conv2d`."""
    check_inputs(x, conv, timestep_group, input_norm, channel_bias, residual)
    shape = conv.shape
    acc_dtype = torch.promote_types(conv.coefficients.dtype, x.dtype)
    h = x.to(acc_dtype)
    if input_norm is not None:
        factors, offsets = input_norm.to(acc_dtype)[:, :, :, None, None]
        h = F.silu(h * factors + offsets).to(x.dtype).to(acc_dtype)
    rows = torch.zeros(1, dtype=torch.long, device=x.device) if timestep_group is None else timestep_group
    thresholds = conv.thresholds.view(-1, shape.groups, shape.words * WORD)[:, :, : shape.in_channels].flatten(1)[rows]
    signs = (h >= thresholds[:, :, None, None]).to(acc_dtype)
    signs = signs if conv.unsigned else 2 * signs - 1
    weights = 2 * to_bits(conv.filters.unsqueeze(0), shape)[0].to(acc_dtype) - 1
    padded = F.pad(signs, conv.geometry.pad)
    dot = F.conv2d(padded, weights, None, conv.geometry.stride, 0, conv.geometry.dilation, shape.groups)
    table = channel_coefficients(conv.coefficients, shape)[:, rows].to(acc_dtype)
    scale, factor, offset, shift_in, slope, shift_out = table[..., None, None]
    y = dot * scale * factor + offset
    if conv.shortcut == Shortcut.FIRST:
        y = y + h
    y = y + shift_in
    y = torch.where(y > 0, y, y * slope) + shift_out
    if math.isfinite(conv.low) or math.isfinite(conv.high):
        y = y.clamp(conv.low, conv.high)
    if conv.shortcut == Shortcut.LAST:
        y = y + h
    if channel_bias is not None:
        y = y + channel_bias.to(acc_dtype)[:, :, None, None]
    if residual is not None:
        y = y + residual.to(acc_dtype)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def norm_factors(
    x: Tensor, channel_bias: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    row_sums: RowSums | None = None,
) -> Tensor:  # fmt: skip
    """Return GroupNorm's factors and offsets; see `binarize.kernels.ops.norm_factors`."""
    out_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, square = x.to(out_dtype).mean((2, 3)).double(), x.to(out_dtype).square().mean((2, 3)).double()
    if channel_bias is not None:
        shift = channel_bias.double()
        square = square + 2 * shift * mean + shift * shift
        mean = mean + shift
    batch, channels = mean.shape
    by_group = (batch, groups, channels // groups)
    group_mean, group_square = mean.view(by_group).mean(2), square.view(by_group).mean(2)
    rstd = torch.rsqrt((group_square - group_mean.square()).clamp_min(0) + eps)
    factors = rstd.repeat_interleave(channels // groups, 1)
    offsets = (-group_mean * rstd).repeat_interleave(channels // groups, 1)
    if weight is not None:
        factors, offsets = factors * weight, offsets * weight
    if bias is not None:
        offsets = offsets + bias
    if channel_bias is not None:
        offsets = offsets + channel_bias * factors
    return torch.stack([factors, offsets]).to(out_dtype)


def norm_silu(x: Tensor, input_norm: Tensor) -> Tensor:
    """Return ``silu(x * input_norm[0] + input_norm[1])``; see `binarize.kernels.ops.norm_silu`."""
    factors, offsets = input_norm[:, :, :, None, None]
    out = F.silu(x.to(input_norm.dtype) * factors + offsets).to(x.dtype)
    return out.contiguous(memory_format=torch.channels_last)


def shuffle(hidden: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Return CS-Fusion's two mixtures; see `binarize.kernels.ops.shuffle`."""
    first, second = (torch.cat([hidden[:, 1 - i :: 2], skip[:, i::2]], dim=1) for i in range(2))
    return first.contiguous(memory_format=torch.channels_last), second.contiguous(memory_format=torch.channels_last)


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, input_norm: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Return a full-precision 3x3 convolution with padding 1; see `binarize.kernels.ops.conv3x3`."""
    y = F.conv2d(x if input_norm is None else norm_silu(x, input_norm), weight, bias, padding=1)
    y = y if residual is None else y.add_(residual)
    return y.contiguous(memory_format=torch.channels_last)
