"""The command `binarize ablate`, and a study whose process is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from studies_case import SHRINK, TINY, make, write_study
from typer.testing import CliRunner

from binarize.cli import app
from binarize.studies import list_studies
from binarize.studies.ablation import ablate
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


# Runs a study in a child process, which is forked so that the imports are shared. The first child is killed.
KILL = """
import os, signal, sys, time
from pathlib import Path

import torch
from binarize.studies.ablation import ablate

study, second = sys.argv[1], Path(sys.argv[2])

def start():
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        status = 1
        try:
            ablate(study)
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    return child

child = start()
while not list(second.glob("checkpoint-*")):
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    time.sleep(0.01)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
print("killed", max(int(folder.name.split("-")[1]) for folder in second.glob("checkpoint-*")), flush=True)
print("left", (second.parents[1] / "1" / "seed-0" / "result.json").stat().st_mtime_ns, flush=True)
print("status", os.waitpid(start(), 0)[1])
"""


@pytest.mark.slow
def test_a_study_survives_kill_9_and_repeats_nothing(pictures: Path, tmp_path: Path) -> None:
    changes = {**TINY, "train_data_dir": str(pictures), "max_train_steps": 30, "checkpointing_steps": 3}
    cells = [{"name": str(number), "overrides": {"learning_rate": 1e-3 * number}} for number in (1, 2)]
    out = tmp_path / "out"
    study = make(pictures, out, overrides=changes, grid={}, cells=cells)
    path = write_study(study, tmp_path)
    first, second = (out / "cells" / number / "seed-0" for number in "12")
    command = [sys.executable, "-c", KILL, str(path), str(second)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr
    reached = int(re.findall(r"killed (\d+)", done.stdout)[0])
    assert reached < 30
    assert "status 0" in done.stdout, done.stderr
    assert "1 of 2 runs are already done" in done.stdout
    assert f"resuming from {second / f'checkpoint-{reached}'}, at step {reached}" in done.stdout
    assert f"left {(first / 'result.json').stat().st_mtime_ns}" in done.stdout
    assert all((out / f"table.{suffix}").is_file() for suffix in ("md", "csv", "json", "png"))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as above: another order of summation can flip a sign
    try:
        whole = ablate({**study, "output_dir": str(tmp_path / "whole")}, only="2", progress=False)
    finally:
        torch.set_num_threads(threads)
    found = ablate(path, dry_run=True)
    assert found.complete
    assert found.runs[1].psnr == pytest.approx(whole.runs[1].psnr, abs=1e-6)
