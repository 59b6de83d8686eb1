"""Generation as a training task: images of a folder, and a grid of samples as the validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from binarize.errors import BinarizeError
from binarize.imaging import save_image
from binarize.json_files import read_json
from binarize.models import GenerationPipeline
from binarize.models.generation import generate_images
from binarize.models.grid import image_grid
from binarize.models.latents import autoencoder_folder, load_autoencoder
from binarize.models.location import NETWORK
from binarize.recipes import GenerationRecipe
from binarize.recipes.networks import generation_network, sample_size
from binarize.training.image_folder import LabelledImages, Latents
from binarize.training.images import file_digests
from binarize.training.samples import BatchPlan, noisy_samples
from binarize.training.tasks import Task


@dataclass(frozen=True)
class SampleGrid:
    """Samples side by side."""

    image: Image.Image
    name: str = "samples"
    psnr: None = None

    @property
    def pixels(self) -> np.ndarray:
        """The grid as uint8 (H, W, 3)."""
        return np.asarray(self.image.convert("RGB"))

    def save(self, folder: Path, step: int) -> Path:
        """Write the grid as a PNG named by the step."""
        return save_image(self.image, folder / f"step-{step:07d}-{self.name}.png", force=True)


class Generation(Task):
    """The training images of a recipe, and ``num_validation_images`` samples, of all classes in turn."""

    def __init__(self, recipe: GenerationRecipe, plan: BatchPlan) -> None:
        if recipe.train_data_dir is None:
            raise BinarizeError("train_data_dir: missing; name the folder of training images.")
        images = LabelledImages(
            recipe.train_data_dir,
            resolution=recipe.resolution,
            channels=image_channels(recipe),
            classes=recipe.classes,
            class_dropout=recipe.class_dropout,
            center_crop=recipe.center_crop,
            random_flip=recipe.random_flip,
            seed=recipe.seed,
        )
        files = {name: path for name, (_, path) in images.images.files.items()}
        data: LabelledImages | Latents = images
        if recipe.vae is not None:
            data = Latents(images, load_autoencoder(recipe.vae))
            weights = autoencoder_folder(recipe.vae).glob("*.safetensors")
            files |= {f"vae/{path.name}": path for path in sorted(weights)}
        self.samples = noisy_samples(recipe, plan, data)
        self.images = file_digests(files)
        self.seed, self.count = recipe.seed, recipe.num_validation_images

    def validate(self, pipeline: GenerationPipeline) -> Iterator[SampleGrid]:
        """Yield a grid of samples, see `binarize.models.generation.generate_images`."""
        images = list(generate_images(pipeline, self.count, seed=self.seed, batch_size=self.count))
        yield SampleGrid(image_grid(images, None if pipeline.classes is None else len(pipeline.classes)))


def image_channels(recipe: GenerationRecipe) -> int:
    """Return the number of channels of a recipe's images, after checking that its network generates them.

    The samples of the network must be the images, or latents of the autoencoder.
    """
    with torch.device("meta"):
        config = getattr(generation_network(recipe), "config", {})
    size, channels = config.get("sample_size"), config.get("in_channels")
    needed, side = sample_size(recipe)
    if size not in (side, (side,) * 2, [side] * 2):
        is_it = f"is {recipe.resolution}" if recipe.vae is None else f"is {recipe.resolution}, {side} in latents"
        fix = "set resolution to it, or change it" if recipe.vae is None else "change one of them"
        raise BinarizeError(f"resolution: {is_it}, but the network's sample_size is {size}; {fix}.")
    if not isinstance(channels, int):
        raise BinarizeError("model: the network's configuration has no in_channels; add it to its __init__.")
    if needed not in (None, channels):
        raise BinarizeError(f"model: has {channels} channels, but the latents of vae have {needed}.")
    return channels if recipe.vae is None else read_json(autoencoder_folder(recipe.vae) / NETWORK)["in_channels"]
