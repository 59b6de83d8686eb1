"""The compiled loops of GroupNorm's statistics, SiLU and CS-Fusion's shuffle; see `conv_worker`."""

from __future__ import annotations

import numpy as np
from numba import types

from binarize.kernels.bitpack import WORD
from binarize.kernels.cpu import simd
from binarize.kernels.cpu.conv_worker import activate_row, sum_row
from binarize.kernels.cpu.fields import Norm, Shuffle
from binarize.kernels.cpu.parts import part
from binarize.kernels.cpu.simd import fetch_add, field, read_float32, write_float32


def moments_worker(p):  # type: ignore[no-untyped-def]
    """Sum each row and its squares, channel by channel."""
    height, channels = field(p, Norm.HEIGHT), field(p, Norm.CHANNELS)
    while True:
        task = fetch_add(p + 8 * Norm.TASKS, 1)
        if task >= field(p, Norm.COUNT):
            break
        x = field(p, Norm.X) + task // height * field(p, Norm.X_BATCH) + task % height * field(p, Norm.X_ROW)
        sums = field(p, Norm.ROW_SUMS) + task * 8 * channels
        sum_row(x, field(p, Norm.X_PIXEL), field(p, Norm.WIDTH), channels, sums, field(p, Norm.BF16))


def factors_worker(p):  # type: ignore[no-untyped-def]
    """Turn sums and sums of squares into GroupNorm's factors and offsets, for every sample."""
    height, channels, groups = field(p, Norm.HEIGHT), field(p, Norm.CHANNELS), field(p, Norm.GROUPS)
    pixels = height * field(p, Norm.WIDTH)
    weight, bias, shifts, eps = field(p, Norm.WEIGHT), field(p, Norm.BIAS), field(p, Norm.SHIFT), field(p, Norm.EPS)
    width = channels // groups
    for sample in range(field(p, Norm.COUNT) // height):
        sums = field(p, Norm.ROW_SUMS) + sample * height * 8 * channels
        row = shifts + sample * channels * 4 if shifts != 0 else 0
        factors = field(p, Norm.FACTORS) + sample * channels * 4
        offsets = field(p, Norm.OFFSETS) + sample * channels * 4
        for g in range(groups):
            mean, square = 0.0, 0.0
            for c in range(g * width, (g + 1) * width):
                total, squares = 0.0, 0.0
                for y in range(height):
                    total += types.float64(read_float32(sums + (y * 2 * channels + c) * 4))
                    squares += types.float64(read_float32(sums + ((y * 2 + 1) * channels + c) * 4))
                shift = types.float64(read_float32(row + 4 * c)) if row != 0 else 0.0
                mean += total / pixels + shift
                square += squares / pixels + 2 * shift * total / pixels + shift * shift
            mean, square = mean / width, square / width
            scale = 1.0 / np.sqrt(max(square - mean * mean, 0.0) + simd.read_float64(eps))
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
    height, channels, bf16 = field(p, Norm.HEIGHT), field(p, Norm.CHANNELS), field(p, Norm.BF16)
    while True:
        task = fetch_add(p + 8 * Norm.TASKS, 1)
        if task >= field(p, Norm.COUNT):
            break
        sample, y = task // height, task % height
        factors = field(p, Norm.FACTORS) + sample * channels * 4
        offsets = field(p, Norm.OFFSETS) + sample * channels * 4
        x = field(p, Norm.X) + sample * field(p, Norm.X_BATCH) + y * field(p, Norm.X_ROW)
        out = field(p, Norm.OUT) + sample * field(p, Norm.OUT_BATCH) + y * field(p, Norm.OUT_ROW)
        step, out_step = field(p, Norm.X_PIXEL), field(p, Norm.OUT_PIXEL)
        activate_row(x, step, field(p, Norm.WIDTH), channels, factors, offsets, out, out_step, bf16)


@part
def _deal_pixel(x, channels, evens, odds, bf16):  # type: ignore[no-untyped-def]
    size = 4 - 2 * bf16
    for c in range(0, channels, WORD):
        simd.deinterleave(x + c * size, evens + c // 2 * size, odds + c // 2 * size, bf16)


def shuffle_worker(p):  # type: ignore[no-untyped-def]
    """Write the channels of hidden and skip to two images, opposite parities together."""
    bf16 = field(p, Shuffle.BF16)
    size = 4 - 2 * bf16
    hidden, skip = field(p, Shuffle.HIDDEN_CHANNELS), field(p, Shuffle.SKIP_CHANNELS)
    height, width = field(p, Shuffle.HEIGHT), field(p, Shuffle.WIDTH)
    channels = (hidden + skip) // 2
    while True:
        task = fetch_add(p + 8 * Shuffle.TASKS, 1)
        if task >= field(p, Shuffle.COUNT):
            break
        sample, y = task // height, task % height
        h = field(p, Shuffle.HIDDEN) + sample * field(p, Shuffle.HIDDEN_BATCH) + y * field(p, Shuffle.HIDDEN_ROW)
        s = field(p, Shuffle.SKIP) + sample * field(p, Shuffle.SKIP_BATCH) + y * field(p, Shuffle.SKIP_ROW)
        first = field(p, Shuffle.FIRST) + task * width * channels * size
        second = field(p, Shuffle.SECOND) + task * width * channels * size
        for _ in range(width):
            _deal_pixel(h, hidden, second, first, bf16)
            _deal_pixel(s, skip, first + hidden // 2 * size, second + hidden // 2 * size, bf16)
            h += field(p, Shuffle.HIDDEN_PIXEL)
            s += field(p, Shuffle.SKIP_PIXEL)
            first += channels * size
            second += channels * size
