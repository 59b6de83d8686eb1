"""Generation in studies: Fréchet and kernel distances, precision and recall, by the number of sampling steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from binarize.errors import BinarizeError
from binarize.evaluation.features import Features
from binarize.evaluation.generation import FEWEST, RealImages, require_torchmetrics
from binarize.imaging import save_image
from binarize.imaging.labelled import LabelledFolder, find_labelled
from binarize.models import GenerationPipeline
from binarize.models.generation import generate_images
from binarize.models.grid import image_grid
from binarize.models.latents import autoencoder_digests
from binarize.models.loading import load_generator, prepare
from binarize.recipes import GenerationRecipe
from binarize.recipes.networks import image_channels
from binarize.studies.sections import GenerationEvaluation
from binarize.studies.tasks import Measured, StudyCache, StudyTask, absolute, with_content
from binarize.training.folder import MODEL
from binarize.training.images import file_digests

MEASURES = ("frechet", "kid", "precision", "recall", "nearest", "nearest_real")


class GenerationTask(StudyTask):
    """Generated images, compared with those of a folder. All runs of a study draw from the same noise."""

    def __init__(self, recipe: GenerationRecipe, settings: GenerationEvaluation, cache: StudyCache) -> None:
        self.recipe, self.settings, self._cache = recipe, settings, cache
        timesteps = recipe.scheduler.num_train_timesteps
        steps = settings.num_inference_steps
        self.steps = (min(recipe.num_inference_steps, timesteps),) if steps is None else steps
        self.data = recipe.train_data_dir if settings.data_dir is None else settings.data_dir

    def adjusted(self, keys: dict[str, Any]) -> dict[str, Any]:
        """Add the content of a file that defines the network."""
        factory = self.recipe.model.factory
        if self.recipe.vae is not None and self.recipe.vae.is_dir():
            keys = {**keys, "vae": absolute(self.recipe.vae)}
        return keys if factory is None else {**keys, "model": {**keys["model"], "factory": with_content(factory)}}

    def evaluation_keys(self) -> dict[str, Any]:
        """Return the folder, the features and the sampling."""
        settings = self.settings
        sampling = {"num_inference_steps": list(self.steps), "guidance_scale": self.recipe.guidance_scale}
        features = {"features": with_content(settings.features), "count": settings.count}
        return {"data_dir": absolute(self.data), **features, **sampling}

    def training_images(self) -> dict[str, str] | None:
        """Return the digests of the training images and of the autoencoder."""
        images, vae = self._digests(self.recipe.train_data_dir), self.recipe.vae
        if images is None or vae is None:
            return images
        return images | self._cache.once(("vae", vae), lambda: autoencoder_digests(vae))

    def evaluation_images(self) -> dict[str, str] | None:
        """Return the digests of the real images."""
        return self._digests(self.data)

    def _digests(self, folder: Path | None) -> dict[str, str] | None:
        if folder is None or not folder.is_dir():
            return None
        classes = self.recipe.classes

        def read() -> dict[str, str]:
            return file_digests({name: path for name, (_, path) in find_labelled(folder, classes).items()})

        return self._cache.once(("digests", folder, classes), read)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the images, the features and the numbers of steps."""
        require_torchmetrics()
        recipe, settings = self.recipe, self.settings
        if (most := recipe.scheduler.num_train_timesteps) < self.steps[-1]:
            yield f"evaluation.num_inference_steps: {self.steps[-1]} is above the {most} timesteps of the training"
        try:
            self._cache.once(("features", settings.features), lambda: Features(settings.features).name)
        except BinarizeError as error:
            yield f"evaluation.features: {error}"
        if (data := self.data) is None:
            return  # train_data_dir is missing
        try:
            channels = image_channels(recipe)
        except BinarizeError as error:
            yield str(error)
            return
        try:
            options: dict[str, Any] = {"channels": channels, "resolution": recipe.resolution, "classes": recipe.classes}
            key = "images", data, *options.values()
            found = self._cache.once(key, lambda: len(LabelledFolder(data, **options)))
        except BinarizeError as error:
            yield f"evaluation.data_dir: {error}"
        else:
            if found < FEWEST:
                yield f"evaluation.data_dir: {data}: holds {found} images; at least {FEWEST} are needed"

    def measure(self, folder: Path, seed: int, lpips: str | None, *, name: str, progress: bool) -> Measured:
        """Generate and compare images, and write a report and a grid of samples for each number of steps."""
        pipeline = prepare(load_generator(folder / MODEL))
        features, data = self.settings.features, self.data
        assert data is not None  # one of the problems
        key = "real", data, features, pipeline.image_shape, self.recipe.classes
        real = self._cache.once(key, lambda: RealImages(data, pipeline, features))
        scores: dict[str, float] = {}
        seconds = []
        for steps in self.steps:
            options: dict[str, Any] = {"count": self.settings.count, "progress": progress}
            report = real.evaluate(pipeline, num_inference_steps=steps, name=name, **options)
            target = folder / f"{steps}-steps"
            report.save(target, force=True)
            save_image(self._grid(pipeline, steps), target / "samples.png", force=True)
            scores |= {f"{measure}_{steps}": getattr(report, measure) for measure in MEASURES}
            seconds.append(report.seconds / (report.images * steps))
        return Measured({"scores": scores}, median(seconds))

    def _grid(self, pipeline: GenerationPipeline, steps: int) -> Any:
        """Return samples of all classes in turn, from the noise of the seeds 0, 1, 2, ..."""
        count = self.recipe.num_validation_images
        images = list(generate_images(pipeline, count, batch_size=count, num_inference_steps=steps))
        return image_grid(images, None if pipeline.classes is None else len(pipeline.classes))
