"""Set up Accelerate, and exchange results between processes."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list
from torch import Tensor

from binarize.errors import BinarizeError, one_line
from binarize.recipes import TrainingRecipe

T = TypeVar("T")
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_PACKAGES = {"wandb": "wandb", "tensorboard": "'binarize-diffusion[train]'"}


@contextmanager
def accelerator_for(recipe: TrainingRecipe) -> Iterator[Accelerator]:
    """Set Accelerate up as the recipe says, and restore torch's random state and TF32 flags at the end."""
    if recipe.report_to is not None and importlib.util.find_spec(recipe.report_to) is None:
        package = _PACKAGES[recipe.report_to]
        raise BinarizeError(f"report_to: {recipe.report_to} is not installed; pip install {package}.")
    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "") in ("true", "1", "yes")
    if recipe.mixed_precision == "fp16" and on_cpu:
        raise BinarizeError("mixed_precision: fp16 needs a GPU; use mixed_precision=bf16 or no.")
    embedded = PartialState._shared_state != {}
    wanted = launched_processes()
    try:
        accelerator = Accelerator(
            cpu=on_cpu and wanted > 1,  # without it, Accelerate starts no process group on a machine without GPUs
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_steps=recipe.gradient_accumulation_steps,
            log_with=recipe.report_to,
            project_config=ProjectConfiguration(project_dir=str(recipe.output_dir), logging_dir=str(recipe.output_dir)),
        )
    except Exception as error:
        if not embedded:
            AcceleratorState._reset_state(reset_partial_state=True)  # half made, it would break the next run
        if not isinstance(error, ValueError):
            raise
        what = f"mixed_precision={recipe.mixed_precision}, or a variable such as LOCAL_RANK or ACCELERATE_USE_CPU"
        raise BinarizeError(f"Accelerate cannot start with {what}: {one_line(error, 200)}.") from error
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        if accelerator.num_processes != wanted and not embedded:
            fix = f"torchrun --nproc_per_node {wanted} -m binarize train ..." if on_cpu else "accelerate config"
            raise BinarizeError(
                f"the launcher was asked for {wanted} processes, but {accelerator.num_processes} would train together; "
                f"each of the others would be a run of its own. Use `{fix}`, or one process."
            )
        if accelerator.distributed_type in _SHARDED:
            reason = f"{accelerator.distributed_type.value}: it shards the parameters"
            raise BinarizeError(f"training cannot be launched with {reason}. Use data parallelism: --num_processes N.")
        with torch.random.fork_rng(devices=cuda):
            torch.backends.cuda.matmul.allow_tf32 = recipe.allow_tf32
            torch.backends.cudnn.allow_tf32 = recipe.allow_tf32
            yield accelerator
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        for tracker in accelerator.trackers:
            tracker.finish()
        if not embedded:
            # Accelerate keeps the precision for the life of the process, and the next run may need another one.
            accelerator.state.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def launched_processes() -> int:
    """Return how many processes the program's launcher was asked for, or 1 without one."""
    for name in _WORLD_SIZES:
        given = os.environ.get(name)
        if given is not None:
            if not re.fullmatch(r"\d{1,6}", given) or int(given) < 1:
                raise BinarizeError(
                    f"{name}={given!r:.40}: must be the number of processes; unset it without a launcher."
                )
            return int(given)
    # On a machine without GPUs, `accelerate launch` starts one process and sets no variable.
    with suppress(OSError):
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace")
        asked = re.search(r"accelerate\0launch\0(?:.*\0)?--num[_-]processes[=\0](\d{1,6})\0", command)
        if asked is not None and "ACCELERATE_MIXED_PRECISION" in os.environ:
            return int(asked[1])
    return 1


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Call ``work`` in the main process, and return its picklable result, or raise its error, in every process."""
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


def reduce_losses(accelerator: Accelerator, losses: Mapping[str, Tensor], signum: int) -> tuple[dict[str, float], int]:
    """Return the mean losses over all processes, and the largest signal that any process received.

    ``losses`` has this process's "loss" and its parts, (B,) each; ``signum`` is its signal, or 0.
    """
    total = losses["loss"].mean()
    row = torch.stack([*(part.mean().to(total.dtype) for part in losses.values()), torch.full_like(total, signum)])
    gathered = accelerator.gather(row[None]).tolist()
    means = [sum(column) / len(gathered) for column in zip(*gathered, strict=True)]
    return dict(zip(losses, means, strict=False)), int(max(row[-1] for row in gathered))
