"""A recipe's network in one call."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from binarize.models import SRUNet
    from binarize.recipes import Recipe


def build(recipe: str | PathLike[str] | Recipe, *overrides: str) -> SRUNet:
    """Return the network of a recipe, converted and untrained: ``binarize.build("bidiffsr_x4")``.

    Args:
        recipe: An installed recipe's name, the path of a YAML file, or a loaded `binarize.recipes.Recipe`.
        *overrides: ``"key=value"`` texts that change the recipe, such as ``"method.groups=2"``.

    Raises:
        BinarizeError: If there is no such recipe, it is not valid, or overrides come with a loaded recipe.
    """
    from binarize.recipes import Recipe, build_model, load_recipe

    if isinstance(recipe, Recipe) and overrides:
        raise BinarizeError(f"build: a loaded recipe takes no overrides; got {overrides}. Give them to load_recipe.")
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    return build_model(loaded)
