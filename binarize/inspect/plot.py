"""Axes for plots; matplotlib is imported here alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
else:
    Axes = Any


def get_axes(ax: Axes | None, **figure: Any) -> Axes:
    """Return the given axes, or those of a new pyplot figure."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise BinarizeError("plots need matplotlib: pip install 'binarize-diffusion[plot]'") from error
    return pyplot.subplots(layout="constrained", **figure)[1] if ax is None else ax
