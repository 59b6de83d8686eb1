"""What a study found: one row a cell, for the terminal and as Markdown, CSV, JSON and a plot."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from binarize.errors import BinarizeError
from binarize.imaging import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True)
class TrialResult:
    """One cell with one seed.

    Attributes:
        cell: The cell.
        seed: The seed.
        folder: Where its run is.
        state: "done", "failed", "trained" (but not measured), "step N" (begun), "to do", or "other recipe".
        params: Parameters, a binary weight as 1/32.
        ops: Operations at 3x256x256, a binary MAC as 1/64.
        psnr: In dB on Y; None where it is infinite or not measured.
        ssim: On Y.
        lpips: On RGB.
        loss: Mean training loss since the log entry before the last.
        train_step_seconds: Median time of an optimiser step.
        sample_step_seconds: Median time of a denoising step of one picture.
        published: The recipe's published row, if it has one.
        error: Why it failed.
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


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: Name of the attribute of `TrialResult`.
        heading: What is printed.
        form: From the number to the text.
        published: Where the published figure is: a key of the row, or of its results on the data set.
    """

    key: str
    heading: str
    form: Callable[[float], str]
    published: str | None = None


def columns(lpips: str | None) -> list[Column]:
    """Return the columns, LPIPS labelled by its backbone."""
    return [
        Column("params", "params (M)", lambda value: f"{value / 1e6:.3f}", "params_m"),
        Column("ops", "OPs (G)", lambda value: f"{value / 1e9:.3f}", "ops_g"),
        Column("psnr", "PSNR", lambda value: f"{value:.2f}", "psnr"),
        Column("ssim", "SSIM", lambda value: f"{value:.4f}", "ssim"),
        Column("lpips", "LPIPS" if lpips is None else f"LPIPS ({lpips})", lambda value: f"{value:.4f}", "lpips"),
        Column("loss", "loss", lambda value: f"{value:.4f}"),
        Column("train_step_seconds", "training step", _seconds),
        Column("sample_step_seconds", "sampling step", _seconds),
    ]


@dataclass(frozen=True)
class AblationResult:
    """The table of a study; ``print`` it with rich.

    Attributes:
        name: The study.
        description: In one line.
        dataset: What it was measured on, where the study names it.
        lpips: The backbone of LPIPS.
        output_dir: Where the runs and the table are.
        trials: One `TrialResult` for each cell and seed, in the study's order.
        notes: What was left out and how to get it.
    """

    name: str
    description: str
    dataset: str | None
    lpips: str | None
    output_dir: Path
    trials: tuple[TrialResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def cells(self) -> list[str]:
        """The names of the cells."""
        return list(dict.fromkeys(trial.cell for trial in self.trials))

    @property
    def failed(self) -> list[TrialResult]:
        """The runs that failed."""
        return [trial for trial in self.trials if trial.error is not None]

    @property
    def complete(self) -> bool:
        """Whether every run is done."""
        return all(trial.state == "done" for trial in self.trials)

    def values(self, cell: str, key: str) -> list[float]:
        """Return one figure of a cell for each seed that has it.

        Args:
            cell: The cell's name.
            key: An attribute of `TrialResult`, such as ``"psnr"``.

        Raises:
            BinarizeError: If there is no such cell.
        """
        if cell not in self.cells:
            raise BinarizeError(f"there is no cell {cell!r}; there are {', '.join(self.cells)}.")
        found = [getattr(trial, key) for trial in self.trials if trial.cell == cell]
        return [value for value in found if value is not None]

    def published(self, cell: str, column: Column) -> float | None:
        """Return the published figure of a cell, the qualities those on the study's data set."""
        row = next(trial.published for trial in self.trials if trial.cell == cell)
        if column.published is None:
            return None
        if column.published in ("params_m", "ops_g"):
            unit = 1e6 if column.published == "params_m" else 1e9
            return row[column.published] * unit if column.published in row else None
        found = row.get("results", {}).get(self.dataset, {}).get(column.published)
        # The paper's LPIPS is AlexNet's; another backbone's is another quantity.
        return None if column.key == "lpips" and self.lpips != "alex" else found

    def to_markdown(self) -> str:
        """Return the table, a mean and the deviation over the seeds where there are several, and the notes."""
        heading, rows = self._table()
        lines = [f"# {self.name}", "", *([f"{self.description}.", ""] if self.description else [])]
        lines += [_line(heading), _line(["---", *["---:"] * (len(heading) - 1)]), *map(_line, rows)]
        for note in self._footnotes():
            lines += ["", note]
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """Return a line for each cell and seed, at full precision, times in seconds."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [item.name for item in fields(TrialResult) if item.name not in ("folder", "published")]
        writer.writerow(names)
        for trial in self.trials:
            writer.writerow(["" if (value := getattr(trial, name)) is None else value for name in names])
        return text.getvalue()

    def to_json(self) -> str:
        """Return everything at full precision, times in seconds."""
        content = asdict(self)
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"

    def table(self) -> Table:
        """Return a table for the terminal."""
        from rich.table import Table

        heading, rows = self._table()
        table = Table(title=self.name, caption="\n".join(self._footnotes()) or None)
        for number, name in enumerate(heading):
            table.add_column(name, justify="right" if number else "left", no_wrap=not number)
        for row in rows:
            table.add_row(*row)
        return table

    def __rich__(self) -> Table:
        return self.table()

    def plot(self) -> Figure:
        """Return a figure with one panel a quantity, a point a cell, and the published figures as diamonds.

        Raises:
            BinarizeError: If matplotlib is missing.
        """
        from binarize.studies.plot import draw

        return draw(self)

    def save(self) -> list[Path]:
        """Write ``table.md``, ``table.csv``, ``table.json`` and, with matplotlib, ``table.png`` into ``output_dir``.

        Earlier ones are replaced, each atomically.

        Raises:
            BinarizeError: If one cannot be written.
        """
        texts = {"table.md": self.to_markdown(), "table.csv": self.to_csv(), "table.json": self.to_json()}
        self.output_dir.mkdir(parents=True, exist_ok=True)
        written = [
            write_atomic(self.output_dir / name, partial(_write, text=text), force=True) for name, text in texts.items()
        ]
        if _has_matplotlib():
            figure = self.plot()
            path = self.output_dir / "table.png"
            written.append(write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150), force=True))
        return written

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Return the headings and the rows, columns without any figure left out."""
        shown = [c for c in columns(self.lpips) if any(self.values(cell, c.key) for cell in self.cells)]
        beside = {c.key for c in shown if any(self.published(cell, c) is not None for cell in self.cells)}
        heading = [self.dataset if self.dataset is not None else "cell"]
        for column in shown:
            heading += [column.heading, *(["published"] if column.key in beside else [])]
        rows = []
        for cell in self.cells:
            row = [cell]
            for column in shown:
                row.append(_spread(self.values(cell, column.key), column.form))
                if column.key in beside:
                    value = self.published(cell, column)
                    row.append("-" if value is None else column.form(value))
            rows.append(row)
        if not self.complete:
            heading.append("state")
            for cell, row in zip(self.cells, rows, strict=True):
                states = [trial.state for trial in self.trials if trial.cell == cell]
                row.append(", ".join(states) if len(set(states)) > 1 else states[0])
        return heading, rows

    def _footnotes(self) -> list[str]:
        seeds = list(dict.fromkeys(trial.seed for trial in self.trials))
        notes = [f"{note}." for note in self.notes]
        if len(seeds) > 1:
            notes.append(f"Mean and standard deviation over the seeds {', '.join(map(str, seeds))}.")
        notes += [f"{trial.cell}, seed {trial.seed}, failed: {trial.error}" for trial in self.failed]
        if not _has_matplotlib():
            notes.append("The plot is left out; it needs matplotlib: pip install 'binarize-diffusion[plot]'.")
        return notes


def _spread(values: list[float], form: Callable[[float], str]) -> str:
    if not values:
        return "-"
    if len(values) == 1 or len(set(values)) == 1:
        return form(values[0])
    return f"{form(fmean(values))} ± {form(stdev(values))}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _line(cells: list[str]) -> str:
    # A cell's name may hold the sign that parts the cells.
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _write(path: Path, *, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
