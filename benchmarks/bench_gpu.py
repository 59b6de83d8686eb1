"""Packed networks and training steps on a CUDA device, compared with float networks and the textbook implementation.

    python benchmarks/bench_gpu.py --only networks training     about three minutes
    python benchmarks/bench_gpu.py --only pipelines --json benchmarks/results/pipelines.json

Networks are timed in turns with CUDA events, and a cell is the median. "graph ms" is the replay of a CUDA graph, which
excludes the cost of Python and of kernel launches. Results go to benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bench_training import training_step
from common import RESULTS, TIMESTEP, Job, inputs, interleaved, machine, networks, released
from tables import section

from binarize.kernels import backends
from binarize.models import SuperResolutionPipeline, default_model

SHAPES = ((256, 1), (256, 8), (1024, 1))
SECTIONS = ("networks", "training", "pipelines")


def milliseconds(job: Job) -> float:
    """Return the time of one call on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    job()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def timed(jobs: dict[str, Job], rounds: int) -> dict[str, float]:
    """Return the median time of each job in milliseconds."""
    return interleaved(jobs, rounds, clock=milliseconds)


def graphed(job: Job) -> Job:
    """Capture a job as a CUDA graph and return its replay."""
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


def plain(job: Job) -> Job:
    """Return the job run without Triton kernels."""

    def run() -> object:
        with backends.use("torch"):
            return job()

    return run


def network_rows(rounds: int) -> list[dict[str, Any]]:
    """Time a denoising step of each network at each shape."""
    models = {name: (model.cuda(), dtype) for name, (model, dtype) in networks().items()}
    models["training form bfloat16"] = (released().cuda().to(torch.bfloat16), torch.bfloat16)
    rows = []
    for size, batch in SHAPES:
        jobs: dict[str, Job] = {}
        for name, (model, dtype) in models.items():
            sample, condition = (t.cuda() for t in inputs(size, dtype, batch))
            steps = torch.full((batch,), TIMESTEP, device="cuda")
            jobs[name] = lambda m=model, x=sample, t=steps, c=condition: m(x, t, c)
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


def training_row(name: str, tf32: bool, rounds: int, size: int, batch: int) -> dict[str, Any]:
    """Measure one training step: time, and peak memory above that of the network and the optimizer."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    step = training_step(name, size, batch, "cuda")
    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ms = timed({"step": step}, rounds)["step"]
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"variant": name, "tf32": tf32, "size": size, "batch": batch, "ms": ms, "peak MB": peak}


def training_rows(rounds: int) -> list[dict[str, Any]]:
    """Measure a training step of the released configuration in each variant."""
    rows = []
    for batch in (4, 16):
        for tf32 in (False, True):
            for name in ("textbook", "exact", "compact"):
                rows.append(training_row(name, tf32, rounds, 128, batch))
                print(json.dumps(rows[-1]), flush=True)
                torch.cuda.empty_cache()
    return rows


def pipeline_rows(rounds: int, side: int = 128, steps: int = 50) -> list[dict[str, Any]]:
    """Time a denoising step in calls of pretrained pipelines, with and without a CUDA graph."""
    rows = []
    low = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    for folder in (default_model(2, "clean"), default_model(4, "photo")):
        pipe = SuperResolutionPipeline.from_pretrained(folder).to("cuda")
        pipe.set_progress_bar_config(disable=True)

        def call(graphs: bool, pipe: SuperResolutionPipeline = pipe) -> torch.Tensor:
            pipe.cuda_graphs = graphs
            noise = torch.Generator().manual_seed(0)
            return pipe(low, num_inference_steps=steps, generator=noise, output_type="pt").images

        ms = timed({"eager": lambda: call(False), "graph": lambda: call(True)}, rounds)
        if not torch.equal(call(False), call(True)):
            raise AssertionError(f"{folder.name} gives other images with a CUDA graph")
        row = {"model": folder.name, "side": pipe.config.scale * side}
        rows.append(row | {f"{kind} ms": time / steps for kind, time in ms.items()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu: no CUDA device found; nothing was measured.", file=sys.stderr)
        return
    results: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    results["machine"] = {**machine(), "gpu": torch.cuda.get_device_name()}
    if "networks" in options.only:
        with torch.no_grad():
            results["networks"] = network_rows(options.rounds)
    if "training" in options.only:
        results["training"] = training_rows(options.rounds)
    if "pipelines" in options.only:
        results["pipelines"] = pipeline_rows(options.rounds)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    for name in ("networks", "training"):
        if name in options.only:
            print(section(f"gpu-{name}", {"gpu": results}))


if __name__ == "__main__":
    main()
