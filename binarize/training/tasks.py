"""What a training run does differently for each task: its data and its validation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from binarize.training.initial import TrainedModel
from binarize.training.samples import NoisySamples


class ValidationResult(Protocol):
    """One image of a validation, uint8 (H, W, 3), and its PSNR in dB if there is an image to compare it with."""

    @property
    def name(self) -> str:
        """The image's name."""

    @property
    def psnr(self) -> float | None:
        """The PSNR."""

    @property
    def pixels(self) -> np.ndarray:
        """The image, uint8 (H, W, 3)."""

    def save(self, folder: Path, step: int) -> Path:
        """Write the image as a PNG named by the step and the image."""


class Task(ABC):
    """The data of a run, read and checked, and its validation.

    Attributes:
        samples: The training samples.
        images: Name -> digest of the training images, and of the autoencoder's files, by which a resumed run knows
            them.
        vae: The autoencoder whose latents the network generates, or None.
    """

    samples: NoisySamples
    images: dict[str, str]
    vae: Any = None

    def complete(self, recipe: Any, start: Path | None, trained: Iterable[TrainedModel | None]) -> Any:
        """Return the recipe with the keys that are measured, or read from the checkpoint or the trained models."""
        return recipe

    @abstractmethod
    def validate(self, pipeline: Any) -> Iterator[ValidationResult]:
        """Yield samples of a pipeline, always from the same noise, so that validations differ by the weights alone."""
