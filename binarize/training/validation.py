"""Looking at a network while it learns: pictures enlarged by it, beside what it saw and what it should give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.imaging import ImagePairs, enlarge, save_picture
from binarize.training.checkpoint import replace_folder

if TYPE_CHECKING:
    from binarize.models import SuperResolutionPipeline
    from binarize.recipes import Recipe


@dataclass(frozen=True)
class Validation:
    """One picture, enlarged.

    Args:
        name: The file's name without its suffix.
        strip: The condition, the sample and the original side by side, (3, H, 3 W), float32 in [0, 1].
        psnr: Of the sample over all channels, in dB; infinite if it equals the original.
    """

    name: str
    strip: Tensor
    psnr: float

    @property
    def levels(self) -> Tensor:
        """The strip as uint8 (H, 3 W, 3)."""
        return (self.strip * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()

    def save(self, folder: Path, step: int) -> Path:
        """Write the strip as a PNG, named by the step and the picture.

        Raises:
            BinarizeError: If it cannot be written.
        """
        path = folder / f"step-{step:07d}-{self.name}.png"
        return save_picture(Image.fromarray(self.levels.numpy()), path, force=True)


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
            lr, hr = picture.lr.float() / 255, picture.hr.float() / 255
            generator = torch.Generator().manual_seed(self.seed)
            result = pipeline(lr, num_inference_steps=self.steps, generator=generator, output_type="pt")
            sample = result.images[0].float().cpu()
            error = (sample - hr).square().mean().item()
            strip = torch.cat([enlarge(lr, pipeline.config.scale), sample, hr], dim=-1)
            yield Validation(picture.name, strip, -10 * math.log10(error) if error else math.inf)


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
    except OSError as error:
        raise BinarizeError(f"cannot write the model to {folder}: {' '.join(str(error).split())}.") from error
