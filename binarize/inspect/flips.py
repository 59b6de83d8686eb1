"""How many binary weights change their sign during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from binarize.conversion.export import pack_bits
from binarize.errors import BinarizeError
from binarize.inspect.observe import select_layers
from binarize.inspect.plot import Axes, get_axes

Since = Literal["last", "start"]
_BITS_SET = torch.tensor([byte.bit_count() for byte in range(256)])


@dataclass(frozen=True)
class FlipRatios:
    """The share of binary weights whose sign changed, for S updates and L layers.

    ``weights``, (L,) int64, are the signs of each layer: two per weight in two-basis methods. ``steps`` are (S,) int64,
    the shares since the previous update and since the start (S, L) float64.
    """

    layers: tuple[str, ...]
    weights: np.ndarray
    steps: np.ndarray
    since_last: np.ndarray
    since_start: np.ndarray

    def overall(self, since: Since = "last") -> np.ndarray:
        """Return the share over all layers together, (S,) float64."""
        return self._ratios(since) @ self.weights / self.weights.sum()

    def plot(self, ax: Axes | None = None, *, since: Since = "last") -> Axes:
        """Draw the share over steps: a thin line for each layer, a thick one for all layers together."""
        ratios = self._ratios(since)
        ax = get_axes(ax)
        ax.plot(self.steps, ratios, linewidth=0.6, alpha=0.5)
        ax.plot(self.steps, self.overall(since), color="black", linewidth=2, label="all layers")
        start = "the previous update" if since == "last" else "the start"
        ax.set(xlabel="step", ylabel=f"signs flipped since {start}")
        ax.set_ylim(bottom=0)
        ax.legend()
        return ax

    def _ratios(self, since: str) -> np.ndarray:
        if since not in ("last", "start"):
            raise BinarizeError(f"since must be 'last' or 'start'; got {since!r}.")
        return self.since_last if since == "last" else self.since_start


class FlipTracker:
    """Follows the signs of a model's binary weights through training.

    Call `update` after each step (or every hundredth). The codes of the forward are compared, so a method that centres
    its weights before the sign is followed correctly. The model's device holds two snapshots of one bit per sign: that
    of the last update and that of the start.

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
        self._layers = select_layers(model, layers)
        self._start = self._last = self._snapshot()
        self._steps: list[int] = []
        self._flips: list[tuple[np.ndarray, np.ndarray]] = []  # since the last update, and since the start
        bases = [bits.shape[0] for bits in self._start]
        self._weights = np.array([layer.weight.numel() for _, layer in self._layers], dtype=np.int64) * bases

    def update(self, step: int | None = None) -> float:
        """Compare the signs at `step`, by default one more than the last; return the share that changed since then."""
        last = self._steps[-1] if self._steps else 0
        step = last + 1 if step is None else step
        if self._steps and step <= last:
            raise BinarizeError(f"update: step {step} is not after the last one, {last}.")
        now = self._snapshot()
        flips = _count_flips(self._last, now), _count_flips(self._start, now)
        self._steps.append(step)
        self._flips.append(flips)
        self._last = now
        return float(flips[0].sum() / self._weights.sum())

    def result(self) -> FlipRatios:
        """Return the ratios so far."""
        names = tuple(name for name, _ in self._layers)
        ratios = np.array(self._flips, dtype=np.int64).reshape(-1, 2, len(names)) / self._weights
        return FlipRatios(names, self._weights, np.array(self._steps, dtype=np.int64), ratios[:, 0], ratios[:, 1])

    def _snapshot(self) -> list[Tensor]:
        return [pack_bits(layer.binary_weight().codes) for _, layer in self._layers]


def count_bits(words: Tensor) -> Tensor:
    """Return the number of set bits of a uint8 tensor, as an int64 scalar tensor."""
    return _BITS_SET.to(words.device)[words.int()].sum()


def _count_flips(before: list[Tensor], after: list[Tensor]) -> np.ndarray:
    counts = [count_bits(old.to(new.device) ^ new) for old, new in zip(before, after, strict=True)]
    # One transfer for all layers: a synchronisation for each would cost more than the counting.
    return torch.stack([count.to(counts[0].device) for count in counts]).cpu().numpy()
