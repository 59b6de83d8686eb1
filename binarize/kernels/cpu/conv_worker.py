"""The loops of the CPU kernels, compiled by numba. A worker takes tasks until none is left; threads run it together.

A worker's only argument is the address of a block of int64 fields, named below; it shares nothing else. It allocates
nothing and raises nothing.
"""

from __future__ import annotations

from enum import IntEnum, auto

import numpy as np
from numba import njit, types

from binarize.kernels.bitpack import WORD
from binarize.kernels.cpu import simd as vectors
from binarize.kernels.cpu.popcount import BLOCKS, PIXELS, make_tile
from binarize.kernels.cpu.simd import (
    LANES,
    fetch_add,
    prefetch,
    read_float32,
    read_float64,
    read_int32,
    read_int64,
    write_float32,
    write_int32,
    write_int64,
)


class Conv(IntEnum):
    """Fields of a convolution's parameters: addresses, strides in bytes, sizes."""

    WORKERS = 0  # how many workers have started
    TASKS = auto()  # how many tasks have been taken
    COUNT = auto()
    HALF = auto()  # 1 for bfloat16
    SCRATCH = auto()
    SCRATCH_STEP = auto()
    STRIP = auto()  # output rows of a task
    AHEAD = auto()  # how many tasks on this worker's next one is, more or less
    HEIGHT = auto()
    WIDTH = auto()
    OUT_HEIGHT = auto()
    OUT_WIDTH = auto()
    GROUPS = auto()
    GROUP_IN = auto()  # input channels of a group
    GROUP_OUT = auto()
    WORDS = auto()  # words of a pixel and group
    OUT_BLOCKS = auto()  # of 16 channels, of a group
    KERNEL_H = auto()
    KERNEL_W = auto()
    STRIDE_H = auto()
    STRIDE_W = auto()
    LEFT = auto()
    RIGHT = auto()
    TOP = auto()
    DILATION_H = auto()
    DILATION_W = auto()
    X = auto()
    X_BATCH = auto()
    X_ROW = auto()
    X_PIXEL = auto()
    OUT = auto()
    OUT_BATCH = auto()
    OUT_ROW = auto()
    OUT_PIXEL = auto()
    RESIDUAL = auto()
    RESIDUAL_BATCH = auto()
    RESIDUAL_ROW = auto()
    RESIDUAL_PIXEL = auto()
    FILTERS = auto()
    FILTER_SUMS = auto()  # int32, (kernel taps, groups * blocks * 16)
    BASE = auto()  # int32, (groups * blocks * 16): the dot product of no differing bits
    HALVE = auto()  # 1 for {0, 1} activations
    THRESHOLDS = auto()
    TABLE = auto()
    GROUP = auto()  # int64, (B,) rows of thresholds and table, or null for row 0
    LIMITS = auto()  # not an address: two floats, the clamp
    SHORTCUT = auto()
    EARLY = auto()
    ROW_ADD = auto()  # float32, (B, C_out) or null
    NORM_FACTORS = auto()  # float32, (B, C_in) or null
    NORM_OFFSETS = auto()
    BORDERS = auto()  # output columns with a tap outside the input
    INNER_FIRST = auto()  # the first output column whose taps are all inside, and the one after the last
    INNER_LAST = auto()


class Norm(IntEnum):
    """Fields of the parameters of a pass over all pixels: GroupNorm's moments, or its result and SiLU."""

    WORKERS = 0
    TASKS = auto()
    COUNT = auto()
    HALF = auto()  # 1 for bfloat16
    STRIPS = auto()
    ROWS = auto()  # of a strip
    HEIGHT = auto()
    WIDTH = auto()
    CHANNELS = auto()
    X = auto()
    X_BATCH = auto()
    X_ROW = auto()
    X_PIXEL = auto()
    OUT = auto()
    OUT_BATCH = auto()
    OUT_ROW = auto()
    OUT_PIXEL = auto()
    SUMS = auto()  # float32, (B, strips, 2, C)
    FACTORS = auto()  # float32, (B, C)
    OFFSETS = auto()
    GROUPS = auto()
    WEIGHT = auto()  # float32, (C,) or null, as the next
    BIAS = auto()
    SHIFT = auto()  # float32, (B, C) or null
    EPS = auto()  # the address of a float64


@njit
def field(parameters, which):  # type: ignore[no-untyped-def]
    return read_int64(parameters + 8 * which)


_signs, _signs_part = vectors.make_signs(False, False), vectors.make_signs(False, True)
_signs_bf16, _signs_part_bf16 = vectors.make_signs(True, False), vectors.make_signs(True, True)
_tile1, _tile1_bf16 = (make_tile(PIXELS, 1, bf16) for bf16 in (False, True))
_tile2, _tile2_bf16 = (make_tile(PIXELS, min(2, BLOCKS), bf16) for bf16 in (False, True))
_tile3, _tile3_bf16 = (make_tile(PIXELS, min(3, BLOCKS), bf16) for bf16 in (False, True))
_tile4, _tile4_bf16 = (make_tile(PIXELS, min(4, BLOCKS), bf16) for bf16 in (False, True))
_part, _part_bf16 = (make_tile(PIXELS, 1, bf16, partial=True) for bf16 in (False, True))
_pixel, _pixel_bf16 = (make_tile(1, 1, bf16, partial=True) for bf16 in (False, True))
_activate, _activate_part = vectors.make_activate(False, False), vectors.make_activate(False, True)
_activate_bf16, _activate_part_bf16 = vectors.make_activate(True, False), vectors.make_activate(True, True)
_moments, _moments_part = vectors.make_moments(False, False), vectors.make_moments(False, True)
_moments_bf16, _moments_part_bf16 = vectors.make_moments(True, False), vectors.make_moments(True, True)
_unzip, _unzip_bf16 = vectors.make_unzip(False), vectors.make_unzip(True)
_WIDE = BLOCKS > 1
PIXELS_AHEAD = 2 * PIXELS  # how far ahead of its writing an output's line is fetched
AHEAD_BYTES = 200_000  # a row of the input that is longer is not read ahead

# The functions below are global and have no closure, or numba would compile them in every process: its cache cannot
# tell two closures apart. So the dtype is a flag at run time, "half" for bfloat16.


@njit
def _tile_row(x, entries, shortcut, residual, out, blocks, pixels, half, together, count, ahead, lines, fixed):  # type: ignore[no-untyped-def]
    """Compute a row of pixels for ``together`` blocks, the last of which has ``count`` channels; see `make_tile`.

    ``blocks`` are the tile's arguments w, bases, table and row, ``fixed`` those after count. ``ahead`` is the next
    strip's input, of which each tile has ``lines`` lines read into the cache.
    """
    w_step, x_step, s_step, r_step, o_step = fixed[2:7]
    at = 0
    while at + PIXELS <= pixels:
        # Not beyond the row: the next one may be another worker's.
        soon = out + PIXELS_AHEAD * o_step if at + PIXELS_AHEAD + PIXELS <= pixels else out
        for _ in range(lines):
            prefetch(ahead)
            ahead += 64
        if count < LANES:
            if half:
                _part_bf16(x, entries, shortcut, residual, out, soon, *blocks, count, *fixed)
            else:
                _part(x, entries, shortcut, residual, out, soon, *blocks, count, *fixed)
        elif half and _WIDE and together == 4:
            _tile4_bf16(x, entries, shortcut, residual, out, soon, *blocks, count, *fixed)
        elif _WIDE and together == 4:
            _tile4(x, entries, shortcut, residual, out, soon, *blocks, count, *fixed)
        elif half and _WIDE and together == 3:
            _tile3_bf16(x, entries, shortcut, residual, out, soon, *blocks, count, *fixed)
        elif _WIDE and together == 3:
            _tile3(x, entries, shortcut, residual, out, soon, *blocks, count, *fixed)
        elif half and _WIDE and together == 2:
            _tile2_bf16(x, entries, shortcut, residual, out, soon, *blocks, count, *fixed)
        elif _WIDE and together == 2:
            _tile2(x, entries, shortcut, residual, out, soon, *blocks, count, *fixed)
        elif half:
            _tile1_bf16(x, entries, shortcut, residual, out, soon, *blocks, count, *fixed)
        else:
            _tile1(x, entries, shortcut, residual, out, soon, *blocks, count, *fixed)
        x, entries, out = x + PIXELS * x_step, entries + 8 * PIXELS, out + PIXELS * o_step
        shortcut, residual = shortcut + PIXELS * s_step, residual + PIXELS * r_step
        at += PIXELS
    size = 2 if half else 4
    w, bases, table, row = blocks
    for _ in range(at, pixels):
        for r in range(together):
            lanes, block = count if r + 1 == together else LANES, LANES * r * size
            short = shortcut + block if shortcut != 0 else 0
            more = residual + block if residual != 0 else 0
            add = row + 64 * r if row != 0 else 0
            start, constants = bases + 64 * r, table + 384 * r
            if half:
                _pixel_bf16(x, entries, short, more, out + block, out + block, w, start, constants, add, lanes, *fixed)
            else:
                _pixel(x, entries, short, more, out + block, out + block, w, start, constants, add, lanes, *fixed)
            w += w_step
        w -= together * w_step
        x, entries, shortcut, residual = x + x_step, entries + 8, shortcut + s_step, residual + r_step
        out += o_step


@njit
def activate_row(x, x_step, width, channels, factors, offsets, out, out_step, half):  # type: ignore[no-untyped-def]
    size = 2 if half else 4
    for _ in range(width):
        for c in range(0, channels, LANES):
            source, target, f, o = x + c * size, out + c * size, factors + 4 * c, offsets + 4 * c
            if c + LANES <= channels:
                if half:
                    _activate_bf16(source, f, o, target, LANES)
                else:
                    _activate(source, f, o, target, LANES)
            elif half:
                _activate_part_bf16(source, f, o, target, channels - c)
            else:
                _activate_part(source, f, o, target, channels - c)
        x += x_step
        out += out_step


@njit
def _sign_row(x, x_step, width, groups, channels, words, thresholds, out, half):  # type: ignore[no-untyped-def]
    size = 2 if half else 4
    for _ in range(width):
        for g in range(groups):
            start, limits = x + g * channels * size, thresholds + g * words * 128
            for c in range(0, channels, WORD):
                source, limit = start + c * size, limits + 4 * c
                if c + WORD <= channels:
                    word = _signs_bf16(source, limit, WORD) if half else _signs(source, limit, WORD)
                elif half:
                    word = _signs_part_bf16(source, limit, channels - c)
                else:
                    word = _signs_part(source, limit, channels - c)
                write_int32(out, word)
                out += 4
        x += x_step


@njit
def clear(address, words):  # type: ignore[no-untyped-def]
    for i in range(words):
        write_int32(address + 4 * i, types.int32(0))


@njit
def _inside(at, kernel, dilation, size_in):  # type: ignore[no-untyped-def]
    """A bit for each kernel tap along one axis that lies inside the input."""
    found = 0
    for i in range(kernel):
        position = at + i * dilation
        if 0 <= position < size_in:
            found |= 1 << i
    return found


@njit
def _base_row(p, rows, out):  # type: ignore[no-untyped-def]
    """The dot product of no differing bits for each column of an output row: border taps count nothing.

    Columns whose taps are all inside share the first entry; each border column has its own after it.
    """
    lanes = field(p, Conv.GROUPS) * field(p, Conv.OUT_BLOCKS) * LANES
    kernel_h, kernel_w = field(p, Conv.KERNEL_H), field(p, Conv.KERNEL_W)
    base, sums = field(p, Conv.BASE), field(p, Conv.FILTER_SUMS)
    halve = field(p, Conv.HALVE)
    for i in range(lanes):
        write_int32(out + 4 * i, read_int32(base + 4 * i))
    if halve == 0:
        for ky in range(kernel_h):
            if not (rows >> ky) & 1:
                for kx in range(kernel_w):
                    tap = sums + (ky * kernel_w + kx) * lanes * 4
                    for i in range(lanes):
                        write_int32(out + 4 * i, read_int32(out + 4 * i) + read_int32(tap + 4 * i))
    full = (1 << kernel_w) - 1
    entry = out
    for ox in range(field(p, Conv.OUT_WIDTH)):
        at = ox * field(p, Conv.STRIDE_W) - field(p, Conv.LEFT)
        columns = _inside(at, kernel_w, field(p, Conv.DILATION_W), field(p, Conv.WIDTH))
        if columns == full or halve == 1:
            continue
        entry += lanes * 4
        for i in range(lanes):
            write_int32(entry + 4 * i, read_int32(out + 4 * i))
        for kx in range(kernel_w):
            if (columns >> kx) & 1:
                continue
            for ky in range(kernel_h):
                if (rows >> ky) & 1:
                    tap = sums + (ky * kernel_w + kx) * lanes * 4
                    for i in range(lanes):
                        write_int32(entry + 4 * i, read_int32(entry + 4 * i) + read_int32(tap + 4 * i))


@njit
def _is_plain(table, blocks, low, high):  # type: ignore[no-untyped-def]
    """Whether factors are 1, offsets 0 and the clamp infinite, so that the epilogue can leave them out."""
    if low > -np.inf or high < np.inf:
        return False
    for block in range(blocks):
        for lane in range(LANES):
            at = table + block * 384 + 4 * lane
            if read_float32(at + 64) != 1 or read_float32(at + 128) != 0:
                return False
    return True


@njit
def _entries(p, out):  # type: ignore[no-untyped-def]
    """Write for each output column how far from the first entry of a base row its own is, in bytes; see `_base_row`."""
    step = field(p, Conv.GROUPS) * field(p, Conv.OUT_BLOCKS) * LANES * 4
    first, last = field(p, Conv.INNER_FIRST), field(p, Conv.INNER_LAST)
    for column in range(field(p, Conv.OUT_WIDTH)):
        entry = 0
        if column < first:
            entry = 1 + column
        elif column >= last:
            entry = 1 + first + column - last
        write_int64(out + 8 * column, entry * step)


@njit
def _strip(p, task, scratch, last_rows):  # type: ignore[no-untyped-def]
    half = field(p, Conv.HALF) == 1
    size = 2 if half else 4
    groups, words, blocks = field(p, Conv.GROUPS), field(p, Conv.WORDS), field(p, Conv.OUT_BLOCKS)
    group_in, group_out = field(p, Conv.GROUP_IN), field(p, Conv.GROUP_OUT)
    height, width = field(p, Conv.HEIGHT), field(p, Conv.WIDTH)
    out_height, out_width = field(p, Conv.OUT_HEIGHT), field(p, Conv.OUT_WIDTH)
    kernel_h, kernel_w = field(p, Conv.KERNEL_H), field(p, Conv.KERNEL_W)
    stride_h, stride_w = field(p, Conv.STRIDE_H), field(p, Conv.STRIDE_W)
    left, right, top = field(p, Conv.LEFT), field(p, Conv.RIGHT), field(p, Conv.TOP)
    dilation_h, dilation_w = field(p, Conv.DILATION_H), field(p, Conv.DILATION_W)
    rows_of_task = field(p, Conv.STRIP)
    strips = (out_height + rows_of_task - 1) // rows_of_task
    sample, first = task // strips, task % strips * rows_of_task
    last = min(first + rows_of_task, out_height)
    channels, lanes = groups * group_in, groups * blocks * LANES
    padded, pixel = left + width + right, groups * words * 4
    k = kernel_h * kernel_w * words

    # Scratch: offsets of the words of a patch, entries of the columns, base rows, signs, and the activated rows.
    offsets = scratch
    entries = offsets + (4 * k + 63) // 64 * 64
    bases = entries + (8 * out_width + 63) // 64 * 64
    signs = bases + field(p, Conv.BORDERS) * lanes * 4 + lanes * 4
    input_rows = (rows_of_task - 1) * stride_h + (kernel_h - 1) * dilation_h + 1
    activated = signs + (input_rows * padded * pixel + 63) // 64 * 64
    if last_rows < 0:  # this worker's first task
        _entries(p, entries)
        for ky in range(kernel_h):
            for kx in range(kernel_w):
                for i in range(words):
                    at = (ky * dilation_h * padded + kx * dilation_w) * pixel + 4 * i
                    write_int32(offsets + 4 * ((ky * kernel_w + kx) * words + i), types.int32(at))

    group = field(p, Conv.GROUP)
    row = read_int64(group + 8 * sample) if group != 0 else 0
    thresholds = field(p, Conv.THRESHOLDS) + row * groups * words * 128
    table = field(p, Conv.TABLE) + row * groups * blocks * 384
    x = field(p, Conv.X) + sample * field(p, Conv.X_BATCH)
    x_row, x_pixel = field(p, Conv.X_ROW), field(p, Conv.X_PIXEL)
    factors = field(p, Conv.NORM_FACTORS)
    normed = factors != 0
    norm_offsets = field(p, Conv.NORM_OFFSETS)
    if normed:
        factors += sample * channels * 4
        norm_offsets += sample * channels * 4

    start = first * stride_h - top
    for i in range((last - 1 - first) * stride_h + (kernel_h - 1) * dilation_h + 1):
        y, out = start + i, signs + i * padded * pixel
        if y < 0 or y >= height:
            clear(out, padded * groups * words)
            continue
        clear(out, left * groups * words)
        source, step = x + y * x_row, x_pixel
        if normed:
            target = activated + i * width * channels * size
            activate_row(source, x_pixel, width, channels, factors, norm_offsets, target, channels * size, half)
            source, step = target, channels * size
        _sign_row(source, step, width, groups, group_in, words, thresholds, out + left * pixel, half)
        clear(out + (left + width) * pixel, right * groups * words)

    filters = field(p, Conv.FILTERS)
    low, high = read_float32(p + 8 * Conv.LIMITS), read_float32(p + 8 * Conv.LIMITS + 4)
    plain = 1 if _is_plain(table, groups * blocks, low, high) else 0
    halve, early = field(p, Conv.HALVE), field(p, Conv.EARLY)
    row_add = field(p, Conv.ROW_ADD)
    if row_add != 0:
        row_add += sample * groups * group_out * 4
    residual = field(p, Conv.RESIDUAL)
    residual_row, residual_pixel = field(p, Conv.RESIDUAL_ROW), field(p, Conv.RESIDUAL_PIXEL)  # 0 if there is none
    if residual != 0:
        residual += sample * field(p, Conv.RESIDUAL_BATCH)
    has_shortcut = field(p, Conv.SHORTCUT) == 1
    out = field(p, Conv.OUT) + sample * field(p, Conv.OUT_BATCH)
    out_row, out_pixel = field(p, Conv.OUT_ROW), field(p, Conv.OUT_PIXEL)

    # The next strip's rows, a part of each with every tile, where they are dense and leave room in the cache.
    tiles = max(1, out_width // PIXELS)
    row_bytes = stride_h * width * channels * size
    following = first + field(p, Conv.AHEAD) * rows_of_task
    lines = (row_bytes // 64 + groups * blocks * tiles - 1) // (groups * blocks * tiles)
    if following >= out_height or x_pixel != channels * size or x_row != width * x_pixel or row_bytes > AHEAD_BYTES:
        lines = 0
    following = x + following * stride_h * x_row
    for y in range(first, last):
        rows = _inside(y * stride_h - top, kernel_h, dilation_h, height)
        if rows != last_rows:
            _base_row(p, rows, bases)
            last_rows = rows
        line = signs + (y - first) * stride_h * padded * pixel
        for g in range(groups):
            block = 0
            while block < blocks:
                together = max(1, min(BLOCKS, group_out // LANES - block))
                count = min(LANES, group_out - (block + together - 1) * LANES)
                at = (g * blocks + block) * LANES
                o = g * group_out + block * LANES
                short, short_step = 0, 0
                if has_shortcut and normed:
                    short, short_step = activated + ((y + top - first) * width * channels + o) * size, channels * size
                elif has_shortcut:
                    short, short_step = x + y * x_row + o * size, x_pixel
                add = row_add + 4 * o if row_add != 0 else 0
                more = residual + y * residual_row + o * size if residual != 0 else 0
                taken = (g * blocks + block) * tiles * lines * 64
                _tile_row(
                    line + g * words * 4, entries, short, more, out + y * out_row + o * size,
                    (filters + (g * blocks + block) * k * 64, bases + 4 * at, table + at * 24, add),
                    out_width, half, together, count, following + (y - first) * row_bytes + taken,
                    lines * together if taken < row_bytes else 0,
                    (offsets, k, k * 64, stride_w * pixel, short_step, residual_pixel, out_pixel, halve, plain, low,
                     high, early),
                )  # fmt: skip
                block += together
    return last_rows


def conv_worker(p):  # type: ignore[no-untyped-def]
    me = fetch_add(p + 8 * Conv.WORKERS, 1)
    scratch = field(p, Conv.SCRATCH) + me * field(p, Conv.SCRATCH_STEP)
    last_rows = -1
    while True:
        task = fetch_add(p + 8 * Conv.TASKS, 1)
        if task >= field(p, Conv.COUNT):
            break
        last_rows = _strip(p, task, scratch, last_rows)


@njit
def _moments_row(x, step, width, channels, sums, squares, half):  # type: ignore[no-untyped-def]
    size = 2 if half else 4
    for c in range(0, channels, LANES):
        source, s, q = x + c * size, sums + 4 * c, squares + 4 * c
        if c + LANES <= channels:
            if half:
                _moments_bf16(source, step, width, s, q, LANES)
            else:
                _moments(source, step, width, s, q, LANES)
        elif half:
            _moments_part_bf16(source, step, width, s, q, channels - c)
        else:
            _moments_part(source, step, width, s, q, channels - c)


def moments_worker(p):  # type: ignore[no-untyped-def]
    """Sum each strip of rows and its squares, channel by channel."""
    strips, rows, channels = field(p, Norm.STRIPS), field(p, Norm.ROWS), field(p, Norm.CHANNELS)
    while True:
        task = fetch_add(p + 8 * Norm.TASKS, 1)
        if task >= field(p, Norm.COUNT):
            break
        first = task % strips * rows
        x = field(p, Norm.X) + task // strips * field(p, Norm.X_BATCH) + first * field(p, Norm.X_ROW)
        sums = field(p, Norm.SUMS) + task * 8 * channels
        for _ in range(first, min(first + rows, field(p, Norm.HEIGHT))):
            half = field(p, Norm.HALF) == 1
            _moments_row(x, field(p, Norm.X_PIXEL), field(p, Norm.WIDTH), channels, sums, sums + 4 * channels, half)
            x += field(p, Norm.X_ROW)


def factors_worker(p):  # type: ignore[no-untyped-def]
    """Turn sums and sums of squares into GroupNorm's factors and offsets, for every sample."""
    strips, channels, groups = field(p, Norm.STRIPS), field(p, Norm.CHANNELS), field(p, Norm.GROUPS)
    pixels = field(p, Norm.HEIGHT) * field(p, Norm.WIDTH)
    weight, bias, shifts, eps = field(p, Norm.WEIGHT), field(p, Norm.BIAS), field(p, Norm.SHIFT), field(p, Norm.EPS)
    width = channels // groups
    for sample in range(field(p, Norm.COUNT) // strips):
        sums = field(p, Norm.SUMS) + sample * strips * 8 * channels
        row = shifts + sample * channels * 4 if shifts != 0 else 0
        factors = field(p, Norm.FACTORS) + sample * channels * 4
        offsets = field(p, Norm.OFFSETS) + sample * channels * 4
        for g in range(groups):
            mean, square = 0.0, 0.0
            for c in range(g * width, (g + 1) * width):
                total, squares = 0.0, 0.0
                for strip in range(strips):
                    total += types.float64(read_float32(sums + (strip * 2 * channels + c) * 4))
                    squares += types.float64(read_float32(sums + ((strip * 2 + 1) * channels + c) * 4))
                shift = types.float64(read_float32(row + 4 * c)) if row != 0 else 0.0
                mean += total / pixels + shift
                square += squares / pixels + 2 * shift * total / pixels + shift * shift
            mean, square = mean / width, square / width
            scale = 1.0 / np.sqrt(max(square - mean * mean, 0.0) + read_float64(eps))
            for c in range(g * width, (g + 1) * width):
                factor = scale * types.float64(read_float32(weight + 4 * c)) if weight != 0 else scale
                offset = -mean * factor
                if bias != 0:
                    offset += types.float64(read_float32(bias + 4 * c))
                if row != 0:
                    offset += types.float64(read_float32(row + 4 * c)) * factor
                write_float32(factors + 4 * c, types.float32(factor))
                write_float32(offsets + 4 * c, types.float32(offset))


def silu_worker(p):  # type: ignore[no-untyped-def]
    """Write silu(x * factor + offset)."""
    strips, rows, channels = field(p, Norm.STRIPS), field(p, Norm.ROWS), field(p, Norm.CHANNELS)
    half = field(p, Norm.HALF) == 1
    while True:
        task = fetch_add(p + 8 * Norm.TASKS, 1)
        if task >= field(p, Norm.COUNT):
            break
        sample, first = task // strips, task % strips * rows
        factors = field(p, Norm.FACTORS) + sample * channels * 4
        offsets = field(p, Norm.OFFSETS) + sample * channels * 4
        for y in range(first, min(first + rows, field(p, Norm.HEIGHT))):
            x = field(p, Norm.X) + sample * field(p, Norm.X_BATCH) + y * field(p, Norm.X_ROW)
            out = field(p, Norm.OUT) + sample * field(p, Norm.OUT_BATCH) + y * field(p, Norm.OUT_ROW)
            step, out_step = field(p, Norm.X_PIXEL), field(p, Norm.OUT_PIXEL)
            activate_row(x, step, field(p, Norm.WIDTH), channels, factors, offsets, out, out_step, half)


class Unzip(IntEnum):
    """Fields of the parameters of CS-Fusion's shuffle."""

    WORKERS = 0
    TASKS = auto()
    COUNT = auto()
    HALF = auto()
    HEIGHT = auto()
    WIDTH = auto()
    HIDDEN_CHANNELS = auto()
    SKIP_CHANNELS = auto()
    HIDDEN = auto()
    HIDDEN_BATCH = auto()
    HIDDEN_ROW = auto()
    HIDDEN_PIXEL = auto()
    SKIP = auto()
    SKIP_BATCH = auto()
    SKIP_ROW = auto()
    SKIP_PIXEL = auto()
    FIRST = auto()  # both outputs are dense
    SECOND = auto()


@njit
def _unzip_pixel(x, channels, evens, odds, half):  # type: ignore[no-untyped-def]
    size = 2 if half else 4
    for c in range(0, channels, WORD):
        if half:
            _unzip_bf16(x + c * size, evens + c // 2 * size, odds + c // 2 * size)
        else:
            _unzip(x + c * size, evens + c // 2 * size, odds + c // 2 * size)


def unzip_worker(p):  # type: ignore[no-untyped-def]
    """Deal the channels of hidden and skip out to two pictures, opposite parities together."""
    half = field(p, Unzip.HALF) == 1
    size = 2 if half else 4
    hidden, skip = field(p, Unzip.HIDDEN_CHANNELS), field(p, Unzip.SKIP_CHANNELS)
    height, width = field(p, Unzip.HEIGHT), field(p, Unzip.WIDTH)
    channels = (hidden + skip) // 2
    while True:
        task = fetch_add(p + 8 * Unzip.TASKS, 1)
        if task >= field(p, Unzip.COUNT):
            break
        sample, y = task // height, task % height
        h = field(p, Unzip.HIDDEN) + sample * field(p, Unzip.HIDDEN_BATCH) + y * field(p, Unzip.HIDDEN_ROW)
        s = field(p, Unzip.SKIP) + sample * field(p, Unzip.SKIP_BATCH) + y * field(p, Unzip.SKIP_ROW)
        first = field(p, Unzip.FIRST) + task * width * channels * size
        second = field(p, Unzip.SECOND) + task * width * channels * size
        for _ in range(width):
            _unzip_pixel(h, hidden, second, first, half)
            _unzip_pixel(s, skip, first + hidden // 2 * size, second + hidden // 2 * size, half)
            h += field(p, Unzip.HIDDEN_PIXEL)
            s += field(p, Unzip.SKIP_PIXEL)
            first += channels * size
            second += channels * size


WORKERS = {
    "conv": conv_worker,
    "moments": moments_worker,
    "factors": factors_worker,
    "silu": silu_worker,
    "unzip": unzip_worker,
}
