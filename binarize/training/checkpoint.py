"""Checkpoints that are either complete or absent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, BinaryIO, cast

from binarize.digests import check_sums, load_torch_file, write_sums
from binarize.errors import BinarizeError, one_line
from binarize.files import read_text, remove_folder, replace_folder, tidy
from binarize.recipes.yaml_text import MAX_BYTES

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

        failures: list[OSError] = []

        def write(folder: Path) -> None:
            with (folder / STATE).open("wb") as file:
                import torch

                torch.save(state, cast(BinaryIO, _Recorder(file, failures)))
            (folder / RECIPE).write_text(recipe, encoding="utf-8")
            write_sums(folder)

        earlier = [path for other, path in self.list().items() if other != step]
        try:
            replace_folder(target, write)
        except (OSError, RuntimeError) as error:
            kept = f"the previous checkpoint, {earlier[-1]}, is intact" if earlier else "there is no earlier checkpoint"
            raise BinarizeError(
                f"cannot write {target}: {one_line(failures[0] if failures else error)}; {kept}. "
                "Free disk space and continue with resume_from_checkpoint=latest."
            ) from error
        if self.limit is not None:
            oldest = earlier[: max(0, len(earlier) + 1 - self.limit)]
            for path in (path for path in oldest if path.name != f"checkpoint-{best}"):
                remove_folder(path)
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
        for folder in (self.folder, *filter(Path.is_dir, self.folder.glob("*"))):
            tidy(folder)


class _Recorder:
    """A file that remembers why a write failed: torch.save turns that into a RuntimeError about positions."""

    def __init__(self, file: BinaryIO, failures: list[OSError]) -> None:
        self.file, self.failures = file, failures

    def write(self, content: Any) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.failures.append(error)
            raise

    def flush(self) -> None:
        self.file.flush()


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], str]:
    """Return a checkpoint's state, on the CPU, and its recipe as YAML, after comparing both with their digests."""
    try:
        state = load_torch_file(folder / STATE, checked=check_sums(folder, (STATE, RECIPE)))
        if not isinstance(state, dict):
            raise BinarizeError(f"{STATE} holds a {type(state).__name__}, not the state of a run")
        return state, read_text(folder / RECIPE, MAX_BYTES)
    except Exception as error:
        raise unreadable(folder, one_line(error, 200)) from error


def unreadable(folder: Path, reason: str) -> BinarizeError:
    """Return the error of a checkpoint that cannot be resumed from."""
    return BinarizeError(f"cannot read the checkpoint {folder}: {reason}; remove it and resume from an earlier one.")
