"""The distribution of many values: exact moments, and a sample that plots and quantiles are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from binarize.errors import BinarizeError


@dataclass(frozen=True)
class Distribution:
    """How values are distributed.

    Attributes:
        count: How many values there were.
        mean: Their mean.
        std: Their standard deviation (population).
        minimum: The smallest.
        maximum: The largest.
        values: (n,) float32, all of them or a random sample of each tensor seen.
    """

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float
    values: np.ndarray


class Gathered:
    """Adds up tensors to a `Distribution`, keeping at most ``samples`` values of each.

    Args:
        samples: At least 1.
        seed: Of the choice of values, which touches no global random state.

    Raises:
        BinarizeError: If ``samples`` is less than 1.
    """

    def __init__(self, samples: int, seed: int = 0) -> None:
        if samples < 1:
            raise BinarizeError(f"samples is how many values of a tensor are kept, at least 1; got {samples}.")
        self.samples = samples
        self.generator = torch.Generator().manual_seed(seed)
        self.count, self.sum, self.squares = 0, 0.0, 0.0
        self.minimum, self.maximum = math.inf, -math.inf
        self.values: list[np.ndarray] = []

    def add(self, x: Tensor) -> None:
        """Take in a tensor of any shape; an empty one adds nothing."""
        flat = x.detach().reshape(-1)
        if not flat.numel():
            return
        exact = flat.cpu().to(torch.float64)
        self.count += exact.numel()
        self.sum += float(exact.sum())
        self.squares += float(exact.square().sum())
        self.minimum = min(self.minimum, float(exact.min()))
        self.maximum = max(self.maximum, float(exact.max()))
        if exact.numel() > self.samples:
            exact = exact[torch.randint(exact.numel(), (self.samples,), generator=self.generator)]
        self.values.append(exact.float().numpy())

    def result(self) -> Distribution:
        """Return what was gathered; at least one value must have been."""
        mean = self.sum / self.count
        variance = max(self.squares / self.count - mean**2, 0.0)
        return Distribution(
            self.count, mean, math.sqrt(variance), self.minimum, self.maximum, np.concatenate(self.values)
        )
