"""What a run tells of itself: a line every so many steps, the progress bar, and the trackers."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from binarize.conversion.export import binary_layers
from binarize.errors import BinarizeError
from binarize.imaging import write_atomic
from binarize.inspect import FlipTracker

if TYPE_CHECKING:
    from accelerate import Accelerator

    from binarize.recipes import Recipe
    from binarize.training.validation import Validation


@dataclass(frozen=True)
class LogEntry:
    """One line of the log.

    Args:
        step: Optimiser steps done.
        loss: Mean loss since the entry before.
        learning_rate: Of the last step.
        samples_per_second: Since the entry before.
        parts: Means of the unweighted terms that the loss is made of, where there are several.
        flips: Share of the latent weights' signs that changed since the entry before; None without binary layers.
        memory: Bytes at the peak: of the GPU's allocations, or of this process where there is no GPU; None where the
            system does not say.
    """

    step: int
    loss: float
    learning_rate: float
    samples_per_second: float
    parts: dict[str, float] = field(default_factory=dict)
    flips: float | None = None
    memory: int | None = None


class Log:
    """The log of one process; the main one shows it and feeds the trackers.

    Args:
        recipe: Its ``logging_steps`` and ``report_to``.
        accelerator: The processes.
        model: Whose signs are followed, not wrapped.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, model: nn.Module) -> None:
        self.accelerator, self.model = accelerator, model
        self.entries: list[LogEntry] = []
        self._losses: list[Mapping[str, float]] = []
        self._since = time.perf_counter()
        self._flips = self._follow()

    def add(self, losses: Mapping[str, float]) -> None:
        """Note one step's losses: ``"loss"`` and the names of its parts."""
        self._losses.append(losses)

    def write(self, bar: tqdm, step: int, rate: float, samples: int) -> None:
        """Close an entry: means since the one before, to the bar and the trackers.

        Args:
            bar: The progress bar.
            step: Optimiser steps done.
            rate: The learning rate.
            samples: Samples per step, of all processes.
        """
        now, count = time.perf_counter(), len(self._losses)
        means = {name: sum(one[name] for one in self._losses) / count for name in self._losses[0]}
        layers: dict[str, float] = {}
        flips = None
        if self._flips is not None:
            flips = self._flips.update()
            ratios = self._flips.result()
            layers = {
                f"flips/{name}": float(share) for name, share in zip(ratios.layers, ratios.since_last[-1], strict=True)
            }
            self._flips = self._follow()  # a fresh one, since it keeps all that it has seen
        loss = means.pop("loss")
        speed = samples * count / (now - self._since)
        entry = LogEntry(step, loss, rate, speed, means, flips, peak_memory(self.accelerator.device))
        self.entries.append(entry)
        bar.set_postfix_str(_line(entry))
        values = {"loss": loss, "learning_rate": rate, "samples_per_second": speed, **layers}
        values |= {f"loss/{name}": value for name, value in means.items()}
        values |= {} if flips is None else {"flips": flips}
        values |= {} if entry.memory is None else {"memory_bytes": entry.memory}
        self.accelerator.log(values, step=step)
        self._losses = []
        self._since = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave out what was spent on other things than steps."""
        self._since += seconds

    def validated(self, step: int, psnr: float) -> None:
        """Tell the trackers of a validation."""
        self.accelerator.log({"validation/psnr": psnr}, step=step)

    def picture(self, step: int, result: Validation) -> None:
        """Show the trackers a picture; called in the main process."""
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({f"validation/{result.name}": result.pixels[None]}, step=step, **layout)

    def _follow(self) -> FlipTracker | None:
        return FlipTracker(self.model) if any(True for _ in binary_layers(self.model)) else None


def start_tracker(recipe: Recipe, accelerator: Accelerator, step: int) -> None:
    """Open the recipe's tracker, in the run's folder; a resumed run goes on with what it wrote before.

    Args:
        recipe: Its ``report_to`` and ``output_dir``, which exists.
        accelerator: The processes.
        step: Optimiser steps done.

    Raises:
        BinarizeError: If the tracker cannot start.
    """
    if recipe.report_to is None:
        return
    folder = recipe.output_dir / recipe.report_to
    try:
        if recipe.report_to == "tensorboard":
            accelerator.init_trackers(folder.name, init_kwargs={"tensorboard": {"purge_step": step + 1}})
            return
        folder.mkdir(exist_ok=True)
        options = {
            "dir": str(recipe.output_dir),
            "name": recipe.output_dir.name,
            "id": _run_id(folder),
            "resume": "allow",
        }
        accelerator.init_trackers("binarize", init_kwargs={"wandb": options})
    except Exception as error:  # wandb raises its own kinds, for a missing login or network
        text = " ".join(str(error).split())[:300]
        raise BinarizeError(
            f"report_to: {recipe.report_to} cannot start: {text}. WANDB_MODE=offline writes to the run's folder alone; "
            "report_to=none does without."
            if recipe.report_to == "wandb"
            else f"report_to: {recipe.report_to} cannot start: {text}."
        ) from error


def _run_id(folder: Path) -> str:
    """Return the name by which wandb knows the run, made once and kept in the run's folder."""
    file = folder / "run-id"
    if not file.is_file():
        write_atomic(file, lambda temporary: temporary.write_text(secrets.token_hex(4), encoding="utf-8"), force=False)
    return file.read_text(encoding="utf-8")


def peak_memory(device: torch.device) -> int | None:
    """Return the bytes at the peak: allocated on a GPU, else resident in this process; None on Windows."""
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
