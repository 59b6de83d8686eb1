"""Super-resolution in studies: upscaled images by PSNR, SSIM and LPIPS."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from binarize.errors import BinarizeError
from binarize.evaluation import evaluate
from binarize.evaluation.quality import scikit_image_ssim
from binarize.imaging import ImagePairs
from binarize.models import SuperResolutionPipeline
from binarize.recipes import Recipe
from binarize.studies.sections import EvaluationSection
from binarize.studies.tasks import Measured, StudyCache, StudyTask, absolute, measuring_device
from binarize.training.folder import MODEL
from binarize.training.images import image_digests


class SuperResolutionTask(StudyTask):
    """Upscaled images of a folder, compared with the originals."""

    def __init__(self, recipe: Recipe, settings: EvaluationSection, cache: StudyCache) -> None:
        self.recipe, self.settings, self._cache = recipe, settings, cache
        steps = settings.num_inference_steps
        self.steps = (recipe.num_inference_steps if steps is None else steps,)
        own = settings.data_dir, settings.lr_data_dir
        self.images = (recipe.validation_data_dir, recipe.validation_lr_data_dir) if own[0] is None else own

    def adjusted(self, keys: dict[str, Any]) -> dict[str, Any]:
        """Make the folder absolute; a degradation that 0.1 did not have is left out, so that its results stay valid."""
        keys = {**keys, "train_lr_data_dir": absolute(self.recipe.train_lr_data_dir)}
        return keys if self.recipe.degradation.root else {k: v for k, v in keys.items() if k != "degradation"}

    def evaluation_keys(self) -> dict[str, Any]:
        """Return the images' folders and all settings that change a result."""
        settings, (high, low) = self.settings, self.images
        own = settings.model_dump(include={"limit", "tile", "lpips"})
        strength, overshoot = self.recipe.residual_strength, self.recipe.overshoot
        folders = {"data_dir": absolute(high), "lr_data_dir": absolute(low)}
        keys = {**folders, **own, "num_inference_steps": self.steps[0], "residual_strength": strength}
        if settings.degradation.root:  # absent by default, as in the results of 0.1
            keys["degradation"] = settings.degradation.model_dump(mode="json")
        return keys if overshoot is None else {**keys, "overshoot": overshoot}

    def training_images(self) -> dict[str, str] | None:
        """Return the digests of the training images, low resolution included."""
        return self._digests(self.recipe.train_data_dir, self.recipe.train_lr_data_dir, None)

    def evaluation_images(self) -> dict[str, str] | None:
        """Return the digests of the first images of the evaluation."""
        return self._digests(*self.images, self.settings.limit)

    def _digests(self, high: Path | None, low: Path | None, limit: int | None) -> dict[str, str] | None:
        if high is None or not high.is_dir():
            return None

        def read() -> dict[str, str]:
            pairs = ImagePairs(high, low, scale=self.recipe.scale)
            return image_digests(pairs if limit is None else pairs.first(limit))

        return self._cache.once(("pairs", high, low, self.recipe.scale, limit), read)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the images."""
        scikit_image_ssim()
        high, low = self.images
        if high is None:
            yield "evaluation.data_dir: missing; name the folder of test images"
            return
        if low is not None and self.settings.degradation.root:
            yield f"evaluation.degradation: has no effect on the images of {str(low)!r}; remove it"
        try:
            ImagePairs(high, low, scale=self.recipe.scale)
        except BinarizeError as error:
            yield f"evaluation.data_dir: {error}"

    def measure(self, folder: Path, seed: int, lpips: str | None, *, name: str, progress: bool) -> Measured:
        """Upscale each image from the noise of the run's seed; write ``evaluation.json``, ``.csv`` and ``.md``."""
        pipeline = SuperResolutionPipeline.from_pretrained(folder / MODEL, local_files_only=True)
        device = measuring_device()
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        settings, steps = self.settings, self.steps[0]

        def upscale(image: Any) -> Any:
            noise = torch.Generator().manual_seed(seed)
            output: Any = pipeline(image, num_inference_steps=steps, generator=noise, tile=settings.tile)
            return output.images[0]

        high, low = self.images
        assert high is not None  # one of the problems
        options: dict[str, Any] = {"limit": settings.limit, "progress": progress, "name": name, "device": device}
        options |= {"lpips": lpips, "lpips_backbone": settings.lpips_backbone, "degradation": settings.degradation}
        report = evaluate(upscale, high if low is None else (high, low), scale=self.recipe.scale, **options)
        report.save(folder, force=True)
        scores = report.mean.model
        values = {**asdict(scores), "psnr": scores.psnr if math.isfinite(scores.psnr) else None}
        return Measured(values, median(row.seconds / steps for row in report.rows))
