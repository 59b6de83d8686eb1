"""Vector instructions of Winograd's algorithm for 3x3 convolutions, in LLVM's portable form as in `_vectors`."""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from binarize.kernels.cpu.simd import (
    F32,
    FLOATS,
    I32,
    I64,
    LANES,
    constant,
    fma,
    load,
    load_pixels,
    pointer,
    splat,
    store,
    store_pixels,
    when,
)


def make_matmul(rows: int, blocks: int) -> Any:
    """Return ``f(x, x_step, w, w_step, k, out, out_step)``: ``rows`` x ``blocks`` x 16 sums of k products in registers.

    ``out[p * out_step + 64 r + 4 lane] = sum_j x[p * x_step + 4 j] * w[r * w_step + 64 j + 4 lane]``, all float32.
    """

    @intrinsic
    def matmul(context, x, x_step, w, w_step, k, out, out_step):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            x, x_step, w, w_step, count, out, out_step = args
            entry, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
            row, block = [x], [w]
            for _ in range(1, rows):
                row.append(b.add(row[-1], x_step))
            for _ in range(1, blocks):
                block.append(b.add(block[-1], w_step))
            b.branch(loop)
            b.position_at_end(loop)
            j = b.phi(I64)
            sums = [b.phi(FLOATS) for _ in range(rows * blocks)]
            filters = [load(b, b.add(a, b.shl(j, I64(6))), FLOATS) for a in block]
            new = []
            for p, address in enumerate(row):
                value = splat(b, load(b, b.add(address, b.shl(j, I64(2))), F32))
                new += [fma(b, value, f, sums[p * blocks + r]) for r, f in enumerate(filters)]
            after = b.add(j, I64(1))
            for phi, first, last in (
                (j, I64(0), after),
                *((s, ir.Constant(FLOATS, None), n) for s, n in zip(sums, new, strict=True)),
            ):
                phi.add_incoming(first, entry)
                phi.add_incoming(last, loop)
            b.cbranch(b.icmp_signed("<", after, count), loop, done)
            b.position_at_end(done)
            for p in range(rows):
                for r in range(blocks):
                    store(b, new[p * blocks + r], b.add(b.add(out, b.mul(I64(p), out_step)), I64(64 * r)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return matmul


def make_outer(rows: int, blocks: int) -> Any:
    """Return ``f(x, x_step, w, w_step, k, out, out_step)``: sums of outer products, added to what is there.

    ``out[p * out_step + 64 r + 4 lane] += sum_j x[4 p + j * x_step] * w[64 r + 4 lane + j * w_step]``, all float32.
    """

    @intrinsic
    def outer(context, x, x_step, w, w_step, k, out, out_step):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            x, x_step, w, w_step, count, out, out_step = args
            entry, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
            targets = [
                b.add(b.add(out, b.mul(I64(p), out_step)), I64(64 * r)) for p in range(rows) for r in range(blocks)
            ]
            before = [load(b, target, FLOATS) for target in targets]
            b.branch(loop)
            b.position_at_end(loop)
            left, here, there = b.phi(I64), b.phi(I64), b.phi(I64)
            sums = [b.phi(FLOATS) for _ in targets]
            lines = [load(b, b.add(there, I64(64 * r)), FLOATS) for r in range(blocks)]
            new = []
            for p in range(rows):
                value = splat(b, load(b, b.add(here, I64(4 * p)), F32))
                new += [fma(b, value, line, sums[p * blocks + r]) for r, line in enumerate(lines)]
            after = b.sub(left, I64(1))
            for phi, first, last in (
                (left, count, after),
                (here, x, b.add(here, x_step)),
                (there, w, b.add(there, w_step)),
                *zip(sums, before, new, strict=True),
            ):
                phi.add_incoming(first, entry)
                phi.add_incoming(last, loop)
            b.cbranch(b.icmp_signed(">", after, I64(0)), loop, done)
            b.position_at_end(done)
            for value, target in zip(new, targets, strict=True):
                store(b, value, target)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return outer


def _combine(b: ir.IRBuilder, values: list[ir.Value], factors: tuple[float, ...]) -> ir.Value:
    """Return the sum of values times constants."""
    total = None
    for value, factor in zip(values, factors, strict=True):
        if factor == 0:
            continue
        if total is None:
            total = value if factor == 1 else b.fmul(value, constant(float(factor), FLOATS))
        elif factor in (1, -1):
            total = b.fadd(total, value) if factor == 1 else b.fsub(total, value)
        else:
            total = fma(b, value, constant(float(factor), FLOATS), total)
    return total


def _sandwich(
    b: ir.IRBuilder, grid: list[list[ir.Value]], matrix: tuple[tuple[float, ...], ...]
) -> list[list[ir.Value]]:
    """Return matrix @ grid @ matrix.T."""
    columns = [[_combine(b, [line[x] for line in grid], row) for row in matrix] for x in range(len(grid[0]))]
    return [[_combine(b, [column[y] for column in columns], row) for row in matrix] for y in range(len(matrix))]


class Winograd(NamedTuple):
    """Matrices of F(m x m, 3 x 3): m x m outputs from patches of n x n, n = m + 2, by n^2 products."""

    spread: tuple[tuple[float, ...], ...]  # B^T, of patches, (n, n)
    filter: tuple[tuple[float, ...], ...]  # G, (n, 3)
    gather: tuple[tuple[float, ...], ...]  # A^T, back to pixels, (m, n)


# By m, from Lavin and Gray 2016, "Fast algorithms for convolutional neural networks", sections 4.1 and 4.3.
WINOGRAD = {
    2: Winograd(
        ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
        ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
        ((1, 1, 1, 0), (0, 1, -1, -1)),
    ),
    4: Winograd(
        (
            (4, 0, -5, 0, 1, 0),
            (0, -4, -4, 1, 1, 0),
            (0, 4, -4, -1, 1, 0),
            (0, -2, -1, 2, 1, 0),
            (0, 2, -1, -2, 1, 0),
            (0, 4, 0, -5, 0, 1),
        ),
        (
            (1 / 4, 0, 0),
            (-1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6),
            (1 / 24, 1 / 12, 1 / 6),
            (1 / 24, -1 / 12, 1 / 6),
            (0, 0, 1),
        ),
        ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
    ),
}


def make_spread(bf16: bool, matrix: tuple[tuple[float, ...], ...]) -> Any:
    """Return ``f(addresses, channel, out, step)``: matrix @ patch @ matrix.T of a square patch, for 16 channels.

    ``addresses`` points to the addresses of the patch's pixels, ``channel`` is an offset in bytes from each; value i of
    the transform goes to ``out + i * step``, float32.
    """
    side = len(matrix[0])

    @intrinsic
    def spread(context, addresses, channel, out, step):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            addresses, channel, out, step = args

            def pixel(i: int) -> ir.Value:
                address = b.load(pointer(b, b.add(addresses, I64(8 * i)), I64))
                return load_pixels(b, b.add(address, channel), bf16, None)

            grid = [[pixel(side * y + x) for x in range(side)] for y in range(side)]
            for i, value in enumerate(v for line in _sandwich(b, grid, matrix) for v in line):
                store(b, value, b.add(out, b.mul(I64(i), step)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return spread


def make_spread_filters(matrix: tuple[tuple[float, ...], ...]) -> Any:
    """Return ``f(w, lane, row, column, out, step)``: Winograd's transform of one input channel's 3x3 taps.

    It is for 16 output channels, whose weights are ``lane`` apart.
    """

    @intrinsic
    def spread_filters(context, w, lane, row, column, out, step):  # type: ignore[no-untyped-def]

        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            w, lane, row, column, out, step = args

            def tap(y: int, x: int) -> ir.Value:
                start = b.add(w, b.add(b.mul(row, I64(y)), b.mul(column, I64(x))))
                values = ir.Constant(FLOATS, ir.Undefined)
                for i in range(LANES):
                    value = load(b, b.add(start, b.mul(lane, I64(i))), F32)
                    values = b.insert_element(values, value, I32(i))
                return values

            grid = [[tap(y, x) for x in range(3)] for y in range(3)]
            for i, value in enumerate(v for line in _sandwich(b, grid, matrix) for v in line):
                store(b, value, b.add(out, b.mul(I64(i), step)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return spread_filters


def make_collect(matrix: tuple[tuple[float, ...], ...]) -> Any:
    """Return ``f(x, step, out, lane)``: the transpose of Winograd's transform of filters, for a gradient of weights.

    The n x n values at ``x + i * step``, of 16 output channels, become each one's 3x3 taps at ``out + i * lane``.
    """
    side = len(matrix)
    transposed = tuple(zip(*matrix, strict=True))

    @intrinsic
    def collect(context, x, step, out, lane):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            x, step, out, lane = args
            values = [load(b, b.add(x, b.mul(I64(i), step)), FLOATS) for i in range(side * side)]
            grid = [values[side * y : side * (y + 1)] for y in range(side)]
            for tap, value in enumerate(v for line in _sandwich(b, grid, transposed) for v in line):
                for i in range(LANES):
                    target = b.add(b.add(out, b.mul(I64(i), lane)), I64(4 * tap))
                    store(b, b.extract_element(value, I32(i)), target)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return collect


def make_gather(bf16: bool, matrix: tuple[tuple[float, ...], ...]) -> Any:
    """Return ``f(x, step, bias, residual, r_row, r_pixel, out, row, pixel, rows, columns)``: Winograd's way back.

    The n x n values at ``x + i * step`` become m x m output pixels of 16 channels, plus bias and residual (null
    addresses leave them out), of which ``rows`` x ``columns`` are inside the picture.
    """
    side = len(matrix[0])

    @intrinsic
    def gather(context, x, step, bias, residual, r_row, r_pixel, out, row, pixel, rows, columns):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            x, step, bias, residual, r_row, r_pixel, out, row, pixel, rows, columns = args
            at = [[b.add(x, b.mul(I64(side * y + i), step)) for i in range(side)] for y in range(side)]
            grid = [[load(b, address, FLOATS) for address in line] for line in at]
            zero = ir.Constant(FLOATS, None)
            biased = b.icmp_signed("!=", bias, I64(0))
            (start,) = when(b, biased, [zero], lambda _: [load(b, bias, FLOATS)])
            more = b.icmp_signed("!=", residual, I64(0))
            for y, line in enumerate(_sandwich(b, grid, matrix)):
                for i, value in enumerate(line):
                    inside = b.and_(b.icmp_signed(">", rows, I64(y)), b.icmp_signed(">", columns, I64(i)))
                    with b.if_then(inside):
                        value = b.fadd(value, start)
                        at = b.add(b.mul(r_row, I64(y)), b.mul(r_pixel, I64(i)))

                        def plus_residual(values: list[ir.Value], at: ir.Value = at) -> list[ir.Value]:
                            return [b.fadd(values[0], load_pixels(b, b.add(residual, at), bf16, None))]

                        (value,) = when(b, more, [value], plus_residual)
                        to = b.add(out, b.add(b.mul(row, I64(y)), b.mul(pixel, I64(i))))
                        store_pixels(b, value, to, bf16, None)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), codegen

    return gather
