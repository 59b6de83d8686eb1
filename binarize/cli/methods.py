"""`binarize methods`: list the binarization methods and their options."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import TYPE_CHECKING, Annotated

import typer

from binarize.cli.streams import echo
from binarize.tables import Table

if TYPE_CHECKING:
    from binarize.methods import Method


def methods(name: Annotated[str | None, typer.Argument(help="A method, to see its options.")] = None) -> None:
    """List the binarization methods and their options.

    ```
    binarize methods bidiffsr
    ```
    """
    from binarize.layers.parts import PART_KINDS, list_parts
    from binarize.methods import get_method, list_methods

    if name is None:
        rows = [[each, _first_line(get_method(each))] for each in list_methods()]
        echo(Table(["method", "description"], rows).to_text(header=False))
        return
    method = get_method(name)
    described = _described_fields(type(method))
    names = [field.name for field in dataclasses.fields(method)]
    for kind in PART_KINDS:
        described[kind] = f"{described.get(kind, '')} Parts: {', '.join(list_parts(kind))}."
    options = [["", name, repr(getattr(method, name)), described.get(name, "")] for name in names]
    echo(f"{name}: {_first_line(method)}\n")
    echo(Table(["", "option", "default", "description"], options).to_text(header=False))


def _first_line(method: Method) -> str:
    return (inspect.getdoc(type(method)) or "").partition("\n")[0]


def _described_fields(cls: type[Method]) -> dict[str, str]:
    """Return the descriptions of all options from the docstrings of a method and its bases."""
    described: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        attributes = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE):
            described[name] = " ".join(text.split())
    return described
