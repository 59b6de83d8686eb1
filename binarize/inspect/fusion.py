"""The distributions of the two activations that CS-Fusion fuses, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from binarize.inspect.distribution import Distribution, DistributionMeter
from binarize.inspect.observe import Run, execute, find_module, not_called, observing
from binarize.inspect.plot import Axes, get_axes
from binarize.layers import AddFusion, CSFusion


@dataclass(frozen=True)
class FusionDistributions:
    """The distributions around one CS-Fusion.

    ``hidden`` is the decoder's activation, ``skip`` the encoder's, ``mixed`` the inputs of the convolutions, with
    channels of both, ``fused`` the output, and ``added`` the plain sum of hidden and skip, for comparison.
    """

    module: str
    hidden: Distribution
    skip: Distribution
    mixed: tuple[Distribution, ...]
    fused: Distribution
    added: Distribution

    def plot(self, ax: Axes | None = None, *, bins: int = 100) -> Axes:
        """Draw the densities between the 0.1st and the 99.9th percentile of all values."""
        ax = get_axes(ax)
        curves: list[tuple[str, Distribution, dict[str, Any]]] = [
            ("hidden", self.hidden, {"color": "tab:blue"}),
            ("skip", self.skip, {"color": "tab:orange"}),
            *((f"mixed {n}", one, {"color": "tab:green", "linestyle": "--"}) for n, one in enumerate(self.mixed, 1)),
            ("fused", self.fused, {"color": "tab:red", "linewidth": 2}),
            ("hidden + skip", self.added, {"color": "black", "linewidth": 2}),
        ]
        values = np.concatenate([one.values for _, one, _ in curves]).astype(np.float64)
        edges = np.histogram_bin_edges(np.quantile(values, (0.001, 0.999)), bins)
        for label, one, style in curves:
            density = np.histogram(one.values, edges)[0] / len(one.values) / np.diff(edges)
            ax.plot((edges[:-1] + edges[1:]) / 2, density, label=f"{label} (std {one.std:.3g})", **style)
        ax.set(xlabel="activation", ylabel="density", title=self.module)
        ax.legend()
        return ax


def fusion_distributions(model: nn.Module, module: str, run: Run, *, samples: int = 10_000) -> FusionDistributions:
    """Record the inputs and the output of a CS-Fusion, and the output that an addition would give.

    `module` is the path of one, such as "decoder.2.blocks.0.fusion". At most `samples` values of each call are kept.
    """
    fusion = find_module(model, module, CSFusion)
    addition = AddFusion(fusion.hidden_channels, fusion.skip_channels, fusion.out_channels)
    hidden, skip, fused, added = meters = [DistributionMeter(samples) for _ in range(4)]
    mixed = [DistributionMeter(samples) for _ in range(fusion.terms)]

    def record(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0]
        parts = (x[:, : fusion.hidden_channels], x[:, fusion.hidden_channels :], output, addition(x), *fusion.mix(x))
        for meter, part in zip([*meters, *mixed], parts, strict=True):
            meter.add(part)

    with observing(model) as undo:
        undo.enter_context(fusion.register_forward_hook(record))
        execute(model, run)
    if not fused.count:
        raise not_called(module)
    between = tuple(meter.result() for meter in mixed)
    return FusionDistributions(module, hidden.result(), skip.result(), between, fused.result(), added.result())
