"""Ablation studies: train, measure and tabulate every cell, and go on after an interruption where it stopped."""

from __future__ import annotations

import fnmatch
import os
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm

from binarize.conversion.summary import summary
from binarize.errors import BinarizeError
from binarize.imaging import ImagePairs
from binarize.recipes import EvaluationSection, Recipe, Study, build_model, load_study
from binarize.studies.results import AblationResult, TrialResult
from binarize.studies.state import Trial, TrialState
from binarize.training.errors import TrainingInterrupted
from binarize.training.folder import MODEL


def ablate(
    study: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    only: str | Sequence[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> AblationResult:
    """Run a study: train every cell with every seed, measure it, and write one table.

    Each run has a folder below ``output_dir/cells``. A run is done once its ``result.json`` is there, which is written
    atomically and carries a fingerprint of the recipe and of what was measured; it is not repeated. A run that was cut
    short, by Ctrl-C or by ``kill -9``, goes on from its newest checkpoint. Cells with the same seed start from the same
    random state and see the same patches, timesteps and noise. The table, as Markdown, CSV, JSON and a plot, is
    rewritten after each run.

    Args:
        study: An installed study's name, the path of a YAML file, or a study's keys:
            ``{"base": "small_x2", "grid": {"method.groups": [1, 5]}, "output_dir": "runs/groups"}``.
        overrides: ``"key=value"`` texts. A key of the study (``seeds``, ``output_dir``, ``evaluation.data_dir``)
            changes the study, any other the recipe of every cell.
        only: Globs on the names of cells to run; the others enter the table as far as they are done. Several machines
            share a study so.
        force: Remove and repeat runs in ``output_dir`` whose recipe has changed since, instead of refusing.
        dry_run: Train and write nothing: return the cells with their parameters, operations and state.
        progress: Show what happens.

    Returns:
        The table. A run that failed is in it with its error; the others were run all the same.

    Raises:
        BinarizeError: Before anything is run: if the study or a cell's recipe has errors (all are listed), data is
            missing, or ``output_dir`` holds runs of the same cells with other recipes.
        TrainingInterrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BinarizeError(
            "a study runs in one process; start it without a launcher, and let other machines or GPUs take other "
            "cells of the same output_dir by --only."
        )
    loaded, rest = load_study(study, overrides)
    name = "study" if isinstance(study, Mapping) else Path(study).stem
    run = _Ablation(name, loaded, rest, only=only, progress=progress)
    if not dry_run:
        run.prepare(force)
        run.work()
    return run.result()


@dataclass(frozen=True)
class _Cost:
    params: float
    ops: float


class _Ablation:
    """One call of `ablate`."""

    def __init__(
        self, name: str, study: Study, overrides: Sequence[str], *, only: str | Sequence[str] | None, progress: bool
    ) -> None:
        self.name, self.study, self.progress = name, study, progress
        recipes = study.recipes(overrides)
        self.trials = [Trial(cell, seed, recipe, study) for cell, recipe in recipes.items() for seed in study.seeds]
        _refuse_shared_folders(self.trials)
        wanted = _choose(recipes, only)
        self.chosen = [trial for trial in self.trials if trial.cell in wanted]
        self.costs = self._measure_costs(recipes)
        self.states = {trial: TrialState.read(trial) for trial in self.trials}
        self.failures: dict[Trial, str] = {}
        self.notes: list[str] = []

    def prepare(self, force: bool) -> None:
        """Refuse what cannot work before hours are spent on the rest of it."""
        stale = [trial for trial in self.todo(None) if self.states[trial].changes]
        if stale and not force:
            lines = [f"  {trial}: {change}" for trial in stale for change in self.states[trial].changes]
            raise BinarizeError(
                "\n".join(
                    [
                        f"{self.study.output_dir} holds runs of these cells with other recipes:",
                        *lines,
                        "Choose another output_dir, or repeat these runs with --force.",
                    ]
                )
            )
        for trial in stale:
            remove_run(trial.folder)
            self.states[trial] = TrialState.read(trial)
        evaluation = self.study.evaluation
        self.lpips: str | None = evaluation.lpips
        if any(self.states[trial].figure("lpips") is None for trial in self.chosen):
            self.lpips, notes = _available_lpips(evaluation)
            self.notes += notes
        pending = self.todo(self.lpips)
        if pending:
            _check_data({trial.cell: trial.recipe for trial in pending}, evaluation)

    def todo(self, lpips: str | None) -> list[Trial]:
        """Return the chosen runs that are not done; LPIPS is needed for that if a backbone is given."""
        return [trial for trial in self.chosen if not self.states[trial].done(lpips)]

    def work(self) -> None:
        """Run what is left; one failure does not stop the others."""
        pending = self.todo(self.lpips)
        chosen = len(self.chosen)
        if len(pending) < chosen:
            self._say(f"{chosen - len(pending)} of {chosen} runs are done already")
        for number, trial in enumerate(pending, 1):
            self._say(f"[{number}/{len(pending)}] {trial}")
            try:
                self.states[trial] = run_trial(trial, self.lpips, progress=self.progress)
            except TrainingInterrupted:
                raise
            except Exception as error:
                message = str(error) if isinstance(error, BinarizeError) else f"{type(error).__name__}: {error}"
                self.failures[trial] = message
                trial.record_failure(traceback.format_exc())
                self._say(f"{trial} failed: {message}")
            self.result().save()
        if not pending:
            self.result().save()

    def result(self) -> AblationResult:
        """Return the table as it stands."""
        evaluation = self.study.evaluation
        return AblationResult(
            name=self.name,
            description=self.study.description,
            dataset=evaluation.dataset,
            lpips=evaluation.lpips,
            output_dir=self.study.output_dir,
            trials=tuple(self._row(trial) for trial in self.trials),
            notes=tuple(self.notes),
        )

    def _row(self, trial: Trial) -> TrialResult:
        state, cost, published = self.states[trial], self.costs[trial.cell], trial.recipe.published
        failure = self.failures.get(trial)
        return TrialResult(
            cell=trial.cell,
            seed=trial.seed,
            folder=trial.folder,
            state=state.describe() if failure is None else "failed",
            params=cost.params,
            ops=cost.ops,
            psnr=state.figure("psnr"),
            ssim=state.figure("ssim"),
            lpips=state.figure("lpips"),
            loss=state.figure("loss"),
            train_step_seconds=state.figure("train_step_seconds"),
            sample_step_seconds=state.figure("sample_step_seconds"),
            published={} if published is None else published.model_dump(exclude_none=True),
            error=failure,
        )

    def _measure_costs(self, recipes: Mapping[str, Recipe]) -> dict[str, _Cost]:
        costs: dict[str, _Cost] = {}
        wrong: list[str] = []
        for cell, recipe in recipes.items():
            try:
                with torch.device("meta"):
                    found = summary(build_model(recipe))
                costs[cell] = _Cost(found.params, found.ops)
            except BinarizeError as error:
                wrong.append(f"  {cell}: {error}")
        if wrong:
            raise BinarizeError("\n".join(["the networks of some cells cannot be built:", *wrong]))
        return costs

    def _say(self, text: str) -> None:
        if self.progress:
            tqdm.write(text)


def run_trial(trial: Trial, lpips: str | None, *, progress: bool) -> TrialState:
    """Train a run, or what is left of it, and measure it.

    Args:
        trial: What to run.
        lpips: The backbone to measure with, or None.
        progress: Show progress bars.
    """
    from binarize.evaluation import evaluate
    from binarize.models import SuperResolutionPipeline
    from binarize.training.loop import train

    state = TrialState.begin(trial)
    if state.trained is None:
        trained = train(trial.recipe, progress=progress)
        samples = trial.recipe.train_batch_size * trial.recipe.gradient_accumulation_steps
        state = state.after_training(
            loss=trained.history[-1].loss if trained.history else None,
            step_seconds=median(samples / entry.samples_per_second for entry in trained.history)
            if trained.history
            else None,
        )
    pipeline = SuperResolutionPipeline.from_pretrained(trial.folder / MODEL, local_files_only=True)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    settings = trial.study.evaluation

    def upscale(picture: Any) -> Any:
        noise = torch.Generator().manual_seed(trial.seed)
        steps = trial.inference_steps
        output: Any = pipeline(picture, num_inference_steps=steps, generator=noise, tile=settings.tile)
        return output.images[0]

    report = evaluate(
        upscale,
        _pictures(trial.recipe, settings),
        scale=trial.recipe.scale,
        lpips=lpips,
        lpips_backbone=settings.lpips_backbone,
        limit=settings.limit,
        progress=progress,
        name=str(trial),
        device="cpu" if device is None else device,
    )
    report.save(trial.folder, force=True)
    return state.after_evaluation(report, median(row.seconds / trial.inference_steps for row in report.rows))


def remove_run(folder: Path) -> None:
    """Remove a run's folder so that a removal cut short leaves nothing that looks like a run."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _choose(recipes: Mapping[str, Recipe], only: str | Sequence[str] | None) -> set[str]:
    if only is None:
        return set(recipes)
    patterns = [only] if isinstance(only, str) else list(only)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {cell for cell in recipes if cell == pattern or fnmatch.fnmatchcase(cell, pattern)}
        if not found:
            raise BinarizeError(f"only: no cell is called {pattern!r}; there are {', '.join(recipes)}.")
        chosen |= found
    return chosen


def _refuse_shared_folders(trials: Sequence[Trial]) -> None:
    owners: dict[str, str] = {}
    for trial in trials:
        # Some file systems take capitals and small letters for the same.
        owner = owners.setdefault(str(trial.folder.parent).casefold(), trial.cell)
        if owner != trial.cell:
            raise BinarizeError(
                f"the cells {owner!r} and {trial.cell!r} would share the folder {trial.folder.parent}; rename one."
            )


def _pictures(recipe: Recipe, settings: EvaluationSection) -> Any:
    high, low = settings.data_dir, settings.lr_data_dir
    if high is None:
        high, low = recipe.validation_data_dir, recipe.validation_lr_data_dir
    return high if low is None or high is None else (high, low)


def _check_data(recipes: Mapping[str, Recipe], settings: EvaluationSection) -> None:
    """Raise one error that names all data that is missing."""
    from binarize.evaluation.quality import scikit_image_ssim

    scikit_image_ssim()
    wrong: dict[str, list[str]] = {}
    for cell, recipe in recipes.items():
        if recipe.train_data_dir is None:
            wrong.setdefault("train_data_dir: missing; name the folder of training pictures", []).append(cell)
        elif not recipe.train_data_dir.is_dir():
            wrong.setdefault(f"train_data_dir: there is no folder {str(recipe.train_data_dir)!r}", []).append(cell)
        pictures = _pictures(recipe, settings)
        if pictures is None:
            message = "evaluation.data_dir: missing; name the folder of pictures to measure on"
            wrong.setdefault(message, []).append(cell)
            continue
        try:
            folders = pictures if isinstance(pictures, tuple) else (pictures,)
            ImagePairs(*folders, scale=recipe.scale)
        except BinarizeError as error:
            wrong.setdefault(f"evaluation.data_dir: {error}", []).append(cell)
    if wrong:
        lines = [f"  {message} ({', '.join(cells)})" for message, cells in wrong.items()]
        raise BinarizeError("\n".join(["the study cannot be run with these data:", *lines]))


def _available_lpips(settings: EvaluationSection) -> tuple[str | None, tuple[str, ...]]:
    """Return the backbone if it can be had here, and a note if it cannot."""
    from binarize.evaluation import Lpips, LpipsUnavailable

    if settings.lpips is None:
        return None, ()
    try:
        Lpips(settings.lpips, backbone=settings.lpips_backbone)
    except LpipsUnavailable as reason:
        return None, (f"LPIPS is left out. {reason}",)
    return settings.lpips, ()
