"""MkDocs hook: generates the reference of the command line and of the recipe keys, so that they cannot become stale."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from typing import Any, get_args

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pydantic import BaseModel, TypeAdapter

from binarize import recipes
from binarize.tables import Table


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages to the files that MkDocs found.

    Args:
        files: The pages and assets; changed in place.
        config: The configuration of the build.

    Raises:
        PluginError: If typer cannot import ``binarize.cli``; the message is typer's.
    """
    files.append(File.generated(config, "reference/cli.md", content=_command_line()))
    files.append(File.generated(config, "reference/recipe-keys.md", content=_recipe_keys()))
    return files


def _command_line() -> str:
    command = [sys.executable, "-m", "typer", "binarize.cli", "utils", "docs", "--name", "binarize"]
    # A fixed width without colors, so that the page does not depend on the terminal.
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, "--title", "Command line"], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise PluginError(
            f"cannot describe the command line with {' '.join(command)}\n{done.stderr}"
            "If the import failed, run python -c 'import binarize.cli' to see why."
        )
    return done.stdout


def _recipe_keys() -> str:
    """Return the page of recipe keys: one table for the recipe and one for each of its sections."""
    sections = {
        "model": recipes.ModelSection,
        "scheduler": recipes.SchedulerSection,
        "distillation": recipes.DistillationSection,
        "perceptual": recipes.PerceptualSection,
        "progressive": recipes.ProgressiveSection,
        "degradation": recipes.DegradationStep,  # the last one: the tables of its steps follow
    }
    parts = [
        "# Recipe keys",
        "The key `task` is `super_resolution`, the default, or `generation`. "
        "Keys have the names and meanings of the arguments of diffusers' training scripts. A key without a default is "
        "required. [Write a recipe](../howto/recipes.md) explains how recipes are combined.",
        _keys(recipes.Recipe),
    ]
    for name, section in sections.items():
        parts += [f"## `{name}`", _keys(section)]
    for name, field in recipes.DegradationStep.model_fields.items():
        parts += [f"### `{name}`", _keys(get_args(field.annotation)[0])]
    shared = set(recipes.TrainingRecipe.model_fields) - set(recipes.GenerationRecipe.__annotations__)
    parts += ["## Keys of `task: generation`", _keys(recipes.GenerationRecipe, without=shared)]
    for name, section in {"model": recipes.NetworkSection, "scheduler": recipes.SamplerSection}.items():
        parts += [f"### `{name}` of `task: generation`", _keys(section)]
    return "\n\n".join(parts) + "\n"


def _keys(section: type[BaseModel], without: Collection[str] = ()) -> str:
    rows = [
        [f"`{field.alias or name}`", _default(field), f"{field.description}{_choices(field.annotation)}"]
        for name, field in section.model_fields.items()
        if name not in without
    ]
    return Table(["key", "default", "meaning"], rows).to_markdown()


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    if field.is_required():
        return "-"
    plain = TypeAdapter(Any).dump_python(value, mode="json")
    return "`" + yaml.safe_dump(plain, default_flow_style=True).split("\n")[0] + "`"


def _choices(annotation: Any) -> str:
    choices = [f"`{choice}`" for choice in get_args(annotation) if isinstance(choice, str)]
    return f" One of {', '.join(choices)}." if len(choices) > 1 else ""
