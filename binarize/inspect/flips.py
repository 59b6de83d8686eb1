"""How many binary weights change their sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from binarize.conversion.export import pack_bits
from binarize.errors import BinarizeError
from binarize.inspect.observe import chosen_layers
from binarize.inspect.plot import axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class FlipRatios:
    """The share of binary weights whose sign changed, for S updates and L layers.

    Attributes:
        layers: Names of the layers.
        weights: (L,) int64, how many signs each holds (two a weight for two-basis methods).
        steps: (S,) int64, when each update was.
        since_last: (S, L) float64, the share that changed since the update before.
        since_start: (S, L) float64, the share that differs from the start.
    """

    layers: tuple[str, ...]
    weights: np.ndarray
    steps: np.ndarray
    since_last: np.ndarray
    since_start: np.ndarray

    def overall(self, since: Literal["last", "start"] = "last") -> np.ndarray:
        """Return the share over all layers together, (S,) float64.

        Raises:
            BinarizeError: If ``since`` is neither.
        """
        return self._ratios(since) @ self.weights / self.weights.sum()

    def plot(self, ax: Axes | None = None, *, since: Literal["last", "start"] = "last") -> Axes:
        """Draw the share over steps: a thin line for each layer, a thick one for all together.

        Args:
            ax: Where to; by default on a new figure.
            since: Changes since the update before, or since the start.

        Raises:
            BinarizeError: If matplotlib is missing, or ``since`` is neither.
        """
        ratios = self._ratios(since)
        ax = axes(ax)
        ax.plot(self.steps, ratios, linewidth=0.6, alpha=0.5)
        ax.plot(self.steps, self.overall(since), color="black", linewidth=2, label="all layers")
        ax.set_xlabel("step")
        ax.set_ylabel(f"signs flipped since {'the update before' if since == 'last' else 'the start'}")
        ax.set_ylim(bottom=0)
        ax.legend()
        return ax

    def _ratios(self, since: str) -> np.ndarray:
        if since not in ("last", "start"):
            raise BinarizeError(f"since must be 'last' or 'start'; got {since!r}.")
        return self.since_last if since == "last" else self.since_start


class FlipTracker:
    """Follows the signs of a model's binary weights through training.

    Call `update` after each step (or every hundredth). What is compared are the codes that the forward uses, so a
    method that centres its weights before the sign is followed where it decides. Two snapshots are kept on the model's
    device, at one bit a sign each: that of the last update and that of the start.

    Args:
        model: A converted model.
        layers: Globs on the names of binary layers; all by default.

    Raises:
        BinarizeError: If the model has no binary layer, or a pattern matches none.

    Example:
        ```python
        tracker = FlipTracker(unet)
        for batch in batches:
            step(batch)
            tracker.update()
        tracker.result().plot()
        ```
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str] | None = None) -> None:
        self._layers = chosen_layers(model, layers)
        self._start = self._snapshot()
        self._last = self._start
        self._steps: list[int] = []
        self._since_last: list[list[float]] = []
        self._since_start: list[list[float]] = []
        self._weights = [
            int(layer.weight.numel()) * bits.shape[0]
            for (_, layer), bits in zip(self._layers, self._start, strict=True)
        ]

    def update(self, step: int | None = None) -> float:
        """Compare the signs with those of the last update and of the start.

        Args:
            step: When this is; by default one more than the last.

        Returns:
            The share of all signs that changed since the last update.

        Raises:
            BinarizeError: If ``step`` is not after the last one.
        """
        last = self._steps[-1] if self._steps else 0
        step = last + 1 if step is None else step
        if self._steps and step <= last:
            raise BinarizeError(f"update: step {step} is not after the last one, {last}.")
        now = self._snapshot()
        flips = self._flips(self._last, now)
        self._steps.append(step)
        self._since_last.append([n / of for n, of in zip(flips, self._weights, strict=True)])
        self._since_start.append([n / of for n, of in zip(self._flips(self._start, now), self._weights, strict=True)])
        self._last = now
        return sum(flips) / sum(self._weights)

    def result(self) -> FlipRatios:
        """Return what was recorded so far."""
        shape = (len(self._steps), len(self._layers))
        return FlipRatios(
            layers=tuple(name for name, _ in self._layers),
            weights=np.array(self._weights, dtype=np.int64),
            steps=np.array(self._steps, dtype=np.int64),
            since_last=np.array(self._since_last, dtype=np.float64).reshape(shape),
            since_start=np.array(self._since_start, dtype=np.float64).reshape(shape),
        )

    def _snapshot(self) -> list[Tensor]:
        return [pack_bits(layer.binary_weight().codes) for _, layer in self._layers]

    @staticmethod
    def _flips(before: list[Tensor], after: list[Tensor]) -> list[int]:
        counts = [count_bits(old.to(new.device) ^ new) for old, new in zip(before, after, strict=True)]
        # One transfer for all layers: a synchronisation each would cost more than the counting.
        return torch.stack([count.to(counts[0].device) for count in counts]).tolist()


def count_bits(words: Tensor) -> Tensor:
    """Return how many bits of a uint8 tensor are set, as an int64 scalar tensor.

    Args:
        words: Any shape.
    """
    pairs = words - ((words >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(dtype=torch.int64)
