"""LPIPS of predicted images as a term of the training loss."""

from __future__ import annotations

import torch
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.evaluation import Lpips
from binarize.evaluation.perceptual import smallest_side
from binarize.recipes import Recipe, TrainingRecipe


class PerceptualLoss:
    """LPIPS (Zhang et al., 2018) of predicted images, and its ``weight`` in the loss.

    Raises:
        BinarizeError: If the recipe's patches are too small for the backbone.
        LpipsUnavailable: If the package or the backbone is missing.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        assert recipe.perceptual is not None
        self.weight, net = recipe.perceptual.weight, recipe.perceptual.net
        if recipe.resolution < smallest_side(net):
            raise BinarizeError(
                f"perceptual.net: {net} needs patches of {smallest_side(net)} pixels or more; resolution is "
                f"{recipe.resolution}. Raise it, or remove perceptual."
            )
        self._lpips = Lpips(net, backbone=recipe.perceptual.backbone, device=device)

    def __call__(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Return LPIPS of each pair of images, (B, 3, H, W) in [0, 1], as (B,)."""
        return self._lpips.distance(predicted.to(torch.float32), true.to(torch.float32))


def perceptual_loss(recipe: TrainingRecipe, device: torch.device) -> PerceptualLoss | None:
    """Return the perceptual loss of a recipe; None if it has none."""
    return PerceptualLoss(recipe, device) if isinstance(recipe, Recipe) and recipe.perceptual is not None else None
