"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from binarize.errors import BinarizeError
from binarize.layers import training_step
from binarize.models import SuperResolutionPipeline
from binarize.recipes import Recipe, build_model, build_scheduler
from binarize.training.checkpoint import Checkpoints, load_checkpoint
from binarize.training.errors import DivergedError, TrainingInterrupted
from binarize.training.folder import MODEL, SAMPLES, TRACKER, find_start, prepare_folder
from binarize.training.objective import prediction_target, sample_losses
from binarize.training.optim import build_lr_scheduler, build_optimizer
from binarize.training.processes import accelerator_for, agree, on_main
from binarize.training.randomness import torch_seed
from binarize.training.resume import check_resumable
from binarize.training.samples import BatchPlan, batch_loader, training_samples
from binarize.training.signals import StopRequest
from binarize.training.validation import Validator, averaged_weights, export


@dataclass(frozen=True)
class LogEntry:
    """One line of the log.

    Args:
        step: Optimiser steps done.
        loss: Mean loss since the entry before.
        learning_rate: Of the last step.
        samples_per_second: Since the entry before.
    """

    step: int
    loss: float
    learning_rate: float
    samples_per_second: float


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Args:
        output_dir: The run's folder.
        model_dir: A `SuperResolutionPipeline`, to be read by its ``from_pretrained``.
        checkpoint: The last checkpoint.
        steps: Optimiser steps done, those before a resume included.
        history: The log since the start or the resume.
        validation: Validated step -> mean PSNR on luma with the border shaved, in dB.
        seconds: Since the start or the resume.
    """

    output_dir: Path
    model_dir: Path
    checkpoint: Path
    steps: int
    history: tuple[LogEntry, ...]
    validation: dict[int, float]
    seconds: float


def train(recipe: Recipe, *, force: bool = False, progress: bool = True) -> TrainResult:
    """Run a recipe, in as many processes as the program was launched in.

    Every random choice is a function of the recipe's seed and of the number of the sample or step that it is for, so
    a resumed run continues exactly as the uninterrupted one would have (bit for bit where the device computes
    deterministically, as CPUs do), and the split into processes and accumulated forward passes changes no patch, no
    timestep and no noise.

    Args:
        recipe: What to do.
        force: Remove a run that ``output_dir`` already holds.
        progress: Show a progress bar and what happens.

    Returns:
        Where the model is and how the loss went.

    Raises:
        BinarizeError: If the recipe cannot be run, the folder holds a run, the data or the checkpoint cannot be read,
            or a file cannot be written.
        DivergedError: If the loss became NaN or infinite.
        TrainingInterrupted: After SIGINT or SIGTERM, once a checkpoint is saved.
    """
    with accelerator_for(recipe) as accelerator, StopRequest() as stop:
        return _Run(recipe, accelerator, stop, force=force, progress=progress).train()


class _Run:
    """One call of `train`: all that a step needs, set up once; then the steps."""

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, stop: StopRequest, *, force: bool, progress: bool
    ) -> None:
        self.recipe, self.accelerator, self.stop = recipe, accelerator, stop
        self.shows = progress and accelerator.is_main_process
        self.plan = BatchPlan(
            recipe.train_batch_size,
            recipe.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
        )
        self.checkpoints = Checkpoints(recipe.output_dir, recipe.checkpoints_total_limit)
        self.start = find_start(recipe, self.checkpoints, force)
        state = None if self.start is None else self._read(self.start)
        self.samples = training_samples(recipe, self.plan)
        self.validator = Validator(recipe)

        torch.manual_seed(torch_seed(recipe.seed, "weights"))
        self.scheduler = build_scheduler(recipe)
        self.unet = build_model(recipe).train()
        if recipe.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        optimizer = build_optimizer(recipe, self.unet)
        self.lr_scheduler = build_lr_scheduler(recipe, optimizer)
        self.model, self.optimizer = accelerator.prepare(self.unet, optimizer)
        self.ema = EMAModel(self.unet.parameters(), decay=recipe.ema_decay, foreach=True) if recipe.use_ema else None
        self.step = 0
        if state is not None:
            self._restore(state)

        on_main(accelerator, lambda: prepare_folder(recipe, self.checkpoints, force))
        if recipe.report_to is not None:
            accelerator.init_trackers(TRACKER, init_kwargs={recipe.report_to: {"purge_step": self.step + 1}})
        self.history: list[LogEntry] = []
        self.validation: dict[int, float] = {}
        self._announce()

    def train(self) -> TrainResult:
        """Take the steps that are left."""
        recipe, began = self.recipe, time.perf_counter()
        if self.step >= recipe.max_train_steps:
            # Resumed at its end: the run may have been killed between its last checkpoint and the model.
            self._validate()
        loader = batch_loader(
            self.samples,
            self.plan,
            self.step,
            recipe.max_train_steps,
            workers=recipe.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        batches, checkpoint = iter(loader), self.start
        since, losses = began, list[float]()
        with tqdm(total=recipe.max_train_steps, initial=self.step, disable=not self.shows, unit="step") as bar:
            while self.step < recipe.max_train_steps:
                loss, signum = self._optimizer_step(batches)
                losses.append(loss)
                bar.update()
                last = self.step == recipe.max_train_steps
                if self.step % recipe.logging_steps == 0 or last:
                    seconds = time.perf_counter() - since
                    self._log(bar, sum(losses) / len(losses), self.plan.total * len(losses) / seconds)
                    since, losses = time.perf_counter(), []
                paused = time.perf_counter()
                if self.step % recipe.checkpointing_steps == 0 or last or signum:
                    checkpoint = self._save()
                    if signum and not last:
                        raise TrainingInterrupted(signum, checkpoint)
                if self.step % recipe.validation_steps == 0 or last:
                    self._validate()
                since += time.perf_counter() - paused
        return TrainResult(
            output_dir=recipe.output_dir,
            model_dir=recipe.output_dir / MODEL,
            checkpoint=cast(Path, checkpoint),  # a run that starts at its end was resumed from one
            steps=self.step,
            history=tuple(self.history),
            validation=self.validation,
            seconds=time.perf_counter() - began,
        )

    def _optimizer_step(self, batches: Iterator[dict[str, Any]]) -> tuple[float, int]:
        """Take one step; return its mean loss and the signal that asks to stop, or 0."""
        losses: list[Tensor] = []
        names: list[str] = []
        for forward in range(self.plan.accumulation):
            batch = self._next(batches)
            # Dropout is the one thing that draws from torch's own state.
            torch.manual_seed(torch_seed(self.recipe.seed, "dropout", self.step, forward, self.plan.rank))
            with self.accelerator.accumulate(self.model):
                loss = self._losses(batch)
                self.accelerator.backward(loss.mean())
            losses.append(loss.detach())
            names += batch["name"]
        mean, signum = agree(self.accelerator, torch.cat(losses), self.stop.signum)
        if not math.isfinite(mean):
            self._diverged(torch.cat(losses), names)
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
        return mean, signum

    def _losses(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss of each sample of a batch, (B,)."""

        def placed(name: str) -> Tensor:
            return batch[name].to(self.accelerator.device, self.unet.dtype, non_blocking=True)

        clean, noise, condition = placed("hr"), placed("noise"), placed("condition")
        timesteps = batch["timestep"].to(self.accelerator.device, non_blocking=True)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        target = prediction_target(self.scheduler, clean, noise, timesteps)
        prediction = self.model(noisy, timesteps, condition).sample
        return sample_losses(self.recipe.loss, prediction, target)

    def _next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        try:
            return next(batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise BinarizeError(
                f"a process that prepares batches died before step {self.step + 1} ({error}); most often memory ran "
                "out. Lower dataloader_num_workers and go on with resume_from_checkpoint=latest."
            ) from error

    def _diverged(self, losses: Tensor, names: list[str]) -> NoReturn:
        bad = [name for name, loss in zip(names, losses.tolist(), strict=True) if not math.isfinite(loss)]
        pictures = ", ".join(sorted(set(gather_object(bad))))
        complete = list(self.checkpoints.list().values())
        last = f"The last checkpoint is {complete[-1]}." if complete else "There is no checkpoint yet."
        raise DivergedError(
            f"the loss of step {self.step + 1} is not finite for the pictures {pictures}; the weights were left as "
            f"they were before it. {last} Lower learning_rate, set max_grad_norm, or use mixed_precision=bf16 or no."
        )

    def _log(self, bar: tqdm, loss: float, speed: float) -> None:
        rate = float(self.lr_scheduler.get_last_lr()[0])
        self.history.append(LogEntry(self.step, loss, rate, speed))
        bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2e}, {speed:.1f} samples/s")
        self.accelerator.log({"loss": loss, "learning_rate": rate, "samples_per_second": speed}, step=self.step)

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
            }
            return self.checkpoints.save(self.step, state, self.recipe.to_yaml())

        return on_main(self.accelerator, write)

    def _read(self, folder: Path) -> dict[str, Any]:
        state, recipe = load_checkpoint(folder)
        check_resumable(self.recipe, self.plan.total, recipe, state["samples_per_step"], folder)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.unet.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.accelerator.device)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _validate(self) -> None:
        """Save the model as a pipeline, and enlarge the validation pictures with it."""

        def work() -> float | None:
            folder = self.recipe.output_dir
            pipeline = SuperResolutionPipeline(self.unet, build_scheduler(self.recipe), scale=self.recipe.scale)
            pipeline.set_progress_bar_config(disable=True)
            with averaged_weights(self.unet, self.ema):
                export(pipeline, folder / MODEL)
                results = list(self.validator(pipeline))
            for result in results:
                result.save(folder / SAMPLES, self.step)
                for tracker in self.accelerator.trackers:
                    pictures = {f"validation/{result.name}": result.pixels[None]}
                    tracker.log_images(pictures, step=self.step, dataformats="NHWC")
            return sum(result.psnr for result in results) / len(results) if results else None

        psnr = on_main(self.accelerator, work)
        if psnr is not None:
            self.validation[self.step] = psnr
            self.accelerator.log({"validation/psnr": psnr}, step=self.step)
            self._say(f"step {self.step}: {psnr:.2f} dB on the validation pictures")

    def _announce(self) -> None:
        plan = self.plan
        if self.start is not None:
            self._say(f"going on from {self.start}, at step {self.step}")
        elif self.recipe.resume_from_checkpoint is not None:
            self._say("there is no checkpoint yet; starting anew")
        self._say(
            f"{plan.size} samples x {plan.accumulation} forward passes x {plan.processes} processes "
            f"= {plan.total} per step, on {self.accelerator.device}"
        )

    def _say(self, text: str) -> None:
        if self.shows:
            tqdm.write(text)
