"""Looking at a network while it learns: pictures enlarged by it, beside what it saw and what it should give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.evaluation import psnr
from binarize.imaging import ImagePairs, save_image, upscale_bicubic
from binarize.training.checkpoint import replace_folder

if TYPE_CHECKING:
    from binarize.models import SuperResolutionPipeline
    from binarize.recipes import Recipe


@dataclass(frozen=True)
class Validation:
    """One picture, enlarged.

    Args:
        name: The file's name without its suffix.
        strip: The condition, the sample and the original side by side, uint8 (3, H, 3 W).
        psnr: Of the sample on luma with the border shaved, as published figures are, in dB; infinite if it is equal.
    """

    name: str
    strip: Tensor
    psnr: float

    @property
    def pixels(self) -> np.ndarray:
        """The strip as uint8 (H, 3 W, 3)."""
        return self.strip.permute(1, 2, 0).numpy()

    def save(self, folder: Path, step: int) -> Path:
        """Write the strip as a PNG, named by the step and the picture.

        Raises:
            BinarizeError: If it cannot be written.
        """
        path = folder / f"step-{step:07d}-{self.name}.png"
        return save_image(Image.fromarray(self.pixels), path, force=True)


class Validator:
    """The first pictures of a recipe's validation folder, read and checked once.

    Args:
        recipe: Without ``validation_data_dir`` there are no pictures.

    Raises:
        BinarizeError: If a folder or a picture cannot be read or does not fit its twin.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.steps, self.seed = recipe.num_inference_steps, recipe.seed
        self.pictures = []
        if recipe.validation_data_dir is not None:
            pairs = ImagePairs(recipe.validation_data_dir, recipe.validation_lr_data_dir, scale=recipe.scale)
            self.pictures = pairs[: recipe.num_validation_images]

    def __call__(self, pipeline: SuperResolutionPipeline) -> Iterator[Validation]:
        """Enlarge each picture, from the same noise every time, so that validations differ by the weights alone."""
        for picture in self.pictures:
            scale = pipeline.config.scale
            generator = torch.Generator().manual_seed(self.seed)
            images = pipeline(
                picture.lr,
                num_inference_steps=self.steps,
                generator=generator,
                output_type="pt",
                return_dict=False,
            )[0]
            sample = (images[0].float().cpu() * 255).round().to(torch.uint8)
            quality = psnr(sample, picture.hr, border=scale)
            strip = torch.cat([upscale_bicubic(picture.lr, scale), sample, picture.hr], dim=-1)
            yield Validation(picture.name, strip.contiguous(), quality)


@contextmanager
def averaged_weights(model: nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """While entered, the model has the averaged weights, where there is an average."""
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
    """Save a pipeline into a folder, whole, in the place of an earlier one.

    Raises:
        BinarizeError: If it cannot be written; an earlier one is then as it was.
    """
    try:
        replace_folder(folder, pipeline.save_pretrained)
    except (OSError, SafetensorError) as error:
        raise BinarizeError(f"cannot write the model to {folder}: {' '.join(str(error).split())}.") from error
