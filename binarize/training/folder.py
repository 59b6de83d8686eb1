"""The output folder of a run: check it before the run, and find the checkpoint to resume from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from binarize.errors import BinarizeError
from binarize.files import write_text_atomic
from binarize.locks import locked
from binarize.recipes import TrainingRecipe
from binarize.training.checkpoint import RECIPE, Checkpoints
from binarize.training.csv_log import NAME as LOG

MODEL = "model"
SAMPLES = "samples"
BEST = "best"
TRACKERS = ("tensorboard", "wandb")


def find_start(recipe: TrainingRecipe, checkpoints: Checkpoints, force: bool) -> Path | None:
    """Return the checkpoint that a recipe resumes from, or None for a new run, without changing anything."""
    folder, which = recipe.output_dir, recipe.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise BinarizeError(f"output_dir: {folder} is a file; name a folder.")
    if force and which is not None:
        raise BinarizeError(f"resume_from_checkpoint={which} continues a run and force removes it; give only one.")
    found = None if which is None else checkpoints.find(which)
    resumes_here = which == "latest" or (found is not None and found.resolve().parent == folder.resolve())
    if _holds_run(folder) and not resumes_here and not force:
        fix = "continue it with resume_from_checkpoint=latest, or remove it with --force"
        raise BinarizeError(f"output_dir: {folder} already holds a run; {fix}.")
    if found is not None and which != "latest" and resumes_here:
        newer = [path for step, path in checkpoints.list().items() if step > int(found.name.rpartition("-")[2])]
        if newer:
            reason = f"{folder} has newer checkpoints than {which}, such as {newer[-1].name}"
            raise BinarizeError(f"resume_from_checkpoint: {reason}; choose another folder with output_dir=...")
    return found


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create the output folder and hold its lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BinarizeError(f"output_dir: cannot write {folder}: {error.strerror}.") from error
    with locked(folder):
        yield


def prepare_folder(recipe: TrainingRecipe, checkpoints: Checkpoints, force: bool) -> None:
    """Write the recipe into the output folder; with force, remove the files of an existing run first."""
    folder = recipe.output_dir
    try:
        if force:
            (folder / LOG).unlink(missing_ok=True)
            for path in (*checkpoints.list().values(), *(folder / name for name in (MODEL, BEST, SAMPLES, *TRACKERS))):
                if path.exists():
                    shutil.rmtree(path)
        checkpoints.clean_up()
        (folder / SAMPLES).mkdir(exist_ok=True)
        write_text_atomic(folder / RECIPE, recipe.to_yaml())
    except OSError as error:
        raise BinarizeError(f"output_dir: cannot write {folder}: {error.strerror}.") from error


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (RECIPE, MODEL)) or any(folder.glob("checkpoint-*"))
