"""Generation as a training task: images of a folder, and a grid of samples as the validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from binarize.errors import BinarizeError
from binarize.imaging import save_image
from binarize.models import GenerationPipeline
from binarize.models.generation import generate_images
from binarize.models.grid import image_grid
from binarize.models.latents import autoencoder_digests, load_autoencoder, same_autoencoder
from binarize.recipes import GenerationRecipe, build_scheduler
from binarize.recipes.networks import image_channels
from binarize.training.image_folder import LabelledImages, Latents
from binarize.training.images import file_digests
from binarize.training.initial import TrainedModel
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

    def __init__(self, recipe: GenerationRecipe, plan: BatchPlan, device: torch.device, *, progress: bool) -> None:
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
        self.images = file_digests({name: path for name, (_, path) in images.images.files.items()})
        data: LabelledImages | Latents = images
        if recipe.vae is not None:
            build_scheduler(recipe)  # raises before the images are encoded if it clips latents
            self.images |= autoencoder_digests(recipe.vae)
            self.vae = load_autoencoder(recipe.vae).to(device)
            data = Latents(images, self.vae, progress=progress)
        self.samples = noisy_samples(recipe, plan, data)
        self.seed, self.count = recipe.seed, recipe.num_validation_images

    def complete(self, recipe: Any, start: Path | None, trained: Iterable[TrainedModel | None]) -> Any:
        """Return the recipe, after checking that trained models generate images or latents as it does."""
        for model in trained:
            if model is not None and not same_autoencoder(self.vae, model.vae):
                theirs = "pixels" if model.vae is None else "latents of another autoencoder"
                fix = "set vae to null" if model.vae is None else f"set vae to {model.path}"
                raise BinarizeError(f"{model.path} generates {theirs}; {fix}, or give another model.")
        return recipe

    def validate(self, pipeline: GenerationPipeline) -> Iterator[SampleGrid]:
        """Yield a grid of samples, see `binarize.models.generation.generate_images`."""
        images = list(generate_images(pipeline, self.count, seed=self.seed, batch_size=self.count))
        yield SampleGrid(image_grid(images, None if pipeline.classes is None else len(pipeline.classes)))
