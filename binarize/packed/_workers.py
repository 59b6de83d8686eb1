"""The loops of the CPU kernels, compiled by numba. A worker takes tasks until none is left; threads run it together.

A worker's only argument is the address of a block of int64 fields, named below; it shares nothing else. It allocates
nothing and raises nothing.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum, auto
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, njit, types

from binarize.packed import _layout as layout
from binarize.packed import _vectors as vectors
from binarize.packed._layout import WORD
from binarize.packed._vectors import (
    LANES,
    fetch_add,
    read_float32,
    read_float64,
    read_int32,
    read_int64,
    write_float32,
    write_int32,
    write_int64,
)

BYTEWISE = "+avx512vpopcntdq" not in vectors.cpu_features()
# Register blocking: how many pixels x 16 output channels are summed at once; sums and filters must fit the registers.
PIXELS, BLOCKS = (4, 4) if not BYTEWISE else (4, 1)


class Conv(IntEnum):
    """Fields of a convolution's parameters: addresses, strides in bytes, sizes."""

    WORKERS = 0  # how many workers have started
    TASKS = auto()  # how many tasks have been taken
    COUNT = auto()
    HALF = auto()  # 1 for bfloat16
    SCRATCH = auto()
    SCRATCH_STEP = auto()
    STRIP = auto()  # output rows of a task
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
    LIMITS = auto()  # two floats, the clamp
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
def _field(parameters, which):  # type: ignore[no-untyped-def]
    return read_int64(parameters + 8 * which)


_signs, _signs_part = vectors.make_signs(False, False), vectors.make_signs(False, True)
_signs_bf16, _signs_part_bf16 = vectors.make_signs(True, False), vectors.make_signs(True, True)
_finish, _finish_part = vectors.make_finish(False, False), vectors.make_finish(False, True)
_finish_plain, _finish_plain_bf16 = vectors.make_finish(False, False, True), vectors.make_finish(True, False, True)
_finish_bf16, _finish_part_bf16 = vectors.make_finish(True, False), vectors.make_finish(True, True)
_finish_row, _finish_row_bf16 = vectors.make_finish_row(False, PIXELS), vectors.make_finish_row(True, PIXELS)
_activate, _activate_part = vectors.make_activate(False, False), vectors.make_activate(False, True)
_activate_bf16, _activate_part_bf16 = vectors.make_activate(True, False), vectors.make_activate(True, True)
_moments, _moments_part = vectors.make_moments(False, False), vectors.make_moments(False, True)
_moments_bf16, _moments_part_bf16 = vectors.make_moments(True, False), vectors.make_moments(True, True)
_many4, _one4 = (vectors.make_product(p, min(4, BLOCKS), BYTEWISE) for p in (PIXELS, 1))
_many3, _one3 = (vectors.make_product(p, min(3, BLOCKS), BYTEWISE) for p in (PIXELS, 1))
_many2, _one2 = (vectors.make_product(p, min(2, BLOCKS), BYTEWISE) for p in (PIXELS, 1))
_many1, _one1 = (vectors.make_product(p, 1, BYTEWISE) for p in (PIXELS, 1))
_unzip, _unzip_bf16 = vectors.make_unzip(False), vectors.make_unzip(True)
_WIDE = BLOCKS > 1

# The functions below are global and have no closure, or numba would compile them in every process: its cache cannot
# tell two closures apart. So the dtype is a flag at run time, "half" for bfloat16.


@njit
def _multiply(pixels, blocks, x, offsets, step, w, w_step, k, out):  # type: ignore[no-untyped-def]
    if _WIDE and pixels == PIXELS:
        if blocks == 4:
            _many4(x, offsets, step, w, w_step, k, out)
        elif blocks == 3:
            _many3(x, offsets, step, w, w_step, k, out)
        elif blocks == 2:
            _many2(x, offsets, step, w, w_step, k, out)
        else:
            _many1(x, offsets, step, w, w_step, k, out)
    elif _WIDE:
        if blocks == 4:
            _one4(x, offsets, step, w, w_step, k, out)
        elif blocks == 3:
            _one3(x, offsets, step, w, w_step, k, out)
        elif blocks == 2:
            _one2(x, offsets, step, w, w_step, k, out)
        else:
            _one1(x, offsets, step, w, w_step, k, out)
    elif pixels == PIXELS:
        _many1(x, offsets, step, w, w_step, k, out)
    else:
        _one1(x, offsets, step, w, w_step, k, out)


@njit
def _activate_row(x, x_step, width, channels, factors, offsets, out, out_step, half):  # type: ignore[no-untyped-def]
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
def _clear(address, words):  # type: ignore[no-untyped-def]
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
    lanes = _field(p, Conv.GROUPS) * _field(p, Conv.OUT_BLOCKS) * LANES
    kernel_h, kernel_w = _field(p, Conv.KERNEL_H), _field(p, Conv.KERNEL_W)
    base, sums = _field(p, Conv.BASE), _field(p, Conv.FILTER_SUMS)
    halve = _field(p, Conv.HALVE)
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
    for ox in range(_field(p, Conv.OUT_WIDTH)):
        at = ox * _field(p, Conv.STRIDE_W) - _field(p, Conv.LEFT)
        columns = _inside(at, kernel_w, _field(p, Conv.DILATION_W), _field(p, Conv.WIDTH))
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
def _finish_pixel(half, plain, sums, base, table, halve, low, high, short, early, add, more, out, count):  # type: ignore[no-untyped-def]
    if count < LANES:
        if half:
            _finish_part_bf16(sums, base, table, halve, low, high, short, early, add, more, out, count)
        else:
            _finish_part(sums, base, table, halve, low, high, short, early, add, more, out, count)
    elif half:
        if plain:
            _finish_plain_bf16(sums, base, table, halve, low, high, short, early, add, more, out, LANES)
        else:
            _finish_bf16(sums, base, table, halve, low, high, short, early, add, more, out, LANES)
    elif plain:
        _finish_plain(sums, base, table, halve, low, high, short, early, add, more, out, LANES)
    else:
        _finish(sums, base, table, halve, low, high, short, early, add, more, out, LANES)


@njit
def _strip(p, task, scratch, last_rows):  # type: ignore[no-untyped-def]
    half = _field(p, Conv.HALF) == 1
    size = 2 if half else 4
    groups, words, blocks = _field(p, Conv.GROUPS), _field(p, Conv.WORDS), _field(p, Conv.OUT_BLOCKS)
    group_in, group_out = _field(p, Conv.GROUP_IN), _field(p, Conv.GROUP_OUT)
    height, width = _field(p, Conv.HEIGHT), _field(p, Conv.WIDTH)
    out_height, out_width = _field(p, Conv.OUT_HEIGHT), _field(p, Conv.OUT_WIDTH)
    kernel_h, kernel_w = _field(p, Conv.KERNEL_H), _field(p, Conv.KERNEL_W)
    stride_h, stride_w = _field(p, Conv.STRIDE_H), _field(p, Conv.STRIDE_W)
    left, right, top = _field(p, Conv.LEFT), _field(p, Conv.RIGHT), _field(p, Conv.TOP)
    dilation_h, dilation_w = _field(p, Conv.DILATION_H), _field(p, Conv.DILATION_W)
    rows_of_task = _field(p, Conv.STRIP)
    strips = (out_height + rows_of_task - 1) // rows_of_task
    sample, first = task // strips, task % strips * rows_of_task
    last = min(first + rows_of_task, out_height)
    channels, lanes = groups * group_in, groups * blocks * LANES
    padded, pixel = left + width + right, groups * words * 4
    k = kernel_h * kernel_w * words

    # Scratch: offsets of the words of a patch, sums, base rows, signs, and the activated rows.
    offsets = scratch
    sums = offsets + (4 * k + 63) // 64 * 64
    bases = sums + PIXELS * 4 * 64
    signs = bases + _field(p, Conv.BORDERS) * lanes * 4 + lanes * 4
    input_rows = (rows_of_task - 1) * stride_h + (kernel_h - 1) * dilation_h + 1
    activated = signs + (input_rows * padded * pixel + 63) // 64 * 64
    if last_rows < -1:  # this worker's first task
        for ky in range(kernel_h):
            for kx in range(kernel_w):
                for i in range(words):
                    at = (ky * dilation_h * padded + kx * dilation_w) * pixel + 4 * i
                    write_int32(offsets + 4 * ((ky * kernel_w + kx) * words + i), types.int32(at))

    group = _field(p, Conv.GROUP)
    row = read_int64(group + 8 * sample) if group != 0 else 0
    thresholds = _field(p, Conv.THRESHOLDS) + row * groups * words * 128
    table = _field(p, Conv.TABLE) + row * groups * blocks * 384
    x = _field(p, Conv.X) + sample * _field(p, Conv.X_BATCH)
    x_row, x_pixel = _field(p, Conv.X_ROW), _field(p, Conv.X_PIXEL)
    factors = _field(p, Conv.NORM_FACTORS)
    normed = factors != 0
    norm_offsets = _field(p, Conv.NORM_OFFSETS)
    if normed:
        factors += sample * channels * 4
        norm_offsets += sample * channels * 4

    start = first * stride_h - top
    for i in range((last - 1 - first) * stride_h + (kernel_h - 1) * dilation_h + 1):
        y, out = start + i, signs + i * padded * pixel
        if y < 0 or y >= height:
            _clear(out, padded * groups * words)
            continue
        _clear(out, left * groups * words)
        source, step = x + y * x_row, x_pixel
        if normed:
            target = activated + i * width * channels * size
            _activate_row(source, x_pixel, width, channels, factors, norm_offsets, target, channels * size, half)
            source, step = target, channels * size
        _sign_row(source, step, width, groups, group_in, words, thresholds, out + left * pixel, half)
        _clear(out + (left + width) * pixel, right * groups * words)

    filters = _field(p, Conv.FILTERS)
    low, high = read_float32(_field(p, Conv.LIMITS)), read_float32(_field(p, Conv.LIMITS) + 4)
    plain = _is_plain(table, groups * blocks, low, high)
    halve, early = _field(p, Conv.HALVE), _field(p, Conv.EARLY)
    row_add = _field(p, Conv.ROW_ADD)
    if row_add != 0:
        row_add += sample * groups * group_out * 4
    residual = _field(p, Conv.RESIDUAL)
    residual_row, residual_pixel = _field(p, Conv.RESIDUAL_ROW), _field(p, Conv.RESIDUAL_PIXEL)
    if residual != 0:
        residual += sample * _field(p, Conv.RESIDUAL_BATCH)
    has_shortcut = _field(p, Conv.SHORTCUT) == 1
    out = _field(p, Conv.OUT) + sample * _field(p, Conv.OUT_BATCH)
    out_row, out_pixel = _field(p, Conv.OUT_ROW), _field(p, Conv.OUT_PIXEL)
    inner_first, inner_last = _field(p, Conv.INNER_FIRST), _field(p, Conv.INNER_LAST)

    for y in range(first, last):
        rows = _inside(y * stride_h - top, kernel_h, dilation_h, height)
        if rows != last_rows:
            _base_row(p, rows, bases)
            last_rows = rows
        line = signs + (y - first) * stride_h * padded * pixel
        for g in range(groups):
            block = 0
            while block < blocks:
                together = min(BLOCKS, blocks - block)
                w = filters + (g * blocks + block) * k * 64
                x_at = 0
                while x_at < out_width:
                    many = PIXELS if x_at + PIXELS <= out_width else 1
                    source = line + x_at * stride_w * pixel + g * words * 4
                    _multiply(many, together, source, offsets, stride_w * pixel, w, k * 64, k, sums)
                    quick = plain and early == 0 and many == PIXELS
                    quick = quick and inner_first <= x_at and x_at + many <= inner_last
                    for r in range(together):
                        at = (g * blocks + block + r) * LANES
                        o = g * group_out + (block + r) * LANES
                        short, short_step = 0, channels * size
                        if has_shortcut and normed:
                            short = activated + (((y + top - first) * width + x_at) * channels + o) * size
                        elif has_shortcut:
                            short, short_step = x + y * x_row + x_at * x_pixel + o * size, x_pixel
                        add = row_add + 4 * o if row_add != 0 else 0
                        more = 0
                        if residual != 0:
                            more = residual + y * residual_row + x_at * residual_pixel + o * size
                        target = out + y * out_row + x_at * out_pixel + o * size
                        count = group_out - (block + r) * LANES
                        total, constants = sums + r * 64, table + at * 24
                        if quick and count >= LANES:
                            start, step = bases + 4 * at, together * 64
                            if half:
                                _finish_row_bf16(
                                    total, step, start, constants, halve, short, add, more, target, short_step,
                                    residual_pixel, out_pixel,
                                )  # fmt: skip
                            else:
                                _finish_row(
                                    total, step, start, constants, halve, short, add, more, target, short_step,
                                    residual_pixel, out_pixel,
                                )  # fmt: skip
                            continue
                        for i in range(many):
                            px = x_at + i
                            entry = bases
                            if px < inner_first:
                                entry = bases + (1 + px) * lanes * 4
                            elif px >= inner_last:
                                entry = bases + (1 + inner_first + px - inner_last) * lanes * 4
                            _finish_pixel(
                                half, plain, total, entry + 4 * at, constants, halve, low, high, short, early, add,
                                more, target, count,
                            )  # fmt: skip
                            total, target = total + together * 64, target + out_pixel
                            short = short + short_step if has_shortcut else 0
                            more = more + residual_pixel if residual != 0 else 0
                    x_at += many
                block += together
    return last_rows


def conv_worker(p):  # type: ignore[no-untyped-def]
    me = fetch_add(p + 8 * Conv.WORKERS, 1)
    scratch = _field(p, Conv.SCRATCH) + me * _field(p, Conv.SCRATCH_STEP)
    last_rows = -2
    while True:
        task = fetch_add(p + 8 * Conv.TASKS, 1)
        if task >= _field(p, Conv.COUNT):
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
    strips, rows, channels = _field(p, Norm.STRIPS), _field(p, Norm.ROWS), _field(p, Norm.CHANNELS)
    while True:
        task = fetch_add(p + 8 * Norm.TASKS, 1)
        if task >= _field(p, Norm.COUNT):
            break
        first = task % strips * rows
        x = _field(p, Norm.X) + task // strips * _field(p, Norm.X_BATCH) + first * _field(p, Norm.X_ROW)
        sums = _field(p, Norm.SUMS) + task * 8 * channels
        for _ in range(first, min(first + rows, _field(p, Norm.HEIGHT))):
            half = _field(p, Norm.HALF) == 1
            _moments_row(x, _field(p, Norm.X_PIXEL), _field(p, Norm.WIDTH), channels, sums, sums + 4 * channels, half)
            x += _field(p, Norm.X_ROW)


def factors_worker(p):  # type: ignore[no-untyped-def]
    """Turn sums and sums of squares into GroupNorm's factors and offsets, for every sample."""
    strips, channels, groups = _field(p, Norm.STRIPS), _field(p, Norm.CHANNELS), _field(p, Norm.GROUPS)
    pixels = _field(p, Norm.HEIGHT) * _field(p, Norm.WIDTH)
    weight, bias, shifts, eps = _field(p, Norm.WEIGHT), _field(p, Norm.BIAS), _field(p, Norm.SHIFT), _field(p, Norm.EPS)
    width = channels // groups
    for sample in range(_field(p, Norm.COUNT) // strips):
        sums = _field(p, Norm.SUMS) + sample * strips * 8 * channels
        row = shifts + sample * channels * 4 if shifts != 0 else 0
        factors = _field(p, Norm.FACTORS) + sample * channels * 4
        offsets = _field(p, Norm.OFFSETS) + sample * channels * 4
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
    strips, rows, channels = _field(p, Norm.STRIPS), _field(p, Norm.ROWS), _field(p, Norm.CHANNELS)
    half = _field(p, Norm.HALF) == 1
    while True:
        task = fetch_add(p + 8 * Norm.TASKS, 1)
        if task >= _field(p, Norm.COUNT):
            break
        sample, first = task // strips, task % strips * rows
        factors = _field(p, Norm.FACTORS) + sample * channels * 4
        offsets = _field(p, Norm.OFFSETS) + sample * channels * 4
        for y in range(first, min(first + rows, _field(p, Norm.HEIGHT))):
            x = _field(p, Norm.X) + sample * _field(p, Norm.X_BATCH) + y * _field(p, Norm.X_ROW)
            out = _field(p, Norm.OUT) + sample * _field(p, Norm.OUT_BATCH) + y * _field(p, Norm.OUT_ROW)
            step, out_step = _field(p, Norm.X_PIXEL), _field(p, Norm.OUT_PIXEL)
            _activate_row(x, step, _field(p, Norm.WIDTH), channels, factors, offsets, out, out_step, half)


class Wide(IntEnum):
    """Fields of the parameters of a full-precision 3x3 convolution, and of the transform of its weights."""

    WORKERS = 0
    TASKS = auto()
    COUNT = auto()
    HALF = auto()
    SCRATCH = auto()
    SCRATCH_STEP = auto()
    TILE = auto()  # m of m x m output tiles, 2 or 4
    TILE_ROWS = auto()  # rows of output tiles of a task
    TILES = auto()  # tiles multiplied together, a multiple of 4
    HEIGHT = auto()
    WIDTH = auto()
    IN_CHANNELS = auto()
    OUT_CHANNELS = auto()
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
    FILTERS = auto()  # float32, (n * n, C_out / 16, C_in, 16)
    BIAS = auto()
    NORM_FACTORS = auto()
    NORM_OFFSETS = auto()
    WEIGHT = auto()  # of the plain convolution, float32
    WEIGHT_OUT = auto()  # its strides in bytes
    WEIGHT_IN = auto()
    WEIGHT_ROW = auto()
    WEIGHT_COLUMN = auto()


_F2, _F4 = vectors.WINOGRAD[2], vectors.WINOGRAD[4]
_spread2, _spread4, _spread4_bf16 = (
    vectors.make_spread(half, f.spread) for half, f in ((False, _F2), (False, _F4), (True, _F4))
)
_gather2, _gather4, _gather4_bf16 = (
    vectors.make_gather(half, f.gather) for half, f in ((False, _F2), (False, _F4), (True, _F4))
)
_spread_filters2, _spread_filters4 = (vectors.make_spread_filters(f.filter) for f in (_F2, _F4))
# The gradient of `gather`, which takes pixels to products.
_return2, _return4 = (vectors.make_spread(False, tuple(zip(*f.gather, strict=True))) for f in (_F2, _F4))
_matmul4, _matmul3, _matmul2, _matmul1 = (vectors.make_matmul(4, n) for n in (4, 3, 2, 1))
_outer4, _outer3, _outer2, _outer1 = (vectors.make_outer(4, n) for n in (4, 3, 2, 1))


def filters_worker(p):  # type: ignore[no-untyped-def]
    """Transform the 3x3 weights of one block of 16 output channels at a time."""
    channels, blocks = _field(p, Wide.IN_CHANNELS), _field(p, Wide.OUT_CHANNELS) // LANES
    lane, row, column = _field(p, Wide.WEIGHT_OUT), _field(p, Wide.WEIGHT_ROW), _field(p, Wide.WEIGHT_COLUMN)
    while True:
        task = fetch_add(p + 8 * Wide.TASKS, 1)
        if task >= _field(p, Wide.COUNT):
            break
        w = _field(p, Wide.WEIGHT) + task * LANES * lane
        out = _field(p, Wide.FILTERS) + task * channels * 64
        for i in range(channels):
            at = w + i * _field(p, Wide.WEIGHT_IN)
            if _field(p, Wide.TILE) == 2:
                _spread_filters2(at, lane, row, column, out + i * 64, blocks * channels * 64)
            else:
                _spread_filters4(at, lane, row, column, out + i * 64, blocks * channels * 64)


@njit
def _multiply_tiles(count, x, in_channels, w, out_channels, out):  # type: ignore[no-untyped-def]
    """(count, C_in) times (C_in, C_out), count a multiple of 4."""
    block = 0
    blocks = out_channels // LANES
    while block < blocks:
        together = min(4, blocks - block)
        filters = w + block * in_channels * 64
        for t in range(0, count, 4):
            source, target = x + t * in_channels * 4, out + (t * out_channels + block * LANES) * 4
            if together == 4:
                _matmul4(source, in_channels * 4, filters, in_channels * 64, in_channels, target, out_channels * 4)
            elif together == 3:
                _matmul3(source, in_channels * 4, filters, in_channels * 64, in_channels, target, out_channels * 4)
            elif together == 2:
                _matmul2(source, in_channels * 4, filters, in_channels * 64, in_channels, target, out_channels * 4)
            else:
                _matmul1(source, in_channels * 4, filters, in_channels * 64, in_channels, target, out_channels * 4)
        block += together


@njit
def _tile_row(p, sample, tile_y, lines, scratch):  # type: ignore[no-untyped-def]
    """One row of tiles; ``lines`` points to the addresses of its n input rows, 0 for one outside the picture."""
    half = _field(p, Wide.HALF) == 1
    size = 2 if half else 4
    m = _field(p, Wide.TILE)
    n = m + 2
    height, width = _field(p, Wide.HEIGHT), _field(p, Wide.WIDTH)
    channels, out_channels = _field(p, Wide.IN_CHANNELS), _field(p, Wide.OUT_CHANNELS)
    pixel = channels * size if _field(p, Wide.NORM_FACTORS) != 0 else _field(p, Wide.X_PIXEL)
    together = _field(p, Wide.TILES)
    addresses = scratch
    nothing = addresses + 320
    spread = nothing + (channels * 4 + 63) // 64 * 64
    # A line more than needed, or all values of a patch would fall into one set of the first cache.
    spread_step, product_step = together * channels * 4 + 64, together * out_channels * 4 + 64
    products = spread + n * n * spread_step
    filter_step = out_channels // LANES * channels * 64
    out = _field(p, Wide.OUT) + sample * _field(p, Wide.OUT_BATCH) + m * tile_y * _field(p, Wide.OUT_ROW)
    residual = _field(p, Wide.RESIDUAL)
    if residual != 0:
        residual += sample * _field(p, Wide.RESIDUAL_BATCH) + m * tile_y * _field(p, Wide.RESIDUAL_ROW)
    bias = _field(p, Wide.BIAS)
    tiles = (width + m - 1) // m
    for first in range(0, tiles, together):
        here = min(together, tiles - first)
        for t in range(here):
            for i in range(n * n):
                line, x = read_int64(lines + 8 * (i // n)), m * (first + t) - 1 + i % n
                inside = line != 0 and 0 <= x < width
                write_int64(addresses + 8 * i, line + x * pixel if inside else nothing)
            for c in range(0, channels, LANES):
                target = spread + (t * channels + c) * 4
                if half:
                    _spread4_bf16(addresses, c * size, target, spread_step)
                elif m == 4:
                    _spread4(addresses, c * size, target, spread_step)
                else:
                    _spread2(addresses, c * size, target, spread_step)
        rounded = (here + 3) // 4 * 4
        for i in range(n * n):
            w = _field(p, Wide.FILTERS) + i * filter_step
            _multiply_tiles(rounded, spread + i * spread_step, channels, w, out_channels, products + i * product_step)
        for t in range(here):
            x = m * (first + t)
            rows, columns = min(m, height - m * tile_y), min(m, width - x)
            for o in range(0, out_channels, LANES):
                more = 0
                if residual != 0:
                    more = residual + x * _field(p, Wide.RESIDUAL_PIXEL) + o * size
                start = bias + 4 * o if bias != 0 else 0
                source = products + (t * out_channels + o) * 4
                target = out + x * _field(p, Wide.OUT_PIXEL) + o * size
                if half:
                    _gather4_bf16(
                        source, product_step, start, more, _field(p, Wide.RESIDUAL_ROW),
                        _field(p, Wide.RESIDUAL_PIXEL), target, _field(p, Wide.OUT_ROW), _field(p, Wide.OUT_PIXEL),
                        rows, columns,
                    )  # fmt: skip
                elif m == 4:
                    _gather4(
                        source, product_step, start, more, _field(p, Wide.RESIDUAL_ROW),
                        _field(p, Wide.RESIDUAL_PIXEL), target, _field(p, Wide.OUT_ROW), _field(p, Wide.OUT_PIXEL),
                        rows, columns,
                    )  # fmt: skip
                else:
                    _gather2(
                        source, product_step, start, more, _field(p, Wide.RESIDUAL_ROW),
                        _field(p, Wide.RESIDUAL_PIXEL), target, _field(p, Wide.OUT_ROW), _field(p, Wide.OUT_PIXEL),
                        rows, columns,
                    )  # fmt: skip


def wide_worker(p):  # type: ignore[no-untyped-def]
    """A full-precision 3x3 convolution by Winograd's algorithm, with what stands before and after it."""
    half = _field(p, Wide.HALF) == 1
    size = 2 if half else 4
    height, width, channels = _field(p, Wide.HEIGHT), _field(p, Wide.WIDTH), _field(p, Wide.IN_CHANNELS)
    me = fetch_add(p + 8 * Wide.WORKERS, 1)
    scratch = _field(p, Wide.SCRATCH) + me * _field(p, Wide.SCRATCH_STEP)
    lines, activated = scratch, scratch + 64
    normed = _field(p, Wide.NORM_FACTORS) != 0
    row_size = width * channels * size
    rest = activated + (8 * row_size + 63) // 64 * 64 if normed else activated
    _clear(rest + 320, channels)
    m = _field(p, Wide.TILE)
    tile_rows, together = (height + m - 1) // m, _field(p, Wide.TILE_ROWS)
    chunks = (tile_rows + together - 1) // together
    while True:
        task = fetch_add(p + 8 * Wide.TASKS, 1)
        if task >= _field(p, Wide.COUNT):
            break
        sample, first = task // chunks, task % chunks * together
        x = _field(p, Wide.X) + sample * _field(p, Wide.X_BATCH)
        factors = _field(p, Wide.NORM_FACTORS) + sample * channels * 4
        offsets = _field(p, Wide.NORM_OFFSETS) + sample * channels * 4
        done = m * first - 1  # input rows before this one are activated
        for tile_y in range(first, min(first + together, tile_rows)):
            for i in range(m + 2):
                y = m * tile_y - 1 + i
                line = 0
                if 0 <= y < height:
                    line = x + y * _field(p, Wide.X_ROW)
                    if normed:
                        target = activated + y % 8 * row_size
                        if y >= done:
                            _activate_row(
                                line, _field(p, Wide.X_PIXEL), width, channels, factors, offsets, target,
                                channels * size, half,
                            )  # fmt: skip
                        line = target
                write_int64(lines + 8 * i, line)
            done = m * tile_y + m + 1
            _tile_row(p, sample, tile_y, lines, rest)


class Tiles(IntEnum):
    """Fields of the parameters of Winograd's algorithm backwards, to the gradient of a 3x3 convolution's weights."""

    WORKERS = 0
    TASKS = auto()
    COUNT = auto()
    TILE = auto()  # m of m x m outputs
    TILES = auto()  # how many are multiplied together, a group
    GROUPS = auto()  # of tiles
    TASK_GROUPS = auto()  # of a task
    COUNT_TILES = auto()  # how many there are to do
    ROWS = auto()  # rows of tiles of a picture
    COLUMNS = auto()  # tiles of a row
    HEIGHT = auto()
    WIDTH = auto()
    IN_CHANNELS = auto()
    OUT_CHANNELS = auto()
    X = auto()  # float32, as all
    X_BATCH = auto()
    X_ROW = auto()
    X_PIXEL = auto()
    GRAD = auto()
    GRAD_BATCH = auto()
    GRAD_ROW = auto()
    GRAD_PIXEL = auto()
    SUMS = auto()  # (tasks, n * n, C_in, C_out), zeros at first; null: leave the transforms, and multiply nothing
    FIRST = auto()  # tiles before these, which are not asked for
    SPREAD = auto()  # where transforms of the input are left, n * n times (tiles, C_in)
    SPREAD_STEP = auto()  # from one of the n * n to the next
    RETURNED = auto()  # where those of the gradient are left
    RETURNED_STEP = auto()
    SCRATCH = auto()
    SCRATCH_STEP = auto()


@njit
def _point(picture, row, pixel, height, width, top, left, side, addresses, nothing):  # type: ignore[no-untyped-def]
    """Write the addresses of the pixels of a square, of which those outside the picture are ``nothing``."""
    for i in range(side * side):
        y, x = top + i // side, left + i % side
        inside = 0 <= y < height and 0 <= x < width
        write_int64(addresses + 8 * i, picture + y * row + x * pixel if inside else nothing)


@njit
def _add_outer(count, x, in_channels, w, out_channels, out):  # type: ignore[no-untyped-def]
    """Add (count, C_in) transposed times (count, C_out)."""
    x_step, w_step = in_channels * 4, out_channels * 4
    block = 0
    while block < out_channels // LANES:
        together = min(4, out_channels // LANES - block)
        filters = w + block * 64
        for i in range(0, in_channels, 4):
            target = out + i * w_step + block * 64
            if together == 4:
                _outer4(x + 4 * i, x_step, filters, w_step, count, target, w_step)
            elif together == 3:
                _outer3(x + 4 * i, x_step, filters, w_step, count, target, w_step)
            elif together == 2:
                _outer2(x + 4 * i, x_step, filters, w_step, count, target, w_step)
            else:
                _outer1(x + 4 * i, x_step, filters, w_step, count, target, w_step)
        block += together


def tiles_worker(p):  # type: ignore[no-untyped-def]
    """Transform some tiles of the input and of the gradient at a time, and add up their products."""
    m, together = _field(p, Tiles.TILE), _field(p, Tiles.TILES)
    n = m + 2
    height, width = _field(p, Tiles.HEIGHT), _field(p, Tiles.WIDTH)
    channels, out_channels = _field(p, Tiles.IN_CHANNELS), _field(p, Tiles.OUT_CHANNELS)
    rows, columns = _field(p, Tiles.ROWS), _field(p, Tiles.COLUMNS)
    me = fetch_add(p + 8 * Tiles.WORKERS, 1)
    keep = _field(p, Tiles.SUMS) == 0
    addresses = _field(p, Tiles.SCRATCH) + me * _field(p, Tiles.SCRATCH_STEP)
    nothing = addresses + 320
    spread = nothing + (max(channels, out_channels) * 4 + 63) // 64 * 64
    # A line more than needed, or all values of a patch would fall into one set of the first cache.
    spread_step, return_step = together * channels * 4 + 64, together * out_channels * 4 + 64
    returned = spread + n * n * spread_step
    _clear(nothing, max(channels, out_channels))
    while True:
        task = fetch_add(p + 8 * Tiles.TASKS, 1)
        if task >= _field(p, Tiles.COUNT):
            break
        # A task's sums are its own, and it is the same groups on whichever thread: the result is, to the last bit.
        sums = _field(p, Tiles.SUMS) + task * n * n * channels * out_channels * 4
        group = task * _field(p, Tiles.TASK_GROUPS)
        for number in range(group, min(group + _field(p, Tiles.TASK_GROUPS), _field(p, Tiles.GROUPS))):
            first = number * together
            here = min(together, _field(p, Tiles.COUNT_TILES) - first)
            if keep:
                spread, returned = _field(p, Tiles.SPREAD) + first * channels * 4, _field(p, Tiles.RETURNED)
                returned += first * out_channels * 4
                spread_step, return_step = _field(p, Tiles.SPREAD_STEP), _field(p, Tiles.RETURNED_STEP)
            for t in range(here):
                tile = _field(p, Tiles.FIRST) + first + t
                row, column = tile // columns, tile % columns
                sample, top, left = row // rows, m * (row % rows), m * column
                x = _field(p, Tiles.X) + sample * _field(p, Tiles.X_BATCH)
                step, pixel = _field(p, Tiles.X_ROW), _field(p, Tiles.X_PIXEL)
                _point(x, step, pixel, height, width, top - 1, left - 1, n, addresses, nothing)
                for c in range(0, channels, LANES):
                    if m == 4:
                        _spread4(addresses, c * 4, spread + (t * channels + c) * 4, spread_step)
                    else:
                        _spread2(addresses, c * 4, spread + (t * channels + c) * 4, spread_step)
                grad = _field(p, Tiles.GRAD) + sample * _field(p, Tiles.GRAD_BATCH)
                step, pixel = _field(p, Tiles.GRAD_ROW), _field(p, Tiles.GRAD_PIXEL)
                _point(grad, step, pixel, height, width, top, left, m, addresses, nothing)
                for c in range(0, out_channels, LANES):
                    if m == 4:
                        _return4(addresses, c * 4, returned + (t * out_channels + c) * 4, return_step)
                    else:
                        _return2(addresses, c * 4, returned + (t * out_channels + c) * 4, return_step)
            for i in range(0 if keep else n * n):
                out = sums + i * channels * out_channels * 4
                _add_outer(here, spread + i * spread_step, channels, returned + i * return_step, out_channels, out)


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
    half = _field(p, Unzip.HALF) == 1
    size = 2 if half else 4
    hidden, skip = _field(p, Unzip.HIDDEN_CHANNELS), _field(p, Unzip.SKIP_CHANNELS)
    height, width = _field(p, Unzip.HEIGHT), _field(p, Unzip.WIDTH)
    channels = (hidden + skip) // 2
    while True:
        task = fetch_add(p + 8 * Unzip.TASKS, 1)
        if task >= _field(p, Unzip.COUNT):
            break
        sample, y = task // height, task % height
        h = _field(p, Unzip.HIDDEN) + sample * _field(p, Unzip.HIDDEN_BATCH) + y * _field(p, Unzip.HIDDEN_ROW)
        s = _field(p, Unzip.SKIP) + sample * _field(p, Unzip.SKIP_BATCH) + y * _field(p, Unzip.SKIP_ROW)
        first = _field(p, Unzip.FIRST) + task * width * channels * size
        second = _field(p, Unzip.SECOND) + task * width * channels * size
        for _ in range(width):
            _unzip_pixel(h, hidden, second, first, half)
            _unzip_pixel(s, skip, first + hidden // 2 * size, second + hidden // 2 * size, half)
            h += _field(p, Unzip.HIDDEN_PIXEL)
            s += _field(p, Unzip.SKIP_PIXEL)
            first += channels * size
            second += channels * size


def compile_workers() -> dict[str, int]:
    """Return the address of every worker, compiled now or by an earlier run."""
    made = {
        "conv": conv_worker,
        "moments": moments_worker,
        "factors": factors_worker,
        "silu": silu_worker,
        "unzip": unzip_worker,
        "filters": filters_worker,
        "wide": wide_worker,
        "tiles": tiles_worker,
    }
    # Numba's cache looks at this file alone, and would go on with what an earlier version of the other one says.
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in (vectors, layout))
    for function in made.values():
        function.__qualname__ = f"{function.__name__}_{hashlib.sha256(sources).hexdigest()[:16]}"
    compiled = {name: _compiled(function) for name, function in made.items()}
    _kept.update(compiled)
    return {name: function.address for name, function in compiled.items()}


def _compiled(function):  # type: ignore[no-untyped-def]
    signature = types.void(types.int64)
    try:
        return cfunc(signature, nopython=True, cache=True)(function)
    except RuntimeError as error:  # neither the package's folder nor the user's own can be written
        if "cache" not in str(error):
            raise
        return cfunc(signature, nopython=True)(function)


_kept: dict[str, Any] = {}  # compiled code lives as long as its function object
