"""The command `binarize ablate`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from studies_case import SHRINK, make, write_study
from typer.testing import CliRunner

from binarize.cli import app
from binarize.studies import list_studies
from binarize.training import TrainingInterrupted


def test_the_command_lists_shows_and_runs(pictures: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    listed = run(app, ["ablate", "--list"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(list_studies())
    nothing = run(app, ["ablate"])
    assert nothing.exit_code == 2
    assert "STUDY" in nothing.stderr
    dry = run(app, ["ablate", "small_groups", "--dry-run", f"output_dir={tmp_path / 'none'}", *SHRINK])
    assert dry.exit_code == 0
    assert "| method.groups=5 |" in dry.stdout
    assert "table:" not in dry.stdout

    path = write_study(make(pictures, tmp_path / "out", grid={"method": ["bnn"]}), tmp_path)
    done = run(app, ["ablate", str(path), "max_train_steps=1"])
    assert done.exit_code == 0, done.output
    assert f"table: {tmp_path / 'out' / 'table.md'}" in done.stdout


def test_the_exit_status_after_a_signal(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise TrainingInterrupted(signal.SIGTERM, Path("checkpoint-2"))

    monkeypatch.setattr("binarize.training.loop.train", stopped)
    ran = CliRunner().invoke(app, ["ablate", str(write_study(make(pictures, tmp_path / "out"), tmp_path))])
    assert ran.exit_code == 143
    assert "saved checkpoint-2. The same command goes on from there." in ran.stderr
