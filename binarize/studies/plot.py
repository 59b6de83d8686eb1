"""The plot of a study."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import TYPE_CHECKING

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from binarize.studies.results import AblationResult

# Keys of the panels, and the factors to the units of their titles where they are not 1.
_PANELS = ("psnr", "ssim", "lpips", "frechet", "kid", "precision", "recall", "params", "ops", "sample_step_seconds")
_FACTORS = {"params": 1e-6, "ops": 1e-9, "sample_step_seconds": 1e3}
_TITLES = {"psnr": "PSNR (dB)", "sample_step_seconds": "sampling step (ms)"}


def draw(result: AblationResult) -> Figure:
    """Return a figure with one panel per metric and a point per cell; error bars are deviations over the seeds."""
    cells, titles = result.cells, {key: column.name for key, column in result.columns.items()} | _TITLES
    keys = [key for name in _PANELS for key in titles if key in (name, *(f"{name}_{steps}" for steps in result.steps))]
    shown = [key for key in keys if any(result.values(cell, key) for cell in cells)]
    figure = _figure(2.4 * len(shown) + 1.5, 0.32 * len(cells) + 1.6)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, shown, strict=True):
        factor = _FACTORS.get(key, 1.0)
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


def draw_steps(result: AblationResult) -> Figure:
    """Return the Fréchet distance over the number of sampling steps, a line per cell; bars are deviations."""
    figure = _figure(6.5, 4.5)
    axes = figure.subplots()
    for cell in result.cells:
        measured = {steps: result.values(cell, f"frechet_{steps}") for steps in result.steps}
        found = {steps: values for steps, values in measured.items() if values}
        means = [fmean(values) for values in found.values()]
        bars = [stdev(values) if len(values) > 1 else 0.0 for values in found.values()]
        if found:
            axes.errorbar([*found], means, yerr=bars, fmt="o-", capsize=3, label=cell)
    if axes.containers:  # not if all runs failed
        axes.legend(fontsize=8)
    axes.set_xscale("log")
    axes.set_xticks(result.steps, [str(steps) for steps in result.steps])
    axes.minorticks_off()
    axes.set_xlabel("sampling steps")
    axes.set_ylabel(f"Fréchet distance ({result.features})")
    axes.grid(alpha=0.3)
    figure.suptitle(result.name)
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BinarizeError("plots need matplotlib: pip install 'binarize-diffusion[plot]'") from error
    # A figure of pyplot would stay in memory for the life of the process.
    return Figure(figsize=(width, height), layout="constrained")
