"""Calls the compiled kernels on tensors: lays out their parameters, scratch memory and tasks."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from binarize.packed import _threads
from binarize.packed._compile import workers
from binarize.packed._layout import LANES, FilterShape
from binarize.packed._vectors import AVX512, WINOGRAD
from binarize.packed._workers import PIXELS, Conv, Norm, Tiles, Unzip, Wide

if TYPE_CHECKING:
    from binarize.packed._op import Geometry

ALIGN = 64
# An output strip's input should stay in the second-level cache from packing until the shortcut reads it again.
STRIP_BYTES = 400_000
TASKS_PER_THREAD = 4
# The transformed patches of a full-precision convolution and their products share that cache with its filters.
TILE_BYTES, MOST_TILES = 600_000, 16
# For a gradient of weights, so many transformed tiles are multiplied together that the sums, which this reads and
# writes, cost little beside it. Where the sums leave the second cache, torch multiplies as many as fit the last one.
TILES_TOGETHER, SUMS_BYTES, GRADIENT_BYTES = 32, 1_200_000, 24_000_000


# Winograd's algorithm keeps 16 sums of 16 lanes in registers, which 16 registers of 8 lanes do not hold.
TRAINS_WIDE = AVX512


class _Plan(NamedTuple):
    """What a convolution's parameters are before addresses are known."""

    fields: np.ndarray
    tasks: int
    scratch: int
    height: int
    width: int


def packed_conv2d(
    x: Tensor,
    filters: Tensor,
    counts: Tensor,
    thresholds: Tensor,
    table: Tensor,
    group: Tensor | None,
    shape: FilterShape,
    geometry: Geometry,
    *,
    halve: bool,
    low: float,
    high: float,
    shortcut: int,
    norm: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Do what `binarize.packed._op.packed_conv2d` says with the compiled kernels."""
    x = _pixels(x)
    batch, _, height, width = x.shape
    threads = _threads.workers()
    plan = _plan(batch, height, width, shape, geometry, halve, x.element_size(), norm is not None, threads)
    out = torch.empty(
        (batch, shape.out_channels, plan.height, plan.width), dtype=x.dtype, memory_format=torch.channels_last
    )
    if out.numel() == 0:
        return out
    # Module.to(memory_format=torch.channels_last) turns over every tensor of four axes, words of bits as well.
    filters, counts = filters.contiguous(), counts.contiguous()
    limits = np.array([low, high], np.float32)
    held: list[Any] = [filters, counts, thresholds.float().contiguous(), table.float().contiguous(), limits]
    p = plan.fields.copy()
    scratch = torch.empty(min(threads, plan.tasks) * plan.scratch + ALIGN, dtype=torch.uint8)
    p[Conv.SCRATCH] = -(-scratch.data_ptr() // ALIGN) * ALIGN
    _place(p, Conv.X, x)
    _place(p, Conv.OUT, out)
    p[Conv.FILTERS], p[Conv.BASE] = filters.data_ptr(), counts.data_ptr()
    p[Conv.FILTER_SUMS] = counts.data_ptr() + counts.stride(0) * 4
    p[Conv.THRESHOLDS], p[Conv.TABLE] = held[2].data_ptr(), held[3].data_ptr()
    p[Conv.LIMITS] = held[4].ctypes.data
    p[Conv.SHORTCUT], p[Conv.EARLY] = int(shortcut != 0), int(shortcut == 2)
    if group is not None:
        held.append(group.expand(batch).contiguous())
        p[Conv.GROUP] = held[-1].data_ptr()
    if norm is not None:
        held.append(norm.float().contiguous())
        p[Conv.NORM_FACTORS], p[Conv.NORM_OFFSETS] = held[-1][0].data_ptr(), held[-1][1].data_ptr()
    if row is not None:
        held.append(row.float().expand(batch, -1).contiguous())
        p[Conv.ROW_ADD] = held[-1].data_ptr()
    if residual is not None:
        held.append(_pixels(residual.to(x.dtype)))
        _place(p, Conv.RESIDUAL, held[-1])
    _threads.run(workers()["conv"], p.ctypes.data, plan.tasks)
    return out


def norm_factors(
    x: Tensor, row: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Do what `binarize.packed._norm.norm_factors` says with the compiled kernels."""
    x = _pixels(x)
    p, tasks, strips = _strips(x)
    sums = torch.zeros(x.shape[0], strips, 2, x.shape[1], dtype=torch.float32)
    out = torch.empty(2, x.shape[0], x.shape[1], dtype=torch.float32)
    small = np.array([eps])
    held = [None if t is None else t.float().contiguous() for t in (weight, bias)]
    held.append(None if row is None else row.float().expand(x.shape[0], -1).contiguous())
    p[Norm.GROUPS], p[Norm.SUMS], p[Norm.EPS] = groups, sums.data_ptr(), small.ctypes.data
    p[Norm.WEIGHT], p[Norm.BIAS], p[Norm.SHIFT] = (0 if t is None else t.data_ptr() for t in held)
    p[Norm.FACTORS], p[Norm.OFFSETS] = out[0].data_ptr(), out[1].data_ptr()
    _threads.run(workers()["moments"], p.ctypes.data, tasks)
    _threads.run(workers()["factors"], p.ctypes.data, 1)
    return out


def norm_silu(x: Tensor, norm: Tensor) -> Tensor:
    """Do what `binarize.packed._norm.norm_silu` says with the compiled kernels."""
    x = _pixels(x)
    out = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    norm = norm.float().contiguous()
    p, tasks, _ = _strips(x)
    _place(p, Norm.OUT, out)
    p[Norm.FACTORS], p[Norm.OFFSETS] = norm[0].data_ptr(), norm[1].data_ptr()
    _threads.run(workers()["silu"], p.ctypes.data, tasks)
    return out


def wide_pays(x: Tensor) -> bool:
    """Say whether `wide_conv` is worth it for such a tensor."""
    return min(x.shape[2:]) >= 4 and (x.dtype == torch.float32 or not _threads.has_tiles())


def wide_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    residual: Tensor | None,
    tile: Literal[2, 4] = 4,
    transposed: bool = False,
) -> Tensor:
    """Do what `binarize.packed._wide.wide_conv` says with the compiled kernels, widths being multiples of 16.

    By Winograd's algorithm on tiles of 4 x 4 outputs, or of 2 x 2 (float32 only), which rounds no more than a plain
    convolution does. ``transposed`` gives the transposed convolution, which is the gradient of the input from that of
    the output.
    """
    x = _pixels(x)
    batch, channels, height, width = x.shape
    weight = weight.float()
    strides, first = [4 * s for s in weight.stride()], weight.data_ptr()
    if transposed:  # the widths change places, and taps are read backwards
        first += 2 * (strides[2] + strides[3])
        strides = [strides[1], strides[0], -strides[2], -strides[3]]
    out_channels, size, threads = weight.shape[1 if transposed else 0], x.element_size(), _threads.workers()
    out = torch.empty((batch, out_channels, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    values = (tile + 2) ** 2
    filters = torch.empty(values, out_channels // LANES, channels, LANES, dtype=torch.float32)
    p = np.zeros(len(Wide), np.int64)
    p[Wide.COUNT], p[Wide.IN_CHANNELS], p[Wide.OUT_CHANNELS] = out_channels // LANES, channels, out_channels
    p[Wide.TILE], p[Wide.FILTERS], p[Wide.WEIGHT] = tile, filters.data_ptr(), first
    p[Wide.WEIGHT_OUT : Wide.WEIGHT_COLUMN + 1] = strides
    _threads.run(workers()["filters"], p.ctypes.data, out_channels // LANES)

    tile_rows = -(-height // tile)
    chunk = max(1, -(-tile_rows * batch // (TASKS_PER_THREAD * threads)))
    tasks = -(-tile_rows // chunk) * batch
    tiles = min(MOST_TILES, TILE_BYTES // (values * 4 * (channels + out_channels)), -(-width // tile) + 3)
    tiles = max(4, tiles // 4 * 4)
    scratch = 64 + 320 + _aligned(4 * channels) + values * (4 * tiles * (channels + out_channels) + 2 * ALIGN)
    if norm is not None:
        scratch += _aligned(8 * width * channels * size)
    held = [torch.empty(min(threads, tasks) * _aligned(scratch) + ALIGN, dtype=torch.uint8)]
    p[Wide.WORKERS] = p[Wide.TASKS] = 0
    p[Wide.COUNT], p[Wide.HALF], p[Wide.TILE_ROWS], p[Wide.TILES] = tasks, int(size == 2), chunk, tiles
    p[Wide.SCRATCH], p[Wide.SCRATCH_STEP] = -(-held[0].data_ptr() // ALIGN) * ALIGN, _aligned(scratch)
    p[Wide.HEIGHT], p[Wide.WIDTH] = height, width
    _place(p, Wide.X, x)
    _place(p, Wide.OUT, out)
    if bias is not None:
        held.append(bias.float().contiguous())
        p[Wide.BIAS] = held[-1].data_ptr()
    if norm is not None:
        held.append(norm.float().contiguous())
        p[Wide.NORM_FACTORS], p[Wide.NORM_OFFSETS] = held[-1][0].data_ptr(), held[-1][1].data_ptr()
    if residual is not None:
        held.append(_pixels(residual.to(x.dtype)))
        _place(p, Wide.RESIDUAL, held[-1])
    _threads.run(workers()["wide"], p.ctypes.data, tasks)
    return out


def wide_conv_of_weight(x: Tensor, grad: Tensor, tile: Literal[2, 4]) -> Tensor:
    """Return the gradient of a 3x3 convolution's weights (padding 1) by Winograd's algorithm, backwards.

    The transforms of the forward's algorithm are linear: what it does to patches is done to the input, what it does to
    products is done, transposed, to the gradient of the output; then what is left is a product of matrices for each of
    the n^2 values, and the filters' transform, transposed.

    Args:
        x: The convolution's input, ``(B, C_in, H, W)`` float32, C_in a multiple of 16.
        grad: Gradient of its output, ``(B, C_out, H, W)`` float32, C_out a multiple of 16.
        tile: m of m x m outputs.

    Returns:
        ``(C_out, C_in, 3, 3)`` float32.
    """
    x, grad = _pixels(x), _pixels(grad)
    (batch, channels, height, width), out_channels = x.shape, grad.shape[1]
    values, threads = (tile + 2) ** 2, _threads.workers()
    rows, columns = -(-height // tile), -(-width // tile)
    tiles, pairs = batch * rows * columns, channels * out_channels
    p = np.zeros(len(Tiles), np.int64)
    p[Tiles.TILE], p[Tiles.TILES] = tile, TILES_TOGETHER
    p[Tiles.ROWS], p[Tiles.COLUMNS], p[Tiles.HEIGHT], p[Tiles.WIDTH] = rows, columns, height, width
    p[Tiles.IN_CHANNELS], p[Tiles.OUT_CHANNELS] = channels, out_channels
    _place(p, Tiles.X, x)
    _place(p, Tiles.GRAD, grad)
    size, together = values * 4 * (channels + out_channels), TILES_TOGETHER
    scratch_step = 320 + _aligned(4 * max(channels, out_channels))
    fused = 4 * values * pairs <= SUMS_BYTES
    if fused:
        scratch_step += _aligned(together * size) + values * 2 * ALIGN
    scratch = torch.empty(threads * scratch_step + ALIGN, dtype=torch.uint8)
    p[Tiles.SCRATCH], p[Tiles.SCRATCH_STEP] = -(-scratch.data_ptr() // ALIGN) * ALIGN, scratch_step
    total = torch.zeros(threads if fused else 1, values, channels, out_channels, dtype=torch.float32)
    if tiles == 0:
        pass
    elif fused:
        p[Tiles.COUNT_TILES], p[Tiles.GROUPS] = tiles, -(-tiles // together)
        p[Tiles.TASK_GROUPS], p[Tiles.SUMS] = -(-p[Tiles.GROUPS] // threads), total.data_ptr()
        p[Tiles.COUNT] = -(-p[Tiles.GROUPS] // p[Tiles.TASK_GROUPS])
        _threads.run(workers()["tiles"], p.ctypes.data, int(p[Tiles.COUNT]))
    else:
        most = min(tiles, max(1, GRADIENT_BYTES // (size * together)) * together)
        spread, returned = (_planes(values, most, c) for c in (channels, out_channels))
        p[Tiles.SPREAD], p[Tiles.SPREAD_STEP] = spread.data_ptr(), 4 * spread.stride(0)
        p[Tiles.RETURNED], p[Tiles.RETURNED_STEP] = returned.data_ptr(), 4 * returned.stride(0)
        for first in range(0, tiles, most):
            here = min(most, tiles - first)
            p[Tiles.WORKERS], p[Tiles.TASKS] = 0, 0
            p[Tiles.COUNT_TILES], p[Tiles.FIRST], p[Tiles.TASK_GROUPS] = here, first, 1
            p[Tiles.COUNT] = p[Tiles.GROUPS] = -(-here // together)
            _threads.run(workers()["tiles"], p.ctypes.data, int(p[Tiles.COUNT]))
            with torch.autocast("cpu", enabled=False):  # a backward may run inside of it
                total[0].baddbmm_(spread[:, :here].transpose(1, 2), returned[:, :here])
    matrix = torch.tensor(WINOGRAD[tile].filter, dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        found = torch.kron(matrix, matrix).T @ total.sum(0).view(values, -1)
    return found.view(9, channels, out_channels).permute(2, 1, 0).reshape(out_channels, channels, 3, 3)


def _planes(count: int, rows: int, channels: int) -> Tensor:
    step = rows * channels + LANES  # see `tiles_worker`
    return torch.empty(count * step, dtype=torch.float32).as_strided((count, rows, channels), (step, channels, 1))


def unzip(hidden: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `binarize.packed._norm.shuffle` says with the compiled kernels, widths being multiples of 32."""
    hidden, skip = _pixels(hidden), _pixels(skip)
    batch, _, height, width = hidden.shape
    shape = (batch, (hidden.shape[1] + skip.shape[1]) // 2, height, width)
    outs = [torch.empty(shape, dtype=hidden.dtype, memory_format=torch.channels_last) for _ in range(2)]
    p = np.zeros(len(Unzip), np.int64)
    p[Unzip.COUNT], p[Unzip.HALF] = batch * height, int(hidden.dtype == torch.bfloat16)
    p[Unzip.HEIGHT], p[Unzip.WIDTH] = height, width
    p[Unzip.HIDDEN_CHANNELS], p[Unzip.SKIP_CHANNELS] = hidden.shape[1], skip.shape[1]
    _place(p, Unzip.HIDDEN, hidden)
    _place(p, Unzip.SKIP, skip)
    p[Unzip.FIRST], p[Unzip.SECOND] = (out.data_ptr() for out in outs)
    _threads.run(workers()["unzip"], p.ctypes.data, batch * height)
    return outs[0], outs[1]


def _strips(x: Tensor) -> tuple[np.ndarray, int, int]:
    """Return the parameters of a pass over all pixels, how many tasks it has, and how many strips a sample has."""
    batch, channels, height, width = x.shape
    rows = max(1, min(STRIP_BYTES // max(1, width * channels * x.element_size()), -(-height // TASKS_PER_THREAD)))
    strips = -(-height // rows)
    p = np.zeros(len(Norm), np.int64)
    p[Norm.COUNT], p[Norm.STRIPS], p[Norm.ROWS] = batch * strips, strips, rows
    p[Norm.HEIGHT], p[Norm.WIDTH], p[Norm.CHANNELS] = height, width, channels
    p[Norm.HALF] = int(x.dtype == torch.bfloat16)
    _place(p, Norm.X, x)
    return p, batch * strips, strips


def _pixels(x: Tensor) -> Tensor:
    """Return ``x`` with the channels of a pixel side by side; slices of channels are left as they are."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _place(p: np.ndarray, field: int, x: Tensor) -> None:
    size = x.element_size()
    p[field : field + 4] = x.data_ptr(), x.stride(0) * size, x.stride(2) * size, x.stride(3) * size


@lru_cache(maxsize=512)
def _plan(
    batch: int,
    height: int,
    width: int,
    shape: FilterShape,
    geometry: Geometry,
    halve: bool,
    size: int,
    normed: bool,
    threads: int,
) -> _Plan:
    kh, kw = shape.kernel
    out_height, out_width = geometry.output(height, width, shape.kernel)
    left, right, top, _ = geometry.pad
    channels = shape.groups * shape.in_channels
    strip = min(-(-out_height * batch // (TASKS_PER_THREAD * threads)), STRIP_BYTES // (width * channels * size))
    strip = max(1, min(strip, out_height))

    reach = (kw - 1) * geometry.dilation[1]
    starts = [x * geometry.stride[1] - left for x in range(out_width)]
    inside = [i for i, start in enumerate(starts) if halve or (start >= 0 and start + reach < width)]
    first, last = (inside[0], inside[-1] + 1) if inside else (out_width, out_width)
    borders = first + out_width - last

    pixel, lines = (
        shape.groups * shape.words * 4,
        (strip - 1) * geometry.stride[0] + (kh - 1) * geometry.dilation[0] + 1,
    )
    scratch = _aligned(4 * kh * kw * shape.words) + PIXELS * 4 * ALIGN + _aligned((borders + 1) * shape.lanes * 4)
    scratch += _aligned(lines * (left + width + right) * pixel)
    if normed:
        scratch += _aligned(lines * width * channels * size)
    tasks = -(-out_height // strip) * batch
    p = np.zeros(len(Conv), np.int64)
    p[Conv.COUNT], p[Conv.SCRATCH_STEP], p[Conv.STRIP] = tasks, scratch, strip
    p[Conv.HEIGHT], p[Conv.WIDTH], p[Conv.OUT_HEIGHT], p[Conv.OUT_WIDTH] = height, width, out_height, out_width
    p[Conv.GROUPS], p[Conv.GROUP_IN], p[Conv.GROUP_OUT] = (
        shape.groups,
        shape.in_channels,
        shape.out_channels // shape.groups,
    )
    p[Conv.WORDS], p[Conv.OUT_BLOCKS], p[Conv.KERNEL_H], p[Conv.KERNEL_W] = shape.words, shape.blocks, kh, kw
    p[Conv.HALF] = int(size == 2)
    p[Conv.STRIDE_H], p[Conv.STRIDE_W] = geometry.stride
    p[Conv.LEFT], p[Conv.RIGHT], p[Conv.TOP] = left, right, top
    p[Conv.DILATION_H], p[Conv.DILATION_W] = geometry.dilation
    p[Conv.BORDERS], p[Conv.INNER_FIRST], p[Conv.INNER_LAST], p[Conv.HALVE] = borders, first, last, int(halve)
    return _Plan(p, tasks, scratch, out_height, out_width)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
