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
from binarize.evaluation import Lpips, LpipsUnavailable, evaluate
from binarize.evaluation.quality import scikit_image_ssim
from binarize.files import remove_folder
from binarize.imaging import ImagePairs
from binarize.models import SuperResolutionPipeline
from binarize.progress import ProgressBar
from binarize.recipes import Recipe, build_model
from binarize.studies.results import AblationResult, RunResult
from binarize.studies.schema import Study, load_study
from binarize.studies.state import ImageDigests, RunState, StudyRun
from binarize.training import TrainingInterrupted, loop
from binarize.training.folder import MODEL
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
        self, name: str, study: Study, overrides: Sequence[str], *, only: str | Sequence[str] | None, progress: bool
    ) -> None:
        self.name, self.study, self.progress = name, study, progress
        recipes = study.recipes(overrides)
        seeds, digests = study.seeds, ImageDigests()
        self.runs = [StudyRun(cell, seed, recipe, study, digests) for cell, recipe in recipes.items() for seed in seeds]
        _check_folders(self.runs)
        chosen = _choose(recipes, only)
        self.chosen = [run for run in self.runs if run.cell in chosen]
        self.sizes = _measure_sizes(recipes)
        self.states = {run: RunState.read(run) for run in self.runs}
        self.failures: dict[StudyRun, str] = {}
        self.lpips = study.evaluation.lpips
        made_by = study.evaluation.degradation
        self.notes = (f"Low-resolution images are made by {made_by.to_text()}",) if made_by.root else ()

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
        evaluation = self.study.evaluation
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
        dataset, lpips = study.evaluation.dataset, study.evaluation.lpips
        return AblationResult(self.name, study.description, dataset, lpips, study.output_dir, runs, self.notes)

    def _run_result(self, run: StudyRun) -> RunResult:
        state, size, published = self.states[run], self.sizes[run.cell], run.recipe.published
        failure = self.failures.get(run)
        names = ("psnr", "ssim", "lpips", "loss", "train_step_seconds", "sample_step_seconds")
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
    pipeline = SuperResolutionPipeline.from_pretrained(run.folder / MODEL, local_files_only=True)
    device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or "cpu"
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    settings = run.study.evaluation

    def upscale(image: Any) -> Any:
        noise = torch.Generator().manual_seed(run.seed)
        output: Any = pipeline(image, num_inference_steps=run.inference_steps, generator=noise, tile=settings.tile)
        return output.images[0]

    high, low = run.images
    assert high is not None  # checked by `prepare`
    data, scale, backbone = high if low is None else (high, low), run.recipe.scale, settings.lpips_backbone
    made_by = settings.degradation
    options: dict[str, Any] = {"limit": settings.limit, "progress": progress, "name": str(run), "device": device}
    report = evaluate(upscale, data, scale=scale, degradation=made_by, lpips=lpips, lpips_backbone=backbone, **options)
    report.save(run.folder, force=True)
    return state.after_evaluation(report, median(row.seconds / run.inference_steps for row in report.rows))


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


def _measure_sizes(recipes: Mapping[str, Recipe]) -> dict[str, Summary]:
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
    scikit_image_ssim()
    errors: dict[str, list[str]] = defaultdict(list)
    for cell, run in {run.cell: run for run in runs}.items():
        training, (high, low) = run.recipe.train_data_dir, run.images
        if training is None:
            errors["train_data_dir: missing; name the folder of training images"].append(cell)
        elif not training.is_dir():
            errors[f"train_data_dir: there is no folder {str(training)!r}"].append(cell)
        if high is None:
            errors["evaluation.data_dir: missing; name the folder of test images"].append(cell)
            continue
        if low is not None and run.study.evaluation.degradation.root:
            errors[f"evaluation.degradation: has no effect on the images of {str(low)!r}; remove it"].append(cell)
        try:
            ImagePairs(high, low, scale=run.recipe.scale)
        except BinarizeError as error:
            errors[f"evaluation.data_dir: {error}"].append(cell)
    if errors:
        lines = [f"{message} ({', '.join(cells)})" for message, cells in errors.items()]
        raise BinarizeError(listing("the study cannot be run with these data:", lines))
