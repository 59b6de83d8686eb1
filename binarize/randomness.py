"""Random numbers as pure functions of their purpose, independent of resuming and of the number of processes."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """Return the generator of one draw for a purpose, such as ``"noise"``, and the index of, for example, a sample.

    Equal arguments give equal numbers on any machine; different arguments give independent streams (NumPy's
    `SeedSequence` and Philox).
    """
    entropy = [seed, zlib.crc32(purpose.encode()), *index]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def torch_seed(seed: int, purpose: str, *index: int) -> int:
    """Return a seed below 2**63 for torch's generators, a pure function of the arguments."""
    return int(generator(seed, purpose, *index).integers(2**63))
