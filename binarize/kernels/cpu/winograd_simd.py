"""Vector instructions of Winograd's algorithm for 3x3 convolutions (Lavin and Gray 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir

from binarize.kernels.cpu import simd
from binarize.kernels.cpu.simd import F32, FLOATS, I32, I64, LANES, Values, chain, fma, instructions, load, loop, store

Matrix = tuple[tuple[float, ...], ...]
ROWS, MOST_BLOCKS = 4, 4  # register blocking of the products


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


@instructions
def matmul(b, x, x_step, w, w_step, count, out, out_step, blocks, dot_bf16):  # type: ignore[no-untyped-def]
    """Write `ROWS` x ``blocks`` x 16 sums of ``count`` products; float32, or of twice as many products of bfloat16.

    ``out[p * out_step + 64 r + 4 lane] = sum_j x[p * x_step + 4 j] * w[r * w_step + 64 j + 4 lane]``

    With ``dot_bf16``, a word is a pair of bfloat16, and each product is the dot product of two pairs.
    """

    def multiply(n: int, add_product: Callable[..., ir.Value]) -> None:
        rows, columns = chain(b, x, x_step, ROWS), chain(b, w, w_step, n)

        def add_products(j: ir.Value, kept: Values) -> Values:
            filters = [load(b, b.add(a, b.shl(j, I64(6))), FLOATS) for a in columns]
            words = [simd.splat(b, load(b, b.add(a, b.shl(j, I64(2))), F32)) for a in rows]
            pairs = [(word, f) for word in words for f in filters]
            return [add_product(b, *pair, total) for pair, total in zip(pairs, kept, strict=True)]

        sums = loop(b, count, [ir.Constant(FLOATS, None)] * (ROWS * n), add_products)
        for p, target in enumerate(chain(b, out, out_step, ROWS)):
            for r in range(n):
                store(b, sums[p * n + r], b.add(target, I64(64 * r)))

    def choose(half_precision: bool) -> None:
        add_product = simd.dot_bf16 if half_precision else fma
        _by_blocks(b, blocks, lambda n: multiply(n, add_product))

    if simd.AVX512_BF16:
        simd.by_flag(b, dot_bf16, choose)
    else:
        choose(False)


@instructions
def add_outer(b, x, x_step, w, w_step, count, out, out_step, blocks):  # type: ignore[no-untyped-def]
    """Add `ROWS` x ``blocks`` x 16 sums of ``count`` outer products to ``out``; all float32.

    ``out[p * out_step + 64 r + 4 lane] += sum_j x[4 p + j * x_step] * w[64 r + 4 lane + j * w_step]``
    """

    def multiply(n: int) -> None:
        targets = [b.add(row, I64(64 * r)) for row in chain(b, out, out_step, ROWS) for r in range(n)]

        def add_products(j: ir.Value, kept: Values) -> Values:
            here, there = b.add(x, b.mul(j, x_step)), b.add(w, b.mul(j, w_step))
            lines = [load(b, b.add(there, I64(64 * r)), FLOATS) for r in range(n)]
            values = [simd.splat(b, load(b, b.add(here, I64(4 * p)), F32)) for p in range(ROWS)]
            pairs = [(value, line) for value in values for line in lines]
            return [fma(b, *pair, total) for pair, total in zip(pairs, kept, strict=True)]

        sums = loop(b, count, [load(b, target, FLOATS) for target in targets], add_products)
        for value, target in zip(sums, targets, strict=True):
            store(b, value, target)

    _by_blocks(b, blocks, multiply)


def _combine(b: ir.IRBuilder, values: list[ir.Value], factors: tuple[float, ...]) -> ir.Value:
    """Return the sum of values times constants. It starts with a value whose factor is 1, if there is one."""
    total = None
    for value, factor in sorted(zip(values, factors, strict=True), key=lambda term: term[1] != 1):
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


def _sandwich(b: ir.IRBuilder, read: Callable[[int], ir.Value], matrix: Matrix) -> Iterator[tuple[int, ir.Value]]:
    """Yield (place, value) for each value of matrix @ grid @ matrix.T, column by column; ``read(i)`` loads one.

    Few values are alive at once if each is read when it is needed and written when it is yielded.
    """
    side, width = len(matrix[0]), len(matrix)
    lines = [_multiply(b, matrix, [read(side * y + x) for x in range(side)]) for y in range(side)]
    for x, column in enumerate(zip(*lines, strict=True)):
        for y, value in enumerate(_multiply(b, matrix, list(column))):
            yield width * y + x, value


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


def _at(b: ir.IRBuilder, start: ir.Value, step: ir.Value, i: int) -> ir.Value:
    return b.add(start, b.mul(step, I64(i)))


def make_patch_transform(choose: Callable[[Winograd], Matrix], narrows: bool = False) -> Any:
    """Return ``f(addresses, channel, out, step, m, bf16, narrow)``: matrix @ patch @ matrix.T for 16 channels.

    ``addresses`` points to the addresses of the patch's pixels, ``channel`` is an offset in bytes from each. Value i of
    the transform goes to ``out + i * step``, float32, or bfloat16 if ``narrow`` (then ``bf16``, and m is 4).
    Only with ``narrows`` is there code for that.
    """

    @instructions
    def transform(b, addresses, channel, out, step, m, bf16, narrow):  # type: ignore[no-untyped-def]
        def apply(matrix: Matrix, half_precision: bool, narrowed: bool) -> None:
            def read(i: int) -> ir.Value:
                place = b.load(simd.pointer(b, b.add(addresses, I64(8 * i)), I64))
                return simd.load_pixels(b, b.add(place, channel), half_precision, None)

            for i, value in _sandwich(b, read, matrix):
                store(b, simd.narrow(b, value) if narrowed else value, _at(b, out, step, i))

        def apply_for(size: Winograd, half_precision: bool) -> None:
            if narrows and half_precision and _has_pairs(size):
                simd.by_flag(b, narrow, lambda narrowed: apply(choose(size), True, narrowed))
            else:
                apply(choose(size), half_precision, False)

        _by_size(b, m, lambda size: simd.by_flag(b, bf16, lambda half: apply_for(size, half)))

    return transform


@instructions
def filter_transform(b, w, bf16, later, paired, lane, row, column, out, step, m):  # type: ignore[no-untyped-def]
    """Transform one input channel's 3x3 taps for 16 output channels, whose weights are ``lane`` bytes apart.

    The values are float32. If ``paired`` (m is 4 then), they are pairs of bfloat16 instead: this channel's and those of
    the channel at ``later``.
    """

    def tap(w: ir.Value, i: int, half_precision: bool) -> ir.Value:
        start = _at(b, _at(b, w, row, i // 3), column, i % 3)
        values = ir.Constant(FLOATS, ir.Undefined)
        for k in range(LANES):
            value = simd.load_float(b, _at(b, start, lane, k), half_precision)
            values = b.insert_element(values, value, I32(k))
        return values

    def apply(size: Winograd, as_pairs: bool, half_precision: bool) -> None:
        found = list(_sandwich(b, lambda i: tap(w, i, half_precision), size.filter))
        if as_pairs:
            second = _sandwich(b, lambda i: tap(later, i, half_precision), size.filter)
            found = [(i, simd.pair(b, value, other)) for (i, value), (_, other) in zip(found, second, strict=True)]
        for i, value in found:
            store(b, value, _at(b, out, step, i))

    def choose(size: Winograd, half_precision: bool) -> None:
        if _has_pairs(size):
            simd.by_flag(b, paired, lambda as_pairs: apply(size, as_pairs, half_precision))
        else:
            apply(size, False, half_precision)

    _by_size(b, m, lambda size: simd.by_flag(b, bf16, lambda half: choose(size, half)))


@instructions
def filter_gradient(b, x, step, out, lane, m):  # type: ignore[no-untyped-def]
    """Apply the transpose of `filter_transform`: n x n values at ``x + i * step`` to 3x3 taps at ``out + i * lane``."""

    def apply(size: Winograd) -> None:
        lanes = chain(b, out, lane, LANES)
        for tap, value in _sandwich(b, lambda i: load(b, _at(b, x, step, i), FLOATS), transposed(size.filter)):
            for i, target in enumerate(lanes):
                store(b, b.extract_element(value, I32(i)), b.add(target, I64(4 * tap)))

    _by_size(b, m, apply)


@instructions
def output_transform(b, x, step, bias, residual, r_row, r_pixel, out, row, pixel, rows, columns, m, bf16):  # type: ignore[no-untyped-def]
    """Write m x m output pixels of 16 channels from the n x n values at ``x + i * step``.

    ``bias`` and ``residual`` are added unless null. ``rows`` x ``columns`` of the pixels lie inside the image.
    """

    def write(size: Winograd, half_precision: bool) -> None:
        zero, side = ir.Constant(FLOATS, None), len(size.output)
        (start,) = simd.when(b, b.icmp_signed("!=", bias, I64(0)), [zero], lambda _: [load(b, bias, FLOATS)])
        has_residual = b.icmp_signed("!=", residual, I64(0))
        for i, value in _sandwich(b, lambda i: load(b, _at(b, x, step, i), FLOATS), size.output):
            y, left = divmod(i, side)
            inside = b.and_(b.icmp_signed(">", rows, I64(y)), b.icmp_signed(">", columns, I64(left)))
            with b.if_then(inside):
                value = b.fadd(value, start)
                place = _at(b, _at(b, residual, r_row, y), r_pixel, left)

                def plus(values: list[ir.Value], place: ir.Value = place) -> list[ir.Value]:
                    return [b.fadd(values[0], simd.load_pixels(b, place, half_precision, None))]

                (value,) = simd.when(b, has_residual, [value], plus)
                target = _at(b, _at(b, out, row, y), pixel, left)
                simd.store_pixels(b, value, target, half_precision, None)

    _by_size(b, m, lambda size: simd.by_flag(b, bf16, lambda half: write(size, half)))


input_transform = make_patch_transform(lambda size: size.input, narrows=True)
# The transpose of `output_transform`, for the gradient of the output.
output_gradient = make_patch_transform(lambda size: transposed(size.output))
