"""Nothing kills a run for good: SIGKILL at random moments, full disks, another number of processes, broken files."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_runs import differences
from PIL import Image
from training_case import TINY, weights

from binarize.errors import BinarizeError
from binarize.training import Checkpoints, load_checkpoint, train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_killed_runs_end_bit_for_bit_as_the_uninterrupted_one(
    processes: int, pictures: Path, tmp_path: Path
) -> None:
    script = Path(__file__).parents[1] / "kill_runs.py"
    command = [sys.executable, str(script), str(pictures), str(tmp_path), "--processes", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert "20 runs" in outcome.stdout


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """While entered, no file of this process grows beyond ``size`` bytes, as on a disk that is full."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1, 20_000, 300_000])
def test_a_full_disk_stops_the_run_with_the_last_checkpoint_intact(size: int, recipe: Any) -> None:
    whole = train(recipe(out="whole"), progress=False)
    train(recipe("max_train_steps=3", out="full"), progress=False)
    folder = recipe(out="full").output_dir
    kept, notes = folder / "checkpoint-3" / "state.pt", (folder / "recipe.yaml").read_text()
    before = kept.read_bytes()
    assert len(before) > 300_000
    resumed = recipe("resume_from_checkpoint=latest", out="full")
    with file_size_limit(size), pytest.raises(BinarizeError, match=r"cannot (be written|write)"):
        train(resumed, progress=False)
    assert kept.read_bytes() == before
    assert (folder / "recipe.yaml").read_text() == notes or size > 1
    assert list(Checkpoints(folder, None).list()) == [3]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    ended = train(resumed, progress=False)
    assert not differences(load_checkpoint(whole.checkpoint)[0], load_checkpoint(ended.checkpoint)[0])


def test_a_folder_that_may_not_be_written_is_said_before_anything_is_computed(recipe: Any) -> None:
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


# Data.


def test_broken_pictures_are_all_named_before_anything_is_written(pictures: Path, tmp_path: Path, recipe: Any) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "cut.png").write_bytes(sorted(pictures.iterdir())[0].read_bytes()[:200])
    (folder / "text.jpg").write_text("no picture")
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
    with pytest.raises(BinarizeError, match=r"cut\.png"):  # sound up to its header
        train(run, progress=False)
    assert not run.output_dir.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_during_the_run_is_named_with_the_last_checkpoint(
    workers: int, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from binarize.training.samples import NoisySamples

    real = NoisySamples.__getitem__

    def breaking(self: NoisySamples, index: int) -> dict[str, Any]:
        if index == 17:
            raise BinarizeError("photos/p3.png: is damaged")
        return real(self, index)

    monkeypatch.setattr(NoisySamples, "__getitem__", breaking)
    with pytest.raises(BinarizeError, match=r"^photos/p3\.png: is damaged The last checkpoint is .*checkpoint-3\.$"):
        train(recipe(f"dataloader_num_workers={workers}"), progress=False)
    assert not multiprocessing.active_children()  # which the end of the program would wait for, and they for it


# Another number of processes.

SCRIPT = """
import sys, torch
from binarize.recipes import load_recipe
from binarize.training import train
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
train(load_recipe("small_x2", sys.argv[1:]), progress=False)
"""


@pytest.mark.slow
def test_two_processes_equal_one_for_twenty_steps_and_resume_as_each_other(pictures: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    shared = ("max_train_steps=20", "model.dropout=0", "checkpointing_steps=10")
    common = [*TINY, *shared, "use_ema=true", f"train_data_dir={pictures}"]

    def launch(processes: int, name: str, *overrides: str) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        mine = [*common, f"output_dir={tmp_path / name}", f"train_batch_size={4 // processes}", *overrides]
        command = [sys.executable, *(launcher if processes > 1 else []), str(script), *mine]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stderr

    launch(1, "one")
    launch(2, "two")
    for name, first, second in (("2 to 1", 2, 1), ("1 to 2", 1, 2)):
        launch(first, name, "max_train_steps=10")
        launch(second, name, "resume_from_checkpoint=latest")
    expected = weights(tmp_path / "one" / "checkpoint-20")
    assert expected["conv_in.weight"].dtype == torch.float64
    for name in ("two", "2 to 1", "1 to 2"):
        found = weights(tmp_path / name / "checkpoint-20")
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=1e-9, rtol=0, msg=f"{name} {key}")
