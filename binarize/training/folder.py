"""The output folder of a run: who may write into it, and where to go on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from binarize.errors import BinarizeError
from binarize.imaging import write_atomic
from binarize.training.checkpoint import RECIPE, Checkpoints

if TYPE_CHECKING:
    from binarize.recipes import Recipe

MODEL = "model"
SAMPLES = "samples"
BEST = "best"
TRACKERS = ("tensorboard", "wandb")


def find_start(recipe: Recipe, checkpoints: Checkpoints, force: bool) -> Path | None:
    """Return the checkpoint to go on from, or None for a new run; nothing is changed.

    Args:
        recipe: Its ``output_dir`` and ``resume_from_checkpoint`` are read.
        checkpoints: Those of the output folder.
        force: A new run may take the place of one that is there.

    Raises:
        BinarizeError: If the output folder holds a run that is neither resumed nor to be replaced, is a file, or has
            no such checkpoint.
    """
    folder, which = recipe.output_dir, recipe.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise BinarizeError(f"output_dir: {folder} is a file; name a folder.")
    if force and which is not None:
        raise BinarizeError(
            f"resume_from_checkpoint={which} goes on with a run and force removes it; give one of them."
        )
    found = None if which is None else checkpoints.find(which)
    resumes_here = which == "latest" or (found is not None and found.resolve().parent == folder.resolve())
    if _holds_run(folder) and not resumes_here and not force:
        raise BinarizeError(
            f"output_dir: {folder} already holds a run; go on with it by resume_from_checkpoint=latest, choose "
            "another folder by output_dir=..., or remove the run with --force."
        )
    newer = (
        [] if found is None or which == "latest" else [p for p in checkpoints.list().values() if _is_newer(p, found)]
    )
    if resumes_here and newer:
        raise BinarizeError(
            f"resume_from_checkpoint: {folder} has newer checkpoints than {which}, such as {newer[-1].name}, which the "
            "run would be mixed up with; choose another folder by output_dir=..., or move the newer ones away."
        )
    return found


def _is_newer(checkpoint: Path, than: Path) -> bool:
    return int(checkpoint.name.rpartition("-")[2]) > int(than.name.rpartition("-")[2])


def prepare_folder(recipe: Recipe, checkpoints: Checkpoints, force: bool) -> None:
    """Make the output folder ready: remove the run there if forced, and write the recipe beside what will come.

    Args:
        recipe: What is run.
        checkpoints: Those of the output folder.
        force: Remove a run's files that are there; other files stay.

    Raises:
        BinarizeError: If the folder cannot be written.
    """
    folder = recipe.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if force:
            for path in (*checkpoints.list().values(), *(folder / name for name in (MODEL, BEST, SAMPLES, *TRACKERS))):
                if path.exists():
                    shutil.rmtree(path)
        checkpoints.tidy()
        (folder / SAMPLES).mkdir(exist_ok=True)
        text = recipe.to_yaml()
        write_atomic(folder / RECIPE, lambda path: path.write_text(text, encoding="utf-8"), force=True)
    except OSError as error:
        raise BinarizeError(f"output_dir: cannot write {folder}: {error.strerror}.") from error


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (RECIPE, MODEL)) or any(folder.glob("checkpoint-*"))
