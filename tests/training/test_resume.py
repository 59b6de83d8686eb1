"""Runs survive SIGKILL, full disks, another number of processes and broken files; checkpoints are whole or absent."""

import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from errors_case import assert_error
from generation_case import write_images
from PIL import Image
from training_case import RESUME, differences

from binarize import files
from binarize.errors import BinarizeError
from binarize.files import replace_folder
from binarize.training import Checkpoints, load_checkpoint, train
from binarize.training.checkpoint import STATE
from binarize.training.samples import NoisySamples

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("task", ["super_resolution", "generation"])
def test_killed_runs_end_as_uninterrupted_ones(task: str, pictures: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "kill_runs.py"
    images = pictures if task == "super_resolution" else write_images(tmp_path / "images")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(images), str(tmp_path), task]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert len(outcome.stdout.splitlines()) == (3 if task == "super_resolution" else 2)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of files that this process writes, as a full disk does."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 20_000, 300_000])
def test_a_full_disk_leaves_the_last_checkpoint(size: int, recipe: Any, trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    shutil.copytree(trained("max_train_steps=3").output_dir, folder)
    kept, text = folder / "checkpoint-3" / "state.pt", (folder / "recipe.yaml").read_text()
    before = kept.read_bytes()
    assert len(before) > 300_000
    resumed = recipe(RESUME, out="full")
    with file_size_limit(size), pytest.raises(BinarizeError, match=r"cannot (be written|write)"):
        train(resumed, progress=False)
    assert kept.read_bytes() == before
    assert (folder / "recipe.yaml").read_text() == text or size > 1
    assert list(Checkpoints(folder, None).list()) == [3]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    ended = train(resumed, progress=False)
    assert not differences(load_checkpoint(trained().checkpoint)[0], load_checkpoint(ended.checkpoint)[0])


def test_broken_images_are_all_named_before_anything_is_written(pictures: Path, tmp_path: Path, recipe: Any) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(pictures, folder)
    (folder / "cut.png").write_bytes(sorted(pictures.iterdir())[0].read_bytes()[:200])
    (folder / "text.jpg").write_text("text")
    Image.new("RGB", (8, 8)).save(folder / "tiny.png")
    run = recipe(f"train_data_dir={folder}")
    assert_error(r"text\.jpg.*tiny\.png", train, run, progress=False)
    (folder / "text.jpg").unlink()
    (folder / "tiny.png").unlink()
    with pytest.raises(BinarizeError, match=r"cut\.png"):  # its header is valid
        train(run, progress=False)
    assert not run.output_dir.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_named(workers: int, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = NoisySamples.__getitem__

    def breaking(self: NoisySamples, index: int) -> dict[str, Any]:
        if index == 17:
            raise BinarizeError("photos/p3.png: is damaged")
        return real(self, index)

    monkeypatch.setattr(NoisySamples, "__getitem__", breaking)
    with pytest.raises(BinarizeError, match=r"^photos/p3\.png: is damaged The last checkpoint is .*checkpoint-3\.$"):
        train(recipe(f"dataloader_num_workers={workers}"), progress=False)
    assert not multiprocessing.active_children()  # the program would wait for them at exit


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"w": torch.full((3,), float(step))}}


def test_the_newest_are_kept_and_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, limit=None)
    assert checkpoints.find("latest") is None
    for step in (8, 9, 9):
        checkpoints.save(step, state_of(step), "")
    assert list(checkpoints.list()) == [8, 9]
    checkpoints.limit = 2
    for step in (10, 100):
        checkpoints.save(step, state_of(step), "scale: 2\n")
    assert list(checkpoints.list()) == [10, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]
    assert checkpoints.find("latest") == tmp_path / "checkpoint-100"
    assert checkpoints.find("checkpoint-10") == checkpoints.find(str(tmp_path / "checkpoint-10"))
    state, text = load_checkpoint(tmp_path / "checkpoint-100")
    assert (state["step"], text) == (100, "scale: 2\n")
    with pytest.raises(BinarizeError, match=r"'checkpoint-9' is not a complete checkpoint; there are: checkpoint-10, "):
        checkpoints.find("checkpoint-9")


def test_a_failed_write_leaves_the_previous_checkpoint_intact(tmp_path: Path) -> None:
    class Unwritable:
        def __reduce__(self) -> Any:
            raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, limit=1)
    checkpoints.save(1, state_of(1), "")
    before = (tmp_path / "checkpoint-1" / STATE).read_bytes()
    with pytest.raises(BinarizeError, match=r"cannot write .*checkpoint-2: .*No space left.*checkpoint-1, is intact"):
        checkpoints.save(2, {**state_of(2), "x": Unwritable()}, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / STATE).read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_at_any_call_keeps_the_folder(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    replace_folder(target, lambda folder: (folder / "a").write_text("old"))

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)  # which takes one step more
    real = getattr(os, call)
    for number in range(1, 10):
        calls = itertools.count(1)

        def failing(*arguments: Any, number: int = number, calls: Any = calls) -> Any:
            if next(calls) == number:
                raise OSError(5, "Input/output error")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                replace_folder(target, lambda folder: (folder / "a").write_text("new"))
            except OSError:
                assert (target / "a").read_text() in ("old", "new")
                assert [path.name for path in tmp_path.iterdir()] == ["model"]
            else:
                break
    assert 2 < number < 9
    assert (target / "a").read_text() == "new"


def left_by(process: int, name: str = "", end: str = "tmp") -> str:
    return f"{name and '.' + name}.binarize-{files._host()}-{process}-abcdef.{end}"


def test_incomplete_folders_are_ignored_and_cleaned_up(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    checkpoints = Checkpoints(tmp_path, limit=3)
    checkpoints.save(5, state_of(5), "")
    for name in (left_by(ended.pid), left_by(os.getpid()), "samples", "checkpoint-8"):
        (tmp_path / name).mkdir()
    (tmp_path / "samples" / left_by(ended.pid, end="tmp.png")).touch()
    (tmp_path / ".binarize-notes").touch()
    assert list(checkpoints.list()) == [5]
    # A run killed between the two renames of a replacement leaves this.
    (tmp_path / "checkpoint-5").rename(tmp_path / left_by(ended.pid, "checkpoint-5", "old"))
    assert list(checkpoints.list()) == []
    checkpoints.clean_up()
    assert list(checkpoints.list()) == [5]
    assert sorted(path.name for path in tmp_path.rglob(".*")) == sorted([left_by(os.getpid()), ".binarize-notes"])


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, limit=None).save(1, state_of(1), "")
    content = (folder / STATE).read_bytes()
    (folder / STATE).write_bytes(content[: len(content) // 2])
    assert_error(r"cannot read the checkpoint .*checkpoint-1: .*; remove it and resume", load_checkpoint, folder)
