"""The results of a study: one row per cell, for the terminal and as Markdown, CSV, JSON and a plot."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from binarize.deprecation import renamed
from binarize.errors import BinarizeError
from binarize.evaluation.feature_names import INCEPTION_NAME
from binarize.evaluation.perceptual import lpips_label
from binarize.files import write_atomic, write_text_atomic
from binarize.studies.plot import draw, draw_steps
from binarize.tables import MISSING, Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table as RichTable

# Results that the recipes' published rows have for the whole network, with their units.
_PUBLISHED_SIZES = {"params": ("params_m", 1e6), "ops": ("ops_g", 1e9)}


@dataclass(frozen=True)
class RunResult:
    """One cell with one seed.

    Attributes:
        state: "done", "failed", "trained" (not yet measured), "step N", "to do", "other recipe" or "other images".
        params: Parameters; a binary weight counts 1/32.
        ops: Operations at 3x256x256; a binary MAC counts 1/64.
        psnr: In dB on Y; None if it is infinite or not measured.
        loss: Mean training loss of the last log entry.
        train_step_seconds: Median time of an optimiser step; ``sample_step_seconds`` of a denoising step of one image.
        published: The recipe's published row, if it has one.
        scores: For generation, the measures of `GenerationReport` by name and number of steps, such as "frechet_50".
    """

    cell: str
    seed: int
    folder: Path
    state: str
    params: float
    ops: float
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    loss: float | None = None
    train_step_seconds: float | None = None
    sample_step_seconds: float | None = None
    published: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    scores: dict[str, float] | None = None


@dataclass(frozen=True)
class AblationResult:
    """The table of a study, with a `RunResult` for each cell and seed in the study's order; ``rich.print`` shows it.

    ``dataset`` is the measured data set, if the study names it, ``lpips`` the backbone, and ``notes`` what is missing.
    A study of generation has the name of the ``features``, and the numbers of sampling ``steps``.
    """

    name: str
    description: str
    dataset: str | None
    lpips: str | None
    output_dir: Path
    runs: tuple[RunResult, ...]
    notes: tuple[str, ...] = ()
    features: str | None = None
    steps: tuple[int, ...] = ()

    @property
    def columns(self) -> dict[str, Column]:
        """The columns of the table by the keys of `values`, with units in the headings."""
        frechet = "FID" if self.features == INCEPTION_NAME else "FD"
        most = self.steps[-1:]
        return {
            "params": Column("params (M)", lambda value: f"{value / 1e6:.3f}"),
            "ops": Column("OPs (G)", lambda value: f"{value / 1e9:.3f}"),
            "psnr": Column("PSNR", ".2f"),
            "ssim": Column("SSIM", ".4f"),
            "lpips": Column("LPIPS" if self.lpips is None else lpips_label(self.lpips), ".4f"),
            **{
                f"frechet_{steps}": Column(f"{frechet}, {steps} step{'s' * (steps > 1)}", ".4g") for steps in self.steps
            },
            **{f"kid_{steps}": Column("KID", ".3g") for steps in most},
            **{f"{key}_{steps}": Column(key, ".3f") for key in ("precision", "recall") for steps in most},
            "loss": Column("loss", ".4f"),
            "train_step_seconds": Column("training step", _seconds),
            "sample_step_seconds": Column("sampling step", _seconds),
        }

    @property
    def trials(self) -> tuple[RunResult, ...]:
        """Deprecated: use `runs`."""
        warnings.warn("AblationResult.trials is now AblationResult.runs", DeprecationWarning, stacklevel=2)
        return self.runs

    @property
    def cells(self) -> list[str]:
        """The names of the cells."""
        return list(dict.fromkeys(run.cell for run in self.runs))

    @property
    def failed(self) -> list[RunResult]:
        """The runs that failed."""
        return [run for run in self.runs if run.error is not None]

    @property
    def complete(self) -> bool:
        """Whether every run is done."""
        return all(run.state == "done" for run in self.runs)

    def values(self, cell: str, key: str) -> list[float]:
        """Return the values of the seeds of a cell that have one.

        ``key`` is an attribute of `RunResult`, such as ``"psnr"``, or one of its ``scores``, such as ``"frechet_50"``.
        """
        if cell not in self.cells:
            raise BinarizeError(f"there is no cell {cell!r}; there are {', '.join(self.cells)}.")
        attribute = key in {item.name for item in fields(RunResult)}
        if not attribute and key not in (known := [*self.columns, *self._score_names()]):
            raise BinarizeError(f"there is no value {key!r}; there are {', '.join(dict.fromkeys(known))}.")
        runs = [run for run in self.runs if run.cell == cell]
        found = [getattr(run, key) if attribute else (run.scores or {}).get(key) for run in runs]
        return [value for value in found if value is not None]

    def _score_names(self) -> list[str]:
        return list(dict.fromkeys(key for run in self.runs for key in run.scores or {}))

    def published(self, cell: str, key: str) -> float | None:
        """Return the published value of an attribute of `RunResult`, for quality on the study's data set."""
        row = next(run.published for run in self.runs if run.cell == cell)
        if key in _PUBLISHED_SIZES:
            name, unit = _PUBLISHED_SIZES[key]
            return row[name] * unit if name in row else None
        # The paper's LPIPS uses AlexNet; values of other backbones are not comparable.
        if key == "lpips" and self.lpips != "alex":
            return None
        return row.get("results", {}).get(self.dataset, {}).get(key)

    def to_markdown(self) -> str:
        """Return the table, with mean and standard deviation over several seeds, and the notes."""
        description = f"{self.description}.\n\n" if self.description else ""
        notes = "".join(f"\n{note}\n" for note in self._footnotes())
        return f"# {self.name}\n\n{description}{self._table().to_markdown()}\n{notes}"

    def to_csv(self) -> str:
        """Return one line for each cell and seed, at full precision, times in seconds."""
        names = [item.name for item in fields(RunResult) if item.name not in ("folder", "published", "scores")]
        scores = self._score_names()
        rows = [
            [*(getattr(run, name) for name in names), *((run.scores or {}).get(key) for key in scores)]
            for run in self.runs
        ]
        return Table([*names, *scores], rows).to_csv()

    def to_json(self) -> str:
        """Return everything at full precision, times in seconds."""
        content = asdict(self)
        if not self.steps:
            content = {key: value for key, value in content.items() if key not in ("features", "steps")}
            content["runs"] = [{k: v for k, v in run.items() if k != "scores"} for run in content["runs"]]
        content["trials"] = content.pop("runs")  # the name in files of version 0.1
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"

    def table(self) -> RichTable:
        """Return a table for the terminal."""
        return self._table().to_rich(title=self.name, caption="\n".join(self._footnotes()) or None)

    def __rich__(self) -> RichTable:
        return self.table()

    def plot(self) -> Figure:
        """Return a figure with one panel per metric, a point per cell, and published values as diamonds.

        For several numbers of sampling steps, it is a line per cell.
        """
        return draw_steps(self) if len(self.steps) > 1 else draw(self)

    def save(self) -> list[Path]:
        """Write ``table.md``, ``table.csv``, ``table.json`` and, with matplotlib, ``table.png``, each atomically."""
        texts = {"md": self.to_markdown(), "csv": self.to_csv(), "json": self.to_json()}
        self.output_dir.mkdir(parents=True, exist_ok=True)
        written = [write_text_atomic(self.output_dir / f"table.{suffix}", text) for suffix, text in texts.items()]
        if _has_matplotlib():
            figure = self.plot()
            path = self.output_dir / "table.png"
            written.append(write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150), force=True))
        return written

    def _table(self) -> Table:
        """Return one row per cell, without columns that have no values."""
        headings = [Column("cell" if self.dataset is None else self.dataset)]
        rows = [[cell] for cell in self.cells]
        for key, column in self.columns.items():
            values = [self.values(cell, key) for cell in self.cells]
            published = [self.published(cell, key) for cell in self.cells]
            if not any(values):
                continue
            headings.append(Column(column.name, align="right"))
            for row, cell_values in zip(rows, values, strict=True):
                row.append(_mean_and_deviation(cell_values, column.text))
            if any(value is not None for value in published):
                headings.append(Column("published", align="right"))
                for row, value in zip(rows, published, strict=True):
                    row.append(column.text(value))
        if not self.complete:
            headings.append(Column("state", align="right"))
            for row in rows:
                states = [run.state for run in self.runs if run.cell == row[0]]
                row.append(", ".join(states) if len(set(states)) > 1 else states[0])
        return Table(headings, rows)

    def _footnotes(self) -> list[str]:
        seeds = list(dict.fromkeys(run.seed for run in self.runs))
        notes = [f"{note}." for note in self.notes]
        if self.steps:
            distances = f"Distances, precision and recall are those of features by {self.features}"
            notes.append(f"{distances}; KID, precision and recall are at {self.steps[-1]} steps.")
        if len(seeds) > 1:
            notes.append(f"Mean and standard deviation over the seeds {', '.join(map(str, seeds))}.")
        notes += [f"{run.cell}, seed {run.seed}, failed: {run.error}" for run in self.failed]
        if not _has_matplotlib():
            notes.append("The plot is left out; it needs matplotlib: pip install 'binarize-diffusion[plot]'.")
        return notes


def _mean_and_deviation(values: list[float], text: Callable[[float], str]) -> str:
    if len(set(values)) < 2:
        return text(values[0]) if values else MISSING
    return f"{text(fmean(values))} ± {text(stdev(values))}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


__getattr__ = renamed(__name__, {"TrialResult": "RunResult"})
