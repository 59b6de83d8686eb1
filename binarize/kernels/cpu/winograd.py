"""Full-precision 3x3 convolutions on a CPU by Winograd's algorithm (Lavin and Gray 2016): starts their workers.

Where torch multiplies, it rounds as `torch.set_float32_matmul_precision` allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from binarize.kernels.bitpack import LANES
from binarize.kernels.checks import as_channels_last
from binarize.kernels.cpu import threads
from binarize.kernels.cpu.compile import worker
from binarize.kernels.cpu.fields import Tiles, Winograd
from binarize.kernels.cpu.parameters import (
    ALIGN,
    TASKS_PER_THREAD,
    aligned,
    as_floats,
    set_image,
    set_row_sums,
    set_scratch,
)
from binarize.kernels.cpu.simd import AVX512, AVX512_BF16
from binarize.kernels.row_sums import RowSums

# Filters up to this size stay in the second-level cache beside the transformed patches of some tiles and their
# products. Larger ones are multiplied by torch, with as many tiles at once as the last-level cache has room for.
FILTER_BYTES, TILE_BYTES, MOST_TILES = 2_500_000, 600_000, 16
PLANES_BYTES = 24_000_000
# Tiles of a task where torch multiplies, and tiles multiplied together for the gradient of the weights, where sums
# larger than this leave the second-level cache and torch multiplies instead.
TILES_TOGETHER, SUMS_BYTES = 32, 1_200_000
# The products keep 16 sums of 16 lanes in registers, more than the 16 registers of 8 lanes of AVX2.
TRAINS = AVX512


def is_faster(x: Tensor) -> bool:
    """Return whether `conv3x3` is faster than torch's convolution for ``x``."""
    return min(x.shape[2:]) >= 4 and (x.dtype == torch.float32 or not threads.has_amx())


def trains(x: Tensor, weight: Tensor) -> bool:
    """Return whether a training step computes a 3x3 convolution of ``x`` with padding 1, and its gradients, here."""
    widths = weight.shape[:2]
    return (
        TRAINS and weight.shape[2:] == (3, 3) and weight.dtype == torch.float32
        and all(width % LANES == 0 and width >= 2 * LANES for width in widths) and is_faster(x)
    )  # fmt: skip


def tile_size(x: Tensor, low_precision: bool) -> Literal[2, 4]:
    """Return m for tiles of m x m outputs: 4 where errors of 1e-5 of the result are acceptable and x is not small."""
    small = x.shape[0] * x.shape[2] * x.shape[3] < 2048 and x.dtype == torch.float32
    return 4 if low_precision and not small else 2


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, input_norm: Tensor | None, residual: Tensor | None,
    tile: Literal[2, 4] = 4, transposed: bool = False, bf16_products: bool = False,
    row_sums: RowSums | None = None,
) -> Tensor:  # fmt: skip
    """Return a 3x3 convolution with padding 1, C_in a multiple of 16; see `binarize.kernels.ops.conv3x3`.

    Tiles of 2 x 2 outputs (float32 only) round no more than a direct convolution does; tiles of 4 x 4 are faster.
    ``transposed`` gives the transposed convolution, that is the gradient of the input from the output's; both widths
    must then be multiples of 16. ``bf16_products`` multiplies bfloat16 if x is bfloat16, tiles are 4 x 4 and the
    processor has AVX512_BF16. Otherwise products are float32, as in training, whose errors would add up.
    """
    spare = -weight.shape[0] % LANES
    if spare and not transposed:  # fill the last block of output channels; an image has three
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, spare))
        bias = None if bias is None else F.pad(bias, (0, spare))
        y = conv3x3(x, weight, bias, input_norm, None, tile, bf16_products=bf16_products)[:, :-spare]
        y = y.contiguous(memory_format=torch.channels_last)
        return y if residual is None else y.add_(residual)
    x = as_channels_last(x)
    batch, channels, height, width = x.shape
    weight = weight if weight.dtype == torch.bfloat16 else weight.float()
    strides, first = [weight.element_size() * s for s in weight.stride()], weight.data_ptr()
    if transposed:  # swap the widths and read the taps backwards
        first += 2 * (strides[2] + strides[3])
        strides = [strides[1], strides[0], -strides[2], -strides[3]]
    out_channels, size, count = weight.shape[1 if transposed else 0], x.element_size(), threads.count()
    out = torch.empty(
        (batch, out_channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if out.numel() == 0:
        return out
    values = (tile + 2) ** 2
    apart = 4 * values * channels * out_channels > FILTER_BYTES
    apart = apart and size == 4 and input_norm is None and residual is None
    dot_bf16 = AVX512_BF16 and bf16_products and size == 2 and tile == 4 and not transposed
    filters = _planes(values, channels // (1 + dot_bf16), out_channels)
    p = np.zeros(len(Winograd), np.int64)
    p[Winograd.COUNT], p[Winograd.IN_CHANNELS], p[Winograd.OUT_CHANNELS] = out_channels // LANES, channels, out_channels
    p[Winograd.TILE], p[Winograd.FILTERS], p[Winograd.WEIGHT] = tile, filters.data_ptr(), first
    p[Winograd.FILTERS_STEP], p[Winograd.DOT_BF16] = 4 * filters.stride(0), dot_bf16
    p[Winograd.WEIGHT_BF16] = weight.dtype == torch.bfloat16
    p[Winograd.FILTERS_OUT], p[Winograd.FILTERS_IN] = (
        (4 * LANES, 4 * out_channels) if apart else (4 * LANES * filters.shape[1], 64)
    )
    p[Winograd.WEIGHT_OUT : Winograd.WEIGHT_COLUMN + 1] = strides
    threads.run(worker("winograd_filter"), p.ctypes.data, out_channels // LANES)
    if apart:
        _convolve_apart(x, filters, bias, tile, out)
        return out

    tile_rows = -(-height // tile)
    chunk = max(1, -(-tile_rows * batch // (TASKS_PER_THREAD * count)))
    tasks = -(-tile_rows // chunk) * batch
    tiles = min(MOST_TILES, TILE_BYTES // (values * 4 * (channels + out_channels)), -(-width // tile) + 3)
    tiles = max(4, tiles // 4 * 4)
    room = 64 + 320 + aligned(4 * channels) + values * (4 * tiles * (channels + out_channels) + 2 * ALIGN)
    if input_norm is not None:
        room += aligned(8 * width * channels * size)
    held = [set_scratch(p, Winograd.SCRATCH, min(count, tasks), aligned(room))]
    p[Winograd.WORKERS] = p[Winograd.TASKS] = 0
    p[Winograd.COUNT], p[Winograd.BF16], p[Winograd.TILE_ROWS], p[Winograd.TILES] = tasks, int(size == 2), chunk, tiles
    p[Winograd.HEIGHT], p[Winograd.WIDTH] = height, width
    set_image(p, Winograd.X, x)
    set_image(p, Winograd.OUT, out)
    if bias is not None:
        held.append(as_floats(bias))
        p[Winograd.BIAS] = held[-1].data_ptr()
    if input_norm is not None:
        held.append(as_floats(input_norm))
        p[Winograd.NORM_FACTORS], p[Winograd.NORM_OFFSETS] = held[-1][0].data_ptr(), held[-1][1].data_ptr()
    if residual is not None:
        held.append(as_channels_last(residual.to(x.dtype)))
        set_image(p, Winograd.RESIDUAL, held[-1])
    set_row_sums(p, Winograd.ROW_SUMS, row_sums, out)
    threads.run(worker("winograd"), p.ctypes.data, tasks)
    return out


def weight_gradient(x: Tensor, grad: Tensor, tile: Literal[2, 4]) -> Tensor:
    """Return the gradient of a 3x3 convolution's weights (padding 1), ``(C_out, C_in, 3, 3)``.

    The forward's transforms are linear. The input goes through the input transform and the output's gradient through
    the transposed output transform; their products for each of the n^2 values, summed over tiles, go through the
    transposed filter transform. All tensors are float32, and both widths multiples of 16.
    """
    x, grad = as_channels_last(x), as_channels_last(grad)
    p, tiles = _tiles(x, tile)
    p[Tiles.OUT_CHANNELS] = grad.shape[1]
    set_image(p, Tiles.GRAD, grad)
    if tiles == 0:
        return torch.zeros(grad.shape[1], x.shape[1], 3, 3, dtype=torch.float32, device="cpu")
    small = 4 * (tile + 2) ** 2 * x.shape[1] * grad.shape[1] <= SUMS_BYTES
    return _filter_gradient(p, _sums_in_cache(p, tiles) if small else _sums_by_torch(p, tiles))


def _convolve_apart(x: Tensor, filters: Tensor, bias: Tensor | None, tile: Literal[2, 4], out: Tensor) -> None:
    """Convolve with torch multiplying the transformed patches by filters ``(n^2, C_in, C_out)``."""
    p, tiles = _tiles(x, tile)
    p[Tiles.OUT_CHANNELS] = out.shape[1]
    set_image(p, Tiles.OUT, out)
    held = None if bias is None else as_floats(bias)
    p[Tiles.BIAS] = 0 if held is None else held.data_ptr()
    for here, patches, products in _in_planes(p, tiles):
        with torch.autocast("cpu", enabled=False):  # a backward may run inside autocast
            torch.bmm(patches[:, :here], filters, out=products[:, :here])
        p[Tiles.WORKERS] = p[Tiles.TASKS] = 0
        threads.run(worker("winograd_output"), p.ctypes.data, int(p[Tiles.COUNT]))


def _tiles(x: Tensor, tile: int) -> tuple[np.ndarray, int]:
    """Return the parameters of a pass over all tiles of the images, and the number of tiles."""
    batch, channels, height, width = x.shape
    rows, columns = -(-height // tile), -(-width // tile)
    p = np.zeros(len(Tiles), np.int64)
    p[Tiles.TILE], p[Tiles.TILES] = tile, TILES_TOGETHER
    p[Tiles.ROWS], p[Tiles.COLUMNS], p[Tiles.HEIGHT], p[Tiles.WIDTH] = rows, columns, height, width
    p[Tiles.IN_CHANNELS] = channels
    set_image(p, Tiles.X, x)
    return p, batch * rows * columns


def _sizes(p: np.ndarray) -> tuple[int, int, int]:
    """Return the number of values of a tile's transform, and the widths of input and output."""
    return (int(p[Tiles.TILE]) + 2) ** 2, int(p[Tiles.IN_CHANNELS]), int(p[Tiles.OUT_CHANNELS])


def _room(p: np.ndarray, more: int = 0) -> Tensor:
    """Give every worker scratch for the addresses of a tile's pixels, for a pixel of zeros, and ``more`` bytes."""
    return set_scratch(p, Tiles.SCRATCH, threads.count(), 320 + aligned(4 * max(_sizes(p)[1:])) + more)


def _sums_in_cache(p: np.ndarray, tiles: int) -> Tensor:
    """Return the products of both transforms summed over tiles, ``(n^2, C_in, C_out)``; each task has its own sums."""
    (values, channels, out_channels), count = _sizes(p), threads.count()
    size = TILES_TOGETHER * values * 4 * (channels + out_channels) + values * 2 * ALIGN
    memory = _room(p, aligned(size))
    sums = torch.zeros(count, values, channels, out_channels, dtype=torch.float32, device="cpu")
    p[Tiles.COUNT_TILES], p[Tiles.GROUPS] = tiles, -(-tiles // TILES_TOGETHER)
    p[Tiles.TASK_GROUPS], p[Tiles.SUMS] = -(-p[Tiles.GROUPS] // count), sums.data_ptr()
    p[Tiles.COUNT] = -(-p[Tiles.GROUPS] // p[Tiles.TASK_GROUPS])
    threads.run(worker("winograd_tiles"), p.ctypes.data, int(p[Tiles.COUNT]))
    del memory
    return sums.sum(0)


def _sums_by_torch(p: np.ndarray, tiles: int) -> Tensor:
    """Return the same sums, computed by torch from as many tiles at a time as fit the last-level cache."""
    sums = torch.zeros(*_sizes(p), dtype=torch.float32, device="cpu")
    for here, patches, products in _in_planes(p, tiles):
        with torch.autocast("cpu", enabled=False):
            sums.baddbmm_(patches[:, :here].transpose(1, 2), products[:, :here])
    return sums


def _in_planes(p: np.ndarray, tiles: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Transform some tiles at a time; yield their number, the patches, and the gradients or room for the products."""
    values, *widths = _sizes(p)
    most = max(1, PLANES_BYTES // (4 * values * sum(widths) * TILES_TOGETHER)) * TILES_TOGETHER
    patches, products = (_planes(values, min(tiles, most), channels) for channels in widths)
    memory = _room(p)
    p[Tiles.PATCHES], p[Tiles.PATCHES_STEP] = patches.data_ptr(), 4 * patches.stride(0)
    p[Tiles.PRODUCTS], p[Tiles.PRODUCTS_STEP] = products.data_ptr(), 4 * products.stride(0)
    for first in range(0, tiles, most):
        here = min(most, tiles - first)
        p[Tiles.WORKERS] = p[Tiles.TASKS] = 0
        p[Tiles.COUNT_TILES], p[Tiles.FIRST], p[Tiles.TASK_GROUPS] = here, first, 1
        p[Tiles.COUNT] = p[Tiles.GROUPS] = -(-here // TILES_TOGETHER)
        threads.run(worker("winograd_tiles"), p.ctypes.data, int(p[Tiles.COUNT]))
        yield here, patches, products
    del memory


def _filter_gradient(p: np.ndarray, sums: Tensor) -> Tensor:
    """Apply the transposed filter transform to sums ``(n^2, C_in, C_out)``; return ``(C_out, C_in, 3, 3)``."""
    _, channels, out_channels = _sizes(p)
    out = torch.empty(out_channels, channels, 3, 3, dtype=torch.float32, device="cpu")
    memory = set_scratch(p, Tiles.SCRATCH, threads.count(), 4 * 9 * LANES**2)
    p[Tiles.WORKERS] = p[Tiles.TASKS] = 0
    p[Tiles.COUNT], p[Tiles.SUMS], p[Tiles.OUT] = out_channels // LANES, sums.data_ptr(), out.data_ptr()
    threads.run(worker("winograd_filter_gradient"), p.ctypes.data, int(p[Tiles.COUNT]))
    del memory
    return out


def _planes(count: int, rows: int, channels: int) -> Tensor:
    step = rows * channels + LANES  # the spare line keeps a tile's values out of one cache set
    return torch.empty(count * step, dtype=torch.float32, device="cpu").as_strided(
        (count, rows, channels), (step, channels, 1)
    )
