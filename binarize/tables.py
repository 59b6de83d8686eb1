"""One table, printed as aligned text, Markdown, CSV, JSON, HTML or a `rich` table."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Align = Literal["left", "right"]
MISSING = "-"  # what a reader sees for None
_BAR = r"\|"


@dataclass(frozen=True)
class Column:
    """A column of a `Table`. None is shown as "-"."""

    name: str
    format: str | Callable[[Any], str] = ""  # a specification, such as ".2f", or a function from a value to its text
    align: Align | None = None  # by default, right for numbers and left for everything else
    key: str | None = None  # the name in CSV and JSON; by default `name`

    def text(self, value: Any) -> str:
        """Return a value as the reader sees it."""
        if value is None:
            return MISSING
        return self.format(value) if callable(self.format) else format(value, self.format)


class Table:
    """Rows of values under named columns.

    Text, Markdown, HTML and rich show values as their columns format them. CSV and JSON hold the values themselves. The
    rows of the `footer`, such as a mean, are set off in the former and ordinary rows in the latter.
    """

    def __init__(
        self, columns: Sequence[str | Column], rows: Sequence[Sequence[Any]], *, footer: Sequence[Sequence[Any]] = ()
    ) -> None:
        self.columns = [Column(column) if isinstance(column, str) else column for column in columns]
        self.rows, self.footer = [*rows], [*footer]
        for row in (*rows, *footer):
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} values for {len(self.columns)} columns: {row!r}")

    def to_text(self, *, header: bool = True) -> str:
        """Return lines in which the columns are aligned, two spaces apart."""
        lines = [self._names()] if header else []
        lines += self._cells([*self.rows, *self.footer])
        aligned = []
        for cells, side in zip(zip(*lines, strict=True), self._sides(), strict=False):
            width = max(map(len, cells))
            aligned.append([cell.rjust(width) if side == "right" else cell.ljust(width) for cell in cells])
        return "\n".join("  ".join(cells).rstrip() for cells in zip(*aligned, strict=True))

    def to_markdown(self) -> str:
        """Return a Markdown table, its footer in bold."""
        rule = ["--:" if side == "right" else "---" for side in self._sides()]
        body = [self._names(), rule, *self._cells(self.rows)]
        body += [[f"**{cell}**" for cell in cells] for cells in self._cells(self.footer)]
        return "\n".join(f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |" for cells in body)

    def to_html(self) -> str:
        """Return a `<table>` element."""

        def line(tag: str, cells: list[str]) -> str:
            sides = zip(cells, self._sides(), strict=True)
            inside = "".join(f'<{tag} align="{side}">{html.escape(cell)}</{tag}>' for cell, side in sides)
            return f"<tr>{inside}</tr>"

        body = [line("td", cells) for cells in self._cells(self.rows)]
        footer = [line("th", cells) for cells in self._cells(self.footer)]
        return "\n".join(["<table>", line("th", self._names()), *body, *footer, "</table>"])

    def to_csv(self) -> str:
        """Return CSV with a header; None is an empty field."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self._keys(), *self.rows, *self.footer])
        return text.getvalue()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a dictionary per row; numbers that JSON cannot hold (inf, nan) become None."""
        rows = [map(_finite, row) for row in (*self.rows, *self.footer)]
        return [dict(zip(self._keys(), row, strict=True)) for row in rows]

    def to_json(self) -> str:
        """Return `to_dicts` as JSON."""
        return json.dumps(self.to_dicts(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_rich(self, *, title: str | None = None, caption: str | None = None) -> RichTable:
        """Return a table that rich draws on a terminal."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=title, caption=caption)
        for number, (column, side) in enumerate(zip(self.columns, self._sides(), strict=True)):
            table.add_column(column.name, justify=side, no_wrap=number == 0)
        for cells in self._cells(self.rows):
            table.add_row(*map(escape, cells))
        table.add_section()
        for cells in self._cells(self.footer):
            table.add_row(*map(escape, cells), style="bold")
        return table

    def _names(self) -> list[str]:
        return [column.name for column in self.columns]

    def _keys(self) -> list[str]:
        return [column.name if column.key is None else column.key for column in self.columns]

    def _cells(self, rows: list[Sequence[Any]]) -> list[list[str]]:
        return [[column.text(value) for column, value in zip(self.columns, row, strict=True)] for row in rows]

    def _sides(self) -> list[Align]:
        sides: list[Align] = []
        for number, column in enumerate(self.columns):
            values = [row[number] for row in self.rows if row[number] is not None]
            numeric = bool(values) and all(isinstance(value, int | float) for value in values)
            sides.append(column.align or ("right" if numeric else "left"))
        return sides


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
