"""One process or many: setting Accelerate up, agreeing on what happened, and doing what one process does for all."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list
from torch import Tensor

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from binarize.recipes import Recipe

T = TypeVar("T")
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
REQUIREMENT = "'binarize-diffusion[train]'"


@contextmanager
def accelerator_for(recipe: Recipe) -> Iterator[Accelerator]:
    """While entered, Accelerate is set up as the recipe says; torch's random state and TF32 switches are put back.

    Args:
        recipe: Its precision, accumulation, tracker and TF32 keys are used.

    Raises:
        BinarizeError: If the tracker is not installed, the precision is not to be had on this machine, or the launcher
            asks for sharded parameters.
    """
    if recipe.report_to is not None and importlib.util.find_spec(recipe.report_to) is None:
        raise BinarizeError(
            f"report_to: {recipe.report_to} is not installed; pip install "
            f"{'wandb' if recipe.report_to == 'wandb' else REQUIREMENT}, or set report_to=none."
        )
    embedded = PartialState._shared_state != {}
    _check_precision(recipe)
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
        _refuse_sharding(accelerator)
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


def _refuse_sharding(accelerator: Accelerator) -> None:
    if accelerator.distributed_type in _SHARDED:
        raise BinarizeError(
            f"training cannot be launched with {accelerator.distributed_type.value}: it shards the parameters, which "
            "checkpoints and averaged weights here do not follow. Use data parallelism: accelerate launch "
            "--num_processes N, without --use_fsdp or --use_deepspeed."
        )


def _check_precision(recipe: Recipe) -> None:
    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "") in ("true", "1", "yes")
    if recipe.mixed_precision == "fp16" and on_cpu:
        raise BinarizeError(
            "mixed_precision: fp16 needs a GPU: it overflows without a scaled loss, and CPUs compute it slowly; use "
            "mixed_precision=bf16 or no."
        )


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


def agree(accelerator: Accelerator, losses: Mapping[str, Tensor], signum: int) -> tuple[dict[str, float], int]:
    """Return what all processes have to know after a step, the same in each.

    Args:
        accelerator: The processes.
        losses: (B,) each, this process's losses by the name "loss", and their parts.
        signum: The signal that this process received, or 0.

    Returns:
        The means over the processes, and the largest signal that any received.
    """
    total = losses["loss"].mean()
    row = torch.stack([*(part.mean().to(total.dtype) for part in losses.values()), torch.full_like(total, signum)])
    gathered = accelerator.gather(row[None]).tolist()
    means = [sum(column) / len(gathered) for column in zip(*gathered, strict=True)]
    return dict(zip(losses, means, strict=False)), int(max(row[-1] for row in gathered))
