"""The plot of a study."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from binarize.studies.results import AblationResult

# Attribute of `RunResult` -> factor to the unit of the panel's title.
_PANELS = {"psnr": 1.0, "ssim": 1.0, "lpips": 1.0, "params": 1e-6, "ops": 1e-9, "sample_step_seconds": 1e3}
_TITLES = {"psnr": "PSNR (dB)", "sample_step_seconds": "sampling step (ms)"}


def draw(result: AblationResult, headings: Mapping[str, str]) -> Figure:
    """Return a figure with one panel per metric and a point per cell; error bars are deviations over the seeds.

    ``headings`` are the titles of the panels by attribute of `RunResult`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BinarizeError("plots need matplotlib: pip install 'binarize-diffusion[plot]'") from error
    cells, titles = result.cells, {**headings, **_TITLES}
    shown = [key for key in _PANELS if any(result.values(cell, key) for cell in cells)]
    # A figure of pyplot would stay in memory for the life of the process.
    figure = Figure(figsize=(2.4 * len(shown) + 1.5, 0.32 * len(cells) + 1.6), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, shown, strict=True):
        factor = _PANELS[key]
        for row, cell in enumerate(cells):
            values = [value * factor for value in result.values(cell, key)]
            if values:
                deviation = stdev(values) if len(values) > 1 else None
                panel.errorbar(fmean(values), row, xerr=deviation, fmt="o", color="tab:blue", label="measured")
            published = result.published(cell, key)
            if published is not None:
                panel.plot(published * factor, row, "D", color="tab:orange", fillstyle="none", label="published")
        panel.set_title(titles[key], fontsize=10)
        panel.set_yticks(range(len(cells)), cells)
        panel.grid(alpha=0.3)
        panel.margins(x=0.2)
    panels[0].set_ylim(len(cells) - 0.5, -0.5)
    marks = {label: mark for panel in panels for mark, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if "published" in marks:
        figure.legend(list(marks.values()), list(marks), loc="outside lower center", ncols=len(marks))
    figure.suptitle(result.name)
    return figure
