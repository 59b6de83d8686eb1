"""`binarize recipes`: list, show, copy and check recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from binarize.cli.options import ForceOption, OverridesArgument
from binarize.cli.streams import echo
from binarize.cli.trust import TrustOption, code_of
from binarize.tables import Table

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="List, show, copy and check recipes.")

RecipeArgument = Annotated[str, typer.Argument(help="Name of an installed recipe, or a YAML file.")]


@app.command("ls")
def ls() -> None:
    """List the installed recipes.

    ```
    binarize recipes ls
    ```
    """
    from binarize.recipes import list_recipes

    echo(Table(["recipe", "description"], [*list_recipes().items()]).to_text(header=False))


@app.command("show")
def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    full: Annotated[bool, typer.Option("--full", help="Show every key, with bases and defaults filled in.")] = False,
) -> None:
    """Print a recipe's file, or with `--full` or overrides every key that it amounts to.

    ```
    binarize recipes show bidiffsr_x4 --full
    binarize recipes show bidiffsr_x4 train_batch_size=4
    ```
    """
    from binarize.recipes import load_recipe, recipe_path

    if full or overrides:
        echo(load_recipe(recipe, overrides or ()).to_yaml(), end="")
    else:
        echo(recipe_path(recipe).read_text(encoding="utf-8"), end="")


@app.command("cp")
def cp(
    recipe: RecipeArgument,
    target: Annotated[Path, typer.Argument(help="The new file, ending in .yaml, or a folder.")],
    force: ForceOption = False,
) -> None:
    """Copy a recipe, to edit it.

    ```
    binarize recipes cp bidiffsr_x2 mine.yaml
    ```
    """
    from binarize.recipes import copy_recipe

    echo(f"wrote {copy_recipe(recipe, target, force=force)}")


@app.command("validate")
def validate(recipe: RecipeArgument, overrides: OverridesArgument = None, trust: TrustOption = False) -> None:
    """Check a recipe without its data: keys, values, method, network, folders.

    A recipe with code of its own, such as plugins, can only be checked with `--trust`.

    ```
    binarize recipes validate bidiffsr_x2 method.groups=10 train_data_dir=DF2K/HR
    ```
    """
    from binarize.recipes import load_recipe
    from binarize.recipes.load import check_folders

    with code_of(recipe, trust, inspecting=True):
        check_folders(load_recipe(recipe, overrides or ()), recipe)

        from binarize.recipes import validate as check

        check(recipe, overrides or ())
    echo(f"{recipe}: valid")
