"""The product of a packed convolution, and what follows it, for a tile of pixels and channels held in registers.

Signs that differ are counted, sixteen output channels at a time. A vector of 32-bit lanes has a population count of
its own on some machines (VPOPCNTD). Elsewhere bytes are counted by table lookups; with AVX-512, words are added bit by
bit first, in carry-save form (a Harley-Seal counter), so that one word in eight is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from binarize.kernels.cpu.simd import (
    FLOATS,
    I32,
    I64,
    INTS,
    LANES,
    call,
    constant,
    cpu_features,
    lanes_below,
    load,
    load_pixels,
    meet,
    prefetch_line,
    splat,
    store_pixels,
    when,
)

# Counts are of bytes where no instruction counts 32-bit lanes.
BYTEWISE = "+avx512vpopcntdq" not in cpu_features()
# Adding words bit by bit pays where one instruction computes any function of three operands.
CARRY_SAVE = BYTEWISE and "+avx512bw" in cpu_features()
VNNI = CARRY_SAVE and "+avx512vnni" in cpu_features()
# Register blocking: how many pixels x 16 output channels are summed at once; sums and filters must fit the registers.
PIXELS, BLOCKS = (4, 1) if BYTEWISE else (4, 4)
_I8 = ir.IntType(8)
_SHORTS, _BYTES = ir.VectorType(ir.IntType(16), 2 * LANES), ir.VectorType(_I8, 4 * LANES)
_Values = list[ir.Value]
_LOW_NIBBLES = 0x0F0F0F0F


def _count_lanes(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return the population count of each 32-bit lane."""
    return call(b, "llvm.ctpop.v16i32", INTS, value)


def _count_bytes(b: ir.IRBuilder, value: ir.Value, weight: int = 1) -> ir.Value:
    """Return ``weight`` times the population count of each byte; a weight other than 1 needs CARRY_SAVE."""
    if weight == 1:
        return b.bitcast(call(b, "llvm.ctpop.v64i8", _BYTES, b.bitcast(value, _BYTES)), INTS)
    table = ir.Constant(_BYTES, [weight * (i % 16).bit_count() for i in range(_BYTES.count)])
    low = constant(_LOW_NIBBLES, INTS)
    found = []
    for nibbles in (b.and_(value, low), b.and_(b.lshr(value, constant(4, INTS)), low)):
        found.append(call(b, "llvm.x86.avx512.pshuf.b.512", _BYTES, table, b.bitcast(nibbles, _BYTES)))
    return b.bitcast(b.add(*found), INTS)


def _sum_bytes(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return the sum of the four bytes of each 32-bit lane."""
    low = constant(0x00FF00FF, INTS)
    pairs = b.add(b.and_(value, low), b.and_(b.lshr(value, constant(8, INTS)), low))
    return b.add(b.and_(pairs, constant(0xFFFF, INTS)), b.lshr(pairs, constant(16, INTS)))


def _add_products(b: ir.IRBuilder, total: ir.Value, value: ir.Value, factor: ir.Value) -> ir.Value:
    """Return ``total`` plus the four bytes of each lane times the lane's four signed ones of ``factor``."""
    if VNNI:
        return call(b, "llvm.x86.avx512.vpdpbusd.512", INTS, total, value, factor)
    pairs = call(b, "llvm.x86.avx512.pmaddubs.w.512", _SHORTS, b.bitcast(value, _BYTES), b.bitcast(factor, _BYTES))
    ones = ir.Constant(_SHORTS, [1] * _SHORTS.count)
    return b.add(total, call(b, "llvm.x86.avx512.pmaddw.d.512", INTS, pairs, ones))


_SUM, _CARRY, _CARRY_OF_SUMS = 0x96, 0xE8, 0x3A  # x ^ y ^ z, the majority, and x ? ~y : z


def _bits(b: ir.IRBuilder, table: int, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """Return a function of three bits, for each bit of the operands; bit 4x + 2y + z of the table is its value."""
    return call(b, "llvm.x86.avx512.pternlog.d.512", INTS, x, y, z, I32(table))


def _add_bits(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return sum and carry of three bits, for each bit of the operands."""
    return _bits(b, _SUM, x, y, z), _bits(b, _CARRY, x, y, z)


def _add_words(
    b: ir.IRBuilder, kept: ir.Value, first: tuple[ir.Value, ir.Value], second: tuple[ir.Value, ir.Value]
) -> tuple[ir.Value, ir.Value]:
    """Return sum and carry of the bits kept and those in which two pairs of words differ.

    Three instructions, not the four of two exclusive ors, a sum and its carry. Where the bit kept and the first pair's
    are equal, they are the carry; where not, the second pair's is, of which the sum is then the inverse.
    """
    unequal = _bits(b, _SUM, kept, *first)
    total = _bits(b, _SUM, unequal, *second)
    return total, _bits(b, _CARRY_OF_SUMS, unequal, total, kept)


def _added(b: ir.IRBuilder, first: _Values, second: _Values) -> _Values:
    return [b.add(x, y) for x, y in zip(first, second, strict=True)]


class Words(NamedTuple):
    """The words of a tile: addresses of its pixels and blocks of filters, and offsets of a pixel's words.

    Attributes:
        pixels: Addresses.
        offsets: Address of an int32 for each word of a pixel: where it is, in bytes from the pixel.
        blocks: Addresses; a block's words, of 16 output channels, are 64 bytes apart.
        count: Words of a pixel.
    """

    pixels: _Values
    offsets: ir.Value
    blocks: _Values
    count: ir.Value

    def pairs(self, b: ir.IRBuilder, j: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
        """Return word j of each pixel with that of each block."""
        offset = b.sext(load(b, b.add(self.offsets, b.shl(j, I64(2))), I32), I64)
        filters = [load(b, b.add(a, b.shl(j, I64(6))), INTS) for a in self.blocks]
        words = (splat(b, load(b, b.add(address, offset), I32)) for address in self.pixels)
        return [(word, f) for word in words for f in filters]

    def differing(self, b: ir.IRBuilder, j: ir.Value) -> _Values:
        """Return the bits of word j that differ, pixel by pixel and block by block."""
        return [b.xor(word, f) for word, f in self.pairs(b, j)]


def _loop(
    b: ir.IRBuilder,
    start: ir.Value,
    stop: ir.Value,
    kept: _Values,
    step: int,
    body: Callable[[ir.Value, _Values], _Values],
) -> _Values:
    """Run ``kept = body(j, kept)`` for j from start to below stop, by step."""
    before, inside, done = b.block, b.append_basic_block("body"), b.append_basic_block("done")
    b.cbranch(b.icmp_signed("<", start, stop), inside, done)
    b.position_at_end(inside)
    j, held = b.phi(I64), [b.phi(INTS) for _ in kept]
    new = body(j, held)
    after, last = b.add(j, I64(step)), b.block
    for phi, first, more in ((j, start, after), *zip(held, kept, new, strict=True)):
        phi.add_incoming(first, before)
        phi.add_incoming(more, last)
    b.cbranch(b.icmp_signed("<", after, stop), inside, done)
    b.position_at_end(done)
    return meet(b, (kept, before), (new, last))


def _end(b: ir.IRBuilder, start: ir.Value, size: int, stop: ir.Value) -> ir.Value:
    end = b.add(start, I64(size))
    return b.select(b.icmp_signed("<", end, stop), end, stop)


def _count_all(b: ir.IRBuilder, words: Words) -> _Values:
    """Return how many bits differ, counting every word."""
    zeros = [ir.Constant(INTS, None)] * (len(words.pixels) * len(words.blocks))
    count = _count_bytes if BYTEWISE else _count_lanes

    def add_counts(j: ir.Value, sums: _Values) -> _Values:
        return _added(b, sums, [count(b, bits) for bits in words.differing(b, j)])

    def add_chunk(j: ir.Value, sums: _Values) -> _Values:
        # Bytes never carry into one another: 31 counts of at most 8 stay below 256.
        found = _loop(b, j, _end(b, j, 31, words.count), zeros, 1, add_counts)
        return _added(b, sums, [_sum_bytes(b, total) for total in found])

    return _loop(b, I64(0), words.count, zeros, *((31, add_chunk) if BYTEWISE else (1, add_counts)))


class _CarrySave:
    """Counts seven words or more: the first seven bit by bit, then eight at a time, then four, two and one.

    Args:
        b: The builder.
        words: What to count.
        halve: Whether a differing bit takes 1 from a total, not 2.
    """

    def __init__(self, b: ir.IRBuilder, words: Words, halve: ir.Value) -> None:
        self.b, self.words, self.n = b, words, len(words.pixels) * len(words.blocks)
        self.per_bit, self.per_eight = (
            splat(b, b.select(halve, I32(0x01010101 * (256 - n)), I32(0x01010101 * (256 - 2 * n)))) for n in (1, 8)
        )

    def carries(self, kept: list[_Values], place: int, j: ir.Value) -> _Values:
        """Add ``2**place`` words, from word j, to the bits kept of each lower place; return what they carry.

        The carries of place 0 are a word's differing bits themselves.
        """
        if place == 0:
            return self.words.differing(self.b, j)
        middle = self.b.add(j, I64(2 ** (place - 1)))
        if place == 1:
            pairs = zip(kept[0], self.words.pairs(self.b, j), self.words.pairs(self.b, middle), strict=True)
            found = [_add_words(self.b, *values) for values in pairs]
        else:
            first, second = self.carries(kept, place - 1, j), self.carries(kept, place - 1, middle)
            found = [_add_bits(self.b, *bits) for bits in zip(kept[place - 1], first, second, strict=True)]
        kept[place - 1] = [bits for bits, _ in found]
        return [carry for _, carry in found]

    def first_seven(self) -> list[_Values]:
        """Return ones, twos and fours of the first seven words."""
        kept: list[_Values] = []
        for place in range(3):
            kept.append(self.carries(kept, place, I64(2**place - 1)))
        return kept

    def add_eight(self, j: ir.Value, held: _Values) -> _Values:
        """Add eight words to ones, twos and fours, kept bit by bit, and to eights, counted in bytes."""
        kept = [held[i * self.n : (i + 1) * self.n] for i in range(3)]
        carried = self.carries(kept, 3, j)
        flat = [value for bits in kept for value in bits]
        return [*flat, *_added(self.b, held[3 * self.n :], [_count_bytes(self.b, c) for c in carried])]

    def add_eights(self, whole: ir.Value) -> Callable[[ir.Value, _Values], _Values]:
        """Return what adds up to 31 times eight words, to the totals in the end."""

        def body(j: ir.Value, held: _Values) -> _Values:
            bits, totals = held[: 3 * self.n], held[3 * self.n :]
            zeros = [ir.Constant(INTS, None)] * self.n
            found = _loop(self.b, j, _end(self.b, j, 31 * 8, whole), [*bits, *zeros], 8, self.add_eight)
            eights = zip(totals, found[3 * self.n :], strict=True)
            return [*found[: 3 * self.n], *(_add_products(self.b, t, e, self.per_eight) for t, e in eights)]

        return body

    def add_to(self, totals: _Values) -> _Values:
        """Return the totals plus what all differing bits add to them."""
        b, count = self.b, self.words.count
        whole = b.add(b.and_(b.sub(count, I64(7)), I64(-8)), I64(7))
        kept = [value for bits in self.first_seven() for value in bits]
        held = _loop(b, I64(7), whole, [*kept, *totals], 31 * 8, self.add_eights(whole))
        fours, totals = held[2 * self.n : 3 * self.n], held[3 * self.n :]
        # In bytes, at most 112: 7 x 8 of the three planes, and 7 x 8 of what is left.
        small = [_count_bytes(b, bits, 4) for bits in fours]
        values = [*held[: 2 * self.n], *small]
        for place in (2, 1, 0):
            some = b.and_(b.sub(count, whole), I64(2**place))
            values = when(b, b.icmp_signed("!=", some, I64(0)), values, self.add_rest(place, whole))
            whole = b.add(whole, some)
        ones, twos, small = (values[i * self.n : (i + 1) * self.n] for i in range(3))
        small = _added(b, small, [_count_bytes(b, bits) for bits in ones])
        small = _added(b, small, [_count_bytes(b, bits, 2) for bits in twos])
        return [_add_products(b, t, s, self.per_bit) for t, s in zip(totals, small, strict=True)]

    def add_rest(self, place: int, j: ir.Value) -> Callable[[_Values], _Values]:
        """Return what adds ``2**place`` words, at most four, to ones and twos, and what they carry to counts."""

        def add(values: _Values) -> _Values:
            kept = [values[: self.n], values[self.n : 2 * self.n]]
            carried = [_count_bytes(self.b, c, 2**place) for c in self.carries(kept, place, j)]
            return [*kept[0], *kept[1], *_added(self.b, values[2 * self.n :], carried)]

        return add


def dots(b: ir.IRBuilder, words: Words, base: Callable[[], _Values], halve: ir.Value) -> _Values:
    """Return dot products, int32, of each pixel with each block, pixel by pixel.

    Args:
        b: The builder.
        words: What to multiply.
        base: Loads the dot products of no differing bits, when they are needed.
        halve: Whether activations are {0, 1}, so that a differing bit takes 1 from a dot product, not 2.
    """

    def plainly() -> _Values:
        shift = splat(b, b.zext(b.not_(halve), I32))
        counted = _count_all(b, words)
        return [b.sub(start, b.shl(total, shift)) for start, total in zip(base(), counted, strict=True)]

    if not CARRY_SAVE or len(words.blocks) > 1:
        return plainly()
    few, many, after = (b.append_basic_block(name) for name in ("few", "many", "counted"))
    b.cbranch(b.icmp_signed("<", words.count, I64(7)), few, many)
    b.position_at_end(few)
    first = plainly(), b.block
    b.branch(after)
    b.position_at_end(many)
    second = _CarrySave(b, words, halve).add_to(base()), b.block
    b.branch(after)
    b.position_at_end(after)
    return meet(b, first, second)


def chain(b: ir.IRBuilder, start: ir.Value, step: ir.Value, many: int) -> _Values:
    """Return so many addresses, a step apart."""
    found = [start]
    while len(found) < many:
        found.append(b.add(found[-1], step))
    return found


_ARGUMENTS = (
    "x", "entries", "shortcut", "residual", "out", "ahead", "w", "bases", "table", "row", "count",
    "offsets", "k", "w_step", "x_step", "s_step", "r_step", "o_step", "halve", "plain", "low", "high", "early",
)  # fmt: skip


def make_tile(pixels: int, blocks: int, bf16: bool, partial: bool = False) -> Any:
    """Return the function of a tile: ``pixels`` x ``blocks`` x 16 outputs, of dot products and all that follows them.

    The dot product (`dots`) times the scale, affine, shift, PReLU, shift, clamp, plus the shortcut (before the
    activation where ``early``), plus ``row`` and ``residual``. Its arguments, addresses and steps being in bytes:

    - x, entries, shortcut, residual, out: of the first pixel, its words; an int64, how far from ``bases`` its own dot
      product of no differing bits is; what is added; where its outputs go. 0 where nothing is added.
    - ahead: where outputs go that are written soon, of as many pixels.
    - w, bases, table, row: of the first block, its filters; its dot products of no differing bits; 16 floats each of
      scale, factor, offset, shift in, slope and shift out; what is added to every pixel, or 0. Blocks follow.
    - count: channels of the last block, which ``partial`` builds the form for.
    - offsets, k, w_step: `Words.offsets` and ``count``, and the step from block to block of filters.
    - x_step, s_step, r_step, o_step: from pixel to pixel of words, shortcut, residual and output.
    - halve: 1 for {0, 1} activations.
    - plain, low, high: 1 to leave out affine and clamp; the clamp.
    - early: 1 for a shortcut before the activation.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        context, x, entries, shortcut, residual, out, ahead, w, bases, table, row, count, offsets, k, w_step, x_step,
        s_step, r_step, o_step, halve, plain, low, high, early,
    ):  # fmt: skip
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            _Tile(b, dict(zip(_ARGUMENTS, args, strict=True)), pixels, blocks, bf16, partial).build()
            return context.get_dummy_value()

        kinds = [types.float32 if name in ("low", "high") else types.int64 for name in _ARGUMENTS]
        return types.void(*kinds), codegen

    return tile


class _Tile:
    """Builds a tile's instructions."""

    def __init__(
        self, b: ir.IRBuilder, given: dict[str, ir.Value], pixels: int, blocks: int, bf16: bool, partial: bool
    ) -> None:
        self.b, self.given, self.pixels, self.blocks, self.bf16 = b, given, pixels, blocks, bf16
        self.mask = lanes_below(b, given["count"]) if partial else None
        self.size = 2 if bf16 else 4

    def is_set(self, name: str) -> ir.Value:
        return self.b.icmp_signed("!=", self.given[name], I64(0))

    def along(self, name: str, step: str) -> _Values:
        """Return an address for each pixel."""
        return chain(self.b, self.given[name], self.given[step], self.pixels)

    def build(self) -> None:
        b, given = self.b, self.given
        filters = chain(b, given["w"], given["w_step"], self.blocks)
        self.fetch_next_outputs()
        words = Words(self.along("x", "x_step"), given["offsets"], filters, given["k"])
        found = dots(b, words, self.bases, self.is_set("halve"))
        for r in range(self.blocks):
            self.finish(r, found[r :: self.blocks])

    def fetch_next_outputs(self) -> None:
        """Have lines fetched that are written soon: a store does so first, and stores wait for one another."""
        b = self.b
        for address in self.along("ahead", "o_step"):
            for line in range(0, self.blocks * LANES * self.size, 64):
                prefetch_line(b, b.add(address, I64(line)), write=True)

    def bases(self) -> _Values:
        """Load the dot products of no differing bits, pixel by pixel and block by block."""
        b, given = self.b, self.given
        entries = [load(b, b.add(given["entries"], I64(8 * p)), I64, 8) for p in range(self.pixels)]
        starts = [b.add(given["bases"], entry) for entry in entries]
        return [load(b, b.add(start, I64(64 * r)), INTS) for start in starts for r in range(self.blocks)]

    def finish(self, r: int, dot: _Values) -> None:
        """Write the outputs of the pixels for block r."""
        b, given, bf16 = self.b, self.given, self.bf16
        mask = self.mask if r == self.blocks - 1 else None

        def column(i: int) -> ir.Value:
            return load(b, b.add(given["table"], I64(384 * r + 64 * i)), FLOATS)

        def all_with(op: Callable[..., ir.Value], values: _Values, other: ir.Value) -> _Values:
            return [op(value, other) for value in values]

        def affine(values: _Values) -> _Values:
            return all_with(b.fadd, all_with(b.fmul, values, column(1)), column(2))

        def clamp(values: _Values) -> _Values:
            for name, beyond in (("high", ">"), ("low", "<")):  # a NaN stays one
                limit = splat(b, given[name])
                values = [b.select(b.fcmp_ordered(beyond, value, limit), limit, value) for value in values]
            return values

        def plus_pixels(name: str, step: str) -> Callable[[_Values], _Values]:
            def add(values: _Values) -> _Values:
                addresses = all_with(b.add, self.along(name, step), I64(LANES * r * self.size))
                more = [load_pixels(b, address, bf16, mask) for address in addresses]
                return [b.fadd(value, m) for value, m in zip(values, more, strict=True)]

            return add

        def plus_row(values: _Values) -> _Values:
            return all_with(b.fadd, values, load_pixels(b, b.add(given["row"], I64(4 * LANES * r)), False, mask))

        more_to_do, is_early, has_shortcut = b.not_(self.is_set("plain")), self.is_set("early"), self.is_set("shortcut")
        values = all_with(b.fmul, [b.sitofp(value, FLOATS) for value in dot], column(0))
        values = when(b, more_to_do, values, affine)
        values = when(b, b.and_(has_shortcut, is_early), values, plus_pixels("shortcut", "s_step"))
        values = all_with(b.fadd, values, column(3))
        positive = [b.fcmp_ordered(">", value, constant(0.0, FLOATS)) for value in values]
        sloped = all_with(b.fmul, values, column(4))
        values = [b.select(*choice) for choice in zip(positive, values, sloped, strict=True)]
        values = all_with(b.fadd, values, column(5))
        values = when(b, more_to_do, values, clamp)
        values = when(b, b.and_(has_shortcut, b.not_(is_early)), values, plus_pixels("shortcut", "s_step"))
        values = when(b, self.is_set("row"), values, plus_row)
        values = when(b, self.is_set("residual"), values, plus_pixels("residual", "r_step"))
        for value, address in zip(values, self.along("out", "o_step"), strict=True):
            store_pixels(b, value, b.add(address, I64(LANES * r * self.size)), bf16, mask)
