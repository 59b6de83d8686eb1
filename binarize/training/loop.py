"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from torch import Tensor

from binarize.conversion.memory import memory_mode
from binarize.conversion.record import is_converted
from binarize.errors import BinarizeError, one_line
from binarize.kernels.malloc import keep_large_blocks_apart
from binarize.layers import training_step
from binarize.progress import ProgressBar
from binarize.randomness import torch_seed
from binarize.recipes import (
    GenerationRecipe,
    Recipe,
    TrainingRecipe,
    build_pipeline,
    build_scheduler,
    last_stage_end,
    remove_stages,
)
from binarize.training import initial
from binarize.training.calibration import calibrate_steps
from binarize.training.checkpoint import Checkpoints
from binarize.training.checkpoint_state import CheckpointState, read_state
from binarize.training.csv_log import CsvLog
from binarize.training.distillation import Distillation
from binarize.training.errors import DivergedError, TrainingInterrupted
from binarize.training.folder import BEST, MODEL, SAMPLES, find_start, lock_folder, prepare_folder
from binarize.training.generation import Generation
from binarize.training.log import Log, LogEntry, start_tracker
from binarize.training.objective import Objective
from binarize.training.optim import build_lr_scheduler, build_optimizer
from binarize.training.perceptual import perceptual_loss
from binarize.training.processes import accelerator_for, on_main, reduce_losses
from binarize.training.resume import check_resumable, check_same_images
from binarize.training.samples import BatchPlan, batch_loader, close, to_device
from binarize.training.signals import StopRequest
from binarize.training.super_resolution import SuperResolution
from binarize.training.tasks import Task
from binarize.training.validation import averaged_weights, export

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished run.

    Attributes:
        model_dir: A saved `SuperResolutionPipeline` or `GenerationPipeline`.
        steps: Number of optimiser steps, including those before a resume.
        history: The log since the start or the resume.
        validation: Step -> mean PSNR on luma without the border, in dB.
        best: Step and PSNR of the best validation of the whole run; None without validation images.
        seconds: Time since the start or the resume.
    """

    output_dir: Path
    model_dir: Path
    checkpoint: Path
    steps: int
    history: tuple[LogEntry, ...]
    validation: dict[int, float]
    best: tuple[int, float] | None
    seconds: float


def train(recipe: TrainingRecipe, *, force: bool = False, progress: bool = True) -> TrainResult:
    """Train a recipe, in as many processes as the program was launched in.

    Every random number is a function of the recipe's seed and of the sample or step that uses it. A resumed run is
    therefore equal to an uninterrupted one (bit for bit on devices that compute deterministically, such as CPUs), and
    the split into processes and accumulated forward passes changes no patch, timestep or noise. With ``force``, an
    existing run in ``output_dir`` is removed first.

    Raises:
        BinarizeError: If the recipe cannot be trained, the folder holds a run, the data or the checkpoint cannot be
            read, or a file cannot be written.
        DivergedError: If the loss or the gradient became NaN or infinite.
        TrainingInterrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
    """
    with accelerator_for(recipe) as accelerator, StopRequest() as stop, ExitStack() as held:
        return _Run(recipe, accelerator, stop, held, force=force, progress=progress).train()


def open_task(recipe: TrainingRecipe, plan: BatchPlan, device: torch.device = _CPU, *, progress: bool = False) -> Task:
    """Return the task of a recipe, or raise an error if its training or validation images cannot be used."""
    if isinstance(recipe, GenerationRecipe):
        return Generation(recipe, plan, device, progress=progress)
    return SuperResolution(cast(Recipe, recipe), plan)


class _Run:
    """One call of `train`: the objects that a step needs, and the steps."""

    def __init__(
        self, recipe: TrainingRecipe, accelerator: Accelerator, stop: StopRequest, held: ExitStack, *, force: bool,
        progress: bool,
    ) -> None:  # fmt: skip
        self.accelerator, self.stop = accelerator, stop
        self.shows_progress = progress and accelerator.is_main_process
        size, accumulation = recipe.train_batch_size, recipe.gradient_accumulation_steps
        self.plan = BatchPlan(size, accumulation, accelerator.num_processes, accelerator.process_index)
        self.checkpoints = Checkpoints(recipe.output_dir, recipe.checkpoints_total_limit)
        self.start = find_start(recipe, self.checkpoints, force)
        perceptual = perceptual_loss(recipe, accelerator.device)
        self.task = open_task(recipe, self.plan, accelerator.device, progress=self.shows_progress)
        section = recipe.distillation
        teacher = None if section is None else initial.read_trained("distillation", section.teacher, recipe)
        trained = None
        if self.start is None and recipe.init_from is not None:
            trained = initial.read_trained("init_from", recipe.init_from, recipe)
        self.recipe = recipe = self.task.complete(recipe, self.start, [teacher, trained])
        state = None if self.start is None else self._read(self.start)

        torch.manual_seed(torch_seed(recipe.seed, "weights"))
        self.unet: Any = initial.initial_network(recipe, trained).train()
        self.calibrated = ""
        if self.start is None and (trained is None or not is_converted(trained.network)):
            # A binary network brings its steps along, and a checkpoint those that it has learned.
            samples, device = self.task.samples, accelerator.device
            self.calibrated = calibrate_steps(recipe, self.unet, samples, self.plan.total, device)
        if recipe.memory_mode == "compact":
            if accelerator.device.type == "cpu":
                keep_large_blocks_apart()
            memory_mode(self.unet, "compact")
        if recipe.gradient_checkpointing:
            self._checkpoint_activations()
        optimizer = build_optimizer(recipe, self.unet)
        self.lr_scheduler = build_lr_scheduler(recipe, optimizer)
        self.model, self.optimizer = accelerator.prepare(self.unet, optimizer)
        distillation = self._distillation(teacher)
        # Compile after `prepare`, so that DDP's buckets are compiled with the network. Checkpoints hold `unet`'s state.
        self.forward = torch.compile(self.model) if recipe.compile else self.model
        self.objective = Objective(recipe, build_scheduler(recipe), distillation, perceptual)
        self.ema = EMAModel(self.unet.parameters(), decay=recipe.ema_decay, foreach=True) if recipe.use_ema else None
        self.step, self.validated = 0, 0
        self.best: tuple[int, float] | None = None
        if state is not None and self.start is not None:
            self._restore(state, self.start)

        on_main(accelerator, lambda: self._enter_folder(held, force))
        on_main(accelerator, lambda: start_tracker(recipe, accelerator, self.step))
        table = CsvLog(recipe.output_dir, self.step, self.objective.parts) if accelerator.is_main_process else None
        self.log = Log(accelerator, self.unet, table)
        self.validation: dict[int, float] = {}
        self._print_start()

    def _checkpoint_activations(self) -> None:
        try:
            self.unet.enable_gradient_checkpointing()
        except ValueError as error:  # of diffusers
            raise BinarizeError(f"gradient_checkpointing: {one_line(error)}; set it to false.") from error

    def _enter_folder(self, held: ExitStack, force: bool) -> None:
        held.enter_context(lock_folder(self.recipe.output_dir))
        if find_start(self.recipe, self.checkpoints, force) != self.start:
            raise BinarizeError(
                f"output_dir: {self.recipe.output_dir} was changed by another run; start this one again."
            )
        prepare_folder(self.recipe, self.checkpoints, force)

    def _distillation(self, teacher: initial.TrainedModel | None) -> Distillation | None:
        if teacher is None or self.recipe.distillation is None:
            return None
        initial.check_same_prediction("distillation", self.recipe, teacher)
        network = teacher.network.to(self.accelerator.device, self.unet.dtype)
        distillation = Distillation(self.recipe.distillation, self.unet, network, self.accelerator.autocast)
        if self.recipe.compile and distillation.blocks:
            # Compiled code does not check for hooks (`skip_nnmodule_hook_guards`), so code of an earlier run in this
            # process would skip the hooks that record block outputs.
            torch.compiler.reset()
        return distillation

    def train(self) -> TrainResult:
        """Train to the last step."""
        recipe, start = self.recipe, time.perf_counter()
        # The run stopped between this step and its validation, or continues in another folder.
        missed = self.validated != self.step or not (recipe.output_dir / MODEL).is_dir()
        if self.step and self._validation_is_due() and missed:
            self._validate()
        steps, cuda = range(self.step, recipe.max_train_steps), self.accelerator.device.type == "cuda"
        workers = recipe.dataloader_num_workers
        batches = iter(batch_loader(self.task.samples, self.plan, steps, workers=workers, pin_memory=cuda))
        try:
            # A run without steps was resumed from a checkpoint.
            checkpoint = cast(Path, self._train_steps(batches))
        finally:
            close(batches)
        folder, history, seconds = recipe.output_dir, tuple(self.log.entries), time.perf_counter() - start
        return TrainResult(folder, folder / MODEL, checkpoint, self.step, history, self.validation, self.best, seconds)

    def _train_steps(self, batches: Iterator[dict[str, Any]]) -> Path | None:
        """Train the remaining steps and return the last checkpoint."""
        recipe, checkpoint = self.recipe, self.start
        total = recipe.max_train_steps
        with ProgressBar(total=total, initial=self.step, disable=not self.shows_progress, unit="step") as bar:
            while self.step < total:
                losses, signum = self._optimizer_step(batches)
                self.log.add(losses)
                last = self.step == total
                if self.step % recipe.logging_steps == 0 or last:
                    self.log.write(bar, self.step, float(self.optimizer.param_groups[0]["lr"]), self.plan.total)
                bar.update()
                paused = time.perf_counter()
                if signum and not last:
                    raise TrainingInterrupted(signum, self._save())
                if self._validation_is_due():
                    # Validate before the checkpoint, which stores the best validation so far.
                    self._validate()
                if self.step % recipe.checkpointing_steps == 0 or last:
                    checkpoint = self._save()
                self.log.exclude(time.perf_counter() - paused)
        return checkpoint

    def _validation_is_due(self) -> bool:
        return self.step % self.recipe.validation_steps == 0 or self.step >= self.recipe.max_train_steps

    def _optimizer_step(self, batches: Iterator[dict[str, Any]]) -> tuple[dict[str, float], int]:
        """Take one step; return its mean losses and the signal that asks to stop, or 0."""
        losses: list[dict[str, Tensor]] = []
        names: list[str] = []
        for forward in range(self.plan.accumulation):
            batch, images = self._next(batches)
            # Only dropout draws from torch's global state.
            torch.manual_seed(torch_seed(self.recipe.seed, "dropout", self.step, forward, self.plan.rank))
            with self.accelerator.accumulate(self.model):
                found = self.objective(self.forward, batch)
                self.accelerator.backward(found.total.mean())
            losses.append({"loss": found.total.detach(), **found.parts})
            names += images
        joined = {name: torch.cat([one[name] for one in losses]) for name in losses[0]}
        means, signum = reduce_losses(self.accelerator, joined, self.stop.signum)
        if not math.isfinite(means["loss"]):
            self._diverged(joined["loss"], names)
        if self.accelerator.scaler is None and not self._gradient_is_finite():  # a scaler skips such steps itself
            self._diverged(joined["loss"], names, "gradient")
        if self.recipe.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        training_step(self.unet, self.step / self.recipe.max_train_steps)
        if self.ema is not None:
            self.ema.step(self.unet.parameters())
        return means, signum

    def _next(self, batches: Iterator[dict[str, Any]]) -> tuple[dict[str, Tensor], list[str]]:
        """Return the next batch on the device, images in the network's dtype, and the names of its images."""
        try:
            batch = next(batches)
        except BinarizeError as error:
            # A worker's error contains its traceback; the last line is the message.
            reason = str(error).strip().splitlines()[-1].partition("BinarizeError: ")
            raise BinarizeError(f"{reason[2] or reason[0]} {self._last_checkpoint()}") from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise BinarizeError(
                f"a worker process died before step {self.step + 1} ({error}), often because memory ran out; lower "
                "dataloader_num_workers and continue with resume_from_checkpoint=latest."
            ) from error
        tensors, device = self.objective.inputs.tensors, self.accelerator.device
        return to_device(batch, tensors, device, self.unet.dtype), batch["name"]

    def _gradient_is_finite(self) -> bool:
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return bool(torch.stack(torch._foreach_norm(grads)).isfinite().all()) if grads else True

    def _diverged(self, losses: Tensor, names: list[str], what: str = "loss") -> NoReturn:
        bad = [n for n, loss in zip(names, losses.tolist(), strict=True) if what != "loss" or not math.isfinite(loss)]
        images = ", ".join(sorted(set(gather_object(bad))))
        raise DivergedError(
            f"the {what} of step {self.step + 1} is not finite for the images {images}; the weights were not updated. "
            f"{self._last_checkpoint()} Lower learning_rate, set max_grad_norm, or use mixed_precision=bf16 or no."
        )

    def _last_checkpoint(self) -> str:
        complete = list(self.checkpoints.list().values())
        return f"The last checkpoint is {complete[-1]}." if complete else "There is no checkpoint yet."

    def _save(self) -> Path:
        def write() -> Path:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "samples_per_step": self.plan.total,
                "model": self.unet.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "ema": None if self.ema is None else self.ema.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "validated": self.validated,
                "best": self.best,
                "images": self.task.images,
            }
            best = None if self.best is None else self.best[0]
            return self.checkpoints.save(self.step, state, self.recipe.to_yaml(), best)

        return on_main(self.accelerator, write)

    def _read(self, folder: Path) -> CheckpointState:
        state, recipe = read_state(folder)
        check_resumable(self.recipe, self.plan.total, recipe, state.samples_per_step, folder)
        check_same_images(self.task.images, state.images, folder)
        return state

    def _restore(self, state: CheckpointState, folder: Path) -> None:
        self.step = state.step
        try:
            self.unet.load_state_dict(state.model)
            self.optimizer.load_state_dict(state.optimizer)
            self.lr_scheduler.load_state_dict(state.lr_scheduler)
            if self.ema is not None:
                self.ema.load_state_dict(state.ema)
                self.ema.to(self.accelerator.device)
            if self.accelerator.scaler is not None and state.scaler is not None:
                self.accelerator.scaler.load_state_dict(state.scaler)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = f"its state does not fit the recipe: {one_line(error, 150)}"
            raise BinarizeError(f"cannot resume from {folder}: {reason}. Use another checkpoint.") from error
        self.validated = state.validated
        # The best model of a run that continues in another folder is not in this folder, so its score does not count.
        self.best = state.best if (self.recipe.output_dir / BEST).is_dir() else None

    def _validate(self) -> None:
        """Save the model as a pipeline, validate it, and save it as the best model if it is."""

        def work() -> float | None:
            folder = self.recipe.output_dir
            with averaged_weights(self.unet, self.ema):
                staged = last_stage_end(self.recipe) is not None
                finished = staged and self._stages_are_over()
                network = remove_stages(self.recipe, self.unet) if finished else self.unet
                pipeline = build_pipeline(self.recipe, network, self.task.vae)
                pipeline.set_progress_bar_config(disable=True)
                export(pipeline, folder / MODEL)
                results = list(self.task.validate(pipeline))
                values = [result.psnr for result in results if result.psnr is not None]
                psnr = sum(values) / len(values) if values else None
                if psnr is not None and self._is_best(psnr):
                    export(pipeline, folder / BEST)
            for result in results:
                result.save(folder / SAMPLES, self.step)
                self.log.add_image(self.step, result)
            return psnr

        psnr = on_main(self.accelerator, work)
        self.validated = self.step
        if psnr is not None:
            if self._is_best(psnr):
                self.best = self.step, psnr
            self.validation[self.step] = psnr
            self.log.add_psnr(self.step, psnr)
            best = "" if self.best is None else f", best {self.best[1]:.2f} dB"
            self._print(f"step {self.step}: {psnr:.2f} dB on the validation images{best}")

    def _is_best(self, psnr: float) -> bool:
        """Whether a validation is the best so far; before all stages are over, the network is not the final one."""
        return self._stages_are_over() and (self.best is None or psnr > self.best[1])

    def _stages_are_over(self) -> bool:
        end = last_stage_end(self.recipe)
        return end is None or self.step >= end * self.recipe.max_train_steps

    def _print_start(self) -> None:
        plan = self.plan
        if self.start is not None:
            self._print(f"resuming from {self.start}, at step {self.step}")
        elif self.recipe.resume_from_checkpoint is not None:
            self._print("there is no checkpoint yet; starting a new run")
        factors = f"{plan.size} samples x {plan.accumulation} forward passes x {plan.processes} processes"
        self._print(f"{factors} = {plan.total} per step, on {self.accelerator.device}")
        if isinstance(self.recipe, Recipe) and self.recipe.residual_scale is not None:
            self._print(f"residuals are divided by {self.recipe.residual_scale:.6g}")
        if self.calibrated:
            self._print(self.calibrated)

    def _print(self, text: str) -> None:
        if self.shows_progress:
            ProgressBar.write(text)
