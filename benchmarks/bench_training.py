"""A training step of BI-DiffSR on a CPU: peak memory and time, compared with the textbook implementation.

Each variant runs in its own process, which builds the network and trains it for a few steps (forward, L1 loss,
backward, Adam with the released settings). Memory is the peak resident set minus the one before the first step. It
includes activations, gradients, Adam's moments and what libraries allocate. Time is the median step after two warm-up
steps. The variants are measured in turns, and the medians of the rounds are reported.

    python benchmarks/bench_training.py                       # the released configuration, 4 images of 128x128
    python benchmarks/bench_training.py --size 64 --batch 1 --variants textbook exact --json results.json
    python benchmarks/bench_training.py --sweep               # our memory by image size and batch size
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import VARIANTS, training

DEFAULT_VARIANTS = ("textbook", "exact", "compact", "exact-bf16", "compact-bf16")
SWEEP = ((128, 1), (128, 2), (128, 4), (128, 8), (256, 1), (256, 2), (64, 16))


def resident(key: str) -> float:
    """Return a field of /proc/self/status in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024


def training_step(kind: str, size: int, batch: int, device: str = "cpu", bf16: bool = False) -> Callable[[], None]:
    """Return a function that trains the released configuration for one step.

    Args:
        kind: "textbook" or a memory mode of this toolkit.
        size: Side of the images in pixels.
        batch: Batch size.
        device: Device.
        bf16: Whether to use bfloat16 autocast.
    """
    import torch
    from textbook import TextbookSRUNet

    import binarize
    from binarize.models import SRUNet

    torch.manual_seed(0)
    if kind == "textbook":
        net: torch.nn.Module = TextbookSRUNet()
    else:
        net = binarize.convert(SRUNet(), "bidiffsr")
        binarize.memory_mode(net, kind)
    net.to(device).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.99))
    sample, condition, noise = torch.rand(3, batch, 3, size, size, device=device)
    timesteps = torch.full((batch,), 700, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            out = net(sample, timesteps, condition)
        predicted = out if isinstance(out, torch.Tensor) else out.sample
        (predicted.float() - noise).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(variant: str, size: int, batch: int, steps: int, threads: int) -> dict[str, Any]:
    """Train for a few steps in this process; return peak memory in MB and the median step in seconds."""
    import torch

    from binarize.training import keep_large_blocks_apart

    torch.set_num_threads(threads)
    kind, _, precision = variant.partition("-")
    if kind == "compact" or precision == "apart":
        keep_large_blocks_apart()  # as the training loop does in compact mode
    step = training_step(kind, size, batch, bf16=precision == "bf16")

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, seconds = resident("VmRSS"), []
    for _ in range(steps + 2):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {
        "memory": resident("VmHWM") - before,
        "seconds": statistics.median(seconds[2:]),
        "first": seconds[0],
        "before": before,
    }


def run(variant: str, size: int, batch: int, steps: int, threads: int) -> dict[str, Any]:
    """Call `measure` in a new process."""
    task = json.dumps([variant, size, batch, steps, threads])
    done = subprocess.run([sys.executable, __file__, "--task", task], check=True, capture_output=True, text=True)
    return {"variant": variant, "size": size, "batch": batch, "threads": threads, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(DEFAULT_VARIANTS))
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sweep", action="store_true", help="measure our memory at several image and batch sizes")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(measure(*json.loads(options.task))))
        return
    cases = [(variant, options.size, options.batch) for variant in options.variants]
    if options.sweep:
        cases = [(variant, *shape) for shape in SWEEP for variant in ("exact", "compact")]
    found: dict[Any, list[dict[str, Any]]] = {case: [] for case in cases}
    for case in [*cases] * (1 if options.sweep else options.rounds):
        row = run(*case, options.steps, options.threads)
        found[case].append(row)
        print(f"{VARIANTS[case[0]]}: {row['memory']:.0f} MB, {row['seconds']:.2f} s", file=sys.stderr)
    rows = [
        {**turns[0], **{key: statistics.median(turn[key] for turn in turns) for key in ("memory", "seconds")}}
        for turns in found.values()
    ]
    print(training({"training": rows}))
    if options.json is not None:
        from common import machine

        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
