"""Vector instructions of Winograd's algorithm for 3x3 convolutions (Lavin and Gray 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from binarize.kernels.cpu import simd
from binarize.kernels.cpu.simd import F32, FLOATS, I32, I64, LANES, chain, fma, load, store, when

Matrix = tuple[tuple[float, ...], ...]
ROWS, MOST_BLOCKS = 4, 4  # register blocking of the products


def iterate(b: ir.IRBuilder, start: ir.Value, step: ir.Value) -> Iterator[ir.Value]:
    """Yield addresses, a step apart."""
    while True:
        yield start
        start = b.add(start, step)


def _by_blocks(b: ir.IRBuilder, blocks: ir.Value, build: Callable[[int], None]) -> None:
    """Append ``build(n)`` for n from 1 to `MOST_BLOCKS` and run the one for ``blocks``."""
    done = b.append_basic_block("blocks_done")
    cases = b.switch(blocks, done)
    for n in range(1, MOST_BLOCKS + 1):
        start = b.append_basic_block(f"blocks_{n}")
        cases.add_case(I64(n), start)
        b.position_at_end(start)
        build(n)
        b.branch(done)
    b.position_at_end(done)


@intrinsic
def matmul(context, x, x_step, w, w_step, k, out, out_step, blocks, dot_bf16):  # type: ignore[no-untyped-def]
    """Write `ROWS` x ``blocks`` x 16 sums of k products, held in registers; float32, or of 2k products of bfloat16.

    ``out[p * out_step + 64 r + 4 lane] = sum_j x[p * x_step + 4 j] * w[r * w_step + 64 j + 4 lane]``

    With ``dot_bf16``, a word is a pair of bfloat16, and each product is the dot product of two pairs.
    """

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, x_step, w, w_step, count, out, out_step, blocks, dot_bf16 = args

        def multiply(n: int, add_product: Callable[..., ir.Value]) -> None:
            entry, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
            rows, columns = chain(b, x, x_step, ROWS), chain(b, w, w_step, n)
            b.branch(loop)
            b.position_at_end(loop)
            j, sums = b.phi(I64), [b.phi(FLOATS) for _ in range(ROWS * n)]
            filters = [load(b, b.add(a, b.shl(j, I64(6))), FLOATS) for a in columns]
            new = []
            for p, address in enumerate(rows):
                value = simd.splat(b, load(b, b.add(address, b.shl(j, I64(2))), F32))
                new += [add_product(b, value, f, sums[p * n + r]) for r, f in enumerate(filters)]
            zeros = [ir.Constant(FLOATS, None)] * len(sums)
            simd.close_loop(b, loop, done, entry, count, j, (sums, zeros, new))
            for p, target in enumerate(chain(b, out, out_step, ROWS)):
                for r in range(n):
                    store(b, new[p * n + r], b.add(target, I64(64 * r)))

        def choose(half_precision: bool) -> None:
            add_product = simd.dot_bf16 if half_precision else fma
            _by_blocks(b, blocks, lambda n: multiply(n, add_product))

        if simd.AVX512_BF16:
            simd.by_flag(b, dot_bf16, choose)
        else:
            choose(False)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


@intrinsic
def add_outer(context, x, x_step, w, w_step, k, out, out_step, blocks):  # type: ignore[no-untyped-def]
    """Add `ROWS` x ``blocks`` x 16 sums of k outer products to ``out``; all float32.

    ``out[p * out_step + 64 r + 4 lane] += sum_j x[4 p + j * x_step] * w[64 r + 4 lane + j * w_step]``
    """

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, x_step, w, w_step, count, out, out_step, blocks = args

        def multiply(n: int) -> None:
            entry, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
            targets = [b.add(row, I64(64 * r)) for row in chain(b, out, out_step, ROWS) for r in range(n)]
            before = [load(b, target, FLOATS) for target in targets]
            b.branch(loop)
            b.position_at_end(loop)
            j, sums = b.phi(I64), [b.phi(FLOATS) for _ in targets]
            here, there = b.add(x, b.mul(j, x_step)), b.add(w, b.mul(j, w_step))
            lines = [load(b, b.add(there, I64(64 * r)), FLOATS) for r in range(n)]
            new = []
            for p in range(ROWS):
                value = simd.splat(b, load(b, b.add(here, I64(4 * p)), F32))
                new += [fma(b, value, line, sums[p * n + r]) for r, line in enumerate(lines)]
            simd.close_loop(b, loop, done, entry, count, j, (sums, before, new))
            for value, target in zip(new, targets, strict=True):
                store(b, value, target)

        _by_blocks(b, blocks, multiply)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


def _combine(b: ir.IRBuilder, values: list[ir.Value], factors: tuple[float, ...]) -> ir.Value:
    """Return the sum of values times constants."""
    total = None
    for value, factor in zip(values, factors, strict=True):
        if factor == 0:
            continue
        if total is None:
            total = value if factor == 1 else b.fmul(value, simd.constant(float(factor), FLOATS))
        elif factor in (1, -1):
            total = b.fadd(total, value) if factor == 1 else b.fsub(total, value)
        else:
            total = fma(b, value, simd.constant(float(factor), FLOATS), total)
    return total


def _mirrored(line: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(-factor if i % 2 else factor for i, factor in enumerate(line))


def _multiply(b: ir.IRBuilder, matrix: Matrix, values: list[ir.Value]) -> list[ir.Value]:
    """Return matrix @ values.

    Rows (or columns) of opposite points differ only in the signs of their odd entries, so both are computed from one
    even and one odd part.
    """
    columns, rows = list(transposed(matrix)), list(matrix)
    if len(columns) > len(rows):
        for i in range(len(columns) - 1):
            even, odd = (tuple(f * (y % 2 == part) for y, f in enumerate(columns[i])) for part in range(2))
            if any(even) and any(odd) and columns[i + 1] == _mirrored(columns[i]):
                columns[i : i + 2] = even, odd
                first, second = values[i : i + 2]
                values = [*values[:i], b.fadd(first, second), b.fsub(first, second), *values[i + 2 :]]
        return [_combine(b, values, row) for row in transposed(tuple(columns))]
    done: dict[int, ir.Value] = {}
    for i, row in enumerate(rows):
        if i in done:
            continue
        if any(row[::2]) and any(row[1::2]) and rows[i + 1 : i + 2] == [_mirrored(row)]:
            even, odd = (_combine(b, values[part::2], row[part::2]) for part in range(2))
            done[i], done[i + 1] = b.fadd(even, odd), b.fsub(even, odd)
        else:
            done[i] = _combine(b, values, row)
    return [done[i] for i in range(len(rows))]


def _sandwich(b: ir.IRBuilder, grid: list[list[ir.Value]], matrix: Matrix) -> list[list[ir.Value]]:
    """Return matrix @ grid @ matrix.T."""
    columns = [_multiply(b, matrix, [line[x] for line in grid]) for x in range(len(grid[0]))]
    return [_multiply(b, matrix, list(row)) for row in zip(*columns, strict=True)]


class Winograd(NamedTuple):
    """Matrices of F(m x m, 3 x 3): m x m outputs from patches of n x n, n = m + 2, by n^2 products."""

    input: Matrix  # B^T, (n, n)
    filter: Matrix  # G, (n, 3)
    output: Matrix  # A^T, (m, n)


def _interpolate(first: float, second: float) -> Winograd:
    """Return F(4 x 4, 3 x 3) for 0, two pairs of opposite points and infinity, by the Toom-Cook construction."""
    points, others = (first, -first, second, -second), (second, second, first, first)
    product, squares = (first * second) ** 2, first**2 + second**2
    scales = [2 * p * p * (p * p - q * q) for p, q in zip(points, others, strict=True)]
    return Winograd(
        (
            (product, 0, -squares, 0, 1, 0),
            *((0, -p * q * q, -q * q, p, 1, 0) for p, q in zip(points, others, strict=True)),
            (0, product, 0, -squares, 0, 1),
        ),
        ((1 / product, 0, 0), *((1 / s, p / s, p * p / s) for p, s in zip(points, scales, strict=True)), (0, 0, 1)),
        tuple((float(i == 0), *(p**i for p in points), float(i == 3)) for i in range(4)),
    )


# By m. m = 2 is from Lavin and Gray 2016, "Fast algorithms for convolutional neural networks", section 4.1. m = 4 uses
# the points 5/8 and 3/2 instead of 1 and 2 (section 4.3), which halves the rounding errors. Barabasz et al. 2020,
# "Error analysis and improving the accuracy of Winograd convolution for deep neural networks", use fractions too.
WINOGRAD = {
    2: Winograd(
        ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
        ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
        ((1, 1, 1, 0), (0, 1, -1, -1)),
    ),
    4: _interpolate(5 / 8, 3 / 2),
}


def transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _by_size(b: ir.IRBuilder, m: ir.Value, build: Callable[[Winograd], None]) -> None:
    """Append the code for both tile sizes and run the one for m x m outputs."""
    simd.by_flag(b, b.and_(m, I64(4)), lambda four: build(WINOGRAD[4 if four else 2]))


def _has_pairs(size: Winograd) -> bool:
    """Return whether there is code that multiplies pairs of bfloat16."""
    return simd.AVX512_BF16 and size is WINOGRAD[4]


def _flat(grid: list[list[ir.Value]]) -> list[ir.Value]:
    return [value for line in grid for value in line]


def make_patch_transform(choose: Callable[[Winograd], Matrix], narrows: bool = False) -> Any:
    """Return ``f(addresses, channel, out, step, m, bf16, narrow)``: matrix @ patch @ matrix.T for 16 channels.

    ``addresses`` points to the addresses of the patch's pixels, ``channel`` is an offset in bytes from each. Value i of
    the transform goes to ``out + i * step``, float32, or bfloat16 if ``narrow`` (then ``bf16``, and m is 4).
    Only with ``narrows`` is there code for that.
    """

    @intrinsic
    def transform(context, addresses, channel, out, step, m, bf16, narrow):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            addresses, channel, out, step, m, bf16, narrow = args

            def apply(matrix: Matrix, half_precision: bool, narrowed: bool) -> None:
                side = len(matrix[0])
                places = [b.load(simd.pointer(b, b.add(addresses, I64(8 * i)), I64)) for i in range(side * side)]
                pixels = [simd.load_pixels(b, b.add(place, channel), half_precision, None) for place in places]
                grid = [pixels[side * y : side * (y + 1)] for y in range(side)]
                for value, target in zip(_flat(_sandwich(b, grid, matrix)), iterate(b, out, step), strict=False):
                    store(b, simd.narrow(b, value) if narrowed else value, target)

            def apply_for(size: Winograd, half_precision: bool) -> None:
                if narrows and half_precision and _has_pairs(size):
                    simd.by_flag(b, narrow, lambda narrowed: apply(choose(size), True, narrowed))
                else:
                    apply(choose(size), half_precision, False)

            _by_size(b, m, lambda size: simd.by_flag(b, bf16, lambda half: apply_for(size, half)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return transform


@intrinsic
def filter_transform(context, w, later, paired, lane, row, column, out, step, m):  # type: ignore[no-untyped-def]
    """Transform one input channel's 3x3 taps for 16 output channels, whose weights are ``lane`` bytes apart.

    The values are float32. If ``paired`` (m is 4 then), they are pairs of bfloat16 instead: this channel's and those of
    the channel at ``later``.
    """

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        w, later, paired, lane, row, column, out, step, m = args

        def tap(w: ir.Value, y: int, x: int) -> ir.Value:
            start = b.add(w, b.add(b.mul(row, I64(y)), b.mul(column, I64(x))))
            values = ir.Constant(FLOATS, ir.Undefined)
            for i in range(LANES):
                value = load(b, b.add(start, b.mul(lane, I64(i))), F32)
                values = b.insert_element(values, value, I32(i))
            return values

        def transform(size: Winograd, w: ir.Value) -> list[ir.Value]:
            return _flat(_sandwich(b, [[tap(w, y, x) for x in range(3)] for y in range(3)], size.filter))

        def apply(size: Winograd, as_pairs: bool) -> None:
            values = transform(size, w)
            if as_pairs:
                values = [simd.pair(b, *both) for both in zip(values, transform(size, later), strict=True)]
            for value, target in zip(values, iterate(b, out, step), strict=False):
                store(b, value, target)

        def choose(size: Winograd) -> None:
            if _has_pairs(size):
                simd.by_flag(b, paired, lambda as_pairs: apply(size, as_pairs))
            else:
                apply(size, False)

        _by_size(b, m, choose)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


@intrinsic
def filter_gradient(context, x, step, out, lane, m):  # type: ignore[no-untyped-def]
    """Apply the transpose of `filter_transform`: n x n values at ``x + i * step`` to 3x3 taps at ``out + i * lane``."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, step, out, lane, m = args

        def apply(size: Winograd) -> None:
            side = len(size.filter)
            values = [load(b, a, FLOATS) for a in chain(b, x, step, side * side)]
            grid = [values[side * y : side * (y + 1)] for y in range(side)]
            lanes = chain(b, out, lane, LANES)
            for tap, value in enumerate(_flat(_sandwich(b, grid, transposed(size.filter)))):
                for i, target in enumerate(lanes):
                    store(b, b.extract_element(value, I32(i)), b.add(target, I64(4 * tap)))

        _by_size(b, m, apply)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def output_transform(context, x, step, bias, residual, r_row, r_pixel, out, row, pixel, rows, columns, m, bf16):  # type: ignore[no-untyped-def]
    """Write m x m output pixels of 16 channels from the n x n values at ``x + i * step``.

    ``bias`` and ``residual`` are added unless null. ``rows`` x ``columns`` of the pixels lie inside the image.
    """

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, step, bias, residual, r_row, r_pixel, out, row, pixel, rows, columns, m, bf16 = args

        def write(size: Winograd, half_precision: bool) -> None:
            side, zero = len(size.input), ir.Constant(FLOATS, None)
            values = [load(b, a, FLOATS) for a in chain(b, x, step, side * side)]
            grid = [values[side * y : side * (y + 1)] for y in range(side)]
            (start,) = when(b, b.icmp_signed("!=", bias, I64(0)), [zero], lambda _: [load(b, bias, FLOATS)])
            has_residual = b.icmp_signed("!=", residual, I64(0))
            for y, line in enumerate(_sandwich(b, grid, size.output)):
                for i, value in enumerate(line):
                    inside = b.and_(b.icmp_signed(">", rows, I64(y)), b.icmp_signed(">", columns, I64(i)))
                    with b.if_then(inside):
                        value = b.fadd(value, start)
                        place = b.add(residual, b.add(b.mul(r_row, I64(y)), b.mul(r_pixel, I64(i))))

                        def plus(values: list[ir.Value], place: ir.Value = place) -> list[ir.Value]:
                            return [b.fadd(values[0], simd.load_pixels(b, place, half_precision, None))]

                        (value,) = when(b, has_residual, [value], plus)
                        target = b.add(out, b.add(b.mul(row, I64(y)), b.mul(pixel, I64(i))))
                        simd.store_pixels(b, value, target, half_precision, None)

        _by_size(b, m, lambda size: simd.by_flag(b, bf16, lambda half: write(size, half)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 13), codegen


input_transform = make_patch_transform(lambda size: size.input, narrows=True)
# The transpose of `output_transform`, for the gradient of the output.
output_gradient = make_patch_transform(lambda size: transposed(size.output))
