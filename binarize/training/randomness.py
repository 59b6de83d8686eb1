"""Random numbers as pure functions of what they are for, so that resuming and adding processes change nothing."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """Return the generator of one draw.

    The same arguments always give the same numbers, on any machine and in any process, and different arguments give
    independent streams (NumPy's `SeedSequence` and Philox).

    Args:
        seed: The run's seed, at least 0.
        purpose: What is drawn, such as ``"noise"``.
        index: Which of them, such as the global number of the sample.
    """
    entropy = [seed, zlib.crc32(purpose.encode()), *index]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def torch_seed(seed: int, purpose: str, *index: int) -> int:
    """Return a seed for torch's own generators, a pure function of the arguments, below 2**63."""
    return int(generator(seed, purpose, *index).integers(2**63))
