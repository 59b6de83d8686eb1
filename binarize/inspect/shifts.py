"""What timestep-aware redistribution has learnt: a bias vector for each timestep group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from binarize.errors import BinarizeError, did_you_mean
from binarize.inspect.observe import chosen_layers
from binarize.inspect.plot import axes
from binarize.layers import Shift

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class TarBiases:
    """The biases that are added before the sign, of L layers.

    Attributes:
        biases: Layer name -> (K, C) float64, a row for each timestep group; K = 1 where the shift is shared over time.
        num_train_timesteps: T, or None where no layer knows the timestep.
    """

    biases: dict[str, np.ndarray]
    num_train_timesteps: int | None

    def plot(self, ax: Axes | None = None, *, layer: str | None = None) -> Axes:
        """Draw a box plot of the biases for each timestep group.

        Args:
            ax: Where to; by default on a new figure.
            layer: Whose biases; by default those of all layers together, which must then have the same K.

        Raises:
            BinarizeError: If matplotlib is missing, there is no such layer, or the layers differ in K.
        """
        rows = self._rows(layer)
        ax = axes(ax)
        groups = len(rows)
        ax.boxplot(list(rows), positions=range(groups), flierprops={"markersize": 2})
        ax.set_xticks(range(groups), [self._label(group, groups) for group in range(groups)])
        ax.axhline(0, color="gray", linewidth=0.5)
        ax.set_xlabel("timestep group")
        ax.set_ylabel("bias")
        ax.set_title(layer if layer is not None else f"{len(self.biases)} layers")
        return ax

    def _rows(self, layer: str | None) -> np.ndarray:
        if layer is not None:
            if layer not in self.biases:
                raise BinarizeError(
                    f"there are no biases of a layer {layer!r}; there are those of {', '.join(list(self.biases)[:4])}."
                    + did_you_mean(layer, self.biases)
                )
            return self.biases[layer]
        kinds = sorted({len(rows) for rows in self.biases.values()})
        if len(kinds) > 1:
            raise BinarizeError(
                f"the layers have different numbers of timestep groups ({', '.join(map(str, kinds))}), which one plot "
                "cannot show; name a layer: plot(layer=...)."
            )
        return np.concatenate(list(self.biases.values()), axis=1)

    def _label(self, group: int, groups: int) -> str:
        steps = self.num_train_timesteps
        if steps is None or groups == 1:
            return "all"
        first = [-(-k * steps // groups) for k in (group, group + 1)]
        return f"{first[0]}-{first[1] - 1}"


def tar_biases(model: nn.Module, layers: str | Sequence[str] | None = None) -> TarBiases:
    """Return the biases of timestep-aware redistribution (TaR), or of the plain shift that takes its place.

    Args:
        model: A converted model.
        layers: Globs on the names of binary layers; all by default.

    Raises:
        BinarizeError: If the model has no binary layer, a pattern matches none, or none of the layers has a shift.
    """
    found: dict[str, np.ndarray] = {}
    steps: int | None = None
    for name, layer in chosen_layers(model, layers):
        if isinstance(layer.pre, Shift):
            found[name] = layer.pre.bias.detach().double().cpu().numpy()
            if layer.pre.context is not None:
                steps = layer.pre.context.num_train_timesteps
    if not found:
        raise BinarizeError(
            "none of these binary layers has a shift before its sign; methods with one are bidiffsr (TaR), reactnet "
            'and bbcu, or any with the option pre="shift" or pre="tar".'
        )
    return TarBiases(found, steps)
