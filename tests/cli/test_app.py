"""The program as a whole: help, errors and exit statuses."""

import gc
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_case import contents, fails, raising, run, succeeds
from training_case import TINY

import binarize
from binarize.training import TrainingInterrupted

COMMANDS = [
    "upscale",
    "train",
    "evaluate",
    "summary",
    "methods",
    "import-official",
    "pack",
    "doctor",
    "demo",
    "ablate",
    "web",
]
COMMANDS += [f"recipes {name}" for name in ("ls", "show", "cp", "validate")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    assert f"binarize {command}" in succeeds(*command.split(), "--help").split("Usage:")[1].split("\n", 1)[1]


def test_version_debug_and_unknown_commands(tmp_path: Path) -> None:
    assert succeeds("--version") == f"binarize {binarize.__version__}\n"
    unknown = run("upscal")
    assert (unknown.exit_code, "upscale" in unknown.stderr) == (2, True)
    result = run("--debug", "summary", tmp_path / "none.pth")
    assert (result.exit_code, "Traceback" in result.stderr) == (1, True)
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (OSError(28, "No space left on device", "some/file"), 1, "error: some/file: No space left on device"),
        (OSError("a plain one"), 1, "error: a plain one"),
        (TrainingInterrupted(signal.SIGINT, Path("run/at-7")), 130, "stopped by SIGINT; saved run/at-7"),
        (TrainingInterrupted(signal.SIGTERM, Path("run/at-7")), 143, "stopped by SIGTERM"),
    ],
)
def test_exit_statuses(monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str) -> None:
    monkeypatch.setattr("binarize.training.loop.train", raising(error))
    result = run("train", "demo")
    assert result.exit_code == status
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_real_process_reports_an_error_in_one_line(model: Path, photos: Path, tmp_path: Path) -> None:
    image = tmp_path / "cut.png"
    image.write_bytes((photos / "p1.png").read_bytes()[:-40])
    before = contents(tmp_path)
    command = [sys.executable, "-m", "binarize", "upscale", image, tmp_path / "large.png", "--model", model]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"error: {image}: ")
    assert contents(tmp_path) == before


@pytest.mark.long
def test_ctrl_c_in_a_real_training_saves_a_checkpoint(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [*TINY, "max_train_steps=1000000", f"train_data_dir={photos}", f"output_dir={folder}"]
    command = [sys.executable, "-m", "binarize", "train", "demo", *settings, "checkpointing_steps=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 120
        while not list(folder.glob("checkpoint-*")):
            assert time.monotonic() < deadline, "the training did not start"
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in errors
    saved = re.fullmatch(r"stopped by SIGINT; saved (.*checkpoint-\d+)\..*", errors.splitlines()[-1])
    assert saved is not None
    assert Path(saved[1]).is_dir()


def test_a_model_of_a_users_own_method_needs_its_plugin(model: Path, small: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "import binarize\n"
        "@binarize.register_method('cli-mine', replace=True)\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(type(binarize.get_method('bidiffsr'))):\n"
        "    '''A user's own.'''\n"
    )
    folder = shutil.copytree(model, tmp_path / "model")
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"bidiffsr"', '"cli-mine"'))
    command = ["upscale", str(small), str(tmp_path / "out.png"), "--model", str(folder), "--steps", "1"]
    message = fails(*command)
    assert "unknown method 'cli-mine'" in message
    assert "`binarize --plugin FILE ...`" in message
    succeeds("--plugin", plugin, *command)
    assert (tmp_path / "out.png").is_file()


def test_imports_are_not_searched_for_garbage(tmp_path: Path) -> None:
    plugin, now = tmp_path / "probe.py", "print(gc.get_threshold()[0], gc.get_freeze_count())"
    plugin.write_text(f"import gc\n{now}\nimport torch\n{now}\nimport diffusers\n{now}\n")
    command = [sys.executable, "-m", "binarize", "--plugin", str(plugin), "recipes", "ls"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [[int(number) for number in line.split()] for line in done.stdout.splitlines()[:3]]
    assert [line[0] for line in lines] == [200_000, *[gc.get_threshold()[0]] * 2]
    assert lines[0][1] < lines[1][1] < lines[2][1]
