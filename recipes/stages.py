"""Training in stages: how long each binary layer computes in full precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from binarize.errors import BinarizeError
from binarize.layers import delayed
from binarize.layers.parts import PartKind
from binarize.methods import Method
from binarize.modules import matches
from binarize.recipes.schema import TrainingRecipe


def staged_overrides(recipe: TrainingRecipe, methods: Mapping[str, Method]) -> dict[str, Any]:
    """Return the overrides of `binarize.convert` that delay the parts of each layer as the recipe's stages say.

    ``methods`` has the method of each binary layer without stages.
    """
    starts = _binary_from(recipe, methods)
    overrides: dict[str, Any] = {}
    for name, method in methods.items():
        config = method.to_config()
        start = starts.get(name, 0.0)
        until: dict[PartKind, float] = {"activation": start, "scale": start}
        until["weight"] = max(start, recipe.two_stage or 0.0)
        for kind, share in until.items():
            if share and method.part(kind) is not None:
                config[kind] = delayed(method.part(kind), share)
        overrides[name] = config
    return overrides


def last_stage_end(recipe: TrainingRecipe) -> float | None:
    """Return the share of the training steps after which all layers are binary, or None without stages."""
    ends = [recipe.two_stage, None if recipe.progressive is None else recipe.progressive.until]
    return max((end for end in ends if end is not None), default=None)


def _binary_from(recipe: TrainingRecipe, layers: Iterable[str]) -> dict[str, float]:
    """Return the share of the steps after which a layer becomes binary, for the layers that are not binary at once."""
    if recipe.progressive is None:
        return {}
    names, blocks = list(layers), recipe.progressive.blocks
    starts: dict[str, float] = {}
    for number, pattern in enumerate(blocks, 1):
        found = [name for name in names if matches(pattern, name)]
        if not found:
            reason = f"the pattern {pattern!r} matches no binary layer"
            raise BinarizeError(f"progressive.blocks: {reason}; names look like {', '.join(names[:3])}.")
        for name in found:
            starts.setdefault(name, recipe.progressive.until * number / len(blocks))
    return starts
