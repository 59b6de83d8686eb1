"""One run of a study and the state of its folder: the recipe it started with, its progress and its results."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from binarize.errors import BinarizeError
from binarize.files import write_text_atomic
from binarize.json_files import read_json
from binarize.recipes import TrainingRecipe
from binarize.studies.generation import GenerationTask
from binarize.studies.schema import BaseStudy
from binarize.studies.sections import EvaluationSection, GenerationEvaluation
from binarize.studies.super_resolution import SuperResolutionTask
from binarize.studies.tasks import Measured, StudyCache, StudyTask, absolute, with_content
from binarize.training.checkpoint import Checkpoints
from binarize.training.resume import BOOKKEEPING, changes, image_changes, with_defaults

RUN = "run.json"
RESULT = "result.json"
FAILURE = "error.txt"
_IMAGES = "training images"


Number = FiniteFloat | None


class _Section(BaseModel):
    model_config = ConfigDict(strict=True)


class _Trained(_Section):
    loss: Number
    train_step_seconds: Number


class _RunFile(_Section):
    training: dict[str, Any]
    trained: _Trained | None
    images: dict[str, str] | None = None  # absent in version 0.1, here and below


class _ResultFile(_Section):
    cell: str
    seed: int
    fingerprint: str
    psnr: Number = None
    ssim: Number = None
    lpips: Number = None
    scores: dict[str, FiniteFloat] | None = None
    loss: Number
    train_step_seconds: Number
    sample_step_seconds: Number
    images: dict[str, str] | None = None


class StudyRun:
    """One cell of a study with one seed, which sets the seed, output folder and resuming of the cell's recipe."""

    def __init__(
        self, cell: str, seed: int, recipe: TrainingRecipe, study: BaseStudy, cache: StudyCache | None = None
    ) -> None:
        self.cell, self.seed, self.study = cell, seed, study
        self.folder = study.output_dir / "cells" / folder_name(cell) / f"seed-{seed}"
        changes = {"seed": seed, "output_dir": self.folder, "resume_from_checkpoint": "latest"}
        self.recipe = recipe.model_copy(update=changes)
        self.task = _task_of(self.recipe, study, StudyCache() if cache is None else cache)

    def __str__(self) -> str:
        return self.cell if len(self.study.seeds) == 1 else f"{self.cell}, seed {self.seed}"

    def training_keys(self) -> dict[str, Any]:
        """Return everything that determines the trained weights."""
        keys = {key: value for key, value in self.recipe.to_keys().items() if key not in BOOKKEEPING}
        if self.recipe.sampling_timesteps_share > 0:
            keys["num_inference_steps"] = self.recipe.num_inference_steps
        keys["train_data_dir"] = absolute(self.recipe.train_data_dir)
        keys["plugins"] = [with_content(plugin) for plugin in self.recipe.plugins]
        return self.task.adjusted(keys)

    def fingerprint(self) -> str:
        """Return a SHA-256 of everything that determines the results."""
        text = json.dumps({"training": self.training_keys(), "evaluation": self.task.evaluation_keys()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def record_failure(self, text: str) -> None:
        """Write a traceback into the run's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / FAILURE).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class RunState:
    """The progress of a run."""

    run: StudyRun
    changes: tuple[str, ...] = ()  # since the recipe that the folder was started with
    checkpoint: int = 0  # step of the newest one, or 0
    trained: dict[str, Any] | None = None  # loss and seconds per step of the finished training
    result: dict[str, Any] | None = None

    @classmethod
    def read(cls, run: StudyRun) -> RunState:
        """Read the state of the run's folder, ignoring training and results of another recipe or of other images."""
        started, result = _load(run.folder / RUN, _RunFile), _load(run.folder / RESULT, _ResultFile)
        checkpoint = max(Checkpoints(run.folder, None).list(), default=0)
        if started is None:
            return cls(run, checkpoint=checkpoint)
        keys = json.loads(json.dumps(run.training_keys()))  # lists instead of tuples, as in the file
        stored = {name: value for name, value in with_defaults(started["training"]).items() if name in keys}
        different = changes({**stored, **started["training"]}, keys)
        if not different and (images := _image_changes(started.get("images"), run.task.training_images)):
            different = [f"{_IMAGES}: {images}"]
        if different:
            return cls(run, tuple(different), checkpoint)
        if result is not None and (
            result["fingerprint"] != run.fingerprint()
            or _image_changes(result.get("images"), run.task.evaluation_images)
        ):
            result = None
        return cls(run, (), checkpoint, started["trained"], result)

    @classmethod
    def start(cls, run: StudyRun) -> RunState:
        """Record the recipe that the run starts with, unless it is recorded; the folder must not be of another run."""
        state = cls.read(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        if not (run.folder / RUN).exists():
            state._write_run(None)
        return state

    def after_training(self, *, loss: float | None, step_seconds: float | None) -> RunState:
        """Record that training is done."""
        trained = {"loss": loss, "train_step_seconds": step_seconds}
        self._write_run(trained)
        return replace(self, trained=trained, checkpoint=self.run.recipe.max_train_steps)

    def after_evaluation(self, measured: Measured) -> RunState:
        """Record the results; the run is then done."""
        run = self.run
        trained = {"loss": None, "train_step_seconds": None} if self.trained is None else self.trained
        times = {**trained, "sample_step_seconds": measured.step_seconds}
        result = {"cell": run.cell, "seed": run.seed, "fingerprint": run.fingerprint(), **measured.values, **times}
        _store(self.run.folder / RESULT, {**result, "images": run.task.evaluation_images()})
        (self.run.folder / FAILURE).unlink(missing_ok=True)
        return replace(self, result=result)

    def value(self, name: str) -> Any:
        """Return one of the results, such as ``"psnr"``, or None if it was not measured."""
        return None if self.result is None else self.result.get(name)

    def done(self, lpips: str | None) -> bool:
        """Whether nothing is left to do. A result without LPIPS is incomplete if LPIPS is available."""
        return self.result is not None and (lpips is None or self.value("lpips") is not None)

    def describe(self) -> str:
        """Return the state in one or two words."""
        if self.result is not None:
            return "done"
        if self.changes:
            return "other images" if self.changes[0].startswith(_IMAGES) else "other recipe"
        if self.trained is not None:
            return "trained"
        return f"step {self.checkpoint}" if self.checkpoint else "to do"

    def _write_run(self, trained: dict[str, Any] | None) -> None:
        run = self.run
        content = {"training": run.training_keys(), "trained": trained, "images": run.task.training_images()}
        _store(run.folder / RUN, content)


def _task_of(recipe: Any, study: BaseStudy, cache: StudyCache) -> StudyTask:
    settings = study.evaluation
    if isinstance(settings, GenerationEvaluation):
        return GenerationTask(recipe, settings, cache)
    return SuperResolutionTask(recipe, cast(EvaluationSection, settings), cache)


def folder_name(cell: str) -> str:
    """Return a folder name for a cell that is valid on any system."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "_", cell).strip("_.")
    if plain and len(plain) <= 80:
        return plain
    return f"{plain[:60]}-{hashlib.sha256(cell.encode()).hexdigest()[:8]}"


def _image_changes(then: dict[str, str] | None, read: Callable[[], dict[str, str] | None]) -> str:
    """Return how images differ from those of a file, or "" if the file or this machine does not have them."""
    now = None if then is None else read()
    return "" if then is None or now is None else image_changes(then, now)


def _load(path: Path, schema: type[BaseModel]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = read_json(path)
        schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except BinarizeError as error:
        reason = str(error)
    else:
        return content
    raise BinarizeError(f"{path} is not a file of a study ({reason:.200}); remove it to repeat its run.")


def _store(path: Path, content: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
