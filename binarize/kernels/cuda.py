"""The CUDA backend: Triton kernels with signs in one byte each and products on the tensor cores.

The matrix units of a GPU, which multiply 8-bit integers, are faster than its xnor and population count. One kernel
writes the signs of the input, a byte each. The other unpacks the filters' bits, accumulates 32-bit integers, which is
exact, and applies the output transform before the sums leave the registers.

With ``TRITON_INTERPRET=1`` in the environment when Triton is imported, the same kernels run on a CPU, slowly, for
tests.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.kernels.binary_conv import COEFFICIENTS, BinaryConv
from binarize.kernels.bitpack import LANES, WORD
from binarize.kernels.checks import as_channels_last, check_inputs
from binarize.kernels.row_sums import RowSums

FEW_TILES = 264  # twice the multiprocessors of an H100, some of which fewer large tiles would leave idle
OLDEST = (8, 0)  # compute capability: tensor cores for 8-bit integers that Triton compiles for
# Multiplications and additions stay apart, so that the floats are those of plain PyTorch.
_EXACT: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def _place(pixel, width, stride_h, stride_w):  # type: ignore[no-untyped-def]
    """Return the offsets of pixels that are counted along the rows of an image."""
    return (pixel // width).to(tl.int64) * stride_h + (pixel % width).to(tl.int64) * stride_w


@triton.jit
def _activated(x, factors, offsets, at, mask, NORMED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the layer's input in float32: ``x``, or ``silu(x * factor + offset)`` rounded to x's dtype."""
    h = x.to(tl.float32)
    if NORMED:
        h = h * tl.load(factors + at, mask=mask, other=0.0) + tl.load(offsets + at, mask=mask, other=0.0)
        h = h / (1.0 + tl.exp(-h))
        h = h.to(x.dtype).to(tl.float32)
    return h


# Not specialised on image sizes, each of which would be compiled anew.
@triton.jit(do_not_specialize=["pixels", "width", "threshold_row", "group_channels", "group_lanes"])
def _input_kernel(  # type: ignore[no-untyped-def]
    x, out, thresholds, group, factors, offsets,
    pixels, width, stride_b, stride_h, stride_w, channels, threshold_row, group_channels, group_lanes,
    SIGNS: tl.constexpr, UNSIGNED: tl.constexpr, NORMED: tl.constexpr, GROUPED: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the signs or the SiLUs of a tile of pixels and channels of one sample, dense and channels_last."""
    tiles = tl.cdiv(pixels, PIXELS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    place = _place(pixel, width, stride_h, stride_w)
    value = tl.load(x + sample * stride_b + place[:, None] + channel[None, :], mask=there, other=0.0)
    at = sample * channels + channel[None, :]
    h = _activated(value, factors, offsets, at, (channel < channels)[None, :], NORMED)
    to = out + (sample * pixels + pixel.to(tl.int64))[:, None] * channels + channel[None, :]
    if SIGNS:
        row = tl.load(group + sample) if GROUPED else 0
        column = channel // group_channels * group_lanes + channel % group_channels
        limit = tl.load(thresholds + row * threshold_row + column, mask=channel < channels, other=0.0)
        bits = (h >= limit[None, :]).to(tl.int8)
        tl.store(to, bits if UNSIGNED else 2 * bits - 1, mask=there)
    else:
        tl.store(to, h.to(out.dtype.element_ty), mask=there)


@triton.jit(
    do_not_specialize=[
        "pixels", "out_width", "height", "width", "group_out", "blocks", "table_row", "stride_h", "stride_w",
        "pad_left", "pad_top", "dilation_h", "dilation_w", "taps", "kernel_w", "group_words",
    ]
)  # fmt: skip
def _product_kernel(  # type: ignore[no-untyped-def]
    codes, filters, table, group, x, out, factors, offsets, channel_bias, residual, low, high,
    pixels, out_width, height, width, out_channels, group_out, blocks, table_row, channels,
    x_stride_b, x_stride_h, x_stride_w, r_stride_b, r_stride_h, r_stride_w,
    stride_h, stride_w, pad_left, pad_top, dilation_h, dilation_w, taps, kernel_w, group_in, group_words,
    LANES: tl.constexpr,
    GROUPED: tl.constexpr, NORMED: tl.constexpr, SHORTCUT: tl.constexpr, CLAMPED: tl.constexpr,
    BIASED: tl.constexpr, RESIDUAL: tl.constexpr,
    PIXELS: tl.constexpr, OUTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Convolve a tile of output pixels of one sample with some filters of one group and apply the output transform."""
    tiles, out_tiles = tl.cdiv(pixels, PIXELS), tl.cdiv(group_out, OUTS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    conv_group = tl.program_id(1) // out_tiles
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    filter_ = tl.program_id(1) % out_tiles * OUTS + tl.arange(0, OUTS)
    in_group = filter_ < group_out
    top = pixel // out_width * stride_h - pad_top
    left = pixel % out_width * stride_w - pad_left
    first = codes + sample * height * width * channels + conv_group * group_in
    # (blocks, taps * words, LANES): a word has 32 input channels of one tap.
    block = conv_group * blocks + filter_ // LANES
    words = filters + block.to(tl.int64) * (taps * group_words * LANES) + filter_ % LANES

    inner = tl.arange(0, STEP)
    total = tl.zeros((PIXELS, OUTS), dtype=tl.int32)
    steps = tl.cdiv(group_words * 32, STEP)
    for step in range(taps * steps):
        tap, begin = step // steps, step % steps * STEP
        y, z = top + tap // kernel_w * dilation_h, left + tap % kernel_w * dilation_w
        inside = (y >= 0) & (y < height) & (z >= 0) & (z < width) & (pixel < pixels)
        source = first + (y.to(tl.int64) * width + z)[:, None] * channels + (begin + inner)[None, :]
        a = tl.load(source, mask=inside[:, None] & (begin + inner < group_in)[None, :], other=0)
        word = begin // 32 + tl.arange(0, STEP // 32)
        bits = tl.load(
            words[None, :] + (tap * group_words + word)[:, None] * LANES,
            mask=in_group[None, :] & (word < group_words)[:, None], other=0,
        )  # fmt: skip
        spread = (bits[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
        b = (2 * spread - 1).to(tl.int8)
        total = tl.dot(a, tl.reshape(b, (STEP, OUTS)), total, out_dtype=tl.int32)

    channel = conv_group * group_out + filter_
    row = tl.load(group + sample) if GROUPED else 0
    column = table + row * table_row + block.to(tl.int64) * (6 * LANES) + filter_ % LANES
    scale = tl.load(column, mask=in_group, other=0.0)[None, :]
    factor = tl.load(column + LANES, mask=in_group, other=0.0)[None, :]
    offset = tl.load(column + 2 * LANES, mask=in_group, other=0.0)[None, :]
    shift_in = tl.load(column + 3 * LANES, mask=in_group, other=0.0)[None, :]
    slope = tl.load(column + 4 * LANES, mask=in_group, other=0.0)[None, :]
    shift_out = tl.load(column + 5 * LANES, mask=in_group, other=0.0)[None, :]
    there = (pixel < pixels)[:, None] & in_group[None, :]
    v = total.to(tl.float32) * scale * factor + offset
    h = v
    if SHORTCUT > 0:
        place = _place(pixel, out_width, x_stride_h, x_stride_w)
        h = tl.load(x + sample * x_stride_b + place[:, None] + channel[None, :], mask=there, other=0.0)
        h = _activated(h, factors, offsets, sample * channels + channel[None, :], in_group[None, :], NORMED)
    if SHORTCUT == 2:
        v = v + h
    v = v + shift_in
    v = tl.where(v > 0, v, v * slope) + shift_out
    if CLAMPED:
        v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
        v = tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)
    if SHORTCUT == 1:
        v = v + h
    if BIASED:
        v = v + tl.load(channel_bias + sample * out_channels + channel, mask=in_group, other=0.0)[None, :]
    if RESIDUAL:
        place = _place(pixel, out_width, r_stride_h, r_stride_w)
        other = residual + sample * r_stride_b + place[:, None] + channel[None, :]
        v = v + tl.load(other, mask=there, other=0.0).to(tl.float32)
    to = out + (sample * pixels + pixel.to(tl.int64))[:, None] * out_channels + channel[None, :]
    tl.store(to, v.to(out.dtype.element_ty), mask=there)


@triton.jit
def _factors_kernel(  # type: ignore[no-untyped-def]
    means, variances, channel_bias, weight, bias, factors, offsets, eps, channels, group_channels,
    SHIFTED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Combine the moments of a group's channels into GroupNorm's factors and offsets."""
    sample, number = tl.program_id(0), tl.program_id(1)
    inner = tl.arange(0, CHANNELS)
    there = inner < group_channels
    channel = number * group_channels + inner
    at = sample * channels + channel
    shift = tl.zeros((CHANNELS,), dtype=tl.float32)
    if SHIFTED:
        shift = tl.load(channel_bias + at, mask=there, other=0.0)
    mean = tl.load(means + at, mask=there, other=0.0) + shift
    variance = tl.load(variances + at, mask=there, other=0.0)
    center = tl.sum(mean) / group_channels
    away = tl.where(there, mean - center, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(variance + away * away) / group_channels + eps)
    factor = tl.zeros((CHANNELS,), dtype=tl.float32) + scale
    if WEIGHT:
        factor = factor * tl.load(weight + channel, mask=there, other=0.0)
    offset = (shift - center) * factor
    if BIAS:
        offset = offset + tl.load(bias + channel, mask=there, other=0.0)
    tl.store(factors + at, factor, mask=there)
    tl.store(offsets + at, offset, mask=there)


def check(device: int) -> None:
    """Raise BinarizeError, with the reason, unless kernels can be compiled and run on a GPU."""
    try:
        found = torch.cuda.get_device_capability(device)
        if found < OLDEST:
            raise RuntimeError(f"compute capability {found[0]}.{found[1]} is below {OLDEST[0]}.{OLDEST[1]}")
        x = torch.ones((1, 16, 2, 2), device=f"cuda:{device}")
        norm_silu(x, torch.ones((2, 1, 16), device=x.device))
    except Exception as error:
        raise BinarizeError(f"the CUDA kernels cannot be used on device {device}: {error}.") from error


def run(
    x: Tensor, conv: BinaryConv, timestep_group: Tensor | None = None, input_norm: Tensor | None = None,
    channel_bias: Tensor | None = None, residual: Tensor | None = None, row_sums: RowSums | None = None,
) -> Tensor:  # fmt: skip
    """Apply a binary convolution; see `binarize.kernels.ops.binary_conv2d`."""
    check_inputs(x, conv, timestep_group, input_norm, channel_bias, residual)
    x, shape, geometry = as_channels_last(x), conv.shape, conv.geometry
    batch, channels, height, width = x.shape
    out_height, out_width = geometry.output(height, width, shape.kernel)
    out = torch.empty(
        (batch, shape.out_channels, out_height, out_width),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    if out.numel() == 0:
        return out
    # An argument that a kernel does not read still needs a pointer; x stands for it.
    filters, thresholds = conv.filters.contiguous(), conv.thresholds.float().contiguous()
    coefficients = conv.coefficients.float().contiguous()
    grouped = timestep_group is not None and (len(coefficients) > 1 or len(thresholds) > 1)
    group = x if timestep_group is None else timestep_group.expand(batch).contiguous()
    factors, offsets = (x, x) if input_norm is None else input_norm.float().contiguous().unbind()
    bias = x if channel_bias is None else channel_bias.float().expand(batch, -1).contiguous()
    added = x if residual is None else as_channels_last(residual)
    codes = torch.empty((batch, height * width, channels), dtype=torch.int8, device=x.device)
    group_out, kh, kw = shape.out_channels // shape.groups, *shape.kernel
    pixels = out_height * out_width
    outs = max(16, min(64, triton.next_power_of_2(group_out)))
    tile = 128 if pixels * batch * triton.cdiv(shape.out_channels, outs) >= 128 * FEW_TILES else 64
    with _device(x):
        _read(
            x, codes, thresholds, group, factors, offsets, thresholds.shape[1], shape.in_channels, shape.words * WORD,
            signs=True, unsigned=conv.unsigned, normed=input_norm is not None, grouped=grouped,
        )  # fmt: skip
        grid = (triton.cdiv(pixels, tile) * batch, shape.groups * triton.cdiv(group_out, outs))
        _product_kernel[grid](
            codes, filters, coefficients, group, x, out, factors, offsets, bias, added, float(conv.low),
            float(conv.high), pixels, out_width, height, width, shape.out_channels, group_out, shape.blocks,
            shape.groups * shape.blocks * COEFFICIENTS * LANES, channels, *_strides(x), *_strides(added),
            *geometry.stride, geometry.pad[0], geometry.pad[2], *geometry.dilation,
            kh * kw, kw, shape.in_channels, shape.words, LANES=LANES, GROUPED=grouped,
            NORMED=input_norm is not None, SHORTCUT=int(conv.shortcut),
            CLAMPED=math.isfinite(conv.low) or math.isfinite(conv.high), BIASED=channel_bias is not None,
            RESIDUAL=residual is not None, PIXELS=tile, OUTS=outs, STEP=32 if shape.words == 1 else 64,
            num_warps=tile // 16, **_EXACT,
        )  # fmt: skip
    return out


def norm_factors(
    x: Tensor, channel_bias: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    row_sums: RowSums | None = None,
) -> Tensor:  # fmt: skip
    """Return GroupNorm's factors and offsets; see `binarize.kernels.ops.norm_factors`."""
    batch, channels = x.shape[:2]
    variances, means = torch.var_mean(x.float(), dim=(2, 3), correction=0)
    out = torch.empty((2, batch, channels), dtype=torch.float32, device=x.device)
    add, by, plus = (
        means if t is None else t.float().contiguous()
        for t in (None if channel_bias is None else channel_bias.expand(batch, -1), weight, bias)
    )
    with _device(x):
        _factors_kernel[(batch, groups)](
            means, variances, add, by, plus, out[0], out[1], float(eps), channels, channels // groups,
            SHIFTED=channel_bias is not None, WEIGHT=weight is not None, BIAS=bias is not None,
            CHANNELS=triton.next_power_of_2(channels // groups), **_EXACT,
        )  # fmt: skip
    return out


def norm_silu(x: Tensor, input_norm: Tensor) -> Tensor:
    """Return ``silu(x * input_norm[0] + input_norm[1])``; see `binarize.kernels.ops.norm_silu`."""
    x = as_channels_last(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    factors, offsets = input_norm.float().contiguous().unbind()
    if out.numel():
        with _device(x):
            flags = {"signs": False, "unsigned": False, "normed": True, "grouped": False}
            _read(x, out, x, x, factors, offsets, 0, x.shape[1], 0, **flags)
    return out


def _read(
    x: Tensor, out: Tensor, thresholds: Tensor, group: Tensor, factors: Tensor, offsets: Tensor,
    threshold_row: int, group_channels: int, group_lanes: int,
    *, signs: bool, unsigned: bool, normed: bool, grouped: bool,
) -> None:  # fmt: skip
    batch, channels, height, width = x.shape
    across = max(16, min(64, triton.next_power_of_2(channels)))
    grid = (triton.cdiv(height * width, 64) * batch, triton.cdiv(channels, across))
    _input_kernel[grid](
        x, out, thresholds, group, factors, offsets,
        height * width, width, *_strides(x), channels, threshold_row, group_channels, group_lanes,
        SIGNS=signs, UNSIGNED=unsigned, NORMED=normed, GROUPED=grouped, PIXELS=64, CHANNELS=across,
        num_warps=4, **_EXACT,
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(2), x.stride(3)


def _device(x: Tensor) -> Any:
    return contextlib.nullcontext() if x.device.type == "cpu" else torch.cuda.device(x.device)
