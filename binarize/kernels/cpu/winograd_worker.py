"""The loops of Winograd's algorithm for full-precision 3x3 convolutions, forwards and backwards.

They are workers like those of `_workers`.
"""

from __future__ import annotations

from binarize.kernels.cpu import winograd_simd
from binarize.kernels.cpu.conv_worker import activate_row, clear, sum_row
from binarize.kernels.cpu.fields import Tiles, Winograd
from binarize.kernels.cpu.parts import part
from binarize.kernels.cpu.simd import LANES, fetch_add, field, read_int64, write_int64
from binarize.kernels.cpu.winograd_simd import filter_gradient, matmul, output_gradient, output_transform


def filter_worker(p):  # type: ignore[no-untyped-def]
    """Transform the 3x3 weights of one block of 16 output channels at a time."""
    channels, step = field(p, Winograd.IN_CHANNELS), field(p, Winograd.FILTERS_STEP)
    paired, next_channel = field(p, Winograd.DOT_BF16), field(p, Winograd.WEIGHT_IN)
    half = field(p, Winograd.WEIGHT_BF16)
    lane, row, column = field(p, Winograd.WEIGHT_OUT), field(p, Winograd.WEIGHT_ROW), field(p, Winograd.WEIGHT_COLUMN)
    while True:
        task = fetch_add(p + 8 * Winograd.TASKS, 1)
        if task >= field(p, Winograd.COUNT):
            break
        w = field(p, Winograd.WEIGHT) + task * LANES * lane
        out = field(p, Winograd.FILTERS) + task * field(p, Winograd.FILTERS_OUT)
        for _ in range(0, channels, 1 + paired):
            later = w + next_channel
            winograd_simd.filter_transform(
                w, half, later, paired, lane, row, column, out, step, field(p, Winograd.TILE)
            )
            w += (1 + paired) * next_channel
            out += field(p, Winograd.FILTERS_IN)


@part
def _multiply_tiles(count, x, words, w, out_channels, out, dot_bf16):  # type: ignore[no-untyped-def]
    """(count, C_in) times (C_in, C_out), count a multiple of 4; C_in are ``words`` floats or pairs of bfloat16."""
    block = 0
    blocks = out_channels // LANES
    while block < blocks:
        together = min(4, blocks - block)
        filters = w + block * words * 64
        for t in range(0, count, 4):
            source, target = x + t * words * 4, out + (t * out_channels + block * LANES) * 4
            matmul(source, words * 4, filters, words * 64, words, target, out_channels * 4, together, dot_bf16)
        block += together


@part
def _tile_row(p, sample, tile_y, lines, scratch):  # type: ignore[no-untyped-def]
    """One row of tiles; ``lines`` points to the addresses of its n input rows, 0 for one outside the picture."""
    bf16 = field(p, Winograd.BF16)
    size = 4 - 2 * bf16
    m = field(p, Winograd.TILE)
    n = m + 2
    height, width = field(p, Winograd.HEIGHT), field(p, Winograd.WIDTH)
    channels, out_channels = field(p, Winograd.IN_CHANNELS), field(p, Winograd.OUT_CHANNELS)
    pixel = channels * size if field(p, Winograd.NORM_FACTORS) != 0 else field(p, Winograd.X_PIXEL)
    together = field(p, Winograd.TILES)
    addresses = scratch
    dot_bf16 = field(p, Winograd.DOT_BF16)
    words = channels >> dot_bf16
    nothing = addresses + 320
    patches = nothing + (channels * 4 + 63) // 64 * 64
    # A line more than needed, or all values of a patch would fall into one set of the first cache.
    patch_step, product_step = together * words * 4 + 64, together * out_channels * 4 + 64
    products = patches + n * n * patch_step
    filter_step = field(p, Winograd.FILTERS_STEP)
    out = field(p, Winograd.OUT) + sample * field(p, Winograd.OUT_BATCH) + m * tile_y * field(p, Winograd.OUT_ROW)
    residual = field(p, Winograd.RESIDUAL)
    if residual != 0:
        residual += sample * field(p, Winograd.RESIDUAL_BATCH) + m * tile_y * field(p, Winograd.RESIDUAL_ROW)
    bias = field(p, Winograd.BIAS)
    tiles = (width + m - 1) // m
    for first in range(0, tiles, together):
        here = min(together, tiles - first)
        for t in range(here):
            left, at = m * (first + t) - 1, addresses
            for i in range(n):
                line = read_int64(lines + 8 * i)
                for x in range(left, left + n):
                    write_int64(at, line + x * pixel if line != 0 and 0 <= x < width else nothing)
                    at += 8
            for c in range(0, channels, LANES):
                target = patches + (t * words + (c >> dot_bf16)) * 4
                winograd_simd.input_transform(addresses, c * size, target, patch_step, m, bf16, dot_bf16)
        rounded = (here + 3) // 4 * 4
        for i in range(n * n):
            w = field(p, Winograd.FILTERS) + i * filter_step
            target = products + i * product_step
            _multiply_tiles(rounded, patches + i * patch_step, words, w, out_channels, target, dot_bf16)
        for t in range(here):
            x = m * (first + t)
            rows, columns = min(m, height - m * tile_y), min(m, width - x)
            for o in range(0, out_channels, LANES):
                more = 0
                if residual != 0:
                    more = residual + x * field(p, Winograd.RESIDUAL_PIXEL) + o * size
                start = bias + 4 * o if bias != 0 else 0
                source = products + (t * out_channels + o) * 4
                target = out + x * field(p, Winograd.OUT_PIXEL) + o * size
                output_transform(
                    source, product_step, start, more, field(p, Winograd.RESIDUAL_ROW), field(p,
                    Winograd.RESIDUAL_PIXEL), target, field(p, Winograd.OUT_ROW), field(p, Winograd.OUT_PIXEL), rows,
                    columns, m, bf16,
                )  # fmt: skip


def winograd_worker(p):  # type: ignore[no-untyped-def]
    """A full-precision 3x3 convolution by Winograd's algorithm, with what stands before and after it."""
    bf16 = field(p, Winograd.BF16)
    size = 4 - 2 * bf16
    height, width, channels = field(p, Winograd.HEIGHT), field(p, Winograd.WIDTH), field(p, Winograd.IN_CHANNELS)
    me = fetch_add(p + 8 * Winograd.WORKERS, 1)
    scratch = field(p, Winograd.SCRATCH) + me * field(p, Winograd.SCRATCH_STEP)
    lines, activated = scratch, scratch + 64
    normed = field(p, Winograd.NORM_FACTORS) != 0
    row_sums, out_channels = field(p, Winograd.ROW_SUMS), field(p, Winograd.OUT_CHANNELS)
    row_size = width * channels * size
    rest = activated + (8 * row_size + 63) // 64 * 64 if normed else activated
    clear(rest + 320, channels)
    m = field(p, Winograd.TILE)
    tile_rows, together = (height + m - 1) // m, field(p, Winograd.TILE_ROWS)
    chunks = (tile_rows + together - 1) // together
    while True:
        task = fetch_add(p + 8 * Winograd.TASKS, 1)
        if task >= field(p, Winograd.COUNT):
            break
        sample, first = task // chunks, task % chunks * together
        x = field(p, Winograd.X) + sample * field(p, Winograd.X_BATCH)
        factors = field(p, Winograd.NORM_FACTORS) + sample * channels * 4
        offsets = field(p, Winograd.NORM_OFFSETS) + sample * channels * 4
        done = m * first - 1  # input rows before this one are activated
        for tile_y in range(first, min(first + together, tile_rows)):
            for i in range(m + 2):
                y = m * tile_y - 1 + i
                line = 0
                if 0 <= y < height:
                    line = x + y * field(p, Winograd.X_ROW)
                    if normed:
                        target = activated + y % 8 * row_size
                        if y >= done:
                            activate_row(
                                line, field(p, Winograd.X_PIXEL), width, channels, factors, offsets, target,
                                channels * size, bf16,
                            )  # fmt: skip
                        line = target
                write_int64(lines + 8 * i, line)
            done = m * tile_y + m + 1
            _tile_row(p, sample, tile_y, lines, rest)
            for y in range(m * tile_y, min(m * tile_y + m, height) if row_sums != 0 else 0):
                out = field(p, Winograd.OUT) + sample * field(p, Winograd.OUT_BATCH) + y * field(p, Winograd.OUT_ROW)
                sums = row_sums + (sample * height + y) * 8 * out_channels
                sum_row(out, field(p, Winograd.OUT_PIXEL), width, out_channels, sums, bf16)


@part
def _point(picture, row, pixel, height, width, top, left, side, addresses, nothing):  # type: ignore[no-untyped-def]
    """Write the addresses of the pixels of a square, of which those outside the picture are ``nothing``."""
    for y in range(top, top + side):
        for x in range(left, left + side):
            inside = 0 <= y < height and 0 <= x < width
            write_int64(addresses, picture + y * row + x * pixel if inside else nothing)
            addresses += 8


@part
def _add_outer(count, x, in_channels, w, out_channels, out):  # type: ignore[no-untyped-def]
    """Add (count, C_in) transposed times (count, C_out)."""
    x_step, w_step = in_channels * 4, out_channels * 4
    block = 0
    while block < out_channels // LANES:
        together = min(4, out_channels // LANES - block)
        filters = w + block * 64
        for i in range(0, in_channels, 4):
            target = out + i * w_step + block * 64
            winograd_simd.add_outer(x + 4 * i, x_step, filters, w_step, count, target, w_step, together)
        block += together


def tile_worker(p):  # type: ignore[no-untyped-def]
    """Transform some tiles of the input and of the gradient at a time, and add up their products."""
    m, together = field(p, Tiles.TILE), field(p, Tiles.TILES)
    n = m + 2
    height, width = field(p, Tiles.HEIGHT), field(p, Tiles.WIDTH)
    channels, out_channels = field(p, Tiles.IN_CHANNELS), field(p, Tiles.OUT_CHANNELS)
    rows, columns = field(p, Tiles.ROWS), field(p, Tiles.COLUMNS)
    me = fetch_add(p + 8 * Tiles.WORKERS, 1)
    keep = field(p, Tiles.SUMS) == 0
    addresses = field(p, Tiles.SCRATCH) + me * field(p, Tiles.SCRATCH_STEP)
    nothing = addresses + 320
    patches = nothing + (max(channels, out_channels) * 4 + 63) // 64 * 64
    # A line more than needed, or all values of a patch would fall into one set of the first cache.
    patch_step, product_step = together * channels * 4 + 64, together * out_channels * 4 + 64
    products = patches + n * n * patch_step
    clear(nothing, max(channels, out_channels))
    while True:
        task = fetch_add(p + 8 * Tiles.TASKS, 1)
        if task >= field(p, Tiles.COUNT):
            break
        # A task's sums are its own, and it is the same groups on whichever thread: the result is, to the last bit.
        sums = field(p, Tiles.SUMS) + task * n * n * channels * out_channels * 4
        group = task * field(p, Tiles.TASK_GROUPS)
        for number in range(group, min(group + field(p, Tiles.TASK_GROUPS), field(p, Tiles.GROUPS))):
            first = number * together
            here = min(together, field(p, Tiles.COUNT_TILES) - first)
            if keep:
                patches, products = field(p, Tiles.PATCHES) + first * channels * 4, field(p, Tiles.PRODUCTS)
                products += first * out_channels * 4
                patch_step, product_step = field(p, Tiles.PATCHES_STEP), field(p, Tiles.PRODUCTS_STEP)
            for t in range(here):
                tile = field(p, Tiles.FIRST) + first + t
                row, column = tile // columns, tile % columns
                sample, top, left = row // rows, m * (row % rows), m * column
                x = field(p, Tiles.X) + sample * field(p, Tiles.X_BATCH)
                step, pixel = field(p, Tiles.X_ROW), field(p, Tiles.X_PIXEL)
                _point(x, step, pixel, height, width, top - 1, left - 1, n, addresses, nothing)
                for c in range(0, channels, LANES):
                    target = patches + (t * channels + c) * 4
                    winograd_simd.input_transform(addresses, c * 4, target, patch_step, m, 0, 0)
                if field(p, Tiles.GRAD) == 0:
                    continue
                grad = field(p, Tiles.GRAD) + sample * field(p, Tiles.GRAD_BATCH)
                step, pixel = field(p, Tiles.GRAD_ROW), field(p, Tiles.GRAD_PIXEL)
                _point(grad, step, pixel, height, width, top, left, m, addresses, nothing)
                for c in range(0, out_channels, LANES):
                    output_gradient(addresses, c * 4, products + (t * out_channels + c) * 4, product_step, m, 0, 0)
            for i in range(0 if keep else n * n):
                out = sums + i * channels * out_channels * 4
                _add_outer(here, patches + i * patch_step, channels, products + i * product_step, out_channels, out)


def filter_gradient_worker(p):  # type: ignore[no-untyped-def]
    """Turn sums of products into the gradient of weights, 16 x 16 filters at a time."""
    channels, out_channels = field(p, Tiles.IN_CHANNELS), field(p, Tiles.OUT_CHANNELS)
    me = fetch_add(p + 8 * Tiles.WORKERS, 1)
    buffer, size = field(p, Tiles.SCRATCH) + me * field(p, Tiles.SCRATCH_STEP), 4 * 9 * LANES
    while True:
        task = fetch_add(p + 8 * Tiles.TASKS, 1)
        if task >= field(p, Tiles.COUNT):
            break
        for first in range(0, channels, LANES):
            for c in range(LANES):
                x = field(p, Tiles.SUMS) + ((first + c) * out_channels + task * LANES) * 4
                filter_gradient(x, channels * out_channels * 4, buffer + 4 * 9 * c, size, field(p, Tiles.TILE))
            out = field(p, Tiles.OUT) + (task * LANES * channels + first) * 4 * 9
            for lane in range(LANES):
                for i in range(0, size, 8):
                    write_int64(out + i, read_int64(buffer + lane * size + i))
                out += channels * 4 * 9


def output_worker(p):  # type: ignore[no-untyped-def]
    """Take products of tiles back to pixels: the last step of a convolution whose products torch computed."""
    m, together = field(p, Tiles.TILE), field(p, Tiles.TILES)
    height, width = field(p, Tiles.HEIGHT), field(p, Tiles.WIDTH)
    rows, columns = field(p, Tiles.ROWS), field(p, Tiles.COLUMNS)
    row_step, pixel, bias = field(p, Tiles.OUT_ROW), field(p, Tiles.OUT_PIXEL), field(p, Tiles.BIAS)
    while True:
        task = fetch_add(p + 8 * Tiles.TASKS, 1)
        if task >= field(p, Tiles.COUNT):
            break
        for t in range(task * together, min((task + 1) * together, field(p, Tiles.COUNT_TILES))):
            row, column = (field(p, Tiles.FIRST) + t) // columns, (field(p, Tiles.FIRST) + t) % columns
            top, left = m * (row % rows), m * column
            out = field(p, Tiles.OUT) + row // rows * field(p, Tiles.OUT_BATCH) + top * row_step + left * pixel
            x = field(p, Tiles.PRODUCTS) + t * field(p, Tiles.OUT_CHANNELS) * 4
            for o in range(0, 4 * field(p, Tiles.OUT_CHANNELS), 4 * LANES):
                start = bias + o if bias != 0 else 0
                step, inside = field(p, Tiles.PRODUCTS_STEP), (min(m, height - top), min(m, width - left))
                output_transform(x + o, step, start, 0, 0, 0, out + o, row_step, pixel, inside[0], inside[1], m, 0)
