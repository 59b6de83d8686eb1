"""Packed networks and training steps on a CUDA device, against float networks and the released network's form.

    python benchmarks/bench_gpu.py                  about three minutes
    python benchmarks/bench_gpu.py --only networks

Rows are timed in turns with CUDA events; a cell is the median. "graph" is the replay of a CUDA graph, which leaves out
what Python and the launches of the kernels cost. Results go to benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_packed import RESULTS, TIMESTEP, inputs, machine, networks, released
from tables import section
from textbook import TextbookSRUNet
from torch import nn

import binarize
from binarize.models import SRUNet
from binarize.packed import backends

SHAPES = ((256, 1), (256, 8), (1024, 1))
SECTIONS = ("networks", "training")


def timed(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each job by the device's clock, all run in turns."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(rounds + 1):
        for name, job in jobs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            job()
            end.record()
            end.synchronize()
            if i:
                taken[name].append(start.elapsed_time(end))
    return {name: statistics.median(times) for name, times in taken.items()}


def graphed(job: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of a job's CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay


def plain(job: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with backends.use("torch"):
            return job()

    return run


def network_rows(rounds: int) -> list[dict[str, Any]]:
    models = {name: (model.cuda(), dtype) for name, (model, dtype) in networks().items()}
    models["training form bfloat16"] = (released().cuda().to(torch.bfloat16), torch.bfloat16)
    rows = []
    for size, batch in SHAPES:
        jobs: dict[str, Callable[[], object]] = {}
        for name, (model, dtype) in models.items():
            given = [t.cuda() for t in inputs(size, dtype, batch)]
            steps = torch.full((batch,), TIMESTEP, device="cuda")
            jobs[name] = lambda model=model, given=given, steps=steps: model(given[0], steps, given[1])
        jobs["packed float32, plain torch"] = plain(jobs["packed float32"])
        row = {"size": size, "batch": batch, "ms": timed(jobs, rounds), "graph ms": {}}
        for name, job in jobs.items():
            try:
                row["graph ms"] |= timed({name: graphed(job)}, rounds)
            except RuntimeError as error:
                print(f"{name}: no graph: {str(error).splitlines()[0]}", file=sys.stderr)
                torch.cuda.synchronize()
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def training_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "textbook":
        return TextbookSRUNet().cuda().train()
    net = binarize.convert(SRUNet(), "bidiffsr").cuda()
    binarize.memory_mode(net, name)
    return net.train()


def training_row(name: str, tf32: bool, rounds: int, size: int, batch: int) -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    net = training_network(name)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.99))
    sample, condition, noise = torch.rand(3, batch, 3, size, size, device="cuda")
    timesteps = torch.full((batch,), TIMESTEP, device="cuda")

    def step() -> None:
        out = net(sample, timesteps, condition)
        predicted = out if isinstance(out, torch.Tensor) else out.sample
        (predicted - noise).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    taken = timed({"step": step}, rounds)["step"]
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"variant": name, "tf32": tf32, "size": size, "batch": batch, "ms": taken, "peak MB": peak}


def training_rows(rounds: int) -> list[dict[str, Any]]:
    """Time a training step of the released configuration, and its peak memory above that of network and optimiser."""
    rows = []
    for batch in (4, 16):
        for tf32 in (False, True):
            for name in ("textbook", "exact", "compact"):
                rows.append(training_row(name, tf32, rounds, 128, batch))
                print(json.dumps(rows[-1]), flush=True)
                torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu: there is no CUDA device here; nothing was measured.", file=sys.stderr)
        return
    torch.set_grad_enabled(True)
    results: dict[str, Any] = json.loads(given.json.read_text()) if given.json.exists() else {}
    results["machine"] = {**machine(), "gpu": torch.cuda.get_device_name()}
    if "networks" in given.only:
        with torch.no_grad():
            results["networks"] = network_rows(given.rounds)
    if "training" in given.only:
        results["training"] = training_rows(given.rounds)
    given.json.write_text(json.dumps(results, indent=1) + "\n")
    for name in given.only:
        print(section(f"gpu-{name}", {"gpu.json": results}))


if __name__ == "__main__":
    main()
