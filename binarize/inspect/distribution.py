"""Distributions of many values: exact moments, and a sample for plots and quantiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from binarize.errors import BinarizeError


@dataclass(frozen=True)
class Distribution:
    """Exact moments of ``count`` values; ``values``, (n,) float32, are all or a random sample of each tensor's."""

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float
    values: np.ndarray


class DistributionMeter:
    """Accumulates tensors to a `Distribution`, keeping at most `samples` values of each tensor.

    The choice of values does not touch the global random state.
    """

    def __init__(self, samples: int) -> None:
        if samples < 1:
            raise BinarizeError(f"samples is the number of values kept of a tensor, at least 1; got {samples}.")
        self.samples = samples
        self.generator = torch.Generator().manual_seed(0)
        self.count, self.sum, self.squares = 0, 0.0, 0.0
        self.minimum, self.maximum = math.inf, -math.inf
        self.values: list[np.ndarray] = []

    def add(self, x: Tensor) -> None:
        """Add the values of a tensor of any shape."""
        if not x.numel():
            return
        exact = x.detach().reshape(-1).cpu().to(torch.float64)
        self.count += exact.numel()
        self.sum += float(exact.sum())
        self.squares += float(exact.square().sum())
        self.minimum = min(self.minimum, float(exact.min()))
        self.maximum = max(self.maximum, float(exact.max()))
        if exact.numel() > self.samples:
            exact = exact[torch.randint(exact.numel(), (self.samples,), generator=self.generator)]
        self.values.append(exact.float().numpy())

    def result(self) -> Distribution:
        """Return the distribution of the values so far, of which there must be at least one."""
        mean = self.sum / self.count
        std = math.sqrt(max(self.squares / self.count - mean**2, 0.0))
        return Distribution(self.count, mean, std, self.minimum, self.maximum, np.concatenate(self.values))
