"""`Study`: the runs that an ablation compares, and the images it measures them on."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, NonNegativeInt, ValidationError, ValidationInfo, field_validator

from binarize.errors import BinarizeError, listing
from binarize.recipes import load as files
from binarize.recipes.errors import explain
from binarize.recipes.generation_recipe import GenerationRecipe
from binarize.recipes.schema import TrainingRecipe
from binarize.recipes.sections import Section, UserPath
from binarize.recipes.super_resolution_recipe import Recipe
from binarize.studies.sections import Evaluation, EvaluationSection, GenerationEvaluation

MAX_CELLS = 1000
# Keys of a recipe that the study sets for every run.
_RESERVED = {
    "seed": "the study's seeds decide it; write seeds: [0, 1]",
    "output_dir": "the study's output_dir holds a folder for each run",
    "resume_from_checkpoint": "a study resumes by itself; leave it out",
    "base": "name the base beside the overrides",
}


def _check_keys(overrides: dict[str, Any]) -> dict[str, Any]:
    for key in overrides:
        reason = _RESERVED.get(key.partition(".")[0])
        if reason is not None:
            raise ValueError(f"{key!r} cannot be changed here: {reason}")
    return overrides


class CellSection(Section):
    """One row of the table: a recipe with some keys changed."""

    name: str = Field(min_length=1, description="Name of the row.")
    base: str | None = Field(default=None, description="A recipe's name or YAML file; by default the study's base.")
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe, nested as in a recipe or with dots (`method.groups: 2`)."""

    _not_reserved = field_validator("overrides")(_check_keys)


class BaseStudy(Section):
    """An ablation: cells, a grid or their product, each trained with every seed and measured on the same images."""

    task: ClassVar[str]
    """The task of its recipes."""

    description: str = Field(default="", description="One line for `binarize ablate --list`.")
    base: str | None = Field(default=None, description="The recipe that cells change; a cell may name its own.")
    overrides: dict[str, Any] = Field(default_factory=dict, description="Keys of the recipe, for every cell.")
    cells: tuple[CellSection, ...] = Field(default=(), description="The rows, by name.")
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict, validate_default=True)
    """Key of the recipe -> values. Each combination is a row; with cells, each combination and cell is."""
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0,), description="Seeds; every cell is run with each.")
    evaluation: Evaluation
    """What is measured."""
    output_dir: UserPath = Field(description="Output folder; by default runs/ablations/ and the study's name.")

    _not_reserved = field_validator("overrides")(_check_keys)

    @field_validator("cells")
    @classmethod
    def _named_once(cls, value: tuple[CellSection, ...], info: ValidationInfo) -> tuple[CellSection, ...]:
        names = [cell.name for cell in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two cells are called {twice[0]!r}; give each cell its own name")
        orphans = [cell.name for cell in value if cell.base is None]
        if orphans and info.data.get("base", ...) is None:
            raise ValueError(f"{orphans[0]!r} has no base and neither has the study; name a recipe")
        return value

    @field_validator("grid")
    @classmethod
    def _has_rows(cls, value: dict[str, tuple[Any, ...]], info: ValidationInfo) -> dict[str, tuple[Any, ...]]:
        _check_keys(value)
        empty = [key for key, values in value.items() if not values]
        if empty:
            raise ValueError(f"{empty[0]!r} has no values; give a list of at least one")
        if not info.data.get("cells", ...):
            if not value:
                raise ValueError("there is nothing to run; give cells, a grid or both")
            if info.data.get("base", ...) is None:
                raise ValueError("needs base, the recipe that it changes")
        return value

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("give at least one seed, and none twice")
        return value

    def recipes(self, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Return each cell's recipe by the cell's name, without seed and output folder; the overrides apply last."""
        common = as_strings(self.overrides)
        found: dict[str, TrainingRecipe] = {}
        errors: dict[str, list[str]] = {}
        for name, base, own in self._cells():
            if name in found:
                raise BinarizeError(f"two cells of the study are called {name!r}; a value is twice in its grid.")
            try:
                recipe = files.load_recipe(base, [*common, *own, *overrides])
                if recipe.task != self.task:
                    raise BinarizeError(f"the task of {base} is {recipe.task}, and the study's is {self.task}.")
                found[name] = recipe
            except BinarizeError as error:
                errors.setdefault(str(error), []).append(name)
        if errors:
            lines = [f"{', '.join(names)}: {message}" for message, names in errors.items()]
            raise BinarizeError(listing("some cells of the study have no valid recipe:", lines))
        first: dict[str, str] = {}
        for name, recipe in found.items():
            content = recipe.model_copy(update={"description": "", "published": None, "output_dir": Path()}).to_yaml()
            if first.setdefault(content, name) != name:
                both = f"{first[content]!r} and {name!r}"
                raise BinarizeError(f"the cells {both} are the same run; an override may have made them equal.")
        return found

    def _cells(self) -> list[tuple[str, str, list[str]]]:
        """Return the name, base and overrides of every row."""
        cells = [(cell.name, cell.base, as_strings(cell.overrides)) for cell in self.cells] or [("", None, [])]
        if (rows_wanted := math.prod(map(len, self.grid.values())) * len(cells)) > MAX_CELLS:
            raise BinarizeError(f"grid: the study has {rows_wanted} cells; at most {MAX_CELLS}. Give fewer values.")
        points = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        rows = []
        for (name, base, own), point in itertools.product(cells, points):
            label = ", ".join([*filter(None, [name]), *(f"{key}={_short(value)}" for key, value in point.items())])
            rows.append((label, str(self.base if base is None else base), [*own, *as_strings(point)]))
        return rows


class Study(BaseStudy):
    """A study of recipes for super-resolution."""

    task: ClassVar[str] = Recipe.task
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    """What is measured."""


class GenerationStudy(BaseStudy):
    """A study of recipes for generation."""

    task: ClassVar[str] = GenerationRecipe.task
    evaluation: GenerationEvaluation = Field(default_factory=GenerationEvaluation)
    """What is measured."""


_STUDIES: dict[str, type[BaseStudy]] = {study.task: study for study in (Study, GenerationStudy)}


def as_strings(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides as the ``"key=value"`` strings of `load_recipe`; sections merge as with a recipe's base."""
    strings = []
    for key, value in overrides.items():
        if files.merges(key, value):
            # The source of a network comes first, since it may remove the options of another.
            inner = sorted(value, key=lambda name: name not in files.NETWORK_SOURCES)
            strings += [f"{key}.{name}={_json(value[name])}" for name in inner]
        else:
            strings.append(f"{key}={_json(value)}")
    return strings


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "name" in value:
        options = ", ".join(f"{key}={_short(below)}" for key, below in value.items() if key != "name")
        return f"{value['name']}({options})"
    return value if isinstance(value, str) else _json(value)


def list_studies() -> dict[str, str]:
    """Return the installed studies as name -> one-line description, those of the paper first."""
    return {name: str(files.read_yaml(path, "study").get("description", "")) for name, path in _installed().items()}


def _installed() -> dict[str, Path]:
    paths = sorted(files.STUDY_DIR.glob("*.yaml"), key=lambda path: (path.stem.startswith("small_"), path.stem))
    return {path.stem: path for path in paths}


def study_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file of a study, given an installed study's name or the path of a YAML file."""
    return files.find_file("study", name_or_path, _installed(), "binarize ablate --list")


def load_study(
    study: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[Any, list[str]]:
    """Return a validated study of its recipes' task, and those of the ``"key=value"`` overrides that apply to them.

    The study is an installed study's name, the path of a YAML file, or the keys of a study, ``output_dir`` included.
    """
    if isinstance(study, Mapping):
        source, data = "given", dict(study)
    else:
        path = study_path(study)
        source, data = str(study), _with_absolute_files(files.read_yaml(path, "study"), path.parent)
        data.setdefault("output_dir", f"runs/ablations/{path.stem}")
    of_recipes = []
    for override in overrides:
        key = override.partition("=")[0].strip().partition(".")[0]
        if key in ("seeds", "evaluation", "output_dir"):
            files.apply_override(data, override)
        elif key in _RESERVED:
            raise BinarizeError(f"the override {override!r} cannot be given to a study: {_RESERVED[key]}.")
        else:
            of_recipes.append(override)
    task, unreadable = _task(data)
    schema = _STUDIES[task]
    try:
        return schema.model_validate(data), of_recipes
    except ValidationError as error:
        if unreadable is not None:  # the keys of `evaluation` depend on the task
            raise unreadable from None
        raise BinarizeError(explain(error, source, "study", schema)) from None


def _task(data: Mapping[str, Any]) -> tuple[str, BinarizeError | None]:
    """Return the task of the first recipe that can be read, or a default and the reason why none can.

    `BaseStudy.recipes` checks that all have this task.
    """
    common, cells = data.get("base"), data.get("cells")
    sections = [cell for cell in cells if isinstance(cell, Mapping)] if isinstance(cells, list | tuple) else []
    bases = [common if section.get("base") is None else section["base"] for section in sections] or [common]
    errors = []
    for base in dict.fromkeys(base for base in bases if isinstance(base, str)):
        try:
            return files.recipe_task(base), None
        except BinarizeError as error:
            errors.append(error)
    return Study.task, errors[0] if errors else None


def _with_absolute_files(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve bases and files of code of a study and its cells relative to the study's file."""

    def resolve(section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        base, overrides = section.get("base"), section.get("overrides")
        if isinstance(base, str) and Path(base).suffix in files.YAML_SUFFIXES:
            section = {**section, "base": str(folder / base)}
        if isinstance(overrides, dict):
            section = {**section, "overrides": files.code_beside(folder, overrides)}
        return section

    cells, evaluation = data.get("cells"), data.get("evaluation")
    if isinstance(evaluation, dict) and ".py:" in str(evaluation.get("features")):
        data = {**data, "evaluation": {**evaluation, "features": str(folder / evaluation["features"])}}
    return resolve({**data, "cells": [resolve(cell) for cell in cells]} if isinstance(cells, list) else data)
