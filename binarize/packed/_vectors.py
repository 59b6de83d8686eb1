"""Vector instructions for the CPU kernels, written once in LLVM's portable form.

Numba compiles what is built here for the machine that runs it: a population count of sixteen 32-bit lanes becomes one
VPOPCNTD with AVX-512, table lookups with AVX2, CNT with NEON. Everything works on 16 lanes: 16 output channels of the
product, 16 channels of a pixel.

Addresses are int64 values, strides are in bytes. Nothing here checks anything: `binarize.packed._cpu` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

LANES = 16


def cpu_features() -> str:
    """Return the features of the processor that numba compiles for, as LLVM lists them."""
    named = getattr(config, "CPU_FEATURES", None)
    return str(named if named is not None else get_host_cpu_features())


AVX512 = "+avx512f" in cpu_features()
# Without a population count of lanes, adding words bit by bit first halves the work where one instruction computes any
# function of three operands and there are 32 registers for the bits that are kept.
CARRY_SAVE = "+avx512bw" in cpu_features()

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS, _HALVES = (ir.VectorType(t, LANES) for t in (_I32, _F32, _I16))
_BYTES = ir.VectorType(_I8, 4 * LANES)


def _constant(value: float | int, kind: ir.VectorType) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _splat(b: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    kind = ir.VectorType(scalar.type, LANES)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, _I32(0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), _constant(0, _INTS))


def _pointer(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return b.inttoptr(address, kind.as_pointer())


def _load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int = 4) -> ir.Value:
    value = b.load(_pointer(b, address, kind))
    value.align = align
    return value


def _store(b: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 4) -> None:
    b.store(value, _pointer(b, address, value.type)).align = align


def _call(b: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), list(args))


def _fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return _call(b, "llvm.fma.v16f32", _FLOATS, x, y, z)


def _lanes_below(b: ir.IRBuilder, count: ir.Value) -> ir.Value:
    lanes = ir.Constant(_INTS, list(range(LANES)))
    return b.icmp_signed("<", lanes, _splat(b, b.trunc(count, _I32)))


def _widen(b: ir.IRBuilder, halves: ir.Value) -> ir.Value:
    return b.bitcast(b.shl(b.zext(halves, _INTS), _constant(16, _INTS)), _FLOATS)


def _narrow(b: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """Round to bfloat16, to nearest even; a NaN stays one."""
    bits = b.bitcast(values, _INTS)
    odd = b.and_(b.lshr(bits, _constant(16, _INTS)), _constant(1, _INTS))
    rounded = b.lshr(b.add(bits, b.add(odd, _constant(0x7FFF, _INTS))), _constant(16, _INTS))
    quiet = b.select(b.fcmp_unordered("uno", values, values), _constant(0x7FC0, _INTS), rounded)
    return b.trunc(quiet, _HALVES)


def _load_pixels(b: ir.IRBuilder, address: ir.Value, bf16: bool, mask: ir.Value | None) -> ir.Value:
    """Load 16 channels as float32; lanes outside the mask give 0 and are not touched."""
    kind = _HALVES if bf16 else _FLOATS
    if mask is None:
        value = _load(b, address, kind, 2 if bf16 else 4)
    else:
        name = "llvm.masked.load.v16i16.p0" if bf16 else "llvm.masked.load.v16f32.p0"
        fill = ir.Constant(kind, None)
        value = _call(b, name, kind, _pointer(b, address, kind), _I32(2 if bf16 else 4), mask, fill)
    return _widen(b, value) if bf16 else value


def _store_pixels(b: ir.IRBuilder, value: ir.Value, address: ir.Value, bf16: bool, mask: ir.Value | None) -> None:
    if bf16:
        value = _narrow(b, value)
    if mask is None:
        _store(b, value, address, 2 if bf16 else 4)
    else:
        name = "llvm.masked.store.v16i16.p0" if bf16 else "llvm.masked.store.v16f32.p0"
        _call(b, name, ir.VoidType(), value, _pointer(b, address, value.type), _I32(2 if bf16 else 4), mask)


def _exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) to about 1 unit in the last place: 2^n times Taylor's polynomial of order 7 on |r| <= ln(2) / 2."""
    x = _call(b, "llvm.minnum.v16f32", _FLOATS, x, _constant(88.0, _FLOATS))
    x = _call(b, "llvm.maxnum.v16f32", _FLOATS, x, _constant(-87.0, _FLOATS))
    n = _call(b, "llvm.rint.v16f32", _FLOATS, b.fmul(x, _constant(1.4426950216293335, _FLOATS)))
    r = _fma(b, n, _constant(-0.693145751953125, _FLOATS), x)
    r = _fma(b, n, _constant(-1.428606765330187e-06, _FLOATS), r)
    y = _constant(1 / 5040, _FLOATS)
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        y = _fma(b, y, r, _constant(1 / factorial, _FLOATS))
    power = b.shl(b.add(b.fptosi(n, _INTS), _constant(127, _INTS)), _constant(23, _INTS))
    return b.fmul(y, b.bitcast(power, _FLOATS))


def _silu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    divisor = b.fadd(_constant(1.0, _FLOATS), _exp(b, b.fneg(x)))
    if not AVX512:
        return b.fdiv(x, divisor)
    # A division keeps its unit busy for 16 cycles. 14 bits of the reciprocal and one Newton step come in three.
    every = ir.Constant(_I16, -1)
    guess = _call(b, "llvm.x86.avx512.rcp14.ps.512", _FLOATS, divisor, ir.Constant(_FLOATS, None), every)
    rest = _fma(b, b.fneg(divisor), guess, _constant(1.0, _FLOATS))
    return b.fmul(x, _fma(b, guess, rest, guess))


def _when(b: ir.IRBuilder, condition: ir.Value, value: ir.Value, make: Callable[[], ir.Value]) -> ir.Value:
    """Return ``make()`` where the condition holds, else ``value``."""
    before = b.block
    then, after = b.append_basic_block("then"), b.append_basic_block("after")
    b.cbranch(condition, then, after)
    b.position_at_end(then)
    made = make()
    last = b.block
    b.branch(after)
    b.position_at_end(after)
    result = b.phi(value.type)
    result.add_incoming(value, before)
    result.add_incoming(made, last)
    return result


def _sum_bytes(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return the sum of the four bytes of each 32-bit lane."""
    low = _constant(0x00FF00FF, _INTS)
    pairs = b.add(b.and_(value, low), b.and_(b.lshr(value, _constant(8, _INTS)), low))
    return b.add(b.and_(pairs, _constant(0xFFFF, _INTS)), b.lshr(pairs, _constant(16, _INTS)))


def _add_bits(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return sum and carry of three bits, for each bit of the operands."""
    found = [_call(b, "llvm.x86.avx512.pternlog.d.512", _INTS, x, y, z, _I32(table)) for table in (0x96, 0xE8)]
    return found[0], found[1]


def _count_bytes(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return the population count of each byte."""
    return b.bitcast(_call(b, "llvm.ctpop.v64i8", _BYTES, b.bitcast(value, _BYTES)), _INTS)


def make_product(pixels: int, blocks: int, bytewise: bool) -> Any:
    """Return ``f(x, offsets, step, w, w_step, k, out)``: differing bits of pixels with filters, counted in registers.

    ``out[p, r, lane] = sum_j popcount(x[p * step + offsets[j]] ^ w[r * w_step + 64 j + 4 lane])`` as int32, for
    ``pixels`` x ``blocks`` x 16 sums at once, j below k. ``bytewise`` counts in bytes and widens every 31 words, for
    machines without a population count of 32-bit lanes. With AVX-512 these add eight words in carry-save form first (a
    Harley-Seal counter), so that one word in eight is counted.
    """
    saving = bytewise and blocks == 1 and CARRY_SAVE

    @intrinsic
    def product(context, x, offsets, step, w, w_step, k, out):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            x, offsets, step, w, w_step, count, out = args
            pixel = [x]
            for _ in range(1, pixels):
                pixel.append(b.add(pixel[-1], step))
            block = [w]
            for _ in range(1, blocks):
                block.append(b.add(block[-1], w_step))
            zeros = [ir.Constant(_INTS, None)] * (pixels * blocks)

            def differing(j: ir.Value) -> list[ir.Value]:
                offset = b.sext(_load(b, b.add(offsets, b.shl(j, _I64(2))), _I32), _I64)
                filters = [_load(b, b.add(a, b.shl(j, _I64(6))), _INTS) for a in block]
                words = (_splat(b, _load(b, b.add(address, offset), _I32)) for address in pixel)
                return [b.xor(word, f) for word in words for f in filters]

            def counts(j: ir.Value) -> list[ir.Value]:
                if bytewise:
                    return [_count_bytes(b, bits) for bits in differing(j)]
                return [_call(b, "llvm.ctpop.v16i32", _INTS, bits) for bits in differing(j)]

            def loop(
                start: ir.Value,
                stop: ir.Value,
                kept: list[ir.Value],
                step: int,
                body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
            ) -> list[ir.Value]:
                """Run ``kept = body(j, kept)`` for j from start to stop, which is above it, by step."""
                before, inside, done = b.block, b.append_basic_block("body"), b.append_basic_block("done")
                b.branch(inside)
                b.position_at_end(inside)
                j, held = b.phi(_I64), [b.phi(_INTS) for _ in kept]
                new = body(j, held)
                after = b.add(j, _I64(step))
                for phi, first, last in ((j, start, after), *zip(held, kept, new, strict=True)):
                    phi.add_incoming(first, before)
                    phi.add_incoming(last, b.block)
                b.cbranch(b.icmp_signed("<", after, stop), inside, done)
                b.position_at_end(done)
                return new

            def add_counts(j: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                return [b.add(s, c) for s, c in zip(sums, counts(j), strict=True)]

            def in_chunks(
                start: ir.Value, stop: ir.Value, sums: list[ir.Value], size: int, part: Any
            ) -> list[ir.Value]:
                """Add what ``part(start, stop)`` finds in chunks of ``size`` words, if there are any words."""
                before, chunk, done = b.block, b.append_basic_block("chunk"), b.append_basic_block("end")
                b.cbranch(b.icmp_signed("<", start, stop), chunk, done)
                b.position_at_end(chunk)
                first, held = b.phi(_I64), [b.phi(_INTS) for _ in sums]
                last = b.add(first, _I64(size))
                last = b.select(b.icmp_signed("<", last, stop), last, stop)
                new = [b.add(s, c) for s, c in zip(held, part(first, last), strict=True)]
                for phi, begun, more in ((first, start, last), *zip(held, sums, new, strict=True)):
                    phi.add_incoming(begun, before)
                    phi.add_incoming(more, b.block)
                end = b.block
                b.cbranch(b.icmp_signed("<", last, stop), chunk, done)
                b.position_at_end(done)
                totals = [b.phi(_INTS) for _ in sums]
                for phi, begun, more in zip(totals, sums, new, strict=True):
                    phi.add_incoming(begun, before)
                    phi.add_incoming(more, end)
                return totals

            def add_eight(j: ir.Value, kept: list[ir.Value]) -> list[ir.Value]:
                """Add eight words to what is kept of each sum: ones, twos and fours bit by bit, eights in bytes."""
                n = len(zeros)
                ones, twos, fours, eights = (kept[i * n : (i + 1) * n] for i in range(4))
                quads: list[list[ir.Value]] = []
                for quad in range(2):
                    pairs: list[list[ir.Value]] = []
                    for pair in range(2):
                        word = b.add(j, _I64(4 * quad + 2 * pair))
                        both = zip(ones, differing(word), differing(b.add(word, _I64(1))), strict=True)
                        ones, carries = map(list, zip(*(_add_bits(b, *bits) for bits in both), strict=True))
                        pairs.append(carries)
                    both = zip(twos, *pairs, strict=True)
                    twos, carries = map(list, zip(*(_add_bits(b, *bits) for bits in both), strict=True))
                    quads.append(carries)
                found = [_add_bits(b, *bits) for bits in zip(fours, *quads, strict=True)]
                eights = [b.add(e, _count_bytes(b, carry)) for e, (_, carry) in zip(eights, found, strict=True)]
                return [*ones, *twos, *(kept for kept, _ in found), *eights]

            def eights(start: ir.Value, stop: ir.Value) -> list[ir.Value]:
                kept = loop(start, stop, 4 * zeros, 8, add_eight)
                n, found = len(zeros), []
                for i in range(n):
                    small = _count_bytes(b, kept[2 * n + i])
                    for part in (kept[n + i], kept[i]):  # at most 8 * (4 + 2 + 1) in a byte
                        small = b.add(b.add(small, small), _count_bytes(b, part))
                    wide = b.shl(_sum_bytes(b, kept[3 * n + i]), _constant(3, _INTS))
                    found.append(b.add(wide, _sum_bytes(b, small)))
                return found

            def single(start: ir.Value, stop: ir.Value) -> list[ir.Value]:
                return [_sum_bytes(b, c) for c in loop(start, stop, zeros, 1, add_counts)]

            # Bytes never carry into one another: 31 counts of at most 8 stay below 256.
            if not bytewise:
                totals = loop(_I64(0), count, zeros, 1, add_counts)
            else:
                # Counting what is kept at the end costs as much as the first eight words save.
                many = b.icmp_signed(">=", count, _I64(16))
                whole = b.select(many, b.and_(count, _I64(-8)), _I64(0)) if saving else _I64(0)
                totals = in_chunks(_I64(0), whole, zeros, 31 * 8, eights) if saving else zeros
                totals = in_chunks(whole, count, totals, 31, single)
            for i, value in enumerate(totals):
                _store(b, value, b.add(out, _I64(64 * i)), 64)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return product


def make_finish(bf16: bool, partial: bool, plain: bool = False) -> Any:
    """Return ``f(sums, base, table, halve, low, high, shortcut, early, row, residual, out, count)``: what follows.

    Of 16 output channels: the dot product ``base - 2 sums`` (or ``base - sums`` where ``halve``), times the scale,
    affine, shift, PReLU, shift, clamp, plus the shortcut (before the activation where ``early``), plus ``row`` and
    ``residual``; a null address leaves a summand out. ``table`` holds 16 floats each of scale, factor, offset, shift
    in, slope and shift out. ``partial`` builds the form for ``count`` < 16 channels, ``plain`` the one without affine
    and clamp.
    """

    @intrinsic
    def finish(context, sums, base, table, halve, low, high, shortcut, early, row, residual, out, count):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            sums, base, table, halve, low, high, shortcut, early, row, residual, out, count = args
            mask = _lanes_below(b, count) if partial else None

            def constant(i: int) -> ir.Value:
                return _load(b, b.add(table, _I64(64 * i)), _FLOATS)

            def plus(value: ir.Value, address: ir.Value, wide: bool = False) -> ir.Value:
                there = b.icmp_signed("!=", address, _I64(0))
                return _when(b, there, value, lambda: b.fadd(value, _load_pixels(b, address, bf16 and not wide, mask)))

            differing = b.shl(_load(b, sums, _INTS), _splat(b, b.trunc(b.sub(_I64(1), halve), _I32)))
            dot = b.sitofp(b.sub(_load(b, base, _INTS), differing), _FLOATS)
            value = b.fmul(dot, constant(0))
            if not plain:
                value = b.fadd(b.fmul(value, constant(1)), constant(2))
            value = plus(value, b.mul(shortcut, early))
            value = b.fadd(value, constant(3))
            value = b.select(b.fcmp_ordered(">", value, _constant(0.0, _FLOATS)), value, b.fmul(value, constant(4)))
            value = b.fadd(value, constant(5))
            limits = () if plain else ((_splat(b, high), ">"), (_splat(b, low), "<"))
            for limit, beyond in limits:  # a NaN stays one
                value = b.select(b.fcmp_ordered(beyond, value, limit), limit, value)
            value = plus(value, b.mul(shortcut, b.sub(_I64(1), early)))
            value = plus(value, row, wide=True)
            value = plus(value, residual)
            _store_pixels(b, value, out, bf16, mask)
            return context.get_dummy_value()

        kinds = [types.int64] * 4 + [types.float32] * 2 + [types.int64] * 6
        return types.void(*kinds), codegen

    return finish


def make_finish_row(bf16: bool, pixels: int) -> Any:
    """Return ``f(sums, sums_step, base, table, halve, shortcut, row, residual, out, steps...)`` for ``pixels`` at once.

    What `make_finish`'s plain form does with a late shortcut, with the constants of 16 output channels in registers.
    The steps from pixel to pixel are those of the shortcut, the residual and the output.
    """

    @intrinsic
    def finish(context, sums, sums_step, base, table, halve, shortcut, row, residual, out, s_step, r_step, o_step):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            sums, sums_step, base, table, halve, shortcut, row, residual, out, s_step, r_step, o_step = args
            scale, shift_in, slope, shift_out = (_load(b, b.add(table, _I64(64 * i)), _FLOATS) for i in (0, 3, 4, 5))
            full = _load(b, base, _INTS)
            double = _splat(b, b.trunc(b.sub(_I64(1), halve), _I32))
            there = [b.icmp_signed("!=", address, _I64(0)) for address in (shortcut, row, residual)]

            def plus(value: ir.Value, which: int, address: ir.Value) -> ir.Value:
                half = bf16 and which != 1
                return _when(b, there[which], value, lambda: b.fadd(value, _load_pixels(b, address, half, None)))

            for _ in range(pixels):
                dot = b.sitofp(b.sub(full, b.shl(_load(b, sums, _INTS), double)), _FLOATS)
                value = b.fadd(b.fmul(dot, scale), shift_in)
                value = b.select(b.fcmp_ordered(">", value, _constant(0.0, _FLOATS)), value, b.fmul(value, slope))
                value = b.fadd(value, shift_out)
                for which, address in enumerate((shortcut, row, residual)):
                    value = plus(value, which, address)
                _store_pixels(b, value, out, bf16, None)
                sums, out = b.add(sums, sums_step), b.add(out, o_step)
                shortcut, residual = b.add(shortcut, s_step), b.add(residual, r_step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), codegen

    return finish


def make_signs(bf16: bool, partial: bool) -> Any:
    """Return ``f(x, thresholds, count)``: 32 bits, bit i set where ``x[i] >= thresholds[i]``, and 0 from count on."""

    @intrinsic
    def signs(context, x, thresholds, count):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            x, thresholds, count = args
            word = _I32(0)
            for half in range(2):
                address = b.add(x, _I64(half * LANES * (2 if bf16 else 4)))
                mask = _lanes_below(b, b.sub(count, _I64(half * LANES))) if partial else None
                values = _load_pixels(b, address, bf16, mask)
                limits = _load(b, b.add(thresholds, _I64(64 * half)), _FLOATS)
                set_ = b.fcmp_ordered(">=", values, limits)
                if mask is not None:
                    set_ = b.and_(set_, mask)
                bits = b.zext(b.bitcast(set_, _I16), _I32)
                word = bits if half == 0 else b.or_(word, b.shl(bits, _I32(LANES)))
            return word

        return types.int32(*[types.int64] * 3), codegen

    return signs


def make_activate(bf16: bool, partial: bool) -> Any:
    """Return ``f(x, factors, offsets, out, count)``: ``out = silu(x * factors + offsets)`` for 16 channels."""

    @intrinsic
    def activate(context, x, factors, offsets, out, count):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            x, factors, offsets, out, count = args
            mask = _lanes_below(b, count) if partial else None
            factor, offset = (_load_pixels(b, a, False, mask) for a in (factors, offsets))
            value = b.fadd(b.fmul(_load_pixels(b, x, bf16, mask), factor), offset)
            _store_pixels(b, _silu(b, value), out, bf16, mask)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return activate


def make_moments(bf16: bool, partial: bool) -> Any:
    """Return ``f(x, step, pixels, sums, squares, count)``: add a row's sums and sums of squares of 16 channels."""

    @intrinsic
    def moments(context, x, step, pixels, sums, squares, count):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            x, step, pixels, sums, squares, count = args
            mask = _lanes_below(b, count) if partial else None
            entry = b.block
            loop, done = b.append_basic_block("loop"), b.append_basic_block("done")
            start = [_load_pixels(b, a, False, mask) for a in (sums, squares)]
            b.branch(loop)
            b.position_at_end(loop)
            i, total, square = b.phi(_I64), b.phi(_FLOATS), b.phi(_FLOATS)
            value = _load_pixels(b, b.add(x, b.mul(i, step)), bf16, mask)
            new_total, new_square = b.fadd(total, value), _fma(b, value, value, square)
            after = b.add(i, _I64(1))
            for phi, first, new in ((i, _I64(0), after), (total, start[0], new_total), (square, start[1], new_square)):
                phi.add_incoming(first, entry)
                phi.add_incoming(new, loop)
            b.cbranch(b.icmp_signed("<", after, pixels), loop, done)
            b.position_at_end(done)
            _store_pixels(b, new_total, sums, False, mask)
            _store_pixels(b, new_square, squares, False, mask)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return moments


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
            j = b.phi(_I64)
            sums = [b.phi(_FLOATS) for _ in range(rows * blocks)]
            filters = [_load(b, b.add(a, b.shl(j, _I64(6))), _FLOATS) for a in block]
            new = []
            for p, address in enumerate(row):
                value = _splat(b, _load(b, b.add(address, b.shl(j, _I64(2))), _F32))
                new += [_fma(b, value, f, sums[p * blocks + r]) for r, f in enumerate(filters)]
            after = b.add(j, _I64(1))
            for phi, first, last in (
                (j, _I64(0), after),
                *((s, ir.Constant(_FLOATS, None), n) for s, n in zip(sums, new, strict=True)),
            ):
                phi.add_incoming(first, entry)
                phi.add_incoming(last, loop)
            b.cbranch(b.icmp_signed("<", after, count), loop, done)
            b.position_at_end(done)
            for p in range(rows):
                for r in range(blocks):
                    _store(b, new[p * blocks + r], b.add(b.add(out, b.mul(_I64(p), out_step)), _I64(64 * r)))
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
                b.add(b.add(out, b.mul(_I64(p), out_step)), _I64(64 * r)) for p in range(rows) for r in range(blocks)
            ]
            before = [_load(b, target, _FLOATS) for target in targets]
            b.branch(loop)
            b.position_at_end(loop)
            left, here, there = b.phi(_I64), b.phi(_I64), b.phi(_I64)
            sums = [b.phi(_FLOATS) for _ in targets]
            lines = [_load(b, b.add(there, _I64(64 * r)), _FLOATS) for r in range(blocks)]
            new = []
            for p in range(rows):
                value = _splat(b, _load(b, b.add(here, _I64(4 * p)), _F32))
                new += [_fma(b, value, line, sums[p * blocks + r]) for r, line in enumerate(lines)]
            after = b.sub(left, _I64(1))
            for phi, first, last in (
                (left, count, after),
                (here, x, b.add(here, x_step)),
                (there, w, b.add(there, w_step)),
                *zip(sums, before, new, strict=True),
            ):
                phi.add_incoming(first, entry)
                phi.add_incoming(last, loop)
            b.cbranch(b.icmp_signed(">", after, _I64(0)), loop, done)
            b.position_at_end(done)
            for value, target in zip(new, targets, strict=True):
                _store(b, value, target)
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
            total = value if factor == 1 else b.fmul(value, _constant(float(factor), _FLOATS))
        elif factor in (1, -1):
            total = b.fadd(total, value) if factor == 1 else b.fsub(total, value)
        else:
            total = _fma(b, value, _constant(float(factor), _FLOATS), total)
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
                address = b.load(_pointer(b, b.add(addresses, _I64(8 * i)), _I64))
                return _load_pixels(b, b.add(address, channel), bf16, None)

            grid = [[pixel(side * y + x) for x in range(side)] for y in range(side)]
            for i, value in enumerate(v for line in _sandwich(b, grid, matrix) for v in line):
                _store(b, value, b.add(out, b.mul(_I64(i), step)))
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
                start = b.add(w, b.add(b.mul(row, _I64(y)), b.mul(column, _I64(x))))
                values = ir.Constant(_FLOATS, ir.Undefined)
                for i in range(LANES):
                    value = _load(b, b.add(start, b.mul(lane, _I64(i))), _F32)
                    values = b.insert_element(values, value, _I32(i))
                return values

            grid = [[tap(y, x) for x in range(3)] for y in range(3)]
            for i, value in enumerate(v for line in _sandwich(b, grid, matrix) for v in line):
                _store(b, value, b.add(out, b.mul(_I64(i), step)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return spread_filters


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
            at = [[b.add(x, b.mul(_I64(side * y + i), step)) for i in range(side)] for y in range(side)]
            grid = [[_load(b, address, _FLOATS) for address in line] for line in at]
            zero = ir.Constant(_FLOATS, None)
            biased = b.icmp_signed("!=", bias, _I64(0))
            start = _when(b, biased, zero, lambda: _load(b, bias, _FLOATS))
            more = b.icmp_signed("!=", residual, _I64(0))
            for y, line in enumerate(_sandwich(b, grid, matrix)):
                for i, value in enumerate(line):
                    inside = b.and_(b.icmp_signed(">", rows, _I64(y)), b.icmp_signed(">", columns, _I64(i)))
                    with b.if_then(inside):
                        value = b.fadd(value, start)
                        at = b.add(b.mul(r_row, _I64(y)), b.mul(r_pixel, _I64(i)))

                        def plus_residual(value: ir.Value = value, at: ir.Value = at) -> ir.Value:
                            return b.fadd(value, _load_pixels(b, b.add(residual, at), bf16, None))

                        value = _when(b, more, value, plus_residual)
                        to = b.add(out, b.add(b.mul(row, _I64(y)), b.mul(pixel, _I64(i))))
                        _store_pixels(b, value, to, bf16, None)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), codegen

    return gather


def make_unzip(bf16: bool) -> Any:
    """Return ``f(x, evens, odds)``: 32 channels to the 16 of even and the 16 of odd number."""

    @intrinsic
    def unzip(context, x, evens, odds):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            x, evens, odds = args
            kind, size, align = (_HALVES, 2, 2) if bf16 else (_FLOATS, 4, 4)
            low, high = _load(b, x, kind, align), _load(b, b.add(x, _I64(LANES * size)), kind, align)
            for first, out in ((0, evens), (1, odds)):
                lanes = ir.Constant(_INTS, list(range(first, 2 * LANES, 2)))
                _store(b, b.shuffle_vector(low, high, lanes), out, align)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return unzip


@intrinsic
def fetch_add(context, address, amount):  # type: ignore[no-untyped-def]
    """Add to an int64 in memory as one step for all threads; return what it was."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.atomic_rmw("add", _pointer(b, args[0], _I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


def _memory(kind: Any, width: ir.Type) -> tuple[Any, Any]:
    @intrinsic
    def read(context, address):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            return b.load(_pointer(b, args[0], width))

        return kind(types.int64), codegen

    @intrinsic
    def write(context, address, value):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            b.store(args[1], _pointer(b, args[0], width))
            return context.get_dummy_value()

        return types.void(types.int64, kind), codegen

    return read, write


read_int64, write_int64 = _memory(types.int64, _I64)
read_int32, write_int32 = _memory(types.int32, _I32)
read_float32, write_float32 = _memory(types.float32, _F32)
read_float64, _ = _memory(types.float64, ir.DoubleType())
