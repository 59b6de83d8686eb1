"""The table of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from binarize.errors import BinarizeError
from binarize.studies.results import AblationResult, RunResult


def row(cell: str, seed: int = 0, **figures: Any) -> RunResult:
    return RunResult(cell, seed, Path("x"), figures.pop("state", "done"), 1e6, 2e9, **figures)


def table(*runs: RunResult, lpips: str | None = "alex", dataset: str | None = "Set5") -> AblationResult:
    return AblationResult("mine", "", dataset, lpips, Path("x"), runs)


def test_published_figures_stand_beside_the_measured_ones() -> None:
    published = {"params_m": 1.01, "ops_g": 2.0, "results": {"Set5": {"psnr": 35.68, "lpips": 0.0277}}}
    trials = row("a|b", psnr=30.123, lpips=0.1, published=published), row("other", psnr=20.0)
    result = table(*trials)
    lines = result.to_markdown().splitlines()
    assert lines[2].startswith(
        "| Set5 | params (M) | published | OPs (G) | published | PSNR | published | LPIPS (alex)"
    )
    assert lines[4] == r"| a\|b | 1.000 | 1.010 | 2.000 | 2.000 | 30.12 | 35.68 | 0.1000 | 0.0277 |"
    assert lines[5] == "| other | 1.000 | - | 2.000 | - | 20.00 | - | - | - |"
    # LPIPS of another backbone is another quantity.
    assert "0.0277" not in table(*trials, lpips="squeeze").to_markdown()
    assert "35.68" not in table(*trials, dataset=None).to_markdown()
    assert result.published("other", "loss") is None


def test_seeds_that_are_missing_are_left_out_of_the_mean() -> None:
    result = table(row("a", 0, psnr=30.0), row("a", 1, state="to do"), row("b", 0, psnr=1.0, loss=0.5))
    assert "| a | 1.000 | 2.000 | 30.00 | - | done, to do |" in result.to_markdown()
    assert result.values("a", "psnr") == [30.0]
    with pytest.raises(BinarizeError, match=r"there is no cell 'c'; there are a, b"):
        result.values("c", "psnr")


def test_times_are_shown_in_a_fitting_unit() -> None:
    text = table(row("a", train_step_seconds=1.234, sample_step_seconds=0.0123)).to_markdown()
    assert "| 1.23 s | 12.3 ms |" in text
