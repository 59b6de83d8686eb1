"""A tile of a packed convolution: its dot products and everything that follows them, held in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from binarize.kernels.cpu import simd
from binarize.kernels.cpu.popcount import BLOCKS, Words, dots
from binarize.kernels.cpu.simd import FLOATS, I64, INTS, LANES, Values, chain, load, splat, when

_ARGUMENTS = (
    "x", "entries", "shortcut", "residual", "out", "ahead", "w", "bases", "table", "channel_bias", "count",
    "offsets", "k", "w_step", "x_step", "s_step", "r_step", "o_step", "unsigned", "plain", "low", "high", "early",
)  # fmt: skip


def make_tile(pixels: int) -> Any:
    """Return a function that computes a tile: ``pixels`` x ``blocks`` x 16 outputs and all that follows their products.

    The output is the dot product (`dots`) times the scale, affine, shift, PReLU, shift, clamp, plus the shortcut
    (before the activation if ``early``), plus ``channel_bias`` and ``residual``. Flags are 0 or 1, and ``plain`` leaves
    out affine and clamp. The other arguments, addresses and steps in bytes, are:

    - x, entries, shortcut, residual, out: of the first pixel: its words; an int64, the distance from ``bases`` to its
      dot product of no differing bits; what is added (0 for nothing); its outputs, which are prefetched from ``ahead``.
    - w, bases, table, channel_bias: of the first block: its filters; its dot products of no differing bits; 16 floats
      each of scale, factor, offset, shift in, slope and shift out; what is added to every pixel, or 0. Blocks follow.
    - count: channels of the last block; fewer than 16 only if there is one block.
    - offsets, k, w_step: `Words.offsets` and ``count``, and the step between blocks of filters.
    - x_step, s_step, r_step, o_step: between pixels of words, shortcut, residual and output.
    - blocks: how many blocks of 16 channels, at most `BLOCKS`, or one for a tile of a single pixel.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        context, x, entries, shortcut, residual, out, ahead, w, bases, table, channel_bias, count, offsets, k, w_step,
        x_step, s_step, r_step, o_step, unsigned, plain, low, high, early, blocks, bf16,
    ):  # fmt: skip
        def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
            *given, blocks, bf16 = args
            named = dict(zip(_ARGUMENTS, given, strict=True))

            def build(half_precision: bool) -> None:
                if pixels == 1:
                    _Tile(b, named, pixels, 1, half_precision, partial=True).build()
                    return
                done = b.append_basic_block("tile_done")
                partial = b.icmp_signed("<", named["count"], I64(LANES))
                cases = b.switch(b.select(partial, I64(0), blocks), done)
                for case in range(BLOCKS + 1):
                    start = b.append_basic_block(f"tile_{case}")
                    cases.add_case(I64(case), start)
                    b.position_at_end(start)
                    _Tile(b, named, pixels, max(case, 1), half_precision, partial=case == 0).build()
                    b.branch(done)
                b.position_at_end(done)

            simd.by_flag(b, bf16, build)
            return context.get_dummy_value()

        kinds = [types.float32 if name in ("low", "high") else types.int64 for name in _ARGUMENTS]
        return types.void(*kinds, types.int64, types.int64), codegen

    return tile


class _Tile:
    """Builds a tile's instructions."""

    def __init__(
        self, b: ir.IRBuilder, given: dict[str, ir.Value], pixels: int, blocks: int, bf16: bool, partial: bool
    ) -> None:
        self.b, self.given, self.pixels, self.blocks, self.bf16 = b, given, pixels, blocks, bf16
        self.mask = simd.lanes_below(b, given["count"]) if partial else None
        self.size = 2 if bf16 else 4

    def is_set(self, name: str) -> ir.Value:
        return self.b.icmp_signed("!=", self.given[name], I64(0))

    def along(self, name: str, step: str) -> Values:
        """Return an address for each pixel."""
        return chain(self.b, self.given[name], self.given[step], self.pixels)

    def build(self) -> None:
        b, given = self.b, self.given
        filters = chain(b, given["w"], given["w_step"], self.blocks)
        self.fetch_next_outputs()
        words = Words(self.along("x", "x_step"), given["offsets"], filters, given["k"])
        found = dots(b, words, self.bases, self.is_set("unsigned"))
        for r in range(self.blocks):
            self.finish(r, found[r :: self.blocks])

    def fetch_next_outputs(self) -> None:
        """Have lines fetched that are written soon: a store does so first, and stores wait for one another."""
        b = self.b
        for address in self.along("ahead", "o_step"):
            for line in range(0, self.blocks * LANES * self.size, 64):
                simd.prefetch_line(b, b.add(address, I64(line)), write=True)

    def bases(self) -> Values:
        """Load the dot products of no differing bits, pixel by pixel and block by block."""
        b, given = self.b, self.given
        entries = [load(b, b.add(given["entries"], I64(8 * p)), I64, 8) for p in range(self.pixels)]
        starts = [b.add(given["bases"], entry) for entry in entries]
        return [load(b, b.add(start, I64(64 * r)), INTS) for start in starts for r in range(self.blocks)]

    def finish(self, r: int, dot: Values) -> None:
        """Write the outputs of the pixels for block r."""
        b, given, bf16 = self.b, self.given, self.bf16
        mask = self.mask if r == self.blocks - 1 else None

        def column(i: int) -> ir.Value:
            return load(b, b.add(given["table"], I64(384 * r + 64 * i)), FLOATS)

        def all_with(op: Callable[..., ir.Value], values: Values, other: ir.Value) -> Values:
            return [op(value, other) for value in values]

        def affine(values: Values) -> Values:
            return all_with(b.fadd, all_with(b.fmul, values, column(1)), column(2))

        def clamp(values: Values) -> Values:
            for name, beyond in (("high", ">"), ("low", "<")):  # a NaN stays one
                limit = splat(b, given[name])
                values = [b.select(b.fcmp_ordered(beyond, value, limit), limit, value) for value in values]
            return values

        def plus_pixels(name: str, step: str) -> Callable[[Values], Values]:
            def add(values: Values) -> Values:
                addresses = all_with(b.add, self.along(name, step), I64(LANES * r * self.size))
                more = [simd.load_pixels(b, address, bf16, mask) for address in addresses]
                return [b.fadd(value, m) for value, m in zip(values, more, strict=True)]

            return add

        def plus_channel_bias(values: Values) -> Values:
            bias = simd.load_pixels(b, b.add(given["channel_bias"], I64(4 * LANES * r)), False, mask)
            return all_with(b.fadd, values, bias)

        more_to_do, is_early, has_shortcut = b.not_(self.is_set("plain")), self.is_set("early"), self.is_set("shortcut")
        values = all_with(b.fmul, [b.sitofp(value, FLOATS) for value in dot], column(0))
        values = when(b, more_to_do, values, affine)
        values = when(b, b.and_(has_shortcut, is_early), values, plus_pixels("shortcut", "s_step"))
        values = all_with(b.fadd, values, column(3))
        positive = [b.fcmp_ordered(">", value, simd.constant(0.0, FLOATS)) for value in values]
        sloped = all_with(b.fmul, values, column(4))
        values = [b.select(*choice) for choice in zip(positive, values, sloped, strict=True)]
        values = all_with(b.fadd, values, column(5))
        values = when(b, more_to_do, values, clamp)
        values = when(b, b.and_(has_shortcut, b.not_(is_early)), values, plus_pixels("shortcut", "s_step"))
        values = when(b, self.is_set("channel_bias"), values, plus_channel_bias)
        values = when(b, self.is_set("residual"), values, plus_pixels("residual", "r_step"))
        for value, address in zip(values, self.along("out", "o_step"), strict=True):
            simd.store_pixels(b, value, b.add(address, I64(LANES * r * self.size)), bf16, mask)
