"""Vector instructions for the CPU kernels, written once in LLVM's portable form.

Numba compiles what is built here for the machine that runs it: AVX2, AVX-512 or NEON. Everything works on 16 lanes: 16
output channels of a product, 16 channels of a pixel.

Addresses are int64 values, strides are in bytes. Nothing here checks anything: `binarize.kernels.cpu.conv` does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from llvmlite import binding, ir
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
I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_ZERO = I64(0)
INTS, FLOATS, HALVES = (ir.VectorType(t, LANES) for t in (I32, F32, I16))
# Whether AVX512_BF16 can be used: its intrinsics have other types in LLVM 15, which llvmlite had before LLVM 20.
AVX512_BF16 = "+avx512bf16" in cpu_features() and binding.llvm_version_info[0] >= 20


Values = list[ir.Value]
Body = Callable[[ir.Value, Values], Values]  # of a loop: index and values to new values


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"


_BFLOAT = _BFloat()


def instructions(append: Callable[..., None]) -> Any:
    """Turn a function that appends instructions into an intrinsic without a result. All arguments are int64."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        append(b, *args)
        return context.get_dummy_value()

    @wraps(append)
    def typed(context: Any, *args: Any) -> Any:
        return types.void(*[types.int64] * len(args)), codegen

    return intrinsic(typed)


def constant(value: float | int, kind: ir.VectorType) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def splat(b: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    kind = ir.VectorType(scalar.type, LANES)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), constant(0, INTS))


def pointer(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return b.inttoptr(address, kind.as_pointer())


def load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int = 4) -> ir.Value:
    value = b.load(pointer(b, address, kind))
    value.align = align
    return value


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 4) -> None:
    b.store(value, pointer(b, address, value.type)).align = align


def call(b: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), list(args))


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return call(b, "llvm.fma.v16f32", FLOATS, x, y, z)


def dot_bf16(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """Return z plus the dot products of the pairs of bfloat16 in the 16 words of x and y; needs `AVX512_BF16`."""
    x, y = (b.bitcast(value, ir.VectorType(_BFLOAT, 2 * LANES)) for value in (x, y))
    return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, z, x, y)


def lanes_below(b: ir.IRBuilder, count: ir.Value) -> ir.Value:
    lanes = ir.Constant(INTS, list(range(LANES)))
    return b.icmp_signed("<", lanes, splat(b, b.trunc(count, I32)))


def _widen(b: ir.IRBuilder, halves: ir.Value) -> ir.Value:
    return b.bitcast(b.shl(b.zext(halves, INTS), constant(16, INTS)), FLOATS)


def narrow(b: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """Round to bfloat16, to nearest even; a NaN stays one.

    The instruction turns subnormal numbers into zeros, so that a negative one, now -0, counts as +1 in a binary layer.
    """
    if AVX512_BF16:
        rounded = call(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(_BFLOAT, LANES), values)
        return b.bitcast(rounded, HALVES)
    bits = b.bitcast(values, INTS)
    odd = b.and_(b.lshr(bits, constant(16, INTS)), constant(1, INTS))
    rounded = b.lshr(b.add(bits, b.add(odd, constant(0x7FFF, INTS))), constant(16, INTS))
    quiet = b.select(b.fcmp_unordered("uno", values, values), constant(0x7FC0, INTS), rounded)
    return b.trunc(quiet, HALVES)


def pair(b: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Return words of two bfloat16 each, of which ``first`` are the lower halves, for `dot_bf16`."""
    low, high = (b.zext(narrow(b, values), INTS) for values in (first, second))
    return b.or_(low, b.shl(high, constant(16, INTS)))


def load_float(b: ir.IRBuilder, address: ir.Value, bf16: bool) -> ir.Value:
    if not bf16:
        return load(b, address, F32)
    return b.bitcast(b.shl(b.zext(load(b, address, I16, 2), I32), I32(16)), F32)


def load_pixels(b: ir.IRBuilder, address: ir.Value, bf16: bool, mask: ir.Value | None) -> ir.Value:
    """Load 16 channels as float32; lanes outside the mask give 0 and are not touched."""
    kind = HALVES if bf16 else FLOATS
    if mask is None:
        value = load(b, address, kind, 2 if bf16 else 4)
    else:
        name = "llvm.masked.load.v16i16.p0" if bf16 else "llvm.masked.load.v16f32.p0"
        fill = ir.Constant(kind, None)
        value = call(b, name, kind, pointer(b, address, kind), I32(2 if bf16 else 4), mask, fill)
    return _widen(b, value) if bf16 else value


def store_pixels(b: ir.IRBuilder, value: ir.Value, address: ir.Value, bf16: bool, mask: ir.Value | None) -> None:
    if bf16:
        value = narrow(b, value)
    if mask is None:
        store(b, value, address, 2 if bf16 else 4)
    else:
        name = "llvm.masked.store.v16i16.p0" if bf16 else "llvm.masked.store.v16f32.p0"
        call(b, name, ir.VoidType(), value, pointer(b, address, value.type), I32(2 if bf16 else 4), mask)


# Coefficients of a minimax polynomial of exp(-r) for |r| <= ln(2) / 2, highest power first. Relative error: 9.5e-8.
_EXP_MINUS = (-0.008290295094, 0.041897939425, -0.166676366574, 0.499991494399, -0.999999706944, 1.0)


def _exp_minus(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(-x), as 2^n times a polynomial of r = x + n ln(2). Relative error: 2e-7."""
    x = call(b, "llvm.minnum.v16f32", FLOATS, x, constant(87.0, FLOATS))
    x = call(b, "llvm.maxnum.v16f32", FLOATS, x, constant(-88.0, FLOATS))
    n = call(b, "llvm.rint.v16f32", FLOATS, b.fmul(x, constant(-1.4426950216293335, FLOATS)))
    r = fma(b, n, constant(0.693145751953125, FLOATS), x)
    r = fma(b, n, constant(1.428606765330187e-06, FLOATS), r)
    y = constant(_EXP_MINUS[0], FLOATS)
    for factor in _EXP_MINUS[1:]:
        y = fma(b, y, r, constant(factor, FLOATS))
    if AVX512:
        return call(b, "llvm.x86.avx512.mask.scalef.ps.512", FLOATS, y, n, y, ir.Constant(I16, -1), I32(4))
    power = b.shl(b.add(b.fptosi(n, INTS), constant(127, INTS)), constant(23, INTS))
    return b.fmul(y, b.bitcast(power, FLOATS))


def _silu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    divisor = b.fadd(constant(1.0, FLOATS), _exp_minus(b, x))
    if not AVX512:
        return b.fdiv(x, divisor)
    # A division keeps its unit busy for 16 cycles. 14 bits of the reciprocal and one Newton step come in three.
    every = ir.Constant(I16, -1)
    guess = call(b, "llvm.x86.avx512.rcp14.ps.512", FLOATS, divisor, ir.Constant(FLOATS, None), every)
    rest = fma(b, b.fneg(divisor), guess, constant(1.0, FLOATS))
    return b.fmul(x, fma(b, guess, rest, guess))


def when(
    b: ir.IRBuilder, condition: ir.Value, values: list[ir.Value], make: Callable[[list[ir.Value]], list[ir.Value]]
) -> list[ir.Value]:
    """Return ``make(values)`` where the condition holds, else ``values``."""
    before = b.block
    then, after = b.append_basic_block("then"), b.append_basic_block("after")
    b.cbranch(condition, then, after)
    b.position_at_end(then)
    made = make(values)
    last = b.block
    b.branch(after)
    b.position_at_end(after)
    return meet(b, (values, before), (made, last))


def meet(
    b: ir.IRBuilder, first: tuple[list[ir.Value], ir.Block], second: tuple[list[ir.Value], ir.Block]
) -> list[ir.Value]:
    """Return, where two ways meet, the values of the one that was taken; each is given with its last block."""
    found = []
    for one, other in zip(first[0], second[0], strict=True):
        found.append(b.phi(one.type))
        found[-1].add_incoming(one, first[1])
        found[-1].add_incoming(other, second[1])
    return found


def chain(b: ir.IRBuilder, start: ir.Value, step: ir.Value, count: int) -> list[ir.Value]:
    """Return ``count`` addresses, a step apart."""
    addresses = [start]
    while len(addresses) < count:
        addresses.append(b.add(addresses[-1], step))
    return addresses


def loop(b: ir.IRBuilder, stop: ir.Value, kept: Values, body: Body, start: ir.Value = _ZERO, step: int = 1) -> Values:
    """Run ``kept = body(j, kept)`` for j from start to below stop, by step; return the last values."""
    before, inside, done = b.block, b.append_basic_block("body"), b.append_basic_block("done")
    b.cbranch(b.icmp_signed("<", start, stop), inside, done)
    b.position_at_end(inside)
    j, held = b.phi(I64), [b.phi(value.type) for value in kept]
    new = body(j, held)
    after, last = b.add(j, I64(step)), b.block
    for phi, first, more in ((j, start, after), *zip(held, kept, new, strict=True)):
        phi.add_incoming(first, before)
        phi.add_incoming(more, last)
    b.cbranch(b.icmp_signed("<", after, stop), inside, done)
    b.position_at_end(done)
    return meet(b, (kept, before), (new, last))


def by_flag(b: ir.IRBuilder, bf16: ir.Value, build: Callable[[bool], ir.Value | None]) -> ir.Value | None:
    """Append ``build(True)`` and ``build(False)``, one of which runs by the flag, and return the value of that one."""
    with b.if_else(b.icmp_signed("!=", bf16, I64(0))) as (then, otherwise):
        with then:
            first, first_block = build(True), b.block
        with otherwise:
            second, second_block = build(False), b.block
    if first is None or second is None:
        return None
    return meet(b, ([first], first_block), ([second], second_block))[0]


def by_mask(b: ir.IRBuilder, count: ir.Value, lanes: int, build: Callable[[bool], ir.Value | None]) -> ir.Value | None:
    """Append ``build(partial)`` for fewer than ``lanes`` channels and for all of them; see `by_flag`."""
    return by_flag(b, b.zext(b.icmp_signed("<", count, I64(lanes)), I64), build)


@intrinsic
def signs(context, x, thresholds, count, bf16):  # type: ignore[no-untyped-def]
    """Return a word: bit i is 1 where ``x[i] >= thresholds[i]``, and 0 from ``count`` (at most 32) on."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, thresholds, count, bf16 = args

        def word(half_precision: bool, partial: bool) -> ir.Value:
            bits = I32(0)
            for half in range(2):
                address = b.add(x, I64(half * LANES * (2 if half_precision else 4)))
                mask = lanes_below(b, b.sub(count, I64(half * LANES))) if partial else None
                values = load_pixels(b, address, half_precision, mask)
                limits = load(b, b.add(thresholds, I64(64 * half)), FLOATS)
                above = b.fcmp_ordered(">=", values, limits)
                above = above if mask is None else b.and_(above, mask)
                lanes = b.zext(b.bitcast(above, I16), I32)
                bits = lanes if half == 0 else b.or_(bits, b.shl(lanes, I32(LANES)))
            return bits

        return by_flag(b, bf16, lambda half: by_mask(b, count, 2 * LANES, lambda partial: word(half, partial)))

    return types.int32(*[types.int64] * 4), codegen


@instructions
def affine_silu(b, x, factors, offsets, out, count, bf16):  # type: ignore[no-untyped-def]
    """Write ``silu(x * factors + offsets)`` for ``count`` (at most 16) channels."""

    def activate(half_precision: bool, partial: bool) -> None:
        mask = lanes_below(b, count) if partial else None
        factor, offset = (load_pixels(b, a, False, mask) for a in (factors, offsets))
        value = b.fadd(b.fmul(load_pixels(b, x, half_precision, mask), factor), offset)
        store_pixels(b, _silu(b, value), out, half_precision, mask)

    by_flag(b, bf16, lambda half: by_mask(b, count, LANES, lambda partial: activate(half, partial)))


@instructions
def row_moments(b, x, step, pixels, sums, squares, count, bf16):  # type: ignore[no-untyped-def]
    """Write the sums and the sums of squares of a row of pixels for ``count`` (at most 16) channels."""

    def add(half_precision: bool, partial: bool) -> None:
        mask = lanes_below(b, count) if partial else None

        def add_pixel(i: ir.Value, kept: Values) -> Values:
            value = load_pixels(b, b.add(x, b.mul(i, step)), half_precision, mask)
            return [b.fadd(kept[0], value), fma(b, value, value, kept[1])]

        totals = loop(b, pixels, [ir.Constant(FLOATS, None)] * 2, add_pixel)
        for total, place in zip(totals, (sums, squares), strict=True):
            store_pixels(b, total, place, False, mask)

    by_flag(b, bf16, lambda half: by_mask(b, count, LANES, lambda partial: add(half, partial)))


@intrinsic
def fetch_add(context, address, amount):  # type: ignore[no-untyped-def]
    """Add to an int64 in memory as one step for all threads; return what it was."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.atomic_rmw("add", pointer(b, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


def prefetch_line(b: ir.IRBuilder, address: ir.Value, write: bool) -> None:
    """Have a line read into the second-level cache, or into the first to be written; the address may be any."""
    where = pointer(b, address, ir.IntType(8))
    call(b, "llvm.prefetch.p0", ir.VoidType(), where, I32(int(write)), I32(3 if write else 2), I32(1))


@instructions
def prefetch(b, address):  # type: ignore[no-untyped-def]
    """Have a line read into the second-level cache; the address may be any."""
    prefetch_line(b, address, write=False)


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


@intrinsic
def field(context, parameters, which):  # type: ignore[no-untyped-def]
    """Read one of the int64 fields of a block of parameters; see `fields`."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.load(pointer(b, b.add(args[0], b.mul(args[1], I64(8))), I64))

    return types.int64(parameters, which), codegen
