"""How the input of a module is distributed over the timesteps of a diffusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from binarize.errors import BinarizeError
from binarize.inspect.observe import Run, find_module, observing, start, unreached
from binarize.inspect.plot import axes
from binarize.inspect.values import Distribution, Gathered
from binarize.timestep import TIMESTEP_NAMES, timestep_argument

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ActivationDistribution:
    """The distribution of a module's input at S timesteps.

    Attributes:
        module: Its name.
        timesteps: (S,) float64, rising.
        distributions: One a timestep.
    """

    module: str
    timesteps: np.ndarray
    distributions: tuple[Distribution, ...]

    def quantiles(self, q: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> np.ndarray:
        """Return quantiles of the sampled values, (S, len(q)) float64.

        Args:
            q: Each in [0, 1].
        """
        return np.stack([np.quantile(one.values.astype(np.float64), q) for one in self.distributions])

    def histogram(self, bins: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """Return histograms of the sampled values over one common range.

        Args:
            bins: How many.

        Returns:
            The bins' edges, (bins + 1,), and the densities, (S, bins).
        """
        low = min(one.values.min() for one in self.distributions)
        high = max(one.values.max() for one in self.distributions)
        edges = np.histogram_bin_edges(np.array([low, high], dtype=np.float64), bins)
        return edges, np.stack([np.histogram(one.values, edges, density=True)[0] for one in self.distributions])

    def plot(self, ax: Axes | None = None, *, boxes: int = 20) -> Axes:
        """Draw a box plot for each timestep, the whiskers at the 5th and the 95th percentile.

        Args:
            ax: Where to; by default on a new figure.
            boxes: Draw at most so many, evenly chosen.

        Raises:
            BinarizeError: If matplotlib is missing.
        """
        ax = axes(ax)
        count = len(self.timesteps)
        shown = np.unique(np.linspace(0, count - 1, min(boxes, count)).round().astype(int))
        # Boxes side by side: sampling timesteps may be crowded at one end.
        ax.boxplot(
            [self.distributions[i].values for i in shown], positions=range(len(shown)), whis=(5, 95), showfliers=False
        )
        ax.set_xticks(
            range(len(shown)), [f"{self.timesteps[i]:g}" for i in shown], rotation=90 if len(shown) > 10 else 0
        )
        ax.axhline(0, color="gray", linewidth=0.5)
        ax.set_xlabel("timestep")
        ax.set_ylabel("activation")
        ax.set_title(f"input of {self.module}")
        return ax


def activation_distribution(
    model: nn.Module, module: str, run: Run, *, samples: int = 10_000
) -> ActivationDistribution:
    """Record the input of a module, timestep by timestep.

    Args:
        model: A model with a timestep, converted or not; its ``forward`` is what ``run`` calls.
        module: The path of a module in it, such as "middle.0.conv1". The input of a binary layer is what comes before
            its shift; that of its "activation" ("middle.0.conv1.activation") is what its sign sees.
        run: See `Run`: to follow a sampling, ``lambda: pipe(picture)``. Batches may mix timesteps.
        samples: How many values of a picture and call are kept at most.

    Raises:
        BinarizeError: If the module or the model's timestep cannot be found, the run did not call the module, the
            module's input is no tensor or not one item a picture, or ``samples`` is less than 1.
    """
    watched = find_module(model, module, nn.Module)
    gathered: dict[float, Gathered] = {}
    now: list[float] = []
    Gathered(samples)

    def note(timesteps: Any) -> None:
        if not now:  # diffusers' class_embed_type="timestep" projects the class labels afterwards
            now[:] = torch.as_tensor(timesteps).detach().reshape(-1).tolist()

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            raise BinarizeError(f"{module!r} is not called with a tensor, so there is no activation to record.")
        if len(now) == 1:
            parts = [x]
        elif x.dim() and x.shape[0] == len(now):
            parts = list(x)
        else:
            raise BinarizeError(
                f"the input of {module!r} is {tuple(x.shape)} while the batch has {len(now)} timesteps; choose a "
                "module whose input has one item a picture, or run one timestep at a time."
            )
        for timestep, part in zip(now, parts, strict=True):
            gathered.setdefault(timestep, Gathered(samples)).add(part)

    with observing(model) as undo:
        undo.enter_context(model.register_forward_pre_hook(lambda *_: now.clear()))
        undo.enter_context(_on_timestep(model, note))
        undo.enter_context(watched.register_forward_pre_hook(look, with_kwargs=True))
        start(model, run)
    if not gathered:
        raise unreached(module)
    steps = sorted(gathered)
    return ActivationDistribution(
        module, np.array(steps, dtype=np.float64), tuple(gathered[step].result() for step in steps)
    )


def _on_timestep(model: nn.Module, note: Callable[[Any], None]) -> RemovableHandle:
    """Call ``note`` with the timesteps of each forward, before any layer that uses them runs."""
    time_proj = getattr(model, "time_proj", None)
    if isinstance(time_proj, nn.Module):
        return time_proj.register_forward_pre_hook(lambda _, args: note(args[0]))
    found = timestep_argument(model)
    if found is None:
        raise BinarizeError(
            f"{type(model).__name__} has no timestep: it has no `time_proj` module and its forward has none of the "
            f"arguments {', '.join(TIMESTEP_NAMES)}; a distribution over timesteps needs one."
        )
    name, position = found

    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in kwargs:
            note(kwargs[name])
        elif position < len(args):
            note(args[position])

    return model.register_forward_pre_hook(read, with_kwargs=True)
