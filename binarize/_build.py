"""A recipe's network in one call."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from binarize.models import SRUNet
    from binarize.recipes import Recipe


def build(recipe: str | PathLike[str] | Recipe, *overrides: str) -> SRUNet:
    """Return the network of a recipe, converted and untrained: ``binarize.build("bidiffsr_x4")``.

    Args:
        recipe: An installed recipe's name, the path of a YAML file, or a loaded `binarize.recipes.Recipe`.
        *overrides: ``"key=value"`` texts that change the recipe, such as ``"method.groups=2"``.

    Raises:
        BinarizeError: If there is no such recipe or it is not valid.
    """
    from binarize.recipes import Recipe, build_model, load_recipe

    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    return build_model(loaded)
