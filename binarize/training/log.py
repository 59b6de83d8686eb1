"""The log of a run: periodic entries, shown in the progress bar and sent to trackers."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import nn

from binarize.conversion.export import binary_layers
from binarize.errors import BinarizeError, one_line
from binarize.files import write_text_atomic
from binarize.inspect import FlipTracker
from binarize.progress import ProgressBar
from binarize.recipes import TrainingRecipe
from binarize.training.csv_log import CsvLog

if TYPE_CHECKING:
    from binarize.training.tasks import ValidationResult


@dataclass(frozen=True)
class LogEntry:
    """One entry of the log; losses, speed and flips are since the previous entry.

    Attributes:
        step: Number of optimiser steps done.
        parts: Means of the unweighted terms of the loss, if there are several.
        flips: Share of the latent weights whose sign changed; None without binary layers.
        memory: Peak memory in bytes, as `peak_memory` reports it.
    """

    step: int
    loss: float
    learning_rate: float
    samples_per_second: float
    parts: dict[str, float] = field(default_factory=dict)
    flips: float | None = None
    memory: int | None = None


class Log:
    """The log of one process and of its unwrapped model; the main process's has a table and feeds the trackers."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, table: CsvLog | None) -> None:
        self.accelerator, self.model, self.table = accelerator, model, table
        self.entries: list[LogEntry] = []
        self._losses: list[Mapping[str, float]] = []
        self._since = time.perf_counter()
        self._flips = self._new_tracker()

    def add(self, losses: Mapping[str, float]) -> None:
        """Record the losses of one step: ``"loss"`` and the names of its parts."""
        self._losses.append(losses)

    def write(self, bar: ProgressBar, step: int, rate: float, samples: int) -> None:
        """Write an entry with the means since the previous one; ``samples`` is the number per step of all processes."""
        now, count = time.perf_counter(), len(self._losses)
        means = {name: sum(losses[name] for losses in self._losses) / count for name in self._losses[0]}
        flips, flips_of_layers = self._count_flips()
        loss = means.pop("loss")
        speed = samples * count / (now - self._since)
        entry = LogEntry(step, loss, rate, speed, means, flips, peak_memory(self.accelerator.device))
        self.entries.append(entry)
        bar.set_postfix_str(_line(entry))
        bar.log(f"step {step}: {_line(entry)}")
        values = {"loss": loss, "learning_rate": rate, "samples_per_second": speed, **flips_of_layers}
        values |= {f"loss/{name}": value for name, value in means.items()}
        values |= {} if flips is None else {"flips": flips}
        values |= {} if entry.memory is None else {"memory_bytes": entry.memory}
        self.accelerator.log(values, step=step)
        if self.table is not None:
            self.table.write(step=step, **{name: v for name, v in values.items() if name not in flips_of_layers})
        self._losses = []
        self._since = time.perf_counter()

    def exclude(self, seconds: float) -> None:
        """Exclude time that was not spent on training steps from the speed of the next entry."""
        self._since += seconds

    def add_psnr(self, step: int, psnr: float) -> None:
        """Log a validation's PSNR."""
        self.accelerator.log({"validation/psnr": psnr}, step=step)
        if self.table is not None:
            self.table.write(step=step, validation_psnr=psnr)

    def add_image(self, step: int, result: ValidationResult) -> None:
        """Send a validation image to the trackers; called in the main process."""
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({f"validation/{result.name}": result.pixels[None]}, step=step, **layout)

    def _new_tracker(self) -> FlipTracker | None:
        return FlipTracker(self.model) if any(True for _ in binary_layers(self.model)) else None

    def _count_flips(self) -> tuple[float | None, dict[str, float]]:
        if self._flips is None:
            return None, {}
        flips, ratios = self._flips.update(), self._flips.result()
        self._flips = self._new_tracker()  # a tracker keeps its whole history
        shares = zip(ratios.layers, ratios.since_last[-1], strict=True)
        return flips, {f"flips/{name}": float(share) for name, share in shares}


def start_tracker(recipe: TrainingRecipe, accelerator: Accelerator, step: int) -> None:
    """Start the recipe's tracker in the run's folder, which exists; a resumed run continues its records."""
    if recipe.report_to is None:
        return
    folder = recipe.output_dir / recipe.report_to
    try:
        if recipe.report_to == "tensorboard":
            accelerator.init_trackers(folder.name, init_kwargs={"tensorboard": {"purge_step": step + 1}})
            return
        folder.mkdir(exist_ok=True)
        identifier = folder / "run-id"  # created once, so that a resumed run continues the same record
        if not identifier.is_file():
            write_text_atomic(identifier, secrets.token_hex(4), force=False)
        options = {"dir": str(recipe.output_dir), "name": recipe.output_dir.name, "id": identifier.read_text("utf-8")}
        accelerator.init_trackers("binarize", init_kwargs={"wandb": {**options, "resume": "allow"}})
    except Exception as error:  # wandb raises its own types, for a missing login or network
        fix = " Set WANDB_MODE=offline or report_to=none." if recipe.report_to == "wandb" else ""
        raise BinarizeError(f"report_to: {recipe.report_to} cannot start: {one_line(error, 300)}.{fix}") from error


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory in bytes: GPU allocations, or this process's resident size; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _line(entry: LogEntry) -> str:
    text = f"loss {entry.loss:.4f}, lr {entry.learning_rate:.2e}, {entry.samples_per_second:.1f} samples/s"
    if entry.memory is not None:
        text += f", {entry.memory / 2**30:.2f} GiB"
    if entry.flips is not None:
        text += f", flips {entry.flips:.2%}"
    return text
