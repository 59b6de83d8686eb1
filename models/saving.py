"""The folders of pipelines: read with errors of this package, and written whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from binarize.errors import BinarizeError, one_line
from binarize.files import update_folder
from binarize.models.sampling import FAILURES, read_scheduler


@contextmanager
def reading(folder: Path, options: dict[str, Any]) -> Iterator[None]:
    """Add the scheduler of a pipeline's folder to the options of ``from_pretrained``, which the body calls.

    What diffusers raises for a folder of this machine becomes a BinarizeError.
    """
    is_here = (folder / "model_index.json").is_file()
    if is_here and "scheduler" not in options and (scheduler := read_scheduler(folder)) is not None:
        options["scheduler"] = scheduler
    try:
        yield
    except (*FAILURES, OSError) as error:
        if isinstance(error, BinarizeError) or not is_here:
            raise
        raise BinarizeError(f"{folder}: cannot be read as a pipeline: {one_line(error)}") from error


def save_whole(
    save: Callable[..., Any], folder: str | PathLike[str], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Call diffusers' ``save_pretrained(folder, *args, **options)`` by `update_folder`."""
    if options.get("push_to_hub"):
        options.setdefault("repo_id", Path(folder).name)
    update_folder(folder, lambda temporary: save(str(temporary), *args, **options))
