"""LPIPS of predicted images as a term of the training loss."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.evaluation import Lpips
from binarize.models.target import image_of
from binarize.recipes import PerceptualSection, Recipe


class PerceptualLoss:
    """LPIPS (Zhang et al., 2018) times the weight of a recipe's ``perceptual``, for predictions of x_0.

    Raises:
        BinarizeError: If the patches are too small for the backbone, or there is no backbone.
    """

    def __init__(self, recipe: Recipe) -> None:
        section = cast(PerceptualSection, recipe.perceptual)
        self.weight, self.residual_scale = section.weight, recipe.residual_scale
        self.lpips = Lpips(section.net, backbone=section.backbone)
        if recipe.resolution < self.lpips.min_side:
            raise BinarizeError(
                f"perceptual.net: {section.net} needs a resolution of at least {self.lpips.min_side}, not "
                f"{recipe.resolution}."
            )

    def __call__(self, prediction: Tensor, target: Tensor, upscaled: Tensor) -> Tensor:
        """Return the loss of each sample, (B,), for two x_0 and the upscaled low-resolution images, (B, 3, H, W)."""
        if self.lpips.device != prediction.device:
            self.lpips.to(prediction.device)
        images = [image_of(x, upscaled, self.residual_scale).to(torch.float32) for x in (prediction, target)]
        return self.weight * self.lpips.distance(*images)
