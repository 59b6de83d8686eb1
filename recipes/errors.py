"""Error messages for recipes and studies: a line for each error that pydantic finds."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from binarize.errors import clip, did_you_mean, listing


def explain(error: ValidationError, source: str, kind: str, schema: type[BaseModel]) -> str:
    """Return all errors that pydantic found, one per line: the dotted key, the given value, what is allowed."""
    lines = [_line(item, schema) for item in error.errors(include_url=False)]
    count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
    return listing(f"{kind} {source!r} has {count}:", lines)


def _line(item: Any, schema: type[BaseModel]) -> str:
    path = tuple(str(part) for part in item["loc"])
    key, kind, given = clip(".".join(path), 80), item["type"], item["input"]
    if kind == "extra_forbidden":
        allowed = _keys(path[:-1], schema)
        names = f" Allowed: {', '.join(allowed)}."
        names = names if len(names) < 120 else " `binarize recipes show NAME --full` lists all keys."
        return f"{key}: unknown key.{did_you_mean(path[-1][:80], allowed) or names}"
    if kind == "missing":
        return f"{key}: missing; give it a value."
    message = item["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if kind == "path_type":
        message = "must be a path"
    if kind == "value_error" and not isinstance(given, (str, int, float)):
        return f"{key}: {message}."
    hint = ""
    if kind == "literal_error" and isinstance(given, str):
        hint = did_you_mean(given[:80], re.findall(r"'([^']*)'", message))
    return f"{key}: got {clip(repr(given), 80)}; {message}.{hint}"


def _keys(sections: tuple[str, ...], schema: type[BaseModel]) -> list[str]:
    """Return the allowed keys of a nested section, or of the last section on the way that is a model."""
    for name in sections:
        fields = {field.alias or key: field for key, field in schema.model_fields.items()}
        field = fields.get(name, fields.get("root"))  # an item of a list that is a model has its number as a name
        annotation: Any = None if field is None else field.annotation
        for option in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(option, type) and issubclass(option, BaseModel):
                schema = option
    return sorted(field.alias or name for name, field in schema.model_fields.items())
