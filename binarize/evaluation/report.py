"""The results of an evaluation, for the terminal and as JSON, CSV and Markdown."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from binarize.errors import BinarizeError
from binarize.evaluation.perceptual import lpips_label
from binarize.files import write_text_atomic
from binarize.tables import Column, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

BASELINE = "bicubic"


@dataclass(frozen=True)
class Scores:
    """PSNR in dB and SSIM on Y, and LPIPS if it was computed."""

    psnr: float
    ssim: float
    lpips: float | None = None


@dataclass(frozen=True)
class ImageScores:
    """The scores of one image, named without suffix, or the means over all, named ``mean``.

    ``bicubic`` has the scores of the baseline, if it was measured, and ``seconds`` the wall time of the model.
    """

    image: str
    model: Scores
    bicubic: Scores | None
    seconds: float

    @property
    def picture(self) -> str:
        """Deprecated: use `image`."""
        warnings.warn("ImageScores.picture is now ImageScores.image", DeprecationWarning, stacklevel=2)
        return self.image


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of each image and their means; ``rich.print`` shows a table.

    Attributes:
        rows: One entry per image, in the order of evaluation; at least one.
        border: Pixels cut off each side before measuring.
        lpips: The backbone of LPIPS, or None without LPIPS.
        notes: What is missing and how to get it, one sentence each.
    """

    rows: tuple[ImageScores, ...]
    scale: int
    border: int
    lpips: str | None
    name: str = "model"
    notes: tuple[str, ...] = ()

    @property
    def mean(self) -> ImageScores:
        """The means over the images, each with the same weight."""
        baseline = [row.bicubic for row in self.rows if row.bicubic is not None]
        model, seconds = _mean([row.model for row in self.rows]), fmean(row.seconds for row in self.rows)
        return ImageScores("mean", model, _mean(baseline) if baseline else None, seconds)

    def to_json(self) -> str:
        """Return all scores at full precision; the infinite PSNR of equal images is null."""
        content = {
            "name": self.name,
            "scale": self.scale,
            "border": self.border,
            "notes": list(self.notes),
            "mean": self._nested(self.mean),
            "pictures": [{"picture": row.image, **self._nested(row)} for row in self.rows],
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Return one line per image and one for the means, at full precision."""
        return self._table("seconds").to_csv()

    def to_markdown(self) -> str:
        """Return a table with the precision of the literature, and the notes below it."""
        notes = "".join(f"\nNote: {note}.\n" for note in self.notes)
        return f"{self._title()}.\n\n{self._table().to_markdown()}\n{notes}"

    def table(self) -> RichTable:
        """Return a table for the terminal."""
        return self._table().to_rich(title=self._title(), caption="\n".join(f"{note}." for note in self.notes) or None)

    def __rich__(self) -> RichTable:
        return self.table()

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
        """Write ``evaluation.json``, ``evaluation.csv`` and ``evaluation.md``, each atomically.

        The folder is created if it is missing. If a file exists and ``force`` is false, no file is written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BinarizeError(f"{folder}: cannot create the folder: {error.strerror}") from error
        texts = {"json": self.to_json(), "csv": self.to_csv(), "md": self.to_markdown()}
        paths = {folder / f"evaluation.{suffix}": text for suffix, text in texts.items()}
        existing = [path for path in paths if path.exists()]
        if existing and not force:
            raise BinarizeError(f"{existing[0]}: already exists; give another folder, or force to replace it")
        return [write_text_atomic(path, text, force=force) for path, text in paths.items()]

    def _title(self) -> str:
        return f"{self.name}, x{self.scale}: PSNR and SSIM on Y, {self.border} pixels cut off each side"

    def _table(self, *more: str) -> Table:
        """Return one row per image, with the means as the footer, and more columns named after attributes."""
        columns = [
            Column(metric if name == "model" else f"{name} {metric}", ".2f" if metric == "PSNR" else ".4f", "right")
            for name, metrics in self._metrics(self.rows[0]).items()
            for metric in metrics
        ]
        rows = []
        for row in (*self.rows, self.mean):
            values = [value for metrics in self._metrics(row).values() for value in metrics.values()]
            rows.append([row.image, *values, *(getattr(row, name) for name in more)])
        return Table(["picture", *columns, *more], rows[:-1], footer=rows[-1:])

    def _metrics(self, row: ImageScores) -> dict[str, dict[str, float | None]]:
        """Return "model" and "bicubic" -> metric -> value."""
        found: dict[str, dict[str, float | None]] = {}
        for name, scores in (("model", row.model), (BASELINE, row.bicubic)):
            if scores is not None:
                lpips = {} if self.lpips is None else {lpips_label(self.lpips): scores.lpips}
                found[name] = {"PSNR": scores.psnr, "SSIM": scores.ssim, **lpips}
        return found

    def _nested(self, row: ImageScores) -> dict[str, Any]:
        metrics = self._metrics(row)
        for values in metrics.values():
            if values["PSNR"] == math.inf:
                values["PSNR"] = None
        return {"seconds": row.seconds, **metrics}


def _mean(scores: list[Scores]) -> Scores:
    perceptual = [one.lpips for one in scores if one.lpips is not None]
    lpips = fmean(perceptual) if perceptual else None
    return Scores(fmean(one.psnr for one in scores), fmean(one.ssim for one in scores), lpips)
