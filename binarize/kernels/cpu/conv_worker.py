"""The compiled loops of the binary convolution.

A worker is a function that numba compiles. It takes tasks until none is left, and several threads run it together. Its
only argument is the address of a block of int64 fields, named below. It allocates nothing and raises nothing.
"""

from __future__ import annotations

import numpy as np
from numba import types

from binarize.kernels.bitpack import WORD
from binarize.kernels.cpu import simd
from binarize.kernels.cpu.fields import Conv
from binarize.kernels.cpu.parts import part
from binarize.kernels.cpu.popcount import BLOCKS, PIXELS
from binarize.kernels.cpu.simd import (
    LANES,
    fetch_add,
    field,
    read_float32,
    read_int32,
    read_int64,
    write_int32,
    write_int64,
)
from binarize.kernels.cpu.tile import make_tile

_tile, _pixel = make_tile(PIXELS), make_tile(1)
PIXELS_AHEAD = 2 * PIXELS  # how far ahead of its use an output's cache line is prefetched
AHEAD_BYTES = 200_000  # longer rows of the input are not prefetched

# The functions below are global and have no closure: numba's cache cannot tell two closures apart, and would compile
# them in every process. The dtype is a flag at run time, "bf16".


@part
def _tile_row(x, entries, shortcut, residual, out, blocks, pixels, bf16, together, count, ahead, lines, fixed):  # type: ignore[no-untyped-def]
    """Compute a row of pixels for ``together`` blocks, the last of which has ``count`` channels; see `make_tile`.

    ``blocks`` are the tile's arguments w, bases, table and channel_bias, ``fixed`` those after count. ``ahead`` is the
    input of the next output row, of which each tile prefetches ``lines`` cache lines.
    """
    w_step, x_step, s_step, r_step, o_step = fixed[2:7]
    at = 0
    while at + PIXELS <= pixels:
        # Not beyond the row, which may be another worker's.
        soon = out + PIXELS_AHEAD * o_step if at + PIXELS_AHEAD + PIXELS <= pixels else out
        for _ in range(lines):
            simd.prefetch(ahead)
            ahead += 64
        _tile(x, entries, shortcut, residual, out, soon, *blocks, count, *fixed, together, bf16)
        x, entries, out = x + PIXELS * x_step, entries + 8 * PIXELS, out + PIXELS * o_step
        shortcut, residual = shortcut + PIXELS * s_step, residual + PIXELS * r_step
        at += PIXELS
    size = 4 - 2 * bf16
    w, bases, table, channel_bias = blocks
    for _ in range(at, pixels):
        for r in range(together):
            lanes, block = count if r + 1 == together else LANES, LANES * r * size
            short = shortcut + block if shortcut != 0 else 0
            more = residual + block if residual != 0 else 0
            add = channel_bias + 64 * r if channel_bias != 0 else 0
            _pixel(
                x, entries, short, more, out + block, out + block, w + r * w_step, bases + 64 * r, table + 384 * r, add,
                lanes, *fixed, 1, bf16,
            )  # fmt: skip
        x, entries, shortcut, residual = x + x_step, entries + 8, shortcut + s_step, residual + r_step
        out += o_step


@part
def activate_row(x, x_step, width, channels, factors, offsets, out, out_step, bf16):  # type: ignore[no-untyped-def]
    """Write ``silu(x * factors + offsets)`` for a row of pixels."""
    size = 4 - 2 * bf16
    for _ in range(width):
        for c in range(0, channels, LANES):
            count = min(LANES, channels - c)
            simd.affine_silu(x + c * size, factors + 4 * c, offsets + 4 * c, out + c * size, count, bf16)
        x += x_step
        out += out_step


@part
def sum_row(x, step, width, channels, sums, bf16):  # type: ignore[no-untyped-def]
    """Write each channel's sum, and sum of squares, over a row of pixels."""
    size = 4 - 2 * bf16
    for c in range(0, channels, LANES):
        count, squares = min(LANES, channels - c), sums + 4 * (channels + c)
        simd.row_moments(x + c * size, step, width, sums + 4 * c, squares, count, bf16)


@part
def _sign_row(x, x_step, width, groups, channels, words, thresholds, out, bf16):  # type: ignore[no-untyped-def]
    """Write the words of signs of a row of pixels."""
    size = 4 - 2 * bf16
    for _ in range(width):
        for g in range(groups):
            start, limits = x + g * channels * size, thresholds + g * words * 128
            for c in range(0, channels, WORD):
                write_int32(out, simd.signs(start + c * size, limits + 4 * c, min(WORD, channels - c), bf16))
                out += 4
        x += x_step


@part
def clear(address, words):  # type: ignore[no-untyped-def]
    for i in range(words):
        write_int32(address + 4 * i, types.int32(0))


@part
def _inside(at, kernel, dilation, size_in):  # type: ignore[no-untyped-def]
    """Return a bit mask of the kernel taps along one axis that lie inside the input."""
    found = 0
    for i in range(kernel):
        position = at + i * dilation
        if 0 <= position < size_in:
            found |= 1 << i
    return found


@part
def _base_row(p, rows, out):  # type: ignore[no-untyped-def]
    """Write the dot product of no differing bits for each column of an output row; taps outside the input add nothing.

    Columns whose taps are all inside share the first entry. Each border column has an entry of its own after it.
    """
    lanes = field(p, Conv.GROUPS) * field(p, Conv.OUT_BLOCKS) * LANES
    kernel_h, kernel_w = field(p, Conv.KERNEL_H), field(p, Conv.KERNEL_W)
    base, sums = field(p, Conv.BASE), field(p, Conv.FILTER_SUMS)
    unsigned = field(p, Conv.UNSIGNED)
    for i in range(lanes):
        write_int32(out + 4 * i, read_int32(base + 4 * i))
    if unsigned == 0:
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
        if columns == full or unsigned == 1:
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


@part
def _is_plain(table, blocks, low, high):  # type: ignore[no-untyped-def]
    """Return whether factors are 1, offsets 0 and limits infinite, so that the epilogue can skip them."""
    if low > -np.inf or high < np.inf:
        return False
    for block in range(blocks):
        for lane in range(LANES):
            at = table + block * 384 + 4 * lane
            if read_float32(at + 64) != 1 or read_float32(at + 128) != 0:
                return False
    return True


@part
def _entries(p, out):  # type: ignore[no-untyped-def]
    """Write, for each output column, the distance in bytes from the first entry of a base row to its own entry."""
    step = field(p, Conv.GROUPS) * field(p, Conv.OUT_BLOCKS) * LANES * 4
    first, last = field(p, Conv.INNER_FIRST), field(p, Conv.INNER_LAST)
    for column in range(field(p, Conv.OUT_WIDTH)):
        entry = 0
        if column < first:
            entry = 1 + column
        elif column >= last:
            entry = 1 + first + column - last
        write_int64(out + 8 * column, entry * step)


@part
def _strip(p, task, scratch, last_rows):  # type: ignore[no-untyped-def]
    bf16 = field(p, Conv.BF16)
    size = 4 - 2 * bf16
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

    # Scratch: offsets of the words of a patch, entries of the columns, base rows, packed rows, and the activated rows
    # that an output row reads, each of which takes the place of the oldest.
    offsets = scratch
    entries = offsets + (4 * k + 63) // 64 * 64
    bases = entries + (8 * out_width + 63) // 64 * 64
    packed = bases + field(p, Conv.BORDERS) * lanes * 4 + lanes * 4
    reach = (kernel_h - 1) * dilation_h + 1
    input_rows = (rows_of_task - 1) * stride_h + reach
    activated = packed + (input_rows * padded * pixel + 63) // 64 * 64
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

    filters = field(p, Conv.FILTERS)
    low, high = read_float32(p + 8 * Conv.LIMITS), read_float32(p + 8 * Conv.LIMITS + 4)
    plain = 1 if _is_plain(table, groups * blocks, low, high) else 0
    unsigned, early = field(p, Conv.UNSIGNED), field(p, Conv.EARLY)
    channel_bias = field(p, Conv.CHANNEL_BIAS)
    if channel_bias != 0:
        channel_bias += sample * groups * group_out * 4
    residual = field(p, Conv.RESIDUAL)
    residual_row, residual_pixel = field(p, Conv.RESIDUAL_ROW), field(p, Conv.RESIDUAL_PIXEL)  # 0 if there is none
    if residual != 0:
        residual += sample * field(p, Conv.RESIDUAL_BATCH)
    has_shortcut = field(p, Conv.SHORTCUT) == 1
    out = field(p, Conv.OUT) + sample * field(p, Conv.OUT_BATCH)
    out_row, out_pixel = field(p, Conv.OUT_ROW), field(p, Conv.OUT_PIXEL)
    row_sums, out_channels = field(p, Conv.ROW_SUMS), groups * group_out

    # The input rows of the next output row, a part with every tile, where they are dense and leave room in the cache.
    tiles = max(1, out_width // PIXELS)
    row_bytes = stride_h * width * channels * size
    shares = (row_bytes // 64 + groups * blocks * tiles - 1) // (groups * blocks * tiles)
    if x_pixel != channels * size or x_row != width * x_pixel or row_bytes > AHEAD_BYTES:
        shares = 0
    start, done = first * stride_h - top, 0
    for y in range(first, last):
        end = (y - first) * stride_h + reach
        for i in range(max(done, end - reach), end):  # a stride may pass over rows
            at, out_words = start + i, packed + i * padded * pixel
            if at < 0 or at >= height:
                clear(out_words, padded * groups * words)
                continue
            clear(out_words, left * groups * words)
            source, step = x + at * x_row, x_pixel
            if normed:
                target = activated + i % reach * width * channels * size
                activate_row(source, x_pixel, width, channels, factors, norm_offsets, target, channels * size, bf16)
                source, step = target, channels * size
            _sign_row(source, step, width, groups, group_in, words, thresholds, out_words + left * pixel, bf16)
            clear(out_words + (left + width) * pixel, right * groups * words)
        done = end
        ahead = start + end
        lines = shares if y + 1 < last and ahead >= 0 and ahead + stride_h <= height else 0
        ahead = x + ahead * x_row
        rows = _inside(y * stride_h - top, kernel_h, dilation_h, height)
        if rows != last_rows:
            _base_row(p, rows, bases)
            last_rows = rows
        line = packed + (y - first) * stride_h * padded * pixel
        for g in range(groups):
            block = 0
            while block < blocks:
                together = max(1, min(BLOCKS, group_out // LANES - block))
                count = min(LANES, group_out - (block + together - 1) * LANES)
                at = (g * blocks + block) * LANES
                o = g * group_out + block * LANES
                short, short_step = 0, 0
                if has_shortcut and normed:
                    slot = (y - start) % reach
                    short, short_step = activated + (slot * width * channels + o) * size, channels * size
                elif has_shortcut:
                    short, short_step = x + y * x_row + o * size, x_pixel
                add = channel_bias + 4 * o if channel_bias != 0 else 0
                more = residual + y * residual_row + o * size if residual != 0 else 0
                taken = (g * blocks + block) * tiles * lines * 64
                _tile_row(
                    line + g * words * 4, entries, short, more, out + y * out_row + o * size,
                    (filters + (g * blocks + block) * k * 64, bases + 4 * at, table + at * 24, add),
                    out_width, bf16, together, count, ahead + taken,
                    lines * together if taken < row_bytes else 0,
                    (offsets, k, k * 64, stride_w * pixel, short_step, residual_pixel, out_pixel, unsigned, plain, low,
                     high, early),
                )  # fmt: skip
                block += together
        if row_sums != 0:
            sums = row_sums + (sample * out_height + y) * 8 * out_channels
            sum_row(out + y * out_row, out_pixel, out_width, out_channels, sums, bf16)
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
