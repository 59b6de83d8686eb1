"""How many activations get no gradient through the sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from binarize.inspect.observe import Run, chosen_layers, observing, start, unreached
from binarize.inspect.plot import axes, name_layers
from binarize.layers import NormalizedApproxSign

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Saturation:
    """The share of saturated activations of L layers.

    Attributes:
        layers: Names of the layers.
        share: (L,) float64, the share of a layer's inputs at its sign whose surrogate gradient is zero.
        count: (L,) int64, how many inputs were seen.
    """

    layers: tuple[str, ...]
    share: np.ndarray
    count: np.ndarray

    @property
    def overall(self) -> float:
        """The share over all layers together."""
        return float(self.share @ self.count / self.count.sum())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw a bar a layer.

        Args:
            ax: Where to; by default on a new figure.

        Raises:
            BinarizeError: If matplotlib is missing.
        """
        ax = axes(ax, figsize=(max(6.4, 0.16 * len(self.layers)), 4.8))
        ax.bar(range(len(self.layers)), self.share)
        ax.axhline(self.overall, color="black", linewidth=1, label=f"all layers: {self.overall:.1%}")
        ax.set_ylim(0, 1)
        ax.set_ylabel("saturated activations")
        name_layers(ax, self.layers)
        ax.legend()
        return ax


def saturation(model: nn.Module, run: Run, *, layers: str | Sequence[str] | None = None) -> Saturation:
    """Measure for each binary layer which share of its activations is saturated: no gradient passes their sign.

    That is |x| > 1 for the clipped estimator and |x| >= 1 for ApproxSign, x being the input of the sign, shift
    included; outside [0, 1] for DoReFa; |x| >= 1 after normalisation for ReCU. An activation of your own is asked for
    its gradient, which must depend on each element alone. The sign of the identity estimator never saturates.

    Args:
        model: A converted model.
        run: See `Run`.
        layers: Globs on the names of binary layers; all by default.

    Raises:
        BinarizeError: If the model has no binary layer, a pattern matches none, or the run did not call one.
    """
    chosen = chosen_layers(model, layers)
    counts = {name: [0, 0] for name, _ in chosen}

    def look(held: list[int], activation: nn.Module, args: tuple[Any, ...]) -> None:
        held[0] += int(_dead(activation, args[0]).sum())
        held[1] += args[0].numel()

    with observing(model) as undo:
        for name, layer in chosen:
            undo.enter_context(layer.activation.register_forward_pre_hook(partial(look, counts[name])))
        start(model, run)
    for name, (_, seen) in counts.items():
        if not seen:
            raise unreached(name)
    return Saturation(
        layers=tuple(counts),
        share=np.array([dead / seen for dead, seen in counts.values()], dtype=np.float64),
        count=np.array([seen for _, seen in counts.values()], dtype=np.int64),
    )


def _dead(activation: nn.Module, x: Tensor) -> Tensor:
    if isinstance(activation, NormalizedApproxSign):
        # Its gradient also flows through the variance, which never makes it exactly zero.
        return activation.normalize(x).abs() >= 1
    with torch.inference_mode(False), torch.enable_grad():
        probe = x.detach().clone().requires_grad_()
        # `forward`, not a call: a call would run the hook that asks.
        (grad,) = torch.autograd.grad(activation.forward(probe).sum(), probe)
    return grad == 0
