"""A training step of BI-DiffSR on this CPU: peak memory and time, against the same network written the textbook way.

Every variant runs in a process of its own: it builds the network, then trains it for a few steps (forward, L1 loss,
backward, Adam with the released settings). Memory is the peak of the resident set above what the process held before
the first step, so it counts activations, gradients, Adam's two moments and whatever libraries keep; time is the median
step after the first two. The variants are measured in turns, round after round, so that a machine that slows down slows
all of them, and the medians of the rounds are shown.

    python benchmarks/bench_training.py                       # the released configuration, 4 pictures of 128x128
    python benchmarks/bench_training.py --size 64 --batch 1 --variants textbook exact --json figures.json
    python benchmarks/bench_training.py --sweep               # memory by size and batch, of ours alone
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

VARIANTS = {
    "textbook": "textbook, float32",
    "textbook-apart": "textbook, float32, large blocks apart",
    "exact": "ours, float32, memory exact",
    "compact": "ours, float32, memory compact",
    "exact-bf16": "ours, bfloat16 autocast, memory exact",
    "compact-bf16": "ours, bfloat16 autocast, memory compact",
    "textbook-bf16": "textbook, bfloat16 autocast",
}
BARS = {"exact": (0.4, 0.6), "compact": (0.3, 0.6), "exact-bf16": (0.4, 0.35), "compact-bf16": (0.3, 0.35)}
SWEEP = ((128, 1), (128, 2), (128, 4), (128, 8), (256, 1), (256, 2), (64, 16))


def resident(key: str) -> float:
    """Return a field of /proc/self/status in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024


def training_step(kind: str, size: int, batch: int, device: str = "cpu", bf16: bool = False) -> Callable[[], None]:
    """Return a step of training the released configuration.

    Args:
        kind: "textbook", or a memory mode of ours.
        size: Side of the pictures, in pixels.
        batch: Pictures.
        device: Where.
        bf16: Whether under bfloat16 autocast.
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
    """Train for a few steps in this process and return peak memory in MB and seconds of each step."""
    import torch

    from binarize.training import keep_large_blocks_apart

    torch.set_num_threads(threads)
    kind, _, precision = variant.partition("-")
    if kind == "compact" or precision == "apart":
        keep_large_blocks_apart()  # as our training loop does with compact memory
    step = training_step(kind, size, batch, bf16=precision == "bf16")

    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
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
    """Measure in a fresh process."""
    task = json.dumps([variant, size, batch, steps, threads])
    done = subprocess.run([sys.executable, __file__, "--task", task], check=True, capture_output=True, text=True)
    return {"variant": variant, "size": size, "batch": batch, "threads": threads, **json.loads(done.stdout)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table, with ratios to the textbook form of the same size and batch."""
    lines = [
        "| network | pixels | batch | threads | peak memory, MB | ratio | bar | a step, s | ratio | bar |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    base = {(row["size"], row["batch"]): row for row in rows if row["variant"] == "textbook"}
    for row in rows:
        reference = base.get((row["size"], row["batch"]))
        bars = BARS.get(row["variant"], ("", ""))
        cells = [VARIANTS[row["variant"]], f"{row['size']}x{row['size']}", row["batch"], row["threads"]]
        for key, bar, form in (("memory", bars[0], ".0f"), ("seconds", bars[1], ".2f")):
            ratio = "" if reference is None else f"{row[key] / reference[key]:.2f}"
            cells += [format(row[key], form), ratio, bar if reference is not None else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:6])
    parser.add_argument("--size", type=int, default=128, help="side of the pictures, in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant is measured, in turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sweep", action="store_true", help="measure ours over several sizes and batches instead")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        print(json.dumps(measure(*json.loads(given.task))))
        return
    cases = [(variant, given.size, given.batch) for variant in given.variants]
    if given.sweep:
        cases = [(variant, *shape) for shape in SWEEP for variant in ("exact", "compact")]
    found: dict[Any, list[dict[str, Any]]] = {case: [] for case in cases}
    for case in [*cases] * (1 if given.sweep else given.rounds):
        row = run(*case, given.steps, given.threads)
        found[case].append(row)
        print(f"{VARIANTS[case[0]]}: {row['memory']:.0f} MB, {row['seconds']:.2f} s", file=sys.stderr)
    rows = [
        {**turns[0], **{key: statistics.median(turn[key] for turn in turns) for key in ("memory", "seconds")}}
        for turns in found.values()
    ]
    print(table(rows))
    if given.json is not None:
        from bench_packed import machine

        given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
