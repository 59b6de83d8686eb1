"""matplotlib, when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes(ax: Axes | None, **figure: Any) -> Axes:
    """Return the axes to draw on: the given ones, or those of a new pyplot figure.

    Raises:
        BinarizeError: If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise BinarizeError("plots need matplotlib: pip install 'binarize-diffusion[plot]'") from error
    if ax is not None:
        return ax
    _, created = pyplot.subplots(layout="constrained", **figure)
    return created


def name_layers(ax: Axes, names: tuple[str, ...]) -> None:
    """Label the horizontal axis by layer, or by number where names would not be legible."""
    if len(names) <= 40:
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        ax.set_xlabel("layer")
    else:
        ax.set_xlabel(f"layer (0 is {names[0]}, {len(names) - 1} is {names[-1]})")
