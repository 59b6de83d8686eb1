"""Run a study: train, measure and tabulate every cell, and resume after an interruption."""

from __future__ import annotations

import fnmatch
import os
import traceback
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from binarize.conversion.summary import Summary, summary
from binarize.errors import BinarizeError, listing
from binarize.evaluation import Lpips, LpipsUnavailable
from binarize.evaluation.feature_names import feature_name
from binarize.files import remove_folder
from binarize.progress import ProgressBar
from binarize.recipes import TrainingRecipe, build_model
from binarize.studies.results import AblationResult, RunResult
from binarize.studies.schema import BaseStudy, GenerationStudy, load_study
from binarize.studies.state import RunState, StudyRun
from binarize.studies.tasks import StudyCache, file_problems
from binarize.training import TrainingInterrupted, loop
from binarize.training.processes import launched_processes


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

    A run is not repeated if its folder below ``output_dir/cells`` has the results of its recipe and evaluation. An
    interrupted run, also by ``kill -9``, resumes from its newest checkpoint. Cells with the same seed use the same
    initial random state, patches, timesteps and noise. The table is rewritten after each run.

    Args:
        study: An installed study's name, the path of a YAML file, or a study's keys:
            ``{"base": "small_x2", "grid": {"method.groups": [1, 5]}, "output_dir": "runs/groups"}``.
        overrides: ``"key=value"`` strings. A key of the study (``seeds``, ``output_dir``, ``evaluation.data_dir``)
            changes the study, any other key the recipe of every cell.
        only: Globs of the cells to run. Other cells are in the table with their current state, so several machines can
            share a study.
        force: Remove and repeat runs in ``output_dir`` whose recipe has changed, instead of raising an error.
        dry_run: Train and write nothing; return the cells with their parameters, operations and state.
        progress: Show progress bars and messages.

    Returns:
        The table. It contains failed runs with their error; a failure does not stop the other runs.

    Raises:
        BinarizeError: Before anything is run, listing all errors of the study, its recipes, data and folders.
        TrainingInterrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
    """
    if launched_processes() > 1:
        raise BinarizeError("a study runs in one process; start it without a launcher, and share cells by --only.")
    loaded, of_recipes = load_study(study, overrides)
    name = "study" if isinstance(study, Mapping) else Path(study).stem
    ablation = _Ablation(name, loaded, of_recipes, only=only, progress=progress)
    if not dry_run:
        ablation.prepare(force)
        ablation.run()
    return ablation.result()


class _Ablation:
    """One call of `ablate`."""

    def __init__(
        self, name: str, study: BaseStudy, overrides: Sequence[str], *, only: str | Sequence[str] | None, progress: bool
    ) -> None:
        self.name, self.study, self.progress = name, study, progress
        recipes = study.recipes(overrides)
        seeds, cache = study.seeds, StudyCache()
        self.runs = [StudyRun(cell, seed, recipe, study, cache) for cell, recipe in recipes.items() for seed in seeds]
        _check_folders(self.runs)
        chosen = _choose(recipes, only)
        self.chosen = [run for run in self.runs if run.cell in chosen]
        self.sizes = _measure_sizes(recipes)
        self.states = {run: RunState.read(run) for run in self.runs}
        self.failures: dict[StudyRun, str] = {}
        self.lpips: str | None = study.evaluation.lpips_net
        self.notes = study.evaluation.notes

    def prepare(self, force: bool) -> None:
        """Check everything that can be checked before the first run, and with force remove runs of other recipes."""
        changed = [run for run in self._unfinished(None) if self.states[run].changes]
        if changed and not force:
            lines = [f"{run}: {change}" for run in changed for change in self.states[run].changes]
            opening = f"{self.study.output_dir} holds runs of these cells with other recipes or images:"
            closing = "Choose another output_dir, or repeat these runs with --force."
            raise BinarizeError(listing(opening, lines, closing))
        for run in changed:
            remove_folder(run.folder)
            self.states[run] = RunState.read(run)
        evaluation: Any = self.study.evaluation
        if self.lpips is not None and any(self.states[run].value("lpips") is None for run in self.chosen):
            try:
                Lpips(self.lpips, backbone=evaluation.lpips_backbone)
            except LpipsUnavailable as reason:
                self.lpips, self.notes = None, (*self.notes, f"LPIPS is left out. {reason}")
        if pending := self._unfinished(self.lpips):
            _check_data(pending)

    def _unfinished(self, lpips: str | None) -> list[StudyRun]:
        return [run for run in self.chosen if not self.states[run].done(lpips)]

    def run(self) -> None:
        """Run what is not done; one failure does not stop the other runs."""
        pending, chosen = self._unfinished(self.lpips), len(self.chosen)
        if len(pending) < chosen:
            self._print(f"{chosen - len(pending)} of {chosen} runs are already done")
        for number, run in enumerate(pending, 1):
            self._print(f"[{number}/{len(pending)}] {run}")
            try:
                self.states[run] = train_and_measure(run, self.lpips, progress=self.progress)
            except TrainingInterrupted:
                raise
            except Exception as error:
                message = str(error) if isinstance(error, BinarizeError) else f"{type(error).__name__}: {error}"
                self.failures[run] = message
                run.record_failure(traceback.format_exc())
                self._print(f"{run} failed: {message}")
            self.result().save()
        if not pending:
            self.result().save()

    def result(self) -> AblationResult:
        """Return the table in its current state."""
        study, runs = self.study, tuple(map(self._run_result, self.runs))
        options: dict[str, Any] = {"dataset": None, "lpips": None, "runs": runs, "notes": self.notes}
        if isinstance(study, GenerationStudy):
            options["steps"] = tuple(sorted({steps for run in self.runs for steps in run.task.steps}))
            options["features"] = feature_name(study.evaluation.features)
        else:
            options |= study.evaluation.model_dump(include={"dataset", "lpips"})
        return AblationResult(self.name, study.description, output_dir=study.output_dir, **options)

    def _run_result(self, run: StudyRun) -> RunResult:
        state, size, published = self.states[run], self.sizes[run.cell], run.recipe.published
        failure = self.failures.get(run)
        names = ("psnr", "ssim", "lpips", "scores", "loss", "train_step_seconds", "sample_step_seconds")
        measured: dict[str, Any] = {name: state.value(name) for name in names}
        row = {} if published is None else published.model_dump(exclude_none=True)
        word = state.describe() if failure is None else "failed"
        sizes = size.params, size.ops
        return RunResult(run.cell, run.seed, run.folder, word, *sizes, **measured, published=row, error=failure)

    def _print(self, text: str) -> None:
        if self.progress:
            ProgressBar.write(text)


def train_and_measure(run: StudyRun, lpips: str | None, *, progress: bool) -> RunState:
    """Train a run, or resume it, and measure it with the given backbone of LPIPS, or without LPIPS."""
    state = RunState.start(run)
    if state.trained is None:
        history = loop.train(run.recipe, progress=progress).history
        samples = run.recipe.train_batch_size * run.recipe.gradient_accumulation_steps
        # There is no history if the run was stopped between its last step and the record below.
        seconds = median(samples / entry.samples_per_second for entry in history) if history else None
        state = state.after_training(loss=history[-1].loss if history else None, step_seconds=seconds)
    return state.after_evaluation(run.task.measure(run.folder, run.seed, lpips, name=str(run), progress=progress))


def _choose(cells: Collection[str], only: str | Sequence[str] | None) -> set[str]:
    if only is None:
        return set(cells)
    chosen: set[str] = set()
    for pattern in [only] if isinstance(only, str) else only:
        found = {cell for cell in cells if cell == pattern or fnmatch.fnmatchcase(cell, pattern)}
        if not found:
            raise BinarizeError(f"only: no cell matches {pattern!r}; there are {', '.join(cells)}.")
        chosen |= found
    return chosen


def _measure_sizes(recipes: Mapping[str, TrainingRecipe]) -> dict[str, Summary]:
    sizes: dict[str, Summary] = {}
    errors: list[str] = []
    for cell, recipe in recipes.items():
        try:
            with torch.device("meta"):
                sizes[cell] = summary(build_model(recipe))
        except BinarizeError as error:
            errors.append(f"{cell}: {error}")
    if errors:
        raise BinarizeError(listing("the networks of some cells cannot be built:", errors))
    return sizes


def _check_folders(runs: Iterable[StudyRun]) -> None:
    cells: dict[str, str] = {}
    for run in runs:
        # Some file systems ignore the case of names.
        cell = cells.setdefault(str(run.folder.parent).casefold(), run.cell)
        if cell != run.cell:
            folder = run.folder.parent
            raise BinarizeError(f"the cells {cell!r} and {run.cell!r} would share the folder {folder}; rename one.")


def _check_data(runs: Iterable[StudyRun]) -> None:
    """Raise one error that lists all missing data."""
    errors: dict[str, list[str]] = defaultdict(list)
    for cell, run in {run.cell: run for run in runs}.items():
        made_here = run.study.output_dir / "cells"
        for problem in (*file_problems(run.recipe, made_here), *run.task.problems()):
            errors[problem].append(cell)
    if errors:
        lines = [f"{message} ({', '.join(cells)})" for message, cells in errors.items()]
        raise BinarizeError(listing("the study cannot be run with these data:", lines))
