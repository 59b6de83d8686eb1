"""Validation during training: upscale a few images and compare them with the originals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from binarize.errors import BinarizeError, one_line
from binarize.evaluation import psnr
from binarize.files import replace_folder
from binarize.imaging import ImagePairs, save_image, upscale_bicubic
from binarize.recipes import Recipe

if TYPE_CHECKING:
    from binarize.models import SuperResolutionPipeline


@dataclass(frozen=True)
class ValidationResult:
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


class Validator:
    """The first images of a recipe's validation folder, read and checked once; none without ``validation_data_dir``."""

    def __init__(self, recipe: Recipe) -> None:
        self.steps, self.seed = recipe.num_inference_steps, recipe.seed
        self.images = []
        if recipe.validation_data_dir is not None:
            pairs = ImagePairs(recipe.validation_data_dir, recipe.validation_lr_data_dir, scale=recipe.scale)
            self.images = pairs[: recipe.num_validation_images]

    def __call__(self, pipeline: SuperResolutionPipeline) -> Iterator[ValidationResult]:
        """Upscale each image, always from the same noise, so that validations differ by the weights alone."""
        for image in self.images:
            scale = pipeline.config.scale
            noise = torch.Generator().manual_seed(self.seed)
            options: dict[str, Any] = {"generator": noise, "output_type": "pt", "return_dict": False}
            output = pipeline(image.lr, num_inference_steps=self.steps, **options)[0]
            sample = (output[0].float().cpu() * 255).round().to(torch.uint8)
            strip = torch.cat([upscale_bicubic(image.lr, scale), sample, image.hr], dim=-1)
            yield ValidationResult(image.name, strip.contiguous(), psnr(sample, image.hr, border=scale))


@contextmanager
def averaged_weights(model: nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Give the model the averaged weights inside this context, if there is an average."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


def export(pipeline: SuperResolutionPipeline, folder: Path) -> None:
    """Save a pipeline to a folder, replacing an earlier one as a whole, or leaving it unchanged if writing fails."""
    try:
        replace_folder(folder, pipeline.save_pretrained)
    except (OSError, SafetensorError) as error:
        raise BinarizeError(f"cannot write the model to {folder}: {one_line(error)}.") from error
