"""Super-resolution as a training task: patches of image pairs, and upscaled images as the validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.evaluation import psnr
from binarize.files import read_text
from binarize.imaging import ImagePairs, save_image, upscale_bicubic
from binarize.models import SuperResolutionPipeline
from binarize.recipes import Recipe
from binarize.recipes.yaml_text import MAX_BYTES, parse_mapping
from binarize.training.checkpoint import RECIPE
from binarize.training.data import RESIDUAL_PATCHES, PairedPatches, residual_std
from binarize.training.images import image_digests
from binarize.training.initial import TrainedModel
from binarize.training.samples import BatchPlan, noisy_samples
from binarize.training.tasks import Task


class SuperResolution(Task):
    """Patches of the training images, and the first images of the validation folder, read and checked once.

    Without ``validation_data_dir``, a validation has no images.
    """

    def __init__(self, recipe: Recipe, plan: BatchPlan) -> None:
        self.patches = training_patches(recipe, plan)
        self.samples = noisy_samples(recipe, plan, self.patches)
        self.images = image_digests(self.patches.pairs)
        self.steps, self.seed = recipe.num_inference_steps, recipe.seed
        self.validation = []
        if recipe.validation_data_dir is not None:
            high, low = recipe.validation_data_dir, recipe.validation_lr_data_dir
            pairs = ImagePairs(high, low, scale=recipe.scale, degrader=recipe.degradation.seeded(recipe.seed))
            self.validation = pairs[: recipe.num_validation_images]

    def complete(self, recipe: Any, start: Path | None, trained: Iterable[TrainedModel | None]) -> Recipe:
        """Return the recipe with its residual scale: saved, of the trained models, or measured on the patches."""
        if recipe.target != "residual" or recipe.residual_scale is not None:
            return recipe
        scale = None if start is None else _saved_residual_scale(start)
        known = [model.residual_scale for model in trained if model is not None and model.residual_scale is not None]
        if scale is None:
            scale = known[0] if known else residual_std(self.patches)
        return recipe.model_copy(update={"residual_scale": scale})

    def validate(self, pipeline: SuperResolutionPipeline) -> Iterator[UpscaledImage]:
        """Upscale each validation image."""
        for image in self.validation:
            scale = pipeline.config.scale
            noise = torch.Generator().manual_seed(self.seed)
            options: dict[str, Any] = {"generator": noise, "output_type": "pt", "return_dict": False}
            output = pipeline(image.lr, num_inference_steps=self.steps, **options)[0]
            sample = (output[0].float().cpu() * 255).round().to(torch.uint8)
            strip = torch.cat([upscale_bicubic(image.lr, scale), sample, image.hr], dim=-1)
            yield UpscaledImage(image.name, strip.contiguous(), psnr(sample, image.hr, border=scale))


def training_patches(recipe: Recipe, plan: BatchPlan) -> PairedPatches:
    """Return the training patches of a recipe, or raise an error if its training images cannot be used."""
    if recipe.train_data_dir is None:
        raise BinarizeError("train_data_dir: missing; name the folder of high-resolution training images.")
    length = max(recipe.max_train_steps * plan.total, RESIDUAL_PATCHES)
    options: dict[str, Any] = {"scale": recipe.scale, "augment": recipe.augment, "seed": recipe.seed, "length": length}
    options |= {"patch_size": recipe.resolution, "candidates": recipe.patch_candidates}
    options["degrader"] = recipe.degradation.seeded(recipe.seed)
    return PairedPatches(recipe.train_data_dir, recipe.train_lr_data_dir, **options)


def _saved_residual_scale(folder: Path) -> float | None:
    saved = parse_mapping(read_text(folder / RECIPE, MAX_BYTES), str(folder / RECIPE)).get("residual_scale")
    if saved is not None and not (isinstance(saved, float | int) and saved > 0):
        raise BinarizeError(f"{folder / RECIPE}: residual_scale is {saved!r:.80}; it must be a positive number.")
    return saved


@dataclass(frozen=True)
class UpscaledImage:
    """One upscaled image: condition, sample and original side by side, uint8 (3, H, 3 W), and the PSNR on luma."""

    name: str
    strip: Tensor
    psnr: float

    @property
    def pixels(self) -> np.ndarray:
        """The strip as uint8 (H, 3 W, 3)."""
        return self.strip.permute(1, 2, 0).numpy()

    def save(self, folder: Path, step: int) -> Path:
        """Write the strip as a PNG named by the step and the image."""
        path = folder / f"step-{step:07d}-{self.name}.png"
        return save_image(Image.fromarray(self.pixels), path, force=True)
