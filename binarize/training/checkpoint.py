"""Checkpoints that are either complete or not there."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from binarize.recipes import Recipe

_NAME = re.compile(r"checkpoint-(\d+)")
STATE = "state.pt"
RECIPE = "recipe.yaml"


def replace_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Write a folder so that ``target`` is at every instant the old one, absent for one rename, or the whole new one.

    The files are written beside the target under a temporary name, flushed to the disk and renamed together. If
    anything fails, Ctrl-C included, what was there before stays and the temporary folder goes.

    Args:
        target: The folder; its parent must exist.
        write: Called with the temporary folder, which exists and is empty.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    aside = temporary.with_suffix(".old")
    try:
        temporary.mkdir()
        write(temporary)
        _flush(temporary)
        if target.exists():
            os.rename(target, aside)
        os.rename(temporary, target)
        _flush_entry(target.parent)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


class Checkpoints:
    """The ``checkpoint-<step>`` folders of a run.

    Each holds the training state as a torch file, which loads with ``weights_only=True``, and the recipe as YAML.

    Args:
        folder: The run's output folder.
        limit: How many of the newest to keep; None keeps all.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder = folder
        self.limit = limit

    def list(self) -> dict[int, Path]:
        """Return the complete checkpoints: step -> folder, in rising order. Half-written ones have other names."""
        if not self.folder.is_dir():
            return {}
        named = {int(m[1]): path for path in self.folder.iterdir() if (m := _NAME.fullmatch(path.name))}
        return {step: named[step] for step in sorted(named) if (named[step] / STATE).is_file()}

    def save(self, step: int, state: dict[str, Any], recipe: str, best: int | None = None) -> Path:
        """Write a checkpoint, then remove the oldest beyond the limit, and return its folder.

        Args:
            step: Optimiser steps done.
            state: Tensors, numbers, texts, lists and dictionaries.
            recipe: The recipe as YAML.
            best: A step whose checkpoint is kept beside the newest.

        Raises:
            BinarizeError: If it cannot be written, such as on a full disk; the previous ones are then as they were.
        """
        target = self.folder / f"checkpoint-{step}"

        def write(folder: Path) -> None:
            torch.save(state, folder / STATE)
            (folder / RECIPE).write_text(recipe, encoding="utf-8")

        before = [path for other, path in self.list().items() if other != step]
        try:
            replace_folder(target, write)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a refused write into a RuntimeError
            kept = f"the previous one, {before[-1]}, is intact" if before else "there is no earlier one"
            raise BinarizeError(
                f"cannot write {target}: {' '.join(str(error).split())}; {kept}. "
                "Make room and go on with resume_from_checkpoint=latest."
            ) from error
        if self.limit is not None:
            for path in before[: max(0, len(before) + 1 - self.limit)]:
                if path.name == f"checkpoint-{best}":
                    continue
                # Renamed first, so that a removal cut short never leaves a damaged checkpoint under a valid name.
                doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        return target

    def find(self, which: str) -> Path | None:
        """Return the folder of a checkpoint; None if the latest is asked for and there is none yet.

        Args:
            which: ``"latest"``, a checkpoint's path, or its name in this run's folder.

        Raises:
            BinarizeError: If the named one does not exist or is not a complete checkpoint.
        """
        complete = self.list()
        if which == "latest":
            return complete[max(complete)] if complete else None
        for path in (Path(which), self.folder / which):
            if (path / STATE).is_file():
                return path
        names = ", ".join(path.name for path in complete.values()) or "none"
        raise BinarizeError(
            f"resume_from_checkpoint: {which!r} is not a complete checkpoint; {self.folder} has: {names}. "
            "Use 'latest' for the newest."
        )

    def tidy(self) -> None:
        """Remove what killed runs left half-written or half-removed, and undo a replacement that was cut short."""
        for path in self.folder.glob(".*.old"):
            target = path.with_name(path.name[1:].rsplit(".", 2)[0])
            if not target.exists():
                path.rename(target)
        for pattern in (".*.tmp", ".*.old"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.rglob(".*.tmp.*"):  # files that were being replaced
            path.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], str]:
    """Return a checkpoint's state, on the CPU, and its recipe as YAML.

    Args:
        folder: The checkpoint.

    Raises:
        BinarizeError: If a file is missing or damaged.
    """
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        return state, (folder / RECIPE).read_text(encoding="utf-8")
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        raise BinarizeError(
            f"cannot read the checkpoint {folder}: {' '.join(str(error).split())[:200]}; "
            "remove it and resume from an earlier one."
        ) from error


def recipe_of(folder: Path, recipe: Recipe) -> Recipe:
    """Return a recipe with the residual scale that a checkpoint's run measured, if it does not give one itself.

    Args:
        folder: The checkpoint.
        recipe: What is to be run on from it.

    Raises:
        BinarizeError: If the checkpoint's recipe cannot be read.
    """
    if recipe.target != "residual" or recipe.residual_scale is not None:
        return recipe
    try:
        saved = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BinarizeError(f"cannot read {folder / RECIPE}: {error}.") from error
    return recipe.model_copy(update={"residual_scale": saved.get("residual_scale")})


def _flush(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb+") as file:
                os.fsync(file.fileno())
        _flush_entry(Path(root))


def _flush_entry(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder to flush it
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
