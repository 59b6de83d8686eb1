"""Draws of images and positions in them, each a function of the seed and the index of a sample alone."""

from __future__ import annotations

import numpy as np

_ORDER_STREAM, PATCH_STREAM, GRID_STREAM = 0, 1, 2


def draws(seed: int, stream: int, counter: int, count: int) -> np.ndarray:
    """Return ``count`` uint64 of a counter-based generator, whose raw stream NumPy guarantees not to change."""
    key = np.array([seed, stream], dtype=np.uint64)
    # The generator increments the first word of its counter, so the item's number is the second.
    start = np.array([0, counter, 0, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=start).random_raw(count)


def below(draw: np.uint64, bound: int) -> int:
    """Map a uniform 64-bit integer to 0..bound - 1."""
    return int(draw) * bound >> 64


def shuffled(seed: int, index: int, count: int) -> int:
    """Return which of ``count`` images item ``index`` uses: each epoch of ``count`` items is a new random order."""
    epoch, position = divmod(index, count)
    # A stable sort breaks ties (probability n**2 / 2**65) the same way on every machine.
    return int(np.argsort(draws(seed, _ORDER_STREAM, epoch, count), kind="stable")[position])
