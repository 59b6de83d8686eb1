"""One sentence for each thing that is wrong in a recipe or a study."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from binarize.errors import did_you_mean
from binarize.recipes.schema import Recipe


def explain(error: ValidationError, source: str, what: str = "recipe", schema: type[BaseModel] = Recipe) -> str:
    """Return every error of a recipe, one a line: the dotted key, what was given, what is allowed.

    Args:
        error: What pydantic found.
        source: The recipe's name or path.
        what: What to call it.
        schema: What it was checked against.
    """
    lines = [_line(item, schema) for item in error.errors(include_url=False)]
    count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
    return "\n".join([f"{what} {source!r} has {count}:", *(f"  {line}" for line in lines)])


def _line(item: Any, schema: type[BaseModel]) -> str:
    path = tuple(str(part) for part in item["loc"])
    key, kind, given = ".".join(path), item["type"], item["input"]
    if kind == "extra_forbidden":
        allowed = _keys(path[:-1], schema)
        return f"{key}: unknown key.{did_you_mean(path[-1], allowed) or ' Allowed: ' + ', '.join(allowed) + '.'}"
    if kind == "missing":
        return f"{key}: missing; give it a value."
    message = item["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if kind == "path_type":
        message = "must be a path"
    if kind == "value_error" and not isinstance(given, (str, int, float)):
        return f"{key}: {message}."
    hint = ""
    if kind == "literal_error" and isinstance(given, str):
        hint = did_you_mean(given, re.findall(r"'([^']*)'", message))
    return f"{key}: got {given!r}; {message}.{hint}"


def _keys(sections: tuple[str, ...], schema: type[BaseModel]) -> list[str]:
    """Return the keys of a section of the schema."""
    model = schema
    for name in sections:
        for candidate in _section_types(model, name):
            model = candidate
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _section_types(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    fields = {field.alias or key: field for key, field in model.model_fields.items()}
    if name not in fields:
        return []
    annotation: Any = fields[name].annotation
    options = [annotation, *getattr(annotation, "__args__", ())]
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
