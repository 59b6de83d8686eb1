"""The unit of residuals: how much pictures differ from their enlargement."""

from __future__ import annotations

import math

from binarize.errors import BinarizeError
from binarize.training.data import PairedPatches

PATCHES = 512
"""Patches that `residual_deviation` looks at."""


def residual_deviation(patches: PairedPatches, count: int = PATCHES) -> float:
    """Return the root mean square of high-resolution minus enlarged picture over the first ``count`` patches.

    Dividing residuals by it gives them unit variance, as the noise has. It is a function of the seed and the data.

    Args:
        patches: The training patches, at least ``count`` long.
        count: How many to look at.

    Raises:
        BinarizeError: If pictures and enlargements are all equal.
    """
    total = 0.0
    for index in range(count):
        patch = patches[index]
        total += float((patch["hr"].double() - patch["condition"].double()).square().mean())
    deviation = math.sqrt(total / count)
    if deviation == 0:
        raise BinarizeError(
            "target: residual: the training pictures equal their enlargements, so that nothing is left to learn; are "
            "these high-resolution pictures?"
        )
    return deviation
