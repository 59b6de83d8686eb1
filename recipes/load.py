"""Finding recipes, following their bases, applying overrides, and turning every mistake into one error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from binarize.errors import BinarizeError, did_you_mean
from binarize.recipes.errors import explain
from binarize.recipes.schema import Recipe
from binarize.recipes.yaml_text import parse_yaml

_FOLDER = Path(__file__).parent
_STUDIES = _FOLDER / "ablations"
_SUFFIXES = (".yaml", ".yml")
# Sections whose keys a derived recipe changes one by one; any other value replaces the base's whole.
_MERGED = ("model", "scheduler", "method", "distillation", "progressive")
# What describes a recipe itself and so is never taken from its base.
_OWN = ("description", "published", "base", "output_dir")


def list_recipes() -> dict[str, str]:
    """Return the installed recipes: name -> one-line description.

    The main ones come first, then the paper's rows (``paper/...``) and those that show one option of the training each
    (``training/...``).
    """
    return {name: str(_read(path).get("description", "")) for name, path in _installed().items()}


def recipe_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file of a recipe.

    Args:
        name_or_path: An installed recipe's name, or the path of a YAML file.

    Raises:
        BinarizeError: If there is no such recipe or file.
    """
    text = str(name_or_path)
    if Path(text).suffix in _SUFFIXES:
        if Path(text).is_file():
            return Path(text)
        raise BinarizeError(f"there is no recipe file {text!r}; `binarize recipes ls` lists the installed recipes.")
    installed = _installed()
    if text in installed:
        return installed[text]
    shown = ", ".join(name for name in installed if "/" not in name)
    raise BinarizeError(
        f"unknown recipe {text!r}; installed: {shown}, paper/*, training/*. A file of your own needs its .yaml ending."
        + did_you_mean(text, installed)
    )


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe, checked.

    Args:
        name_or_path: An installed recipe's name, or the path of a YAML file.
        overrides: ``"key=value"`` texts, applied last. A key with dots reaches into a section
            (``"model.base_channels=32"``); a value is YAML (``1e-4``, ``[1, 2]``, ``null``).

    Raises:
        BinarizeError: If the recipe is unknown, is not YAML, or has errors; then all of them are listed, one a line.
    """
    path = recipe_path(name_or_path)
    data = _with_bases(path, ())
    for override in overrides:
        _apply(data, override)
    data.pop("base", None)
    if data.get("output_dir") is None:
        data["output_dir"] = f"runs/{path.stem}"
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise BinarizeError(explain(error, str(name_or_path))) from None


def copy_recipe(name: str, dest: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Copy a recipe's file, to be edited, and return where it went.

    Args:
        name: An installed recipe's name, or the path of a YAML file.
        dest: The new file, or an existing folder to put it in.
        force: Overwrite an existing file.

    Raises:
        BinarizeError: If there is no such recipe, the file exists, or it cannot be written.
    """
    from binarize.imaging import write_atomic

    source, target = recipe_path(name), Path(dest)
    if target.is_dir():
        target = target / source.name
    if target.suffix not in _SUFFIXES:
        raise BinarizeError(f"cannot copy the recipe to {target}: its name must end in .yaml.")
    text = source.read_text(encoding="utf-8")
    return write_atomic(target, lambda temporary: temporary.write_text(text, encoding="utf-8"), force=force)


def _installed() -> dict[str, Path]:
    found = (path for path in _FOLDER.rglob("*.yaml") if path.parent != _STUDIES)
    paths = sorted(found, key=lambda path: (path.parent != _FOLDER, path))
    return {path.relative_to(_FOLDER).with_suffix("").as_posix(): path for path in paths}


def _read(path: Path, what: str = "recipe") -> dict[str, Any]:
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise BinarizeError(f"cannot read the {what} {path}: {error}.") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise BinarizeError(f"{path} is not a {what}: it must hold `key: value` lines at its top level.")
    plugins = data.get("plugins")
    if isinstance(plugins, list):
        data["plugins"] = [str(path.parent / p) if str(p).endswith(".py") else p for p in plugins]
    return data


def _with_bases(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in below:
        chain = " -> ".join(p.name for p in (*below, path))
        raise BinarizeError(f"recipes are each other's base: {chain}; remove one `base:`.")
    data = _read(path)
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise BinarizeError(f"{path}: base is {base!r}; it must be a recipe's name or a YAML file's path.")
    beside = path.parent / base
    origin = beside if beside.suffix in _SUFFIXES else recipe_path(base)
    if not origin.is_file():
        raise BinarizeError(f"{path}: its base {base!r} does not exist beside it.")
    inherited = _with_bases(origin, (*below, path.resolve()))
    for key in _OWN:
        inherited.pop(key, None)
    return _merge(inherited, data)


def _merge(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        below = merged.get(key)
        if key == "method" and isinstance(below, str):
            below = {"name": below}
        # One method's options mean nothing to another, so naming a method starts afresh.
        afresh = key == "method" and isinstance(value, dict) and "name" in value
        if key in _MERGED and isinstance(below, dict) and isinstance(value, dict) and not afresh:
            merged[key] = {**below, **value}
        else:
            merged[key] = value
    return merged


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise BinarizeError(f"the override {override!r} is not key=value; write, for example, learning_rate=2e-4.")
    value = parse_yaml(text, f"the override {override!r}")
    *sections, last = key.split(".")
    target = data
    for depth, section in enumerate(sections):
        below = target.get(section)
        if isinstance(below, str) and section == "method":
            below = {"name": below}
        if below is not None and not isinstance(below, dict):
            name = ".".join(sections[: depth + 1])
            raise BinarizeError(f"the override {override!r} reaches into {name}, which is {below!r} and has no keys.")
        target[section] = dict(below or {})
        target = target[section]
    target[last] = value
