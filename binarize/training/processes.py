"""One process or many: setting Accelerate up, agreeing on what happened, and doing what one process does for all."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from torch import Tensor

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from binarize.recipes import Recipe

T = TypeVar("T")


@contextmanager
def accelerator_for(recipe: Recipe) -> Iterator[Accelerator]:
    """While entered, Accelerate is set up as the recipe says; torch's random state and TF32 switches are put back.

    Args:
        recipe: Its precision, accumulation, tracker and TF32 keys are used.

    Raises:
        BinarizeError: If the tracker is not installed or the precision is not to be had on this machine.
    """
    if recipe.report_to is not None and importlib.util.find_spec(recipe.report_to) is None:
        raise BinarizeError(
            f"report_to: {recipe.report_to} is not installed; pip install 'binarize-diffusion[train]', "
            "or set report_to=none."
        )
    embedded = PartialState._shared_state != {}
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_steps=recipe.gradient_accumulation_steps,
            log_with=recipe.report_to,
            project_config=ProjectConfiguration(project_dir=str(recipe.output_dir), logging_dir=str(recipe.output_dir)),
        )
    except ValueError as error:
        raise BinarizeError(f"mixed_precision: {recipe.mixed_precision}: {error}") from error
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.backends.cuda.matmul.allow_tf32 = recipe.allow_tf32
            torch.backends.cudnn.allow_tf32 = recipe.allow_tf32
            yield accelerator
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        for tracker in accelerator.trackers:
            tracker.finish()
        if not embedded:
            # Accelerate keeps the precision for the life of the process, and a next run may have another.
            accelerator.state.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return what ``work`` returns in the main process, in every process; the others wait.

    Args:
        accelerator: The processes.
        work: Called in the main process alone; what it returns must be picklable.

    Raises:
        BinarizeError: If ``work`` raised one, in every process, so that none waits for one that has left.
    """
    if accelerator.num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except BinarizeError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise BinarizeError(outcome[1])
    return outcome[0]


def agree(accelerator: Accelerator, losses: Tensor, signum: int) -> tuple[float, int]:
    """Return what all processes have to know after a step, the same in each.

    Args:
        accelerator: The processes.
        losses: (B,), this process's losses.
        signum: The signal that this process received, or 0.

    Returns:
        The mean loss over the processes, and the largest signal that any received.
    """
    mean = losses.mean()
    gathered = accelerator.gather(torch.stack([mean, torch.full_like(mean, signum)])[None]).tolist()
    return sum(row[0] for row in gathered) / len(gathered), int(max(row[1] for row in gathered))
