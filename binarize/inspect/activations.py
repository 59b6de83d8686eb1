"""The distribution of a module's input over the timesteps of a diffusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from binarize.errors import BinarizeError
from binarize.inspect.distribution import Distribution, DistributionMeter
from binarize.inspect.observe import Run, execute, find_module, not_called, observing
from binarize.inspect.plot import Axes, get_axes
from binarize.timestep_argument import TIMESTEP_NAMES, timestep_argument


@dataclass(frozen=True)
class ActivationDistribution:
    """The distribution of a module's input at S timesteps: (S,) float64, ascending."""

    module: str
    timesteps: np.ndarray
    distributions: tuple[Distribution, ...]

    def quantiles(self, q: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> np.ndarray:
        """Return quantiles of the sampled values, (S, len(q)) float64, each `q` in [0, 1]."""
        return np.stack([np.quantile(one.values.astype(np.float64), q) for one in self.distributions])

    def histogram(self, bins: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """Return histograms of the sampled values over a common range: edges (bins + 1,) and densities (S, bins)."""
        every = np.concatenate([one.values for one in self.distributions]).astype(np.float64)
        edges = np.histogram_bin_edges(every, bins)
        return edges, np.stack([np.histogram(one.values, edges, density=True)[0] for one in self.distributions])

    def plot(self, ax: Axes | None = None, *, boxes: int = 20) -> Axes:
        """Draw a box plot for each of at most `boxes` timesteps, with whiskers at the 5th and 95th percentile."""
        ax = get_axes(ax)
        count = len(self.timesteps)
        shown = np.unique(np.linspace(0, count - 1, min(boxes, count)).round().astype(int))
        # Equidistant boxes, because sampling timesteps may be crowded at one end.
        values = [self.distributions[i].values for i in shown]
        ax.boxplot(values, positions=range(len(shown)), whis=(5, 95), showfliers=False)
        rotation = 90 if len(shown) > 10 else 0
        ax.set_xticks(range(len(shown)), [f"{self.timesteps[i]:g}" for i in shown], rotation=rotation)
        ax.axhline(0, color="gray", linewidth=0.5)
        ax.set(xlabel="timestep", ylabel="activation", title=f"input of {self.module}")
        return ax


def activation_distribution(
    model: nn.Module, module: str, run: Run, *, samples: int = 10_000
) -> ActivationDistribution:
    """Record the input of a module for each timestep.

    `module` is a path in the model, such as "middle.0.conv1". The input of a binary layer comes before its shift; the
    input of its "activation" ("middle.0.conv1.activation") is the input of its sign. ``run=lambda: pipe(image)``
    follows a sampling. Batches may mix timesteps. At most `samples` values are kept per image and call.
    """
    watched = find_module(model, module, nn.Module)
    meters: dict[float, DistributionMeter] = {}
    current: list[float] = []
    DistributionMeter(samples)  # checks samples

    def note_timesteps(timesteps: Any) -> None:
        if not current:  # diffusers' class_embed_type="timestep" projects the class labels afterwards
            current[:] = torch.as_tensor(timesteps).detach().reshape(-1).tolist()

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            raise BinarizeError(f"{module!r} is not called with a tensor, so there is no activation to record.")
        if len(current) != 1 and not (x.dim() and x.shape[0] == len(current)):
            shape = f"the input of {module!r} is {tuple(x.shape)} while the batch has {len(current)} timesteps"
            raise BinarizeError(f"{shape}; choose a module with one item per image, or run one timestep at a time.")
        for timestep, part in zip(current, [x] if len(current) == 1 else x, strict=True):
            meters.setdefault(timestep, DistributionMeter(samples)).add(part)

    with observing(model) as undo:
        undo.enter_context(model.register_forward_pre_hook(lambda *_: current.clear()))
        undo.enter_context(_on_timestep(model, note_timesteps))
        undo.enter_context(watched.register_forward_pre_hook(record, with_kwargs=True))
        execute(model, run)
    if not meters:
        raise not_called(module)
    timesteps, distributions = zip(*((key, meters[key].result()) for key in sorted(meters)), strict=True)
    return ActivationDistribution(module, np.array(timesteps, dtype=np.float64), distributions)


def _on_timestep(model: nn.Module, note: Callable[[Any], None]) -> RemovableHandle:
    """Call `note` with the timesteps of each forward, before any layer that uses them runs."""
    time_proj = getattr(model, "time_proj", None)
    if isinstance(time_proj, nn.Module):
        return time_proj.register_forward_pre_hook(lambda _, args: note(args[0]))
    found = timestep_argument(model)
    if found is None:
        what = f"no `time_proj` module, and no argument of its forward is {' or '.join(TIMESTEP_NAMES)}"
        raise BinarizeError(f"{type(model).__name__} has no timestep: {what}; a distribution over timesteps needs one.")
    name, position = found

    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in kwargs:
            note(kwargs[name])
        elif position < len(args):
            note(args[position])

    return model.register_forward_pre_hook(read, with_kwargs=True)
