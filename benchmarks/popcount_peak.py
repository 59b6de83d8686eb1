"""The speed of the popcount tile on data that stays in the first-level cache: the peak of a packed convolution."""

from __future__ import annotations

from typing import Any

from common import seconds

LANES = 16  # output channels in a vector
MAX_WORDS = 72  # longer sums leave the first-level cache


def popcount_peak(words: int = MAX_WORDS, *, with_output_transform: bool = False) -> float | None:
    """Return binary GMAC/s of one core, or None without numba.

    Args:
        words: Length of a sum in 32-bit words. Short sums are slower per word.
        with_output_transform: Also apply scale, RPReLU and shortcut to each output.
    """
    try:
        import numpy as np
        from llvmlite import ir
        from numba import njit, types
        from numba.extending import intrinsic

        from binarize.kernels.cpu.popcount import BLOCKS, PIXELS, Words, dots
        from binarize.kernels.cpu.simd import INTS, chain, store
        from binarize.kernels.cpu.tile import make_tile
    except ImportError:
        return None
    outputs, repeats = PIXELS * BLOCKS * LANES, 360_000 // words
    tile, step = make_tile(PIXELS), 64 * BLOCKS

    @intrinsic
    def count(context: Any, x: Any, offsets: Any, k: Any, w: Any, out: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x, offsets, k, w, out = args
            step = b.shl(k, ir.IntType(64)(2))
            pixel = chain(b, x, step, PIXELS)
            block = chain(b, w, b.shl(step, ir.IntType(64)(4)), BLOCKS)
            zeros = [ir.Constant(INTS, None)] * (PIXELS * BLOCKS)
            sums = dots(b, Words(pixel, offsets, block, k), lambda: zeros, ir.IntType(1)(0))
            for i, value in enumerate(sums):
                store(b, value, b.add(out, ir.IntType(64)(64 * i)), 64)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    @njit
    def repeat(x: int, offsets: int, k: int, w: int, out: int, zeros: int, whole: bool, repeats: int) -> None:
        for _ in range(repeats):
            if whole:
                tile(
                    x, zeros, zeros, 0, out, out, w, zeros, zeros, 0, 16, offsets, k, 64 * k, 4 * k, step, 0, step, 0,
                    1, -np.inf, np.inf, 0, BLOCKS, 0,
                )  # fmt: skip
            else:
                count(x, offsets, k, w, out)

    def aligned(count: int) -> Any:
        raw = np.random.default_rng(0).integers(-(2**31), 2**31, count + 16, dtype=np.int32)
        start = -raw.ctypes.data % 64 // 4
        return raw[start : start + count]

    x, w = aligned(PIXELS * words), aligned(BLOCKS * words * LANES)
    out, zeros = aligned(outputs), aligned(96 * BLOCKS)
    zeros[:] = 0  # stands for corrections, coefficients and shortcut
    offsets = (4 * np.arange(words)).astype(np.int32)
    addresses = x.ctypes.data, offsets.ctypes.data, words, w.ctypes.data, out.ctypes.data, zeros.ctypes.data
    repeat(*addresses, with_output_transform, repeats)
    best = min(seconds(lambda: repeat(*addresses, with_output_transform, repeats)) for _ in range(20))
    return repeats * outputs * words * 32 / best / 1e9
