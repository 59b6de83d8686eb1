"""Vector instructions for the CPU kernels, written once in LLVM's portable form.

Numba compiles what is built here for the machine that runs it: a population count of sixteen 32-bit lanes becomes one
VPOPCNTD with AVX-512, table lookups with AVX2, CNT with NEON. Everything works on 16 lanes: 16 output channels of the
product, 16 channels of a pixel.

Addresses are int64 values, strides are in bytes. Nothing here checks anything: `binarize.packed._cpu` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

_I8, _I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, FLOATS, _HALVES = (ir.VectorType(t, LANES) for t in (I32, F32, _I16))
_BYTES = ir.VectorType(_I8, 4 * LANES)


def constant(value: float | int, kind: ir.VectorType) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def splat(b: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    kind = ir.VectorType(scalar.type, LANES)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), constant(0, _INTS))


def pointer(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return b.inttoptr(address, kind.as_pointer())


def load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int = 4) -> ir.Value:
    value = b.load(pointer(b, address, kind))
    value.align = align
    return value


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 4) -> None:
    b.store(value, pointer(b, address, value.type)).align = align


def _call(b: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), list(args))


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return _call(b, "llvm.fma.v16f32", FLOATS, x, y, z)


def _lanes_below(b: ir.IRBuilder, count: ir.Value) -> ir.Value:
    lanes = ir.Constant(_INTS, list(range(LANES)))
    return b.icmp_signed("<", lanes, splat(b, b.trunc(count, I32)))


def _widen(b: ir.IRBuilder, halves: ir.Value) -> ir.Value:
    return b.bitcast(b.shl(b.zext(halves, _INTS), constant(16, _INTS)), FLOATS)


def _narrow(b: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """Round to bfloat16, to nearest even; a NaN stays one."""
    bits = b.bitcast(values, _INTS)
    odd = b.and_(b.lshr(bits, constant(16, _INTS)), constant(1, _INTS))
    rounded = b.lshr(b.add(bits, b.add(odd, constant(0x7FFF, _INTS))), constant(16, _INTS))
    quiet = b.select(b.fcmp_unordered("uno", values, values), constant(0x7FC0, _INTS), rounded)
    return b.trunc(quiet, _HALVES)


def load_pixels(b: ir.IRBuilder, address: ir.Value, bf16: bool, mask: ir.Value | None) -> ir.Value:
    """Load 16 channels as float32; lanes outside the mask give 0 and are not touched."""
    kind = _HALVES if bf16 else FLOATS
    if mask is None:
        value = load(b, address, kind, 2 if bf16 else 4)
    else:
        name = "llvm.masked.load.v16i16.p0" if bf16 else "llvm.masked.load.v16f32.p0"
        fill = ir.Constant(kind, None)
        value = _call(b, name, kind, pointer(b, address, kind), I32(2 if bf16 else 4), mask, fill)
    return _widen(b, value) if bf16 else value


def store_pixels(b: ir.IRBuilder, value: ir.Value, address: ir.Value, bf16: bool, mask: ir.Value | None) -> None:
    if bf16:
        value = _narrow(b, value)
    if mask is None:
        store(b, value, address, 2 if bf16 else 4)
    else:
        name = "llvm.masked.store.v16i16.p0" if bf16 else "llvm.masked.store.v16f32.p0"
        _call(b, name, ir.VoidType(), value, pointer(b, address, value.type), I32(2 if bf16 else 4), mask)


def _exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) to about 1 unit in the last place: 2^n times Taylor's polynomial of order 7 on |r| <= ln(2) / 2."""
    x = _call(b, "llvm.minnum.v16f32", FLOATS, x, constant(88.0, FLOATS))
    x = _call(b, "llvm.maxnum.v16f32", FLOATS, x, constant(-87.0, FLOATS))
    n = _call(b, "llvm.rint.v16f32", FLOATS, b.fmul(x, constant(1.4426950216293335, FLOATS)))
    r = fma(b, n, constant(-0.693145751953125, FLOATS), x)
    r = fma(b, n, constant(-1.428606765330187e-06, FLOATS), r)
    y = constant(1 / 5040, FLOATS)
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        y = fma(b, y, r, constant(1 / factorial, FLOATS))
    power = b.shl(b.add(b.fptosi(n, _INTS), constant(127, _INTS)), constant(23, _INTS))
    return b.fmul(y, b.bitcast(power, FLOATS))


def _silu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    divisor = b.fadd(constant(1.0, FLOATS), _exp(b, b.fneg(x)))
    if not AVX512:
        return b.fdiv(x, divisor)
    # A division keeps its unit busy for 16 cycles. 14 bits of the reciprocal and one Newton step come in three.
    every = ir.Constant(_I16, -1)
    guess = _call(b, "llvm.x86.avx512.rcp14.ps.512", FLOATS, divisor, ir.Constant(FLOATS, None), every)
    rest = fma(b, b.fneg(divisor), guess, constant(1.0, FLOATS))
    return b.fmul(x, fma(b, guess, rest, guess))


def when(b: ir.IRBuilder, condition: ir.Value, value: ir.Value, make: Callable[[], ir.Value]) -> ir.Value:
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
    low = constant(0x00FF00FF, _INTS)
    pairs = b.add(b.and_(value, low), b.and_(b.lshr(value, constant(8, _INTS)), low))
    return b.add(b.and_(pairs, constant(0xFFFF, _INTS)), b.lshr(pairs, constant(16, _INTS)))


def _add_bits(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return sum and carry of three bits, for each bit of the operands."""
    found = [_call(b, "llvm.x86.avx512.pternlog.d.512", _INTS, x, y, z, I32(table)) for table in (0x96, 0xE8)]
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
                offset = b.sext(load(b, b.add(offsets, b.shl(j, I64(2))), I32), I64)
                filters = [load(b, b.add(a, b.shl(j, I64(6))), _INTS) for a in block]
                words = (splat(b, load(b, b.add(address, offset), I32)) for address in pixel)
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
                j, held = b.phi(I64), [b.phi(_INTS) for _ in kept]
                new = body(j, held)
                after = b.add(j, I64(step))
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
                first, held = b.phi(I64), [b.phi(_INTS) for _ in sums]
                last = b.add(first, I64(size))
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
                        word = b.add(j, I64(4 * quad + 2 * pair))
                        both = zip(ones, differing(word), differing(b.add(word, I64(1))), strict=True)
                        ones, carries = map(list, zip(*(_add_bits(b, *bits) for bits in both), strict=True))
                        pairs.append(carries)
                    both = zip(twos, *pairs, strict=True)
                    twos, carries = map(list, zip(*(_add_bits(b, *bits) for bits in both), strict=True))
                    quads.append(carries)
                found = [_add_bits(b, *bits) for bits in zip(fours, *quads, strict=True)]
                eights = [b.add(e, _count_bytes(b, carry)) for e, (_, carry) in zip(eights, found, strict=True)]
                return [*ones, *twos, *(kept for kept, _ in found), *eights]

            def count_kept(kept: list[ir.Value], i: int) -> ir.Value:
                """Return, in bytes, what ones, twos and fours of sum i stand for: at most 8 * (4 + 2 + 1)."""
                small = _count_bytes(b, kept[2 * len(zeros) + i])
                for part in (kept[len(zeros) + i], kept[i]):
                    small = b.add(b.add(small, small), _count_bytes(b, part))
                return small

            def eights(start: ir.Value, stop: ir.Value) -> list[ir.Value]:
                kept, found = loop(start, stop, 4 * zeros, 8, add_eight), []
                for i in range(len(zeros)):
                    wide = b.shl(_sum_bytes(b, kept[3 * len(zeros) + i]), constant(3, _INTS))
                    found.append(b.add(wide, _sum_bytes(b, count_kept(kept, i))))
                return found

            def single(start: ir.Value, stop: ir.Value) -> list[ir.Value]:
                return [_sum_bytes(b, c) for c in loop(start, stop, zeros, 1, add_counts)]

            def few() -> list[ir.Value]:
                """Sum 8 to 23 words, whose differing bits fit a byte: eights, kept, 7 words: at most 240."""
                whole = b.and_(count, I64(-8))
                kept, sums = loop(I64(0), whole, 4 * zeros, 8, add_eight), []
                for i in range(len(zeros)):  # no byte of the eights is above 16, so that none shifts into another
                    sums.append(b.add(b.shl(kept[3 * len(zeros) + i], constant(3, _INTS)), count_kept(kept, i)))
                before, rest, done = b.block, b.append_basic_block("rest"), b.append_basic_block("bytes")
                b.cbranch(b.icmp_signed("<", whole, count), rest, done)
                b.position_at_end(rest)
                more, last = loop(whole, count, sums, 1, add_counts), b.block
                b.branch(done)
                b.position_at_end(done)
                totals = [b.phi(_INTS) for _ in sums]
                for phi, first, other in zip(totals, sums, more, strict=True):
                    phi.add_incoming(first, before)
                    phi.add_incoming(other, last)
                return [_sum_bytes(b, total) for total in totals]

            def many() -> list[ir.Value]:
                whole = b.and_(count, I64(-8)) if saving else I64(0)
                totals = in_chunks(I64(0), whole, zeros, 31 * 8, eights) if saving else zeros
                # Bytes never carry into one another: 31 counts of at most 8 stay below 256.
                return in_chunks(whole, count, totals, 31, single)

            def keep(totals: list[ir.Value]) -> None:
                for i, value in enumerate(totals):
                    store(b, value, b.add(out, I64(64 * i)), 64)

            if not bytewise:
                keep(loop(I64(0), count, zeros, 1, add_counts))
            elif not saving:
                keep(many())
            else:
                is_few = b.and_(b.icmp_signed(">=", count, I64(8)), b.icmp_signed("<", count, I64(24)))
                with b.if_else(is_few) as (then, otherwise):
                    with then:
                        keep(few())
                    with otherwise:
                        keep(many())
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

            def of_table(i: int) -> ir.Value:
                return load(b, b.add(table, I64(64 * i)), FLOATS)

            def plus(value: ir.Value, address: ir.Value, wide: bool = False) -> ir.Value:
                there = b.icmp_signed("!=", address, I64(0))
                return when(b, there, value, lambda: b.fadd(value, load_pixels(b, address, bf16 and not wide, mask)))

            differing = b.shl(load(b, sums, _INTS), splat(b, b.trunc(b.sub(I64(1), halve), I32)))
            dot = b.sitofp(b.sub(load(b, base, _INTS), differing), FLOATS)
            value = b.fmul(dot, of_table(0))
            if not plain:
                value = b.fadd(b.fmul(value, of_table(1)), of_table(2))
            value = plus(value, b.mul(shortcut, early))
            value = b.fadd(value, of_table(3))
            value = b.select(b.fcmp_ordered(">", value, constant(0.0, FLOATS)), value, b.fmul(value, of_table(4)))
            value = b.fadd(value, of_table(5))
            limits = () if plain else ((splat(b, high), ">"), (splat(b, low), "<"))
            for limit, beyond in limits:  # a NaN stays one
                value = b.select(b.fcmp_ordered(beyond, value, limit), limit, value)
            value = plus(value, b.mul(shortcut, b.sub(I64(1), early)))
            value = plus(value, row, wide=True)
            value = plus(value, residual)
            store_pixels(b, value, out, bf16, mask)
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
            scale, shift_in, slope, shift_out = (load(b, b.add(table, I64(64 * i)), FLOATS) for i in (0, 3, 4, 5))
            full = load(b, base, _INTS)
            double = splat(b, b.trunc(b.sub(I64(1), halve), I32))
            there = [b.icmp_signed("!=", address, I64(0)) for address in (shortcut, row, residual)]

            def plus(value: ir.Value, which: int, address: ir.Value) -> ir.Value:
                half = bf16 and which != 1
                return when(b, there[which], value, lambda: b.fadd(value, load_pixels(b, address, half, None)))

            for _ in range(pixels):
                dot = b.sitofp(b.sub(full, b.shl(load(b, sums, _INTS), double)), FLOATS)
                value = b.fadd(b.fmul(dot, scale), shift_in)
                value = b.select(b.fcmp_ordered(">", value, constant(0.0, FLOATS)), value, b.fmul(value, slope))
                value = b.fadd(value, shift_out)
                for which, address in enumerate((shortcut, row, residual)):
                    value = plus(value, which, address)
                store_pixels(b, value, out, bf16, None)
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
            word = I32(0)
            for half in range(2):
                address = b.add(x, I64(half * LANES * (2 if bf16 else 4)))
                mask = _lanes_below(b, b.sub(count, I64(half * LANES))) if partial else None
                values = load_pixels(b, address, bf16, mask)
                limits = load(b, b.add(thresholds, I64(64 * half)), FLOATS)
                set_ = b.fcmp_ordered(">=", values, limits)
                if mask is not None:
                    set_ = b.and_(set_, mask)
                bits = b.zext(b.bitcast(set_, _I16), I32)
                word = bits if half == 0 else b.or_(word, b.shl(bits, I32(LANES)))
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
            factor, offset = (load_pixels(b, a, False, mask) for a in (factors, offsets))
            value = b.fadd(b.fmul(load_pixels(b, x, bf16, mask), factor), offset)
            store_pixels(b, _silu(b, value), out, bf16, mask)
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
            start = [load_pixels(b, a, False, mask) for a in (sums, squares)]
            b.branch(loop)
            b.position_at_end(loop)
            i, total, square = b.phi(I64), b.phi(FLOATS), b.phi(FLOATS)
            value = load_pixels(b, b.add(x, b.mul(i, step)), bf16, mask)
            new_total, new_square = b.fadd(total, value), fma(b, value, value, square)
            after = b.add(i, I64(1))
            for phi, first, new in ((i, I64(0), after), (total, start[0], new_total), (square, start[1], new_square)):
                phi.add_incoming(first, entry)
                phi.add_incoming(new, loop)
            b.cbranch(b.icmp_signed("<", after, pixels), loop, done)
            b.position_at_end(done)
            store_pixels(b, new_total, sums, False, mask)
            store_pixels(b, new_square, squares, False, mask)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return moments


def make_unzip(bf16: bool) -> Any:
    """Return ``f(x, evens, odds)``: 32 channels to the 16 of even and the 16 of odd number."""

    @intrinsic
    def unzip(context, x, evens, odds):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            x, evens, odds = args
            kind, size, align = (_HALVES, 2, 2) if bf16 else (FLOATS, 4, 4)
            low, high = load(b, x, kind, align), load(b, b.add(x, I64(LANES * size)), kind, align)
            for first, out in ((0, evens), (1, odds)):
                lanes = ir.Constant(_INTS, list(range(first, 2 * LANES, 2)))
                store(b, b.shuffle_vector(low, high, lanes), out, align)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return unzip


@intrinsic
def fetch_add(context, address, amount):  # type: ignore[no-untyped-def]
    """Add to an int64 in memory as one step for all threads; return what it was."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.atomic_rmw("add", pointer(b, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


def _memory(kind: Any, width: ir.Type) -> tuple[Any, Any]:
    @intrinsic
    def read(context, address):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            return b.load(pointer(b, args[0], width))

        return kind(types.int64), codegen

    @intrinsic
    def write(context, address, value):  # type: ignore[no-untyped-def]
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            b.store(args[1], pointer(b, args[0], width))
            return context.get_dummy_value()

        return types.void(types.int64, kind), codegen

    return read, write


read_int64, write_int64 = _memory(types.int64, I64)
read_int32, write_int32 = _memory(types.int32, I32)
read_float32, write_float32 = _memory(types.float32, F32)
read_float64, _ = _memory(types.float64, ir.DoubleType())
