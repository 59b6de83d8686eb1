"""What CS-Fusion does to the distributions of the two activations that it fuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from binarize.inspect.observe import Run, find_module, observing, start, unreached
from binarize.inspect.plot import axes
from binarize.inspect.values import Distribution, Gathered
from binarize.layers import AddFusion, CSFusion

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class FusionDistributions:
    """The distributions around one CS-Fusion.

    Attributes:
        module: Its name.
        hidden: The decoder's activation, as it comes in.
        skip: The encoder's activation, as it comes in.
        mixed: What each of its convolutions gets: channels of both.
        fused: Its output.
        added: What the plain sum of hidden and skip would be.
    """

    module: str
    hidden: Distribution
    skip: Distribution
    mixed: tuple[Distribution, ...]
    fused: Distribution
    added: Distribution

    def plot(self, ax: Axes | None = None, *, bins: int = 100) -> Axes:
        """Draw the densities: inputs solid, mixed inputs dashed, the fused output and the plain sum thick.

        Args:
            ax: Where to; by default on a new figure.
            bins: Of the range from the 0.1st to the 99.9th percentile of all.

        Raises:
            BinarizeError: If matplotlib is missing.
        """
        ax = axes(ax)
        curves: list[tuple[str, Distribution, dict[str, Any]]] = [
            ("hidden", self.hidden, {"color": "tab:blue"}),
            ("skip", self.skip, {"color": "tab:orange"}),
            *(
                (f"mixed {number}", one, {"color": "tab:green", "linestyle": "--"})
                for number, one in enumerate(self.mixed, 1)
            ),
            ("fused", self.fused, {"color": "tab:red", "linewidth": 2}),
            ("hidden + skip", self.added, {"color": "black", "linewidth": 2}),
        ]
        every = np.concatenate([one.values for _, one, _ in curves]).astype(np.float64)
        edges = np.histogram_bin_edges(np.quantile(every, (0.001, 0.999)), bins)
        for label, one, style in curves:
            density = np.histogram(one.values, edges)[0] / len(one.values) / np.diff(edges)
            ax.plot((edges[:-1] + edges[1:]) / 2, density, label=f"{label} (std {one.std:.3g})", **style)
        ax.set_xlabel("activation")
        ax.set_ylabel("density")
        ax.set_title(self.module)
        ax.legend()
        return ax


def fusion_distributions(model: nn.Module, module: str, run: Run, *, samples: int = 10_000) -> FusionDistributions:
    """Record what goes into a CS-Fusion and what comes out, beside what an addition would give.

    Args:
        model: A model with CS-Fusions, converted or not.
        module: The path of one, such as "decoder.2.blocks.0.fusion".
        run: See `Run`.
        samples: How many values of each call are kept at most.

    Raises:
        BinarizeError: If there is no such CS-Fusion (those there are get named), the run did not call it, or
            ``samples`` is less than 1.
    """
    fusion = find_module(model, module, CSFusion)
    addition = AddFusion(fusion.hidden_channels, fusion.skip_channels, fusion.out_channels)
    hidden, skip, fused, added = (Gathered(samples) for _ in range(4))
    mixed = [Gathered(samples) for _ in range(fusion.terms)]

    def look(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0]
        hidden.add(x[:, : fusion.hidden_channels])
        skip.add(x[:, fusion.hidden_channels :])
        for gathered, part in zip(mixed, fusion.mix(x), strict=True):
            gathered.add(part)
        fused.add(output)
        added.add(addition(x))

    with observing(model) as undo:
        undo.enter_context(fusion.register_forward_hook(look))
        start(model, run)
    if not fused.count:
        raise unreached(module)
    return FusionDistributions(
        module,
        hidden.result(),
        skip.result(),
        tuple(one.result() for one in mixed),
        fused.result(),
        added.result(),
    )
