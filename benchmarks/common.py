"""Shared by the benchmarks: networks and their inputs, interleaved timing, and the description of the machine."""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from textbook import textbook_twin
from torch import Tensor, nn

import binarize
from binarize.models import SRUNet

RESULTS = Path(__file__).parent / "results"
RECIPE = "bidiffsr_x2"
TIMESTEP = 700
Job = Callable[[], object]


def seconds(job: Job) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def interleaved(
    jobs: dict[str, Job], rounds: int, *, warmup: int = 1, clock: Callable[[Job], float] = seconds, calls: int = 1
) -> dict[str, float]:
    """Return the median time of each job.

    The jobs take turns, so that a machine that slows down slows all of them.

    Args:
        jobs: Functions to time, by name.
        rounds: Timed rounds.
        warmup: Rounds before them that are not timed.
        clock: Calls a job and returns the time it took.
        calls: Consecutive calls of a job in each round.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(warmup + rounds):
        for name, job in jobs.items():
            measured = [clock(job) for _ in range(calls)]
            if i >= warmup:
                times[name] += measured
    return {name: statistics.median(values) for name, values in times.items()}


def released(seed: int = 0) -> SRUNet:
    """Return the released configuration with random weights, shifts and slopes."""
    torch.manual_seed(seed)
    unet: SRUNet = binarize.build(RECIPE).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("pre.bias", "shift_in", "shift_out")):
                parameter.normal_(std=0.1)
            elif name.endswith("slope"):
                parameter.uniform_(0.05, 0.5)
    return unet.requires_grad_(False)


def full_precision() -> SRUNet:
    """Return the full-precision network of the same structure."""
    torch.manual_seed(0)
    return SRUNet().eval().requires_grad_(False)


def networks() -> dict[str, tuple[nn.Module, torch.dtype]]:
    """Return the compared networks and the dtype of their inputs."""
    unet = released()
    packed = binarize.pack(copy.deepcopy(unet))
    return {
        "textbook float32": (textbook_twin(unet).eval(), torch.float32),
        "training form float32": (unet, torch.float32),
        "full precision float32": (full_precision(), torch.float32),
        "full precision bfloat16": (full_precision().to(torch.bfloat16), torch.bfloat16),
        "packed float32": (packed, torch.float32),
        "packed bfloat16": (copy.deepcopy(packed).to(torch.bfloat16), torch.bfloat16),
    }


def inputs(size: int, dtype: torch.dtype = torch.float32, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Return a random sample and condition ``(B, 3, size, size)`` in channels_last."""
    generator = torch.Generator().manual_seed(size)
    sample = torch.randn(batch, 3, size, size, generator=generator)
    condition = torch.rand(batch, 3, size, size, generator=generator)
    return channels_last(sample.to(dtype)), channels_last(condition.to(dtype))


def forward(model: nn.Module, dtype: torch.dtype, size: int) -> Job:
    """Return a function that runs one denoising step of one image."""
    sample, condition = inputs(size, dtype)
    timesteps = torch.tensor([TIMESTEP])
    return lambda: model(sample, timesteps, condition)


def channels_last(x: Tensor) -> Tensor:
    """Return the tensor in channels_last memory format."""
    return x.contiguous(memory_format=torch.channels_last)


def machine() -> dict[str, Any]:
    """Return the processor and the versions that the tables name."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Return the architecture and the instruction sets that matter to the kernels."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
    relevant = ("avx2", "avx512f", "avx512_vpopcntdq", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd")
    return f"{platform.machine()} with " + ", ".join(flag for flag in relevant if flag in flags.split())
