"""Launchers, locks and the training images of a run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import PartialState
from errors_case import assert_error
from PIL import Image
from training_case import RESUME, SMALLEST, TINY

from binarize.imaging import ImagePairs
from binarize.locks import locked
from binarize.training import Checkpoints, train
from binarize.training.images import image_digests
from binarize.training.processes import launched_processes
from binarize.training.resume import check_same_images


@pytest.mark.parametrize("value", ["", "two", "0", "-1", "1e3", "9" * 30])
def test_a_wrong_number_of_processes_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert_error(f"WORLD_SIZE='{value}': must be the number of processes", launched_processes)


def test_processes_that_do_not_train_together_are_refused(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("binarize.training.processes.launched_processes", lambda: 2)
    monkeypatch.setattr("binarize.training.processes.torch.accelerator.is_available", lambda: True)
    run = recipe()
    assert_error("was asked for 2 processes, but 1 would train together", train, run, progress=False)
    assert not run.output_dir.exists()


@pytest.mark.parametrize(("name", "value"), [("ACCELERATE_USE_CPU", "x"), ("LOCAL_RANK", "")])
def test_a_variable_that_accelerate_cannot_read_is_an_error(name, value, recipe, monkeypatch):
    monkeypatch.setenv(name, value)
    run = recipe()
    assert_error("Accelerate cannot start with .*, or a variable such as LOCAL_RANK", train, run, progress=False)
    assert PartialState._shared_state == {}  # the next run of this process starts anew
    assert not run.output_dir.exists()


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo")
def test_torchrun_without_a_gpu_trains_one_run(pictures: Path, tmp_path: Path) -> None:
    options = (*TINY, *SMALLEST, "max_train_steps=2", f"train_data_dir={pictures}", f"output_dir={tmp_path / 'run'}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = [*launcher, "binarize", "train", "small_x2", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "2 samples x 1 forward passes x 2 processes = 4 per step, on cpu" in done.stdout + done.stderr
    assert done.stdout.count("trained to step 2") == 1
    assert not list((tmp_path / "run").glob("*.lock"))


def test_a_run_that_another_process_writes_is_left_alone(recipe: Any, tmp_path: Path) -> None:
    run = recipe()
    run.output_dir.mkdir()
    with locked(run.output_dir):
        assert_error(
            f"{run.output_dir.name}: process {os.getpid()} on .* is writing into it", train, run, progress=False
        )
        assert [path.name for path in run.output_dir.iterdir()] == ["run.lock"]


def test_a_folder_that_changed_before_the_lock_is_noticed(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from binarize.training import loop

    run, calls = recipe(RESUME), iter([None, Path("checkpoint-3")])
    monkeypatch.setattr(loop, "find_start", lambda *_: next(calls))
    assert_error("was changed by another run; start this one again", train, run, progress=False)


def test_changed_images_are_named(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(pictures, folder)
    now = image_digests(ImagePairs(folder, scale=2))
    check_same_images(now, dict(now), tmp_path)
    check_same_images(now, None, tmp_path)  # a checkpoint of version 0.1
    names = sorted(now)
    Image.open(folder / names[0]).rotate(180).save(folder / names[0])
    (folder / names[1]).rename(folder / "other.png")
    changed = image_digests(ImagePairs(folder, scale=2))
    message = rf"1 new, such as other\.png; 1 missing, such as {names[1]}; 1 changed, such as {names[0]}\. .*init_from"
    assert_error(message, check_same_images, changed, now, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["add", "rename", "change", "remove", "none"])
def test_a_run_resumes_on_the_same_images_alone(change: str, pictures: Path, tmp_path: Path, recipe: Any) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(pictures, folder)
    options = (*SMALLEST, f"train_data_dir={folder}")
    train(recipe(*options, "max_train_steps=1"), progress=False)
    first = sorted(folder.iterdir())[0]
    if change == "add":
        shutil.copy(first, folder / "new.png")
    elif change == "rename":
        first.rename(folder / "z.png")
    elif change == "change":
        with Image.open(first) as image:
            image.putpixel((3, 3), (1, 2, 3))
            image.save(first)
    elif change == "remove":
        first.unlink()
    resumed = recipe(*options, "max_train_steps=2", RESUME)
    if change == "none":
        assert train(resumed, progress=False).steps == 2
    else:
        assert_error("the training data are not those of the run", train, resumed, progress=False)
        assert list(Checkpoints(resumed.output_dir, None).list()) == [1]
