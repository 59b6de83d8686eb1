"""What the folder of one run of a study says: with what it was begun, how far it is, and what it measured."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from binarize.errors import BinarizeError
from binarize.imaging import write_atomic
from binarize.training.checkpoint import Checkpoints
from binarize.training.resume import _flat, with_defaults

if TYPE_CHECKING:
    from binarize.evaluation import EvaluationReport
    from binarize.recipes import Recipe, Study

RUN = "run.json"
RESULT = "result.json"
FAILURE = "error.txt"

# Keys that change neither the trained weights nor what is measured (sampling steps may; see `Trial.training_keys`).
_FREE = {
    "description", "published", "plugins", "output_dir", "dataloader_num_workers", "gradient_checkpointing",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_data_dir",
    "validation_lr_data_dir", "validation_steps", "num_validation_images", "num_inference_steps", "report_to",
    "logging_steps", "residual_strength",
}  # fmt: skip


class Trial:
    """One cell of a study with one seed.

    Args:
        cell: The cell's name.
        seed: The seed.
        recipe: The cell's recipe; seed, folder and resuming are set here.
        study: The study.
    """

    def __init__(self, cell: str, seed: int, recipe: Recipe, study: Study) -> None:
        self.cell, self.seed, self.study = cell, seed, study
        self.folder = study.output_dir / "cells" / folder_name(cell) / f"seed-{seed}"
        changes = {"seed": seed, "output_dir": self.folder, "resume_from_checkpoint": "latest"}
        self.recipe = recipe.model_copy(update=changes)

    def __str__(self) -> str:
        return self.cell if len(self.study.seeds) == 1 else f"{self.cell}, seed {self.seed}"

    @property
    def inference_steps(self) -> int:
        """Sampling steps of the evaluation."""
        steps = self.study.evaluation.num_inference_steps
        return self.recipe.num_inference_steps if steps is None else steps

    def training_keys(self) -> dict[str, Any]:
        """Return what decides the trained weights."""
        dumped = self.recipe.model_dump(mode="json", by_alias=True)
        keys = {key: value for key, value in dumped.items() if key not in _FREE}
        if self.recipe.sampling_timesteps_share > 0:
            keys["num_inference_steps"] = self.recipe.num_inference_steps
        for name in ("train_data_dir", "train_lr_data_dir"):
            keys[name] = _absolute(getattr(self.recipe, name))
        keys["plugins"] = [_plugin(plugin) for plugin in self.recipe.plugins]
        return keys

    def evaluation_keys(self) -> dict[str, Any]:
        """Return what decides the figures of given weights."""
        settings, recipe = self.study.evaluation, self.recipe
        high, low = settings.data_dir, settings.lr_data_dir
        if high is None:
            high, low = recipe.validation_data_dir, recipe.validation_lr_data_dir
        return {
            "data_dir": _absolute(high),
            "lr_data_dir": _absolute(low),
            "limit": settings.limit,
            "num_inference_steps": self.inference_steps,
            "residual_strength": recipe.residual_strength,
            "tile": settings.tile,
            "lpips": settings.lpips,
        }

    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that change when anything does that the figures depend on."""
        text = json.dumps({"training": self.training_keys(), "evaluation": self.evaluation_keys()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def record_failure(self, text: str) -> None:
        """Leave a traceback in the run's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / FAILURE).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class TrialState:
    """How far a run is.

    Attributes:
        trial: The run.
        changes: What of the recipe differs from the one that the folder was begun with.
        checkpoint: Step of the newest checkpoint, 0 without one.
        trained: Loss and seconds a step of the finished training, or None.
        result: The figures, or None.
    """

    trial: Trial
    changes: tuple[str, ...] = ()
    checkpoint: int = 0
    trained: dict[str, Any] | None = None
    result: dict[str, Any] | None = None

    @classmethod
    def read(cls, trial: Trial) -> TrialState:
        """Return what the run's folder says; a result or a training with another recipe does not count."""
        begun, result = _load(trial.folder / RUN), _load(trial.folder / RESULT)
        checkpoint = max(Checkpoints(trial.folder, None).list(), default=0)
        if begun is None:
            return cls(trial, checkpoint=checkpoint)
        # Through JSON, as what was stored has been.
        keys = json.loads(json.dumps(trial.training_keys()))
        stored = {name: value for name, value in with_defaults(begun["training"]).items() if name in keys}
        then, now = _flat({**stored, **begun["training"]}), _flat(keys)
        changes = [
            f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key)
        ]
        if changes:
            return cls(trial, tuple(changes), checkpoint)
        counts = result is not None and result["fingerprint"] == trial.fingerprint()
        return cls(trial, (), checkpoint, begun["trained"], result if counts else None)

    @classmethod
    def begin(cls, trial: Trial) -> TrialState:
        """Write down with what the run is begun, unless that was done before; the folder must not be another's."""
        state = cls.read(trial)
        trial.folder.mkdir(parents=True, exist_ok=True)
        if not (trial.folder / RUN).exists():
            state._write_run(None)
        return state

    def after_training(self, *, loss: float | None, step_seconds: float | None) -> TrialState:
        """Write down that the training is done."""
        trained = {"loss": loss, "train_step_seconds": step_seconds}
        self._write_run(trained)
        return replace(self, trained=trained, checkpoint=self.trial.recipe.max_train_steps)

    def after_evaluation(self, report: EvaluationReport, step_seconds: float) -> TrialState:
        """Write the result, with which the run is done."""
        scores = report.mean.model
        result = {
            "cell": self.trial.cell,
            "seed": self.trial.seed,
            "fingerprint": self.trial.fingerprint(),
            "psnr": scores.psnr if math.isfinite(scores.psnr) else None,
            "ssim": scores.ssim,
            "lpips": scores.lpips,
            "loss": None,
            "train_step_seconds": None,
            **({} if self.trained is None else self.trained),
            "sample_step_seconds": step_seconds,
        }
        _store(self.trial.folder / RESULT, result)
        (self.trial.folder / FAILURE).unlink(missing_ok=True)
        return replace(self, result=result)

    def figure(self, name: str) -> float | None:
        """Return one of the figures, such as ``"psnr"``; None for what was not measured."""
        return None if self.result is None else self.result[name]

    def done(self, lpips: str | None) -> bool:
        """Say whether nothing is left to do; a result without LPIPS is not enough once LPIPS can be had."""
        return self.result is not None and (lpips is None or self.figure("lpips") is not None)

    def describe(self) -> str:
        """Return the state in a word or two."""
        if self.result is not None:
            return "done"
        if self.changes:
            return "other recipe"
        if self.trained is not None:
            return "trained"
        return f"step {self.checkpoint}" if self.checkpoint else "to do"

    def _write_run(self, trained: dict[str, Any] | None) -> None:
        _store(self.trial.folder / RUN, {"training": self.trial.training_keys(), "trained": trained})


def folder_name(cell: str) -> str:
    """Return a cell's name as the name of a folder on any system."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "_", cell).strip("_.")
    if plain and len(plain) <= 80:
        return plain
    return f"{plain[:60]}-{hashlib.sha256(cell.encode()).hexdigest()[:8]}"


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _plugin(plugin: str) -> str:
    """Name a plugin; a file also by its content, which is what decides the method."""
    path = Path(plugin)
    if not plugin.endswith(".py") or not path.is_file():
        return plugin
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _load(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BinarizeError(
            f"{path} is not as a study wrote it ({error}); remove it, and its run is repeated."
        ) from error


def _store(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, partial(Path.write_text, data=text, encoding="utf-8"), force=True)
