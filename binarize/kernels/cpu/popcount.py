"""Dot products of signs by counting the bits that differ, for a tile of pixels and channels held in registers.

Sixteen output channels are counted at a time. Some processors count the bits of 32-bit lanes (VPOPCNTD). Elsewhere
bytes are counted by table lookups; with AVX-512, words are first added bit by bit in carry-save form (a Harley-Seal
counter), so that only one word in eight is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from binarize.kernels.cpu import simd
from binarize.kernels.cpu.simd import I32, I64, INTS, LANES, Body, Values, call, constant, load, loop, splat, when

# Counts are of bytes where no instruction counts 32-bit lanes.
BYTEWISE = "+avx512vpopcntdq" not in simd.cpu_features()
# Adding words bit by bit pays where one instruction computes any function of three operands.
CARRY_SAVE = BYTEWISE and "+avx512bw" in simd.cpu_features()
VNNI = CARRY_SAVE and "+avx512vnni" in simd.cpu_features()
# Register blocking: how many pixels x 16 output channels are summed at once; sums and filters must fit the registers.
PIXELS, BLOCKS = (4, 1) if BYTEWISE else (4, 4)
_I8 = ir.IntType(8)
_SHORTS, _BYTES = ir.VectorType(ir.IntType(16), 2 * LANES), ir.VectorType(_I8, 4 * LANES)
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


def _added(b: ir.IRBuilder, first: Values, second: Values) -> Values:
    return [b.add(x, y) for x, y in zip(first, second, strict=True)]


class Words(NamedTuple):
    """The words of a tile: addresses of its pixels and blocks of filters, and offsets of a pixel's words."""

    pixels: Values  # addresses
    offsets: ir.Value  # address of an int32 for each word of a pixel: where it is, in bytes from the pixel
    blocks: Values  # addresses; a block's words, of 16 output channels, are 64 bytes apart
    count: ir.Value  # words of a pixel

    def pairs(self, b: ir.IRBuilder, j: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
        """Return word j of each pixel with that of each block."""
        offset = b.sext(load(b, b.add(self.offsets, b.shl(j, I64(2))), I32), I64)
        filters = [load(b, b.add(a, b.shl(j, I64(6))), INTS) for a in self.blocks]
        words = (splat(b, load(b, b.add(address, offset), I32)) for address in self.pixels)
        return [(word, f) for word in words for f in filters]

    def differing(self, b: ir.IRBuilder, j: ir.Value) -> Values:
        """Return the bits of word j that differ, pixel by pixel and block by block."""
        return [b.xor(word, f) for word, f in self.pairs(b, j)]


def _end(b: ir.IRBuilder, start: ir.Value, size: int, stop: ir.Value) -> ir.Value:
    end = b.add(start, I64(size))
    return b.select(b.icmp_signed("<", end, stop), end, stop)


def _count_all(b: ir.IRBuilder, words: Words) -> Values:
    """Return how many bits differ, counting every word."""
    zeros = [ir.Constant(INTS, None)] * (len(words.pixels) * len(words.blocks))
    count = _count_bytes if BYTEWISE else _count_lanes

    def add_counts(j: ir.Value, sums: Values) -> Values:
        return _added(b, sums, [count(b, bits) for bits in words.differing(b, j)])

    def add_chunk(j: ir.Value, sums: Values) -> Values:
        # Bytes never carry into one another: 31 counts of at most 8 stay below 256.
        found = loop(b, _end(b, j, 31, words.count), zeros, add_counts, j)
        return _added(b, sums, [_sum_bytes(b, total) for total in found])

    return loop(b, words.count, zeros, *((add_chunk, I64(0), 31) if BYTEWISE else (add_counts,)))


class _CarrySave:
    """Counts seven words or more: the first seven bit by bit, then eight at a time, then four, two and one.

    With ``unsigned`` a differing bit takes 1 from a total, not 2.
    """

    def __init__(self, b: ir.IRBuilder, words: Words, unsigned: ir.Value) -> None:
        self.b, self.words, self.n = b, words, len(words.pixels) * len(words.blocks)
        self.per_bit, self.per_eight = (
            splat(b, b.select(unsigned, I32(0x01010101 * (256 - n)), I32(0x01010101 * (256 - 2 * n)))) for n in (1, 8)
        )

    def carries(self, kept: list[Values], place: int, j: ir.Value) -> Values:
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

    def first_seven(self) -> list[Values]:
        """Return ones, twos and fours of the first seven words."""
        kept: list[Values] = []
        for place in range(3):
            kept.append(self.carries(kept, place, I64(2**place - 1)))
        return kept

    def add_eight(self, j: ir.Value, held: Values) -> Values:
        """Add eight words to ones, twos and fours, kept bit by bit, and to eights, counted in bytes."""
        kept = [held[i * self.n : (i + 1) * self.n] for i in range(3)]
        carried = self.carries(kept, 3, j)
        flat = [value for bits in kept for value in bits]
        return [*flat, *_added(self.b, held[3 * self.n :], [_count_bytes(self.b, c) for c in carried])]

    def add_eights(self, whole: ir.Value) -> Body:
        """Return what adds up to 31 times eight words, to the totals in the end."""

        def body(j: ir.Value, held: Values) -> Values:
            bits, totals = held[: 3 * self.n], held[3 * self.n :]
            zeros = [ir.Constant(INTS, None)] * self.n
            found = loop(self.b, _end(self.b, j, 31 * 8, whole), [*bits, *zeros], self.add_eight, j, 8)
            eights = zip(totals, found[3 * self.n :], strict=True)
            return [*found[: 3 * self.n], *(_add_products(self.b, t, e, self.per_eight) for t, e in eights)]

        return body

    def add_to(self, totals: Values) -> Values:
        """Return the totals plus what all differing bits add to them."""
        b, count = self.b, self.words.count
        whole = b.add(b.and_(b.sub(count, I64(7)), I64(-8)), I64(7))
        kept = [value for bits in self.first_seven() for value in bits]
        held = loop(b, whole, [*kept, *totals], self.add_eights(whole), I64(7), 31 * 8)
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

    def add_rest(self, place: int, j: ir.Value) -> Callable[[Values], Values]:
        """Return what adds ``2**place`` words, at most four, to ones and twos, and what they carry to counts."""

        def add(values: Values) -> Values:
            kept = [values[: self.n], values[self.n : 2 * self.n]]
            carried = [_count_bytes(self.b, c, 2**place) for c in self.carries(kept, place, j)]
            return [*kept[0], *kept[1], *_added(self.b, values[2 * self.n :], carried)]

        return add


def dots(b: ir.IRBuilder, words: Words, base: Callable[[], Values], unsigned: ir.Value) -> Values:
    """Return dot products, int32, of each pixel with each block, pixel by pixel.

    ``base`` loads the dot products of no differing bits, when they are needed. ``unsigned`` is set for {0, 1}
    activations, where a differing bit takes 1 from a dot product, not 2.
    """

    def plainly() -> Values:
        shift = splat(b, b.zext(b.not_(unsigned), I32))
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
    second = _CarrySave(b, words, unsigned).add_to(base()), b.block
    b.branch(after)
    b.position_at_end(after)
    return simd.meet(b, first, second)
