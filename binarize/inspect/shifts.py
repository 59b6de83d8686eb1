"""The biases of timestep-aware redistribution (TaR), one vector per timestep group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from binarize.errors import BinarizeError, did_you_mean
from binarize.inspect.observe import select_layers
from binarize.inspect.plot import Axes, get_axes
from binarize.layers import Shift


@dataclass(frozen=True)
class TarBiases:
    """The biases that layers add before the sign: by name, (K, C) float64 for K timestep groups.

    K is 1 if all timesteps share the shift; ``num_train_timesteps`` is None if no layer counts steps.
    """

    biases: dict[str, np.ndarray]
    num_train_timesteps: int | None

    def plot(self, ax: Axes | None = None, *, layer: str | None = None) -> Axes:
        """Draw a box plot of the biases for each timestep group, of one layer or of all, which must have the same K."""
        values = self._values(layer)
        ax = get_axes(ax)
        groups = len(values)
        ax.boxplot(list(values), positions=range(groups), flierprops={"markersize": 2})
        ax.set_xticks(range(groups), [self._label(group, groups) for group in range(groups)])
        ax.axhline(0, color="gray", linewidth=0.5)
        ax.set(xlabel="timestep group", ylabel="bias", title=layer or f"{len(self.biases)} layers")
        return ax

    def _values(self, layer: str | None) -> np.ndarray:
        if layer is not None:
            if layer not in self.biases:
                some = f"{', '.join([*self.biases][:4])}.{did_you_mean(layer, self.biases)}"
                raise BinarizeError(f"there are no biases of a layer {layer!r}; layers with biases: {some}")
            return self.biases[layer]
        groups = sorted({len(values) for values in self.biases.values()})
        if len(groups) > 1:
            found = ", ".join(map(str, groups))
            raise BinarizeError(f"the layers have different numbers of timestep groups ({found}); use plot(layer=...).")
        return np.concatenate([*self.biases.values()], axis=1)

    def _label(self, group: int, groups: int) -> str:
        steps = self.num_train_timesteps
        if groups == 1:
            return "all"
        if steps is None:  # positions between clean data and noise
            return f"{group / groups:.2g}-{(group + 1) / groups:.2g}"
        first, end = (-(-k * steps // groups) for k in (group, group + 1))
        return f"{first}-{end - 1}"


def tar_biases(model: nn.Module, layers: str | Sequence[str] | None = None) -> TarBiases:
    """Return the biases of timestep-aware redistribution (TaR), or of a plain shift in its place.

    `layers` are globs on the names of binary layers, all by default.
    """
    shifts = {name: layer.pre for name, layer in select_layers(model, layers) if isinstance(layer.pre, Shift)}
    if not shifts:
        fix = 'use bidiffsr (TaR), reactnet or bbcu, or the option pre="shift" or pre="tar" of another method'
        raise BinarizeError(f"none of these binary layers has a shift before its sign; {fix}.")
    contexts = [shift.context for shift in shifts.values() if shift.context is not None]
    steps = [context.num_train_timesteps for context in contexts if context.timestep.needs_steps]
    biases = {name: shift.bias.detach().double().cpu().numpy() for name, shift in shifts.items()}
    return TarBiases(biases, steps[-1] if steps else None)
