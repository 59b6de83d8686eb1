"""Whether a command may run the code that a recipe or a study names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from binarize.trust import named_by_a_recipe

_HELP = "Run the code that the recipe names: plugins, and parts written as module:name."
TrustOption = Annotated[bool, typer.Option("--trust", help=_HELP)]


def code_of(source: str, trust: bool, *, inspecting: bool = False) -> AbstractContextManager[None]:
    """Return a context in which the code that a recipe or study names runs, or is an error.

    It runs with --trust. Without, it also runs if the file and its bases are in the working folder, or installed, and
    the command does more than inspect them.
    """
    here = Path.cwd().resolve()
    outside = [file for file in _files(source, ()) if not file.resolve().is_relative_to(here)]
    return nullcontext() if trust or not (inspecting or outside) else named_by_a_recipe()


def _files(source: str, below: tuple[Path, ...]) -> Iterator[Path]:
    """Yield a YAML file, and those of its bases and of the bases of its cells; installed ones have no file here."""
    from binarize.recipes.load import YAML_SUFFIXES, read_yaml

    path = Path(source)
    if path.suffix not in YAML_SUFFIXES or not path.is_file() or path in below:
        return
    yield path
    data: dict[str, Any] = read_yaml(path, "recipe")
    cells = data.get("cells")
    for section in (data, *(cells if isinstance(cells, list) else ())):
        base = section.get("base") if isinstance(section, dict) else None
        if isinstance(base, str):
            yield from _files(str(path.parent / base), (*below, path))
