"""Find recipes, apply their bases and overrides, and report every mistake in one error."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from binarize.errors import BinarizeError, clip, did_you_mean, listing
from binarize.files import read_text, write_atomic
from binarize.recipes.degradation import Degradation
from binarize.recipes.errors import explain
from binarize.recipes.generation_recipe import GenerationRecipe
from binarize.recipes.schema import DEFAULT_TASK, TrainingRecipe
from binarize.recipes.sections import Section
from binarize.recipes.super_resolution_recipe import Recipe
from binarize.recipes.yaml_text import MAX_BYTES, parse_yaml

RECIPE_DIR = Path(__file__).parent
STUDY_DIR = RECIPE_DIR / "ablations"
YAML_SUFFIXES = (".yaml", ".yml")
# A derived recipe changes the keys of these sections one by one. Any other value replaces the base's value as a whole.
MERGED_SECTIONS = ("model", "scheduler", "method", "distillation", "progressive")
# Keys that describe one recipe and are not inherited from its base.
_MAX_BASES = 16
_NOT_INHERITED = ("description", "published", "base", "output_dir")
_TASKS: dict[str, type[TrainingRecipe]] = {cls.task: cls for cls in (Recipe, GenerationRecipe)}
_SOURCES = {"method": ("name",), "model": ("from_pretrained", "factory")}
NETWORK_SOURCES = ("class", *_SOURCES["model"])
_SHORT = {"method": "name", "model": "factory"}


def list_recipes() -> dict[str, str]:
    """Return the installed recipes as name -> one-line description, the main ones first."""
    return {name: str(read_yaml(path, "recipe").get("description", "")) for name, path in installed_recipes().items()}


def recipe_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file of a recipe, given an installed recipe's name or the path of a YAML file."""
    return find_file("recipe", name_or_path, installed_recipes(), "binarize recipes ls")


def find_file(kind: str, name_or_path: str | os.PathLike[str], installed: Mapping[str, Path], command: str) -> Path:
    """Return the YAML file of an installed name or of a path; errors name the command that lists the names."""
    text = str(name_or_path)
    if Path(text).suffix in YAML_SUFFIXES:
        if Path(text).is_file():
            return Path(text)
        raise BinarizeError(f"there is no {kind} file {text!r}; `{command}` lists what is installed.")
    if text in installed:
        return installed[text]
    hint = f"A path must end in .yaml.{did_you_mean(text, installed)}"
    raise BinarizeError(f"unknown {kind} {text!r}; installed: {', '.join(_abbreviated(installed))}. {hint}")


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainingRecipe:
    """Return a validated recipe of its task's class, or raise an error that lists everything that is wrong.

    Args:
        name_or_path: An installed recipe's name, or the path of a YAML file.
        overrides: ``"key=value"`` strings, applied last. A dotted key reaches into a section
            (``"model.base_channels=32"``). The value is YAML (``1e-4``, ``[1, 2]``, ``null``). An override that takes
            the network from elsewhere (``"model.factory=module:function"``) removes the options of the former one.
    """
    path = recipe_path(name_or_path)
    data = _with_bases(path, ())
    for override in overrides:
        apply_override(data, override)
    data.pop("base", None)
    if data.get("output_dir") is None:
        data["output_dir"] = f"runs/{path.stem}"
    schema = recipe_class(data, str(name_or_path))
    data.pop("task", None)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise BinarizeError(explain(error, str(name_or_path), "recipe", schema)) from None


def check_folders(recipe: TrainingRecipe, source: str) -> None:
    """Check that the data folders that a recipe names exist; ``source`` names the recipe in errors."""
    keys = ("train_data_dir", "train_lr_data_dir", "validation_data_dir", "validation_lr_data_dir")
    folders = {key: folder for key in keys if (folder := getattr(recipe, key, None)) is not None}
    missing = [f"{key}: there is no folder {str(path)!r}." for key, path in folders.items() if not _is_folder(path)]
    if missing:
        raise BinarizeError(listing(f"recipe {source!r} names folders that do not exist:", missing))


def recipe_class(data: Mapping[str, Any], source: str) -> type[TrainingRecipe]:
    """Return the class of a recipe's keys; ``source`` names the recipe in errors."""
    task = data.get("task", DEFAULT_TASK)
    if task not in _TASKS:
        hint = did_you_mean(str(task), _TASKS)
        raise BinarizeError(f"{source}: unknown task {clip(repr(task), 60)}; tasks: {', '.join(_TASKS)}.{hint}")
    return _TASKS[task]


def recipe_task(name_or_path: str | os.PathLike[str]) -> str:
    """Return the task of a recipe, given its name or path."""
    return recipe_class(_with_bases(recipe_path(name_or_path), ()), str(name_or_path)).task


class _Degraded(Section):
    degradation: Degradation


def load_degradation(value: Any) -> Degradation:
    """Return a degradation given as in a recipe: a preset's name, or a list of steps, or YAML text of such a list."""
    if isinstance(value, Degradation):
        return value
    parsed = parse_yaml(value, "the degradation") if isinstance(value, str) else value
    try:
        return _Degraded.model_validate({"degradation": parsed}).degradation
    except ValidationError as error:
        raise BinarizeError(explain(error, clip(str(value), 80), "degradation", _Degraded)) from None


def copy_recipe(name: str, dest: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Copy a recipe's file for editing to a new file or into a folder, and return the path of the copy."""
    source, target = recipe_path(name), Path(dest)
    if target.is_dir():
        target = target / source.name
    if target.suffix not in YAML_SUFFIXES:
        raise BinarizeError(f"cannot copy the recipe to {target}: its name must end in .yaml.")
    text = source.read_text(encoding="utf-8")
    return write_atomic(target, lambda temporary: temporary.write_text(text, encoding="utf-8"), force=force)


def read_yaml(path: Path, kind: str) -> dict[str, Any]:
    """Return the top-level mapping of a recipe or study, with files of code relative to the file's folder."""
    data = parse_yaml(read_text(path, MAX_BYTES), str(path))
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise BinarizeError(f"{path} is not a {kind}: it must hold `key: value` lines at its top level.")
    return code_beside(path.parent, data)


def code_beside(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's keys with the .py files of plugins and of the network's factory joined to a folder."""

    def joined(code: Any) -> Any:
        return str(folder / code) if isinstance(code, str) and code.partition(":")[0].endswith(".py") else code

    data = dict(data)
    if isinstance(data.get("plugins"), list):
        data["plugins"] = [joined(each) for each in data["plugins"]]
    if "model.factory" in data:
        data["model.factory"] = joined(data["model.factory"])
    model = data.get("model")
    factory = model.get("factory") if isinstance(model, dict) else model
    if joined(factory) != factory:
        data["model"] = {**(model if isinstance(model, dict) else {}), "factory": joined(factory)}
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Apply one ``"key=value"`` string to a recipe or study in place; a dotted key reaches into a section."""
    key, equals, text = map(str.strip, override.partition("="))
    name = clip(repr(override), 80)
    if not equals or not key:
        raise BinarizeError(f"the override {name} is not key=value; write, for example, learning_rate=2e-4.")
    value = parse_yaml(text, f"the override {name}")
    *sections, last = key.split(".")
    for depth, section in enumerate(sections, 1):
        below = _as_section(section, data.get(section))
        if below is not None and not isinstance(below, dict):
            inside = f"{'.'.join(sections[:depth])}, which is {clip(repr(below), 60)} and has no keys"
            raise BinarizeError(f"the override {name} reaches into {inside}.")
        data[section] = dict(below or {})
        data = data[section]
    if sections == ["model"] and _moves(data, {last: value}):
        data.clear()
    data[last] = value


def installed_recipes() -> dict[str, Path]:
    """Return the installed recipes as name -> file, the main ones first."""
    found = (path for path in RECIPE_DIR.rglob("*.yaml") if path.parent != STUDY_DIR)
    paths = sorted(found, key=lambda path: (path.parent != RECIPE_DIR, path))
    return {path.relative_to(RECIPE_DIR).with_suffix("").as_posix(): path for path in paths}


def _abbreviated(names: Collection[str]) -> list[str]:
    """Return names with those of one folder joined into ``folder/*``."""
    return list(dict.fromkeys(f"{name.partition('/')[0]}/*" if "/" in name else name for name in names))


# Merging stays here although OmegaConf merges YAML: naming another method must drop the base's options, and only some
# sections merge, so OmegaConf.merge would need the same code around it and would add `${...}` interpolation.
def _with_bases(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in derived:
        chain = " -> ".join(p.name for p in (*derived, path))
        raise BinarizeError(f"recipes are each other's base: {chain}; remove one `base:`.")
    if len(derived) > _MAX_BASES:
        raise BinarizeError(
            f"{path}: is the base of more than {_MAX_BASES} recipes, each of the next; write fewer files."
        )
    data = read_yaml(path, "recipe")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise BinarizeError(
            f"{path}: base is {clip(repr(base), 60)}; it must be a recipe's name or a YAML file's path."
        )
    origin = path.parent / base if Path(base).suffix in YAML_SUFFIXES else recipe_path(base)
    if not origin.is_file():
        raise BinarizeError(f"{path}: its base {base!r} does not exist beside it.")
    inherited = _with_bases(origin, (*derived, path.resolve()))
    return _merge({key: value for key, value in inherited.items() if key not in _NOT_INHERITED}, data)


def _merge(base: Mapping[str, Any], derived: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in derived.items():
        below = _as_section(key, merged.get(key))
        joins = isinstance(below, dict) and merges(key, value) and not (key == "model" and _moves(below, value))
        merged[key] = {**below, **value} if joins else value
    return merged


def merges(key: str, value: Any) -> bool:
    """Whether a value changes a section's keys one by one. One that names a method or network replaces the section."""
    replaces = isinstance(value, Mapping) and any(value.get(name) is not None for name in _SOURCES.get(key, ()))
    return key in MERGED_SECTIONS and isinstance(value, Mapping) and not replaces


def _moves(section: Mapping[str, Any], change: Mapping[str, Any]) -> bool:
    """Whether a change of the model section takes the network from elsewhere, where the options are others."""
    old, new = ({name for name in NETWORK_SOURCES if part.get(name) is not None} for part in (section, change))
    return bool(old and new) and old != new


def _as_section(key: str, value: Any) -> Any:
    """Return a method that is given by its name alone, or a network by its factory, as a section."""
    return {_SHORT[key]: value} if key in _SHORT and isinstance(value, str) else value


def _is_folder(path: Path) -> bool:
    return (path.parent if "{}" in path.name else path).is_dir()  # the last part can be a pattern of names
