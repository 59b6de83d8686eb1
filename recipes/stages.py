"""Training in stages: which binary layers compute in full precision for how long."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any

import torch

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from binarize.models import SRUNet
    from binarize.recipes.schema import Recipe


def staged_overrides(recipe: Recipe) -> dict[str, Any]:
    """Return the methods of a recipe's binary layers, name by name, their parts delayed by the recipe's stages.

    Args:
        recipe: With ``two_stage`` or ``progressive``.

    Raises:
        BinarizeError: If a pattern of ``progressive.blocks`` matches no binary layer.
    """
    from binarize.conversion.export import binary_layers
    from binarize.layers import delayed

    methods = {name: layer.method for name, layer in binary_layers(_ghost(recipe))}
    turns = _turns(recipe, list(methods))
    overrides: dict[str, Any] = {}
    for name, method in methods.items():
        config = method.to_config()
        turn = turns.get(name, 0.0)
        weights_turn = max(turn, recipe.two_stage or 0.0)
        if turn:
            config["activation"] = delayed(method.part("activation"), turn)
            if method.part("scale") is not None:
                config["scale"] = delayed(method.part("scale"), turn)
        if weights_turn:
            config["weight"] = delayed(method.part("weight"), weights_turn)
        overrides[name] = config
    return overrides


def settled(recipe: Recipe, model: SRUNet) -> SRUNet:
    """Return a network whose stages are all over as the plain network of its method, with the same tensors.

    Args:
        recipe: With ``two_stage`` or ``progressive``.
        model: Its network, trained.
    """
    from binarize.layers import undelayed

    plain = _ghost(recipe)
    plain.load_state_dict(undelayed(model, plain), assign=True)
    return plain.train(model.training)


def stages_end(recipe: Recipe) -> float | None:
    """Return the share of the steps after which all layers are binary, or None without stages."""
    ends = [recipe.two_stage, None if recipe.progressive is None else recipe.progressive.until]
    return max((end for end in ends if end is not None), default=None)


def _ghost(recipe: Recipe) -> SRUNet:
    """Return the network without its stages, on the meta device."""
    from binarize.recipes.build import build_model

    with torch.device("meta"):
        return build_model(recipe.model_copy(update={"two_stage": None, "progressive": None}))


def _turns(recipe: Recipe, layers: list[str]) -> dict[str, float]:
    """Return the share of the steps after which a layer becomes binary, for the layers that are not so at once."""
    if recipe.progressive is None:
        return {}
    turns: dict[str, float] = {}
    blocks = recipe.progressive.blocks
    for number, pattern in enumerate(blocks, 1):
        # What is below a block belongs to it, as in `keep`.
        names = [
            name for name in layers if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
        ]
        if not names:
            raise BinarizeError(
                f"progressive.blocks: the pattern {pattern!r} matches no binary layer; names look like "
                f"{', '.join(layers[:3])}."
            )
        for name in names:
            turns.setdefault(name, recipe.progressive.until * number / len(blocks))
    return turns
