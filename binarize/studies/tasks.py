"""What a study does differently for each task: its images, its measures, and what determines them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from binarize.models.location import may_be_on_the_hub
from binarize.recipes import Recipe, TrainingRecipe

T = TypeVar("T")


class StudyCache:
    """What the runs of a study share, such as the digests of images, which are each read once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def once(self, key: Hashable, read: Callable[[], T]) -> T:
        """Return what ``read`` returned at the first call with this key."""
        if key not in self._known:
            self._known[key] = read()
        found: T = self._known[key]
        return found


@dataclass(frozen=True)
class Measured:
    """The measures of a run, as `RunResult` and ``result.json`` have them, and the time of a denoising step."""

    values: dict[str, Any]
    step_seconds: float


class StudyTask(ABC):
    """The evaluation of one run of a study."""

    steps: tuple[int, ...]
    """The numbers of sampling steps, ascending."""

    @abstractmethod
    def adjusted(self, keys: dict[str, Any]) -> dict[str, Any]:
        """Return the keys of the recipe that determine the trained weights, in the form in which runs record them."""

    @abstractmethod
    def evaluation_keys(self) -> dict[str, Any]:
        """Return everything that determines the results of given weights."""

    @abstractmethod
    def training_images(self) -> dict[str, str] | None:
        """Return the digests of the training images by name, or None if they are not there."""

    @abstractmethod
    def evaluation_images(self) -> dict[str, str] | None:
        """Return the digests of the images of the evaluation by name, or None if they are not there."""

    @abstractmethod
    def problems(self) -> Iterator[str]:
        """Yield the reasons for which the run cannot be measured."""

    @abstractmethod
    def measure(self, folder: Path, seed: int, lpips: str | None, *, name: str, progress: bool) -> Measured:
        """Measure the trained model of a run's folder, and write reports into it."""


def file_problems(recipe: TrainingRecipe, made_here: Path) -> Iterator[str]:
    """Yield what is missing of the training images and the models that a recipe names.

    A model below the folder ``made_here`` may be made by an earlier run of the study.
    """
    training, section = recipe.train_data_dir, recipe.distillation
    if training is None:
        yield "train_data_dir: missing; name the folder of training images"
    elif not training.is_dir():
        yield f"train_data_dir: there is no folder {str(training)!r}"
    perceptual = recipe.perceptual if isinstance(recipe, Recipe) else None
    if perceptual is not None and perceptual.backbone is not None and not perceptual.backbone.is_file():
        yield f"perceptual.backbone: there is no file {str(perceptual.backbone)!r}"
    models = {"init_from": recipe.init_from, "distillation.teacher": None if section is None else section.teacher}
    for key, path in models.items():
        if path is None or path.exists() or path.resolve().is_relative_to(made_here.resolve()):
            continue
        if not may_be_on_the_hub(path):
            yield f"{key}: there is no model {str(path)!r}; train it first, or name another"


def absolute(path: Path | None) -> str | None:
    """Return a path as runs record it."""
    return None if path is None else str(path.resolve())


def with_content(source: str) -> str:
    """Return the name of a file, or of a function in a .py file, with a hash of the file; other names are unchanged."""
    name, colon, function = source.partition(".py:")
    path = Path(f"{name}.py" if colon else source)
    if not path.is_file():
        return source
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}{colon and f':{function}'}"


def measuring_device() -> torch.device:
    """Return the accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found
