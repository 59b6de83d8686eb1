"""Exported networks in ONNX Runtime compared with the packed kernels: a denoising step of the default models.

    python benchmarks/bench_onnx.py                     needs the extra "onnx"
    python benchmarks/bench_onnx.py --sizes 64 --threads 1 --rounds 3

Both run in turns in one process, and a cell is the median of the rounds, so the ratios are reliable. On a machine that
other programs use, ``--processor-time --threads 1`` is.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from common import TIMESTEP, Job, forward, inputs, interleaved, processor, seconds
from torch import nn

import binarize
from binarize.models import SuperResolutionPipeline, default_model
from binarize.models.default import shipped_scales
from binarize.tables import Column, Table


def exported(path: Path, size: int, threads: int) -> Job:
    """Return a function that runs one denoising step of one image in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle threads would wait in a loop and slow down the other job.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    sample, condition = (x.contiguous().numpy() for x in inputs(size))
    feeds = {"sample": sample, "condition": condition, "timestep": torch.tensor([float(TIMESTEP)]).numpy()}
    return lambda: session.run(None, feeds)


def processor_seconds(job: Job) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    job()
    return time.process_time() - start


def row(
    scale: int, network: nn.Module, path: Path, size: int, threads: int, rounds: int, clock: Callable[[Job], float]
) -> list[object]:
    """Time a network by both."""
    torch.set_num_threads(threads)
    jobs = {"onnx": exported(path, size, threads), "packed": forward(network, torch.float32, size)}
    times = interleaved(jobs, rounds, clock=clock)
    return [f"x{scale}", size, threads, times["packed"], times["onnx"], times["onnx"] / times["packed"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="sides of the results, in pixels")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor-time", action="store_true", help="measure processor time instead of wall time")
    options = parser.parse_args()
    clock = processor_seconds if options.processor_time else seconds
    torch.set_grad_enabled(False)
    names = ("side", "threads", "packed, s", "ONNX Runtime, s", "ratio")
    forms = ("d", "d", ".3f", ".3f", ".1f")
    columns = [Column("model"), *(Column(name, form, "right") for name, form in zip(names, forms, strict=True))]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for scale in shipped_scales():
            network = SuperResolutionPipeline.from_pretrained(default_model(scale)).unet
            path = binarize.export_onnx(network, Path(folder) / f"x{scale}.onnx")
            for size in options.sizes:
                for threads in options.threads:
                    rows.append(row(scale, network, path, size, threads, options.rounds, clock))
    print(Table(columns, rows).to_markdown())
    print(f"\nONNX Runtime {onnxruntime.__version__}, PyTorch {torch.__version__}; {processor()}")


if __name__ == "__main__":
    main()
