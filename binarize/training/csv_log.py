"""``log.csv``: the log of a run as a table, which every run writes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from binarize.errors import BinarizeError, one_line
from binarize.files import read_text, write_text_atomic

NAME = "log.csv"
_COLUMNS = ("step", "loss", "learning_rate", "samples_per_second", "flips", "memory_bytes", "validation_psnr")
_MAX_BYTES = 1 << 28


class CsvLog:
    """The file in a run's folder: a line per log entry and per validation, at full precision.

    A resumed run removes the lines after its ``step``, and a half-written one of a killed run. ``parts`` are the names
    of the terms of the loss, if there are several.
    """

    def __init__(self, folder: Path, step: int, parts: Sequence[str] = ()) -> None:
        self.path, self.columns = folder / NAME, [*_COLUMNS, *(f"loss/{part}" for part in parts)]
        lines = [",".join(self.columns)]
        if step and self.path.is_file():
            before = read_text(self.path, _MAX_BYTES)
            rows = before[: before.rfind("\n") + 1].splitlines()
            if rows[:1] == lines:
                lines += [
                    row for row in rows[1:] if (first := row.partition(",")[0]).isdecimal() and int(first) <= step
                ]
        write_text_atomic(self.path, "".join(f"{line}\n" for line in lines))

    def write(self, **values: float | None) -> None:
        """Append a line; a column without a value stays empty."""
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(values)
        except OSError as error:
            raise BinarizeError(f"{self.path}: cannot be written: {one_line(error)}") from error
