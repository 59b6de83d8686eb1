"""What an evaluation found, for the terminal and as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from binarize.errors import BinarizeError
from binarize.evaluation.perceptual import lpips_label
from binarize.imaging import write_atomic

if TYPE_CHECKING:
    from rich.table import Table

BASELINE = "bicubic"


@dataclass(frozen=True)
class Scores:
    """PSNR in dB and SSIM on Y, and LPIPS where it was computed."""

    psnr: float
    ssim: float
    lpips: float | None = None


@dataclass(frozen=True)
class ImageScores:
    """One picture's scores, or the mean of all.

    Attributes:
        picture: The file's name without its suffix, or ``mean``.
        model: The scores of what was evaluated.
        bicubic: Those of :func:`binarize.imaging.upscale_bicubic`, where the baseline was asked for.
        seconds: Wall time of the enlargement by the model.
    """

    picture: str
    model: Scores
    bicubic: Scores | None
    seconds: float


@dataclass(frozen=True)
class EvaluationReport:
    """Scores per picture and their mean; ``print`` it with rich for a table.

    Attributes:
        rows: One entry a picture, in the order of evaluation; at least one.
        scale: The enlargement.
        border: Pixels shaved off each side before measuring.
        lpips: The backbone of LPIPS, or None where there is no LPIPS.
        name: What was evaluated.
        notes: What was left out and how to get it, a line each.
    """

    rows: tuple[ImageScores, ...]
    scale: int
    border: int
    lpips: str | None
    name: str = "model"
    notes: tuple[str, ...] = ()

    @property
    def mean(self) -> ImageScores:
        """The mean over the pictures, each counting the same."""
        baseline = [row.bicubic for row in self.rows if row.bicubic is not None]
        return ImageScores(
            "mean",
            _mean([row.model for row in self.rows]),
            _mean(baseline) if baseline else None,
            fmean(row.seconds for row in self.rows),
        )

    def to_json(self) -> str:
        """Return all figures at full precision; an infinite PSNR, of equal pictures, is null."""
        content = {
            "name": self.name,
            "scale": self.scale,
            "border": self.border,
            "notes": list(self.notes),
            "mean": self._entry(self.mean),
            "pictures": [{"picture": row.picture, **self._entry(row)} for row in self.rows],
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Return a line a picture and one for the mean, at full precision."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["picture", *self._headings(), "seconds"])
        for row in (*self.rows, self.mean):
            writer.writerow(
                [row.picture, *("" if value is None else value for value in self._values(row)), row.seconds]
            )
        return text.getvalue()

    def to_markdown(self) -> str:
        """Return a table with the precision that papers print, and the notes below it."""
        headings = ["picture", *self._headings()]
        lines = [f"{self._title()}.", "", _line(headings), _line(["---", *["---:"] * (len(headings) - 1)])]
        lines += [_line(self._cells(row)) for row in self.rows]
        lines.append(_line([f"**{cell}**" for cell in self._cells(self.mean)]))
        lines += [line for note in self.notes for line in ("", f"Note: {note}.")]
        return "\n".join(lines) + "\n"

    def table(self) -> Table:
        """Return a table for the terminal."""
        from rich.table import Table

        table = Table(title=self._title(), caption="\n".join(f"{note}." for note in self.notes) or None)
        table.add_column("picture")
        for heading in self._headings():
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(*self._cells(row))
        table.add_section()
        table.add_row(*self._cells(self.mean), style="bold")
        return table

    def __rich__(self) -> Table:
        return self.table()

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
        """Write ``evaluation.json``, ``evaluation.csv`` and ``evaluation.md``, each atomically.

        Args:
            folder: Created if it is missing.
            force: Replace files that are already there.

        Raises:
            BinarizeError: If the folder cannot be made, or a file exists and ``force`` is not given; then none is
                written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BinarizeError(f"{folder}: cannot be made a folder: {error.strerror}") from error
        texts = {
            folder / "evaluation.json": self.to_json(),
            folder / "evaluation.csv": self.to_csv(),
            folder / "evaluation.md": self.to_markdown(),
        }
        there = [path for path in texts if path.exists()]
        if there and not force:
            raise BinarizeError(f"{there[0]}: already exists; give another folder, or force to replace it")
        return [write_atomic(path, partial(_write_text, text=text), force=force) for path, text in texts.items()]

    def _title(self) -> str:
        return f"{self.name}, x{self.scale}: PSNR and SSIM on Y, {self.border} pixels shaved off each side"

    def _metrics(self) -> list[str]:
        return ["PSNR", "SSIM"] + ([] if self.lpips is None else [lpips_label(self.lpips)])

    def _headings(self) -> list[str]:
        baseline = self.rows[0].bicubic is not None
        return self._metrics() + ([f"{BASELINE} {metric}" for metric in self._metrics()] if baseline else [])

    def _values(self, row: ImageScores) -> list[float | None]:
        every = [scores for scores in (row.model, row.bicubic) if scores is not None]
        return [value for scores in every for value in self._numbers(scores)]

    def _numbers(self, scores: Scores) -> list[float | None]:
        return [scores.psnr, scores.ssim] + ([] if self.lpips is None else [scores.lpips])

    def _cells(self, row: ImageScores) -> list[str]:
        values = zip(self._headings(), self._values(row), strict=True)
        return [row.picture] + [
            "-" if value is None else f"{value:.2f}" if "PSNR" in heading else f"{value:.4f}"
            for heading, value in values
        ]

    def _entry(self, row: ImageScores) -> dict[str, Any]:
        entry: dict[str, Any] = {"seconds": row.seconds, "model": self._named(row.model)}
        if row.bicubic is not None:
            entry[BASELINE] = self._named(row.bicubic)
        return entry

    def _named(self, scores: Scores) -> dict[str, float | None]:
        values = zip(self._metrics(), self._numbers(scores), strict=True)
        return {metric: value if value is not None and math.isfinite(value) else None for metric, value in values}


def _mean(scores: list[Scores]) -> Scores:
    perceptual = [one.lpips for one in scores if one.lpips is not None]
    return Scores(
        fmean(one.psnr for one in scores),
        fmean(one.ssim for one in scores),
        fmean(perceptual) if perceptual else None,
    )


def _line(cells: list[str]) -> str:
    # A file's name may hold the sign that parts the cells.
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _write_text(path: Path, *, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
