"""Checkpoints that are either complete or absent."""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from binarize.errors import BinarizeError, one_line
from binarize.files import replace_folder
from binarize.recipes import Recipe

_NAME = re.compile(r"checkpoint-(\d+)")
STATE = "state.pt"
RECIPE = "recipe.yaml"


class Checkpoints:
    """The ``checkpoint-<step>`` folders of a run; the newest ``limit`` are kept, all if it is None.

    Each holds the training state as a torch file, which loads with ``weights_only=True``, and the recipe as YAML.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder, self.limit = folder, limit

    def list(self) -> dict[int, Path]:
        """Return the complete checkpoints as step -> folder, in ascending order."""
        if not self.folder.is_dir():
            return {}
        named = {int(m[1]): path for path in self.folder.iterdir() if (m := _NAME.fullmatch(path.name))}
        return {step: named[step] for step in sorted(named) if (named[step] / STATE).is_file()}

    def save(self, step: int, state: dict[str, Any], recipe: str, best: int | None = None) -> Path:
        """Write a checkpoint, remove the oldest beyond the limit except that of step ``best``, and return the folder.

        If it cannot be written, for example because the disk is full, earlier checkpoints are unchanged.
        """
        target = self.folder / f"checkpoint-{step}"

        def write(folder: Path) -> None:
            torch.save(state, folder / STATE)
            (folder / RECIPE).write_text(recipe, encoding="utf-8")

        earlier = [path for other, path in self.list().items() if other != step]
        try:
            replace_folder(target, write)
        except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
            kept = f"the previous checkpoint, {earlier[-1]}, is intact" if earlier else "there is no earlier checkpoint"
            raise BinarizeError(
                f"cannot write {target}: {one_line(error)}; {kept}. "
                "Free disk space and continue with resume_from_checkpoint=latest."
            ) from error
        if self.limit is not None:
            oldest = earlier[: max(0, len(earlier) + 1 - self.limit)]
            for path in (path for path in oldest if path.name != f"checkpoint-{best}"):
                # Rename first, so that an interrupted removal never leaves a damaged checkpoint under a valid name.
                removed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
                path.rename(removed)
                shutil.rmtree(removed, ignore_errors=True)
        return target

    def find(self, which: str) -> Path | None:
        """Return the folder of ``"latest"``, None if there is none, or of a checkpoint given by its path or name."""
        complete = self.list()
        if which == "latest":
            return complete[max(complete)] if complete else None
        for path in (Path(which), self.folder / which):
            if (path / STATE).is_file():
                return path
        names = ", ".join(path.name for path in complete.values()) or "none"
        raise BinarizeError(f"resume_from_checkpoint: {which!r} is not a complete checkpoint; there are: {names}.")

    def clean_up(self) -> None:
        """Remove the temporary files of killed runs, and undo an interrupted replacement."""
        for path in self.folder.glob(".*.old"):
            target = path.with_name(path.name[1:].rsplit(".", 2)[0])
            if not target.exists():
                path.rename(target)
        for pattern in (".*.tmp", ".*.old"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.rglob(".*.tmp.*"):  # single files
            path.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], str]:
    """Return a checkpoint's state, on the CPU, and its recipe as YAML."""
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        return state, (folder / RECIPE).read_text(encoding="utf-8")
    except Exception as error:  # torch.load raises many types for a damaged file
        raise BinarizeError(
            f"cannot read the checkpoint {folder}: {one_line(error, 200)}; remove it and resume from an earlier one."
        ) from error


def with_saved_residual_scale(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe with the residual scale of a checkpoint's recipe, if it needs one and does not set it."""
    if recipe.target != "residual" or recipe.residual_scale is not None:
        return recipe
    try:
        saved = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BinarizeError(f"cannot read {folder / RECIPE}: {error}.") from error
    return recipe.model_copy(update={"residual_scale": saved.get("residual_scale")})
