"""Read JSON that anyone may have written: bounded in size, depth and digits, each key once."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from binarize.errors import BinarizeError, one_line
from binarize.files import read_text

MAX_BYTES, MAX_DEPTH, MAX_DIGITS = 4 << 20, 64, 20
_SHOWN = 5
_log = logging.getLogger("binarize")


def parse_json(text: str, source: str) -> dict[str, Any]:
    """Return a JSON object; an error names the source."""
    if len(text) > MAX_BYTES:
        raise BinarizeError(
            f"{source} is not valid JSON for a configuration: it is longer than {MAX_BYTES} characters."
        )
    try:
        content = json.loads(text, parse_int=_integer, parse_constant=_constant, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise BinarizeError(
            f"{source} is not valid JSON: it is nested too deeply; at most {MAX_DEPTH} levels."
        ) from None
    except ValueError as error:
        raise BinarizeError(f"{source} is not valid JSON: {one_line(error, 150)}.") from error
    if not isinstance(content, dict):
        raise BinarizeError(f"{source} must be a JSON object; got {type(content).__name__}.")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        nested = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for values in nested for value in values if isinstance(value, dict | list)]
        if not level:
            return content
    raise BinarizeError(f"{source} is not valid JSON: it is nested too deeply; at most {MAX_DEPTH} levels.")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    return parse_json(read_text(path, MAX_BYTES), f"{path}:")


def check_keys(config: Mapping[str, Any], source: str, expected: Collection[str], others: Collection[str] = ()) -> None:
    """Check the keys of a configuration; those that start with an underscore are not looked at.

    Keys that are neither expected nor among the others, which are known but not read, are one warning.

    Raises:
        BinarizeError: If such a key is a misspelling of an expected key that the configuration lacks.
    """
    missing = [key for key in expected if key not in config]
    unknown = [key for key in config if not (key.startswith("_") or key in expected or key in others)]
    for key in unknown:
        if close := difflib.get_close_matches(key, missing, 1, 0.8):
            raise BinarizeError(f"{source}: has an unknown key {key!r:.60}. Did you mean {close[0]!r}?")
    if unknown:
        names = ", ".join(f"{key!r:.60}" for key in unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
        _log.warning("%s: unknown keys have no effect: %s", source, names)


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("a number is NaN")
    return float(name)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; at most {MAX_DIGITS}")
    return int(digits)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.60} is given twice")
    return found
