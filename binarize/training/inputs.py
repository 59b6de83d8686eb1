"""What a task's network predicts from: the clean sample x_0 of a batch, and the network's conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor

from binarize.models.target import diffused_of
from binarize.recipes import GenerationRecipe, Recipe, TrainingRecipe

Network = Callable[..., Any]


class Inputs(Protocol):
    """The inputs of a loss. ``tensors`` names the entries of a batch that they need besides noise and timestep."""

    tensors: tuple[str, ...]

    def clean(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the sample that is diffused, x_0, (B, C, H, W)."""

    def predict(self, network: Network, noisy: Tensor, timesteps: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Return a network's prediction, (B, C, H, W), from a noisy sample of that shape and timesteps (B,)."""


class SuperResolutionInputs:
    """Images, or residuals divided by ``residual_scale``, and the condition ``network(noisy, timesteps, condition)``.

    A batch has ``hr`` and ``condition``, (B, 3, H, W) in [0, 1].
    """

    tensors: tuple[str, ...] = ("hr", "condition")

    def __init__(self, residual_scale: float | None) -> None:
        self.residual_scale = residual_scale

    def clean(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the images or the scaled residuals."""
        return diffused_of(batch["hr"], batch["condition"], self.residual_scale)

    def predict(self, network: Network, noisy: Tensor, timesteps: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Call the network with the upscaled low-resolution image."""
        return cast(Tensor, network(noisy, timesteps, batch["condition"]).sample)


class GenerationInputs:
    """Images in [-1, 1], and their labels for networks with classes.

    A batch has ``image``, (B, C, H, W), and with ``conditional`` ``class_label``, int64 (B,).
    """

    def __init__(self, conditional: bool) -> None:
        self.conditional = conditional
        self.tensors: tuple[str, ...] = ("image", "class_label") if conditional else ("image",)

    def clean(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the images."""
        return batch["image"]

    def predict(self, network: Network, noisy: Tensor, timesteps: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Call the network with the labels, if it has classes."""
        labels = {"class_labels": batch["class_label"]} if self.conditional else {}
        return cast(Tensor, network(noisy, timesteps, **labels).sample)


def inputs_of(recipe: TrainingRecipe) -> Inputs:
    """Return the inputs of a recipe's loss; ``residual_scale`` must be set if residuals are diffused."""
    if isinstance(recipe, GenerationRecipe):
        return GenerationInputs(recipe.classes is not None)
    return SuperResolutionInputs(cast(Recipe, recipe).residual_scale)
