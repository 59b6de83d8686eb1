"""Axes for plots; matplotlib is imported here alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
else:
    Axes = Any


def get_axes(ax: Axes | None, **figure: Any) -> Axes:
    """Return the given axes, or those of a new pyplot figure.

    Raises:
        BinarizeError: If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise BinarizeError("plots need matplotlib: pip install 'binarize-diffusion[plot]'") from error
    return pyplot.subplots(layout="constrained", **figure)[1] if ax is None else ax


def label_layers(ax: Axes, names: tuple[str, ...]) -> None:
    """Label the horizontal axis by layer names, or by numbers if names would not be legible."""
    if len(names) <= 40:
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        ax.set_xlabel("layer")
    else:
        ax.set_xlabel(f"layer (0 is {names[0]}, {len(names) - 1} is {names[-1]})")
