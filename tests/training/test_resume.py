"""Runs survive SIGKILL, full disks, another number of processes and broken files."""

from __future__ import annotations

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
from PIL import Image
from training_case import RESUME, differences

from binarize.errors import BinarizeError
from binarize.training import Checkpoints, load_checkpoint, train
from binarize.training.samples import NoisySamples

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_runs_end_as_uninterrupted_ones(pictures: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "kill_runs.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(pictures), str(tmp_path)]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert len(outcome.stdout.splitlines()) == 3


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


def test_a_folder_without_write_permission(recipe: Any) -> None:
    run = recipe()
    run.output_dir.mkdir()
    if os.geteuid() == 0:
        (run.output_dir / "samples").write_text("in the way")
    else:
        run.output_dir.chmod(0o500)
    try:
        with pytest.raises(BinarizeError, match=r"output_dir: cannot write .*run: "):
            train(run, progress=False)
    finally:
        run.output_dir.chmod(0o700)


def test_broken_images_are_all_named_before_anything_is_written(pictures: Path, tmp_path: Path, recipe: Any) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "cut.png").write_bytes(sorted(pictures.iterdir())[0].read_bytes()[:200])
    (folder / "text.jpg").write_text("text")
    Image.new("RGB", (8, 8)).save(folder / "tiny.png")
    run = recipe(f"train_data_dir={folder}")
    with pytest.raises(BinarizeError) as caught:
        train(run, progress=False)
    text = str(caught.value)
    assert "text.jpg" in text
    assert "tiny.png" in text
    assert not run.output_dir.exists()
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
