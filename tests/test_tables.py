"""One table in every form."""

import csv
import io
import json
import math

import pytest
from rich.console import Console

from binarize.tables import Column, Table

TABLE = Table(
    ["image", Column("PSNR", ".2f", key="psnr"), Column("share", lambda value: f"{value:.0%}", align="left")],
    [["a|b", 30.123, 0.5], ["<c>", math.inf, None]],
    footer=[["mean", 31, 0.25]],
)


def test_text_is_aligned() -> None:
    rows = ["image   PSNR  share", "a|b    30.12  50%", "<c>      inf  -", "mean   31.00  25%"]
    assert TABLE.to_text().splitlines() == rows
    assert Table(["a", "b"], [["x", "longer"], ["yy", "z"]]).to_text(header=False) == "x   longer\nyy  z"


def test_markdown_escapes_bars_and_sets_off_the_footer() -> None:
    assert TABLE.to_markdown().splitlines() == [
        "| image | PSNR | share |",
        "| --- | --: | --- |",
        r"| a\|b | 30.12 | 50% |",
        "| <c> | inf | - |",
        "| **mean** | **31.00** | **25%** |",
    ]


def test_csv_and_json_hold_the_values() -> None:
    rows = list(csv.reader(io.StringIO(TABLE.to_csv())))
    assert rows == [["image", "psnr", "share"], ["a|b", "30.123", "0.5"], ["<c>", "inf", ""], ["mean", "31", "0.25"]]
    first, second, _ = json.loads(TABLE.to_json())
    assert first == {"image": "a|b", "psnr": 30.123, "share": 0.5}
    assert second == {"image": "<c>", "psnr": None, "share": None}


def test_html_escapes_text() -> None:
    text = TABLE.to_html()
    assert '<td align="left">&lt;c&gt;</td>' in text
    assert '<td align="right">30.12</td>' in text
    assert text.count("<tr>") == 4


def test_rich_draws_every_row() -> None:
    console = Console(file=io.StringIO(), width=60)
    console.print(Table(["name", "n"], [["[bold]", 1]], footer=[["sum", 1]]).to_rich(title="a title"))
    text = console.file.getvalue()
    assert all(word in text for word in ("a title", "[bold]", "sum"))


def test_empty_tables_and_uneven_rows() -> None:
    empty = Table(["a", "b"], [])
    assert (empty.to_text(), empty.to_text(header=False), empty.to_json()) == ("a  b", "", "[]")
    with pytest.raises(ValueError, match="a row has 1 values for 2 columns"):
        Table(["a", "b"], [["x"]])
