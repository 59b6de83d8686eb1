"""The compiled loops of GroupNorm's statistics, SiLU and shuffles of channels; see `conv_worker`."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from binarize.kernels.cpu import simd
from binarize.kernels.cpu.conv_worker import PIXELS_AHEAD, activate_row, sum_row
from binarize.kernels.cpu.fields import Deal, Norm
from binarize.kernels.cpu.simd import FLOATS, I64, INTS, LANES, Values, fetch_add, field, instructions, load, store


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


@instructions
def column_sums(b, x, step, rows, out, count):  # type: ignore[no-untyped-def]
    """Sum ``count`` (at most 16) columns of float32, whose rows are ``step`` bytes apart; write 16 float64."""
    doubles = ir.VectorType(ir.DoubleType(), LANES)

    def add(partial: bool) -> None:
        mask = simd.lanes_below(b, count) if partial else None

        def add_row(i: ir.Value, kept: Values) -> Values:
            row = simd.load_pixels(b, b.add(x, b.mul(i, step)), False, mask)
            return [b.fadd(kept[0], b.fpext(row, doubles))]

        store(b, simd.loop(b, rows, [ir.Constant(doubles, None)], add_row)[0], out)

    simd.by_mask(b, count, LANES, add)


def factors_worker(p):  # type: ignore[no-untyped-def]
    """Turn sums and sums of squares into GroupNorm's factors and offsets, for every sample."""
    height, channels, groups = field(p, Norm.HEIGHT), field(p, Norm.CHANNELS), field(p, Norm.GROUPS)
    pixels = height * field(p, Norm.WIDTH)
    weight, bias, shifts, eps = field(p, Norm.WEIGHT), field(p, Norm.BIAS), field(p, Norm.SHIFT), field(p, Norm.EPS)
    width, totals = channels // groups, field(p, Norm.TOTALS)
    for sample in range(field(p, Norm.COUNT) // height):
        sums = field(p, Norm.ROW_SUMS) + sample * height * 8 * channels
        row = shifts + sample * channels * 4 if shifts != 0 else 0
        factors = field(p, Norm.FACTORS) + sample * channels * 4
        offsets = field(p, Norm.OFFSETS) + sample * channels * 4
        for c in range(0, 2 * channels, LANES):
            column_sums(sums + 4 * c, 8 * channels, height, totals + 8 * c, min(LANES, 2 * channels - c))
        for g in range(groups):
            mean, square = 0.0, 0.0
            for c in range(g * width, (g + 1) * width):
                total, squares = simd.read_float64(totals + 8 * c), simd.read_float64(totals + 8 * (channels + c))
                shift = types.float64(simd.read_float32(row + 4 * c)) if row != 0 else 0.0
                mean += total / pixels + shift
                square += squares / pixels + 2 * shift * total / pixels + shift * shift
            mean, square = mean / width, square / width
            scale = 1.0 / np.sqrt(max(square - mean * mean, 0.0) + simd.read_float64(eps))
            for c in range(g * width, (g + 1) * width):
                factor = scale * types.float64(simd.read_float32(weight + 4 * c)) if weight != 0 else scale
                offset = -mean * factor
                if bias != 0:
                    offset += types.float64(simd.read_float32(bias + 4 * c))
                if row != 0:
                    offset += types.float64(simd.read_float32(row + 4 * c)) * factor
                simd.write_float32(factors + 4 * c, types.float32(factor))
                simd.write_float32(offsets + 4 * c, types.float32(offset))


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


def _pick(b: ir.IRBuilder, vectors: Values, lanes: list[tuple[int, int]]) -> ir.Value:
    """Gather lanes of two or four vectors into one. A lane is the numbers of its vector and of itself."""
    found = []
    for k in range(0, len(vectors), 2):
        here = [v % 2 * LANES + lane if v // 2 == k // 2 else 0 for v, lane in lanes]
        found.append(b.shuffle_vector(vectors[k], vectors[k + 1], ir.Constant(INTS, here)))
    both = ir.Constant(INTS, [v // 2 * LANES + i for i, (v, _) in enumerate(lanes)])
    return found[0] if len(found) == 1 else b.shuffle_vector(*found, both)


@instructions
def deal(b, x, place, ahead, column, row, ways, back, bf16):  # type: ignore[no-untyped-def]
    """Copy channel ``ways * i + j`` at ``x`` to channel i of place j, for 16 i. With ``back``, copy the other way.

    There are 2 or 4 places: ``place``, ``column`` bytes after it, ``row`` bytes after it, and both. The lines that lie
    ``ahead`` of what is written there are prefetched.
    """

    def move(n: int, backwards: bool, half_precision: bool) -> None:
        kind, size = (simd.HALVES, 2) if half_precision else (FLOATS, 4)
        near = simd.chain(b, x, I64(LANES * size), n)
        far = [place, b.add(place, column), b.add(place, row), b.add(b.add(place, column), row)][:n]
        sources, targets = (far, near) if backwards else (near, far)
        vectors = [load(b, source, kind, size) for source in sources]
        for j, target in enumerate(targets):
            channels = range(LANES * j, LANES * (j + 1)) if backwards else range(j, n * LANES, n)
            lanes = [(c % n, c // n) if backwards else divmod(c, LANES) for c in channels]
            store(b, _pick(b, vectors, lanes), target, size)
            if not backwards:
                simd.prefetch_line(b, b.add(target, ahead), write=True)

    def choose(four: bool) -> None:
        n = 4 if four else 2
        simd.by_flag(b, bf16, lambda half: simd.by_flag(b, back, lambda backwards: move(n, backwards, half)))

    simd.by_flag(b, b.and_(ways, I64(4)), choose)


def deal_worker(p):  # type: ignore[no-untyped-def]
    """Deal the channels of each pixel to 2 or 4 places of another image, or collect them from there."""
    bf16, ways, channels, back = field(p, Deal.BF16), field(p, Deal.WAYS), field(p, Deal.CHANNELS), field(p, Deal.BACK)
    size, height, width = 4 - 2 * bf16, field(p, Deal.HEIGHT), field(p, Deal.WIDTH)
    column, row = field(p, Deal.COLUMN), field(p, Deal.ROW)
    while True:
        task = fetch_add(p + 8 * Deal.TASKS, 1)
        if task >= field(p, Deal.COUNT):
            break
        sample, y = task // height, task % height
        x = field(p, Deal.X) + sample * field(p, Deal.X_BATCH) + y * field(p, Deal.X_ROW)
        place = field(p, Deal.PLACE) + sample * field(p, Deal.PLACE_BATCH) + y * field(p, Deal.PLACE_ROW)
        for left in range(width):
            target = place
            # Not beyond the row, which may be another worker's.
            ahead = PIXELS_AHEAD * field(p, Deal.PLACE_PIXEL) if left + PIXELS_AHEAD < width else 0
            for c in range(0, channels, ways * LANES):
                deal(x + c * size, target, ahead, column, row, ways, back, bf16)
                target += LANES * size
            x += field(p, Deal.X_PIXEL)
            place += field(p, Deal.PLACE_PIXEL)
