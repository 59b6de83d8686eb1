"""Full-precision 3x3 convolutions on the CPU by Winograd's algorithm: calls its compiled kernels on tensors.

Where torch multiplies, it rounds as `torch.set_float32_matmul_precision` allows it to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from binarize.kernels.bitpack import LANES
from binarize.kernels.cpu import threads as _threads
from binarize.kernels.cpu.compile import workers
from binarize.kernels.cpu.conv import ALIGN, TASKS_PER_THREAD, aligned, floats, place, scratch
from binarize.kernels.cpu.simd import AVX512
from binarize.kernels.cpu.winograd_worker import Tiles, Wide
from binarize.kernels.inputs import pixels

# The transformed patches of some tiles and their products share the second cache with the filters, as long as these
# fit it; else torch multiplies by them, all tiles that the last cache has room for at once.
FILTER_BYTES, TILE_BYTES, MOST_TILES = 2_500_000, 600_000, 16
PLANES_BYTES = 24_000_000
# So many tiles are a task's where torch multiplies. For a gradient of weights so many are multiplied together that the
# sums, which this reads and writes, cost little beside it; where the sums leave the second cache, torch multiplies.
TILES_TOGETHER, SUMS_BYTES = 32, 1_200_000
# Winograd's algorithm keeps 16 sums of 16 lanes in registers, which 16 registers of 8 lanes do not hold.
TRAINS_WIDE = AVX512


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
    """Do what `binarize.kernels.winograd.wide_conv` says with the compiled kernels, widths being multiples of 16.

    By Winograd's algorithm on tiles of 4 x 4 outputs, or of 2 x 2 (float32 only), which rounds no more than a plain
    convolution does. ``transposed`` gives the transposed convolution, which is the gradient of the input from that of
    the output.
    """
    x = pixels(x)
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
    apart = 4 * values * channels * out_channels > FILTER_BYTES
    apart = apart and size == 4 and norm is None and residual is None
    filters = _planes(values, channels, out_channels)
    p = np.zeros(len(Wide), np.int64)
    p[Wide.COUNT], p[Wide.IN_CHANNELS], p[Wide.OUT_CHANNELS] = out_channels // LANES, channels, out_channels
    p[Wide.TILE], p[Wide.FILTERS], p[Wide.WEIGHT] = tile, filters.data_ptr(), first
    p[Wide.FILTERS_STEP] = 4 * filters.stride(0)
    p[Wide.FILTERS_OUT], p[Wide.FILTERS_IN] = (4 * LANES, 4 * out_channels) if apart else (4 * LANES * channels, 64)
    p[Wide.WEIGHT_OUT : Wide.WEIGHT_COLUMN + 1] = strides
    _threads.run(workers()["filters"], p.ctypes.data, out_channels // LANES)
    if apart:
        _convolve_apart(x, filters, bias, tile, out)
        return out

    tile_rows = -(-height // tile)
    chunk = max(1, -(-tile_rows * batch // (TASKS_PER_THREAD * threads)))
    tasks = -(-tile_rows // chunk) * batch
    tiles = min(MOST_TILES, TILE_BYTES // (values * 4 * (channels + out_channels)), -(-width // tile) + 3)
    tiles = max(4, tiles // 4 * 4)
    room = 64 + 320 + aligned(4 * channels) + values * (4 * tiles * (channels + out_channels) + 2 * ALIGN)
    if norm is not None:
        room += aligned(8 * width * channels * size)
    held = [scratch(p, Wide.SCRATCH, min(threads, tasks), aligned(room))]
    p[Wide.WORKERS] = p[Wide.TASKS] = 0
    p[Wide.COUNT], p[Wide.HALF], p[Wide.TILE_ROWS], p[Wide.TILES] = tasks, int(size == 2), chunk, tiles
    p[Wide.HEIGHT], p[Wide.WIDTH] = height, width
    place(p, Wide.X, x)
    place(p, Wide.OUT, out)
    if bias is not None:
        held.append(floats(bias))
        p[Wide.BIAS] = held[-1].data_ptr()
    if norm is not None:
        held.append(floats(norm))
        p[Wide.NORM_FACTORS], p[Wide.NORM_OFFSETS] = held[-1][0].data_ptr(), held[-1][1].data_ptr()
    if residual is not None:
        held.append(pixels(residual.to(x.dtype)))
        place(p, Wide.RESIDUAL, held[-1])
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
    x, grad = pixels(x), pixels(grad)
    p, tiles = _tiles(x, tile)
    p[Tiles.OUT_CHANNELS] = grad.shape[1]
    place(p, Tiles.GRAD, grad)
    if tiles == 0:
        return torch.zeros(grad.shape[1], x.shape[1], 3, 3, dtype=torch.float32)
    small = 4 * (tile + 2) ** 2 * x.shape[1] * grad.shape[1] <= SUMS_BYTES
    return _collect(p, _sums_in_cache(p, tiles) if small else _sums_by_torch(p, tiles))


def _convolve_apart(x: Tensor, filters: Tensor, bias: Tensor | None, tile: Literal[2, 4], out: Tensor) -> None:
    """Convolve by Winograd's algorithm, torch multiplying what is spread by filters ``(n^2, C_in, C_out)``."""
    p, tiles = _tiles(x, tile)
    p[Tiles.OUT_CHANNELS] = out.shape[1]
    place(p, Tiles.OUT, out)
    held = None if bias is None else floats(bias)
    p[Tiles.BIAS] = 0 if held is None else held.data_ptr()
    for here, spread, products in _in_planes(p, tiles):
        with torch.autocast("cpu", enabled=False):  # a backward may run inside of it
            torch.bmm(spread[:, :here], filters, out=products[:, :here])
        p[Tiles.WORKERS] = p[Tiles.TASKS] = 0
        _threads.run(workers()["gather"], p.ctypes.data, int(p[Tiles.COUNT]))


def _tiles(x: Tensor, tile: int) -> tuple[np.ndarray, int]:
    """Return the parameters of a pass over all tiles of pictures, and how many there are."""
    batch, channels, height, width = x.shape
    rows, columns = -(-height // tile), -(-width // tile)
    p = np.zeros(len(Tiles), np.int64)
    p[Tiles.TILE], p[Tiles.TILES] = tile, TILES_TOGETHER
    p[Tiles.ROWS], p[Tiles.COLUMNS], p[Tiles.HEIGHT], p[Tiles.WIDTH] = rows, columns, height, width
    p[Tiles.IN_CHANNELS] = channels
    place(p, Tiles.X, x)
    return p, batch * rows * columns


def _sizes(p: np.ndarray) -> tuple[int, int, int]:
    """Return how many values a tile's transforms have, and the widths of input and output."""
    return (int(p[Tiles.TILE]) + 2) ** 2, int(p[Tiles.IN_CHANNELS]), int(p[Tiles.OUT_CHANNELS])


def _room(p: np.ndarray, more: int = 0) -> Tensor:
    """Give every worker room for the addresses of a tile's pixels, for a pixel of zeros, and ``more`` bytes."""
    return scratch(p, Tiles.SCRATCH, _threads.workers(), 320 + aligned(4 * max(_sizes(p)[1:])) + more)


def _sums_in_cache(p: np.ndarray, tiles: int) -> Tensor:
    """Return the sums over tiles of products of both transforms, ``(n^2, C_in, C_out)``; each task sums its own."""
    (values, channels, out_channels), threads = _sizes(p), _threads.workers()
    size = TILES_TOGETHER * values * 4 * (channels + out_channels) + values * 2 * ALIGN
    memory = _room(p, aligned(size))
    sums = torch.zeros(threads, values, channels, out_channels, dtype=torch.float32)
    p[Tiles.COUNT_TILES], p[Tiles.GROUPS] = tiles, -(-tiles // TILES_TOGETHER)
    p[Tiles.TASK_GROUPS], p[Tiles.SUMS] = -(-p[Tiles.GROUPS] // threads), sums.data_ptr()
    p[Tiles.COUNT] = -(-p[Tiles.GROUPS] // p[Tiles.TASK_GROUPS])
    _threads.run(workers()["tiles"], p.ctypes.data, int(p[Tiles.COUNT]))
    del memory
    return sums.sum(0)


def _sums_by_torch(p: np.ndarray, tiles: int) -> Tensor:
    """Return the same sums, from as many tiles at a time as the last cache has room for."""
    sums = torch.zeros(*_sizes(p), dtype=torch.float32)
    for here, spread, returned in _in_planes(p, tiles):
        with torch.autocast("cpu", enabled=False):
            sums.baddbmm_(spread[:, :here].transpose(1, 2), returned[:, :here])
    return sums


def _in_planes(p: np.ndarray, tiles: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Transform some of the tiles at a time; yield how many, the input's and the gradient's, or room for products."""
    values, *widths = _sizes(p)
    most = max(1, PLANES_BYTES // (4 * values * sum(widths) * TILES_TOGETHER)) * TILES_TOGETHER
    spread, returned = (_planes(values, min(tiles, most), channels) for channels in widths)
    memory = _room(p)
    p[Tiles.SPREAD], p[Tiles.SPREAD_STEP] = spread.data_ptr(), 4 * spread.stride(0)
    p[Tiles.RETURNED], p[Tiles.RETURNED_STEP] = returned.data_ptr(), 4 * returned.stride(0)
    for first in range(0, tiles, most):
        here = min(most, tiles - first)
        p[Tiles.WORKERS] = p[Tiles.TASKS] = 0
        p[Tiles.COUNT_TILES], p[Tiles.FIRST], p[Tiles.TASK_GROUPS] = here, first, 1
        p[Tiles.COUNT] = p[Tiles.GROUPS] = -(-here // TILES_TOGETHER)
        _threads.run(workers()["tiles"], p.ctypes.data, int(p[Tiles.COUNT]))
        yield here, spread, returned
    del memory


def _collect(p: np.ndarray, sums: Tensor) -> Tensor:
    """Take sums ``(n^2, C_in, C_out)`` through the transposed transform of filters, to ``(C_out, C_in, 3, 3)``."""
    _, channels, out_channels = _sizes(p)
    out = torch.empty(out_channels, channels, 3, 3, dtype=torch.float32)
    memory = scratch(p, Tiles.SCRATCH, _threads.workers(), 4 * 9 * LANES**2)
    p[Tiles.WORKERS] = p[Tiles.TASKS] = 0
    p[Tiles.COUNT], p[Tiles.SUMS], p[Tiles.OUT] = out_channels // LANES, sums.data_ptr(), out.data_ptr()
    _threads.run(workers()["collect"], p.ctypes.data, int(p[Tiles.COUNT]))
    del memory
    return out


def _planes(count: int, rows: int, channels: int) -> Tensor:
    step = rows * channels + LANES  # or all values of a tile would fall into one set of a cache
    return torch.empty(count * step, dtype=torch.float32).as_strided((count, rows, channels), (step, channels, 1))
