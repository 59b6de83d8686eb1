"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from binarize.conversion.memory import memory_mode
from binarize.errors import BinarizeError
from binarize.layers import training_step
from binarize.recipes import Recipe, build_pipeline, build_scheduler, settled, stages_end
from binarize.training.checkpoint import Checkpoints, load_checkpoint, recipe_of
from binarize.training.distillation import Distillation
from binarize.training.errors import DivergedError, TrainingInterrupted
from binarize.training.folder import BEST, MODEL, SAMPLES, find_start, prepare_folder
from binarize.training.initial import check_speaks_the_same, initial_network, read_trained, with_residual_scale
from binarize.training.log import Log, LogEntry, start_tracker
from binarize.training.malloc import keep_large_blocks_apart
from binarize.training.objective import Objective
from binarize.training.optim import build_lr_scheduler, build_optimizer
from binarize.training.processes import accelerator_for, agree, on_main
from binarize.training.randomness import torch_seed
from binarize.training.resume import check_resumable
from binarize.training.samples import BatchPlan, batch_loader, close, training_samples
from binarize.training.signals import StopRequest
from binarize.training.validation import Validator, averaged_weights, export

if TYPE_CHECKING:
    from binarize.models import SRUNet


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
        best: The step with the best of these of the whole run, and that PSNR; None without validation pictures.
        seconds: Since the start or the resume.
    """

    output_dir: Path
    model_dir: Path
    checkpoint: Path
    steps: int
    history: tuple[LogEntry, ...]
    validation: dict[int, float]
    best: tuple[int, float] | None
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
        if accelerator.device.type == "cpu" and recipe.memory_mode == "compact":
            keep_large_blocks_apart()
        self.shows = progress and accelerator.is_main_process
        self.plan = BatchPlan(
            recipe.train_batch_size,
            recipe.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
        )
        self.checkpoints = Checkpoints(recipe.output_dir, recipe.checkpoints_total_limit)
        self.start = find_start(recipe, self.checkpoints, force)
        self.samples = training_samples(recipe, self.plan)
        self.validator = Validator(recipe)
        teacher = None if recipe.distillation is None else read_trained("distillation", recipe.distillation.teacher)
        begun = None
        if self.start is None and recipe.init_from is not None:
            begun = read_trained("init_from", recipe.init_from)
        if self.start is not None:
            recipe = recipe_of(self.start, recipe)
        recipe = with_residual_scale(recipe, self.samples.patches, [teacher, begun])
        self.recipe = recipe
        state = None if self.start is None else self._read(self.start)

        torch.manual_seed(torch_seed(recipe.seed, "weights"))
        self.unet = initial_network(recipe, begun).train()
        if recipe.memory_mode != "exact":
            memory_mode(self.unet, recipe.memory_mode)
        if recipe.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        optimizer = build_optimizer(recipe, self.unet)
        self.lr_scheduler = build_lr_scheduler(recipe, optimizer)
        self.model, self.optimizer = accelerator.prepare(self.unet, optimizer)
        distillation = None
        if teacher is not None and recipe.distillation is not None:
            check_speaks_the_same("distillation", recipe, teacher)
            network = teacher.network.to(accelerator.device, self.unet.dtype)
            distillation = Distillation(recipe.distillation, self.unet, network, accelerator.autocast)
        if recipe.compile and distillation is not None and distillation.blocks:
            # Compiled code does not check for hooks (`skip_nnmodule_hook_guards`), so that of an earlier run in this
            # process would pass the teacher's by.
            torch.compiler.reset()
        # After `prepare`, so that DDP's buckets are compiled with the network; the state dict is that of `unet`.
        self.forward = torch.compile(self.model) if recipe.compile else self.model
        self.objective = Objective(recipe, build_scheduler(recipe), distillation)
        self.ema = EMAModel(self.unet.parameters(), decay=recipe.ema_decay, foreach=True) if recipe.use_ema else None
        self.step, self.validated = 0, 0
        self.best: tuple[int, float] | None = None
        if state is not None:
            self._restore(state)

        on_main(accelerator, lambda: prepare_folder(recipe, self.checkpoints, force))
        on_main(accelerator, lambda: start_tracker(recipe, accelerator, self.step))
        self.log = Log(recipe, accelerator, self.unet)
        self.validation: dict[int, float] = {}
        self._announce()

    def train(self) -> TrainResult:
        """Take the steps that are left."""
        recipe, began = self.recipe, time.perf_counter()
        if (
            self.step
            and self._validates()
            and (self.validated != self.step or not (recipe.output_dir / MODEL).is_dir())
        ):
            # The run was stopped between this step and its validation, or goes on in another folder.
            self._validate()
        loader = batch_loader(
            self.samples,
            self.plan,
            self.step,
            recipe.max_train_steps,
            workers=recipe.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        batches = iter(loader)
        try:
            checkpoint = self._steps(batches)
        finally:
            close(batches)
        return TrainResult(
            output_dir=recipe.output_dir,
            model_dir=recipe.output_dir / MODEL,
            checkpoint=cast(Path, checkpoint),  # a run that starts at its end was resumed from one
            steps=self.step,
            history=tuple(self.log.entries),
            validation=self.validation,
            best=self.best,
            seconds=time.perf_counter() - began,
        )

    def _steps(self, batches: Iterator[dict[str, Any]]) -> Path | None:
        """Take the steps; return the last checkpoint."""
        recipe, checkpoint = self.recipe, self.start
        with tqdm(total=recipe.max_train_steps, initial=self.step, disable=not self.shows, unit="step") as bar:
            while self.step < recipe.max_train_steps:
                losses, signum = self._optimizer_step(batches)
                self.log.add(losses)
                bar.update()
                last = self.step == recipe.max_train_steps
                if self.step % recipe.logging_steps == 0 or last:
                    self.log.write(bar, self.step, float(self.lr_scheduler.get_last_lr()[0]), self.plan.total)
                paused = time.perf_counter()
                if signum and not last:
                    raise TrainingInterrupted(signum, self._save())
                if self._validates():
                    # Before the checkpoint, which then knows the best one so far.
                    self._validate()
                if self.step % recipe.checkpointing_steps == 0 or last:
                    checkpoint = self._save()
                self.log.pause(time.perf_counter() - paused)
        return checkpoint

    def _validates(self) -> bool:
        return self.step % self.recipe.validation_steps == 0 or self.step >= self.recipe.max_train_steps

    def _optimizer_step(self, batches: Iterator[dict[str, Any]]) -> tuple[dict[str, float], int]:
        """Take one step; return its mean losses and the signal that asks to stop, or 0."""
        losses: list[dict[str, Tensor]] = []
        names: list[str] = []
        for forward in range(self.plan.accumulation):
            batch = self._next(batches)
            # Dropout is the one thing that draws from torch's own state.
            torch.manual_seed(torch_seed(self.recipe.seed, "dropout", self.step, forward, self.plan.rank))
            with self.accelerator.accumulate(self.model):
                found = self.objective(self.forward, self._placed(batch))
                self.accelerator.backward(found.total.mean())
            losses.append({"loss": found.total.detach(), **found.parts})
            names += batch["name"]
        joined = {name: torch.cat([one[name] for one in losses]) for name in losses[0]}
        means, signum = agree(self.accelerator, joined, self.stop.signum)
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

    def _placed(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return a batch's tensors on the device, pictures in the network's dtype."""
        device, dtype = self.accelerator.device, self.unet.dtype
        placed = {name: batch[name].to(device, dtype, non_blocking=True) for name in ("hr", "noise", "condition")}
        return {**placed, "timestep": batch["timestep"].to(device, non_blocking=True)}

    def _next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        try:
            return next(batches)
        except BinarizeError as error:
            # A worker's error comes with its traceback, of which the last line says what is wrong.
            reason = str(error).strip().splitlines()[-1].partition("BinarizeError: ")
            raise BinarizeError(f"{reason[2] or reason[0]} {self._last_checkpoint()}") from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise BinarizeError(
                f"a process that prepares batches died before step {self.step + 1} ({error}); most often memory ran "
                "out. Lower dataloader_num_workers and go on with resume_from_checkpoint=latest."
            ) from error

    def _gradient_is_finite(self) -> bool:
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return bool(torch.stack(torch._foreach_norm(grads)).isfinite().all()) if grads else True

    def _diverged(self, losses: Tensor, names: list[str], what: str = "loss") -> NoReturn:
        bad = [n for n, loss in zip(names, losses.tolist(), strict=True) if what != "loss" or not math.isfinite(loss)]
        pictures = ", ".join(sorted(set(gather_object(bad))))
        raise DivergedError(
            f"the {what} of step {self.step + 1} is not finite for the pictures {pictures}; the weights were left as "
            f"they were before it. {self._last_checkpoint()} Lower learning_rate, set max_grad_norm, or use "
            "mixed_precision=bf16 or no."
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
            }
            best = None if self.best is None else self.best[0]
            return self.checkpoints.save(self.step, state, self.recipe.to_yaml(), best)

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
        self.validated = state["validated"]
        # A score of a model that is not in this folder is no reason to keep none.
        self.best = state["best"] if (self.recipe.output_dir / BEST).is_dir() else None

    def _validate(self) -> None:
        """Save the model as a pipeline, and enlarge the validation pictures with it; keep the best one apart."""

        def work() -> float | None:
            folder = self.recipe.output_dir
            with averaged_weights(self.unet, self.ema):
                pipeline = build_pipeline(self.recipe, self._plain())
                pipeline.set_progress_bar_config(disable=True)
                export(pipeline, folder / MODEL)
                results = list(self.validator(pipeline))
                psnr = sum(result.psnr for result in results) / len(results) if results else None
                if psnr is not None and self._is_best(psnr):
                    export(pipeline, folder / BEST)
            for result in results:
                result.save(folder / SAMPLES, self.step)
                self.log.picture(self.step, result)
            return psnr

        psnr = on_main(self.accelerator, work)
        self.validated = self.step
        if psnr is not None:
            if self._is_best(psnr):
                self.best = self.step, psnr
            self.validation[self.step] = psnr
            self.log.validated(self.step, psnr)
            best = "" if self.best is None else f", best {self.best[1]:.2f} dB"
            self._say(f"step {self.step}: {psnr:.2f} dB on the validation pictures{best}")

    def _is_best(self, psnr: float) -> bool:
        """Say whether this validation's model is kept: before its stages are over it is not the network asked for."""
        under_way = stages_end(self.recipe) is not None and not self._stages_over()
        return not under_way and (self.best is None or psnr > self.best[1])

    def _stages_over(self) -> bool:
        end = stages_end(self.recipe)
        return end is not None and self.step >= end * self.recipe.max_train_steps

    def _plain(self) -> SRUNet:
        """Return the network as it is to be saved: without its stages, once they are over."""
        return settled(self.recipe, self.unet) if self._stages_over() else self.unet

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
        if self.recipe.residual_scale is not None:
            self._say(f"residuals are divided by {self.recipe.residual_scale:.6g}")

    def _say(self, text: str) -> None:
        if self.shows:
            tqdm.write(text)
