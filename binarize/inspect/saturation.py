"""How many activations get no gradient through the sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from binarize.inspect.observe import Run, execute, not_called, observing, select_layers
from binarize.inspect.plot import Axes, get_axes
from binarize.layers import NormalizedApproxSign


@dataclass(frozen=True)
class Saturation:
    """The share, (L,) float64, of the inputs of L layers' signs whose surrogate gradient is zero, and their count."""

    layers: tuple[str, ...]
    share: np.ndarray
    count: np.ndarray

    @property
    def overall(self) -> float:
        """The share over all layers together."""
        return float(self.share @ self.count / self.count.sum())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw one bar per layer."""
        ax = get_axes(ax, figsize=(max(6.4, 0.16 * len(self.layers)), 4.8))
        ax.bar(range(len(self.layers)), self.share)
        ax.axhline(self.overall, color="black", linewidth=1, label=f"all layers: {self.overall:.1%}")
        ax.set(ylim=(0, 1), ylabel="saturated activations")
        names = self.layers
        if len(names) <= 40:
            ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        ax.set_xlabel("layer" if len(names) <= 40 else f"layer (0 is {names[0]}, {len(names) - 1} is {names[-1]})")
        ax.legend()
        return ax


def saturation(model: nn.Module, run: Run, *, layers: str | Sequence[str] | None = None) -> Saturation:
    """Measure the share of each binary layer's activations that get no gradient through the sign.

    With x the input of the sign, after the shift, these are |x| > 1 for the clipped estimator, |x| >= 1 for ApproxSign,
    x outside [0, 1] for DoReFa, and |x| >= 1 after normalisation for ReCU. The gradient of any other activation is
    computed; it must depend on each element alone. The sign of the identity estimator never saturates.
    `layers` are globs on the names of binary layers, all by default.
    """
    chosen = select_layers(model, layers)
    counts = {name: [0, 0] for name, _ in chosen}

    def record(held: list[int], activation: nn.Module, args: tuple[Any, ...]) -> None:
        held[0] += int(_is_saturated(activation, args[0]).sum())
        held[1] += args[0].numel()

    with observing(model) as undo:
        for name, layer in chosen:
            undo.enter_context(layer.activation.register_forward_pre_hook(partial(record, counts[name])))
        execute(model, run)
    for name, (_, seen) in counts.items():
        if not seen:
            raise not_called(name)
    saturated, seen = np.array([*counts.values()], dtype=np.int64).T
    return Saturation(tuple(counts), saturated / seen, seen)


def _is_saturated(activation: nn.Module, x: Tensor) -> Tensor:
    if isinstance(activation, NormalizedApproxSign):
        # Its gradient also flows through the variance, so it is never exactly zero.
        return activation.normalize(x).abs() >= 1
    with torch.inference_mode(False), torch.enable_grad():
        probe = x.detach().clone().requires_grad_()
        # `forward`, because a call would run this hook again.
        (grad,) = torch.autograd.grad(activation.forward(probe).sum(), probe)
    return grad == 0
