"""Weights of one or two bits with activations of 1, 4, 8 and 32 bits: layers, and a U-Net of Stable Diffusion's size.

    python benchmarks/bench_bits.py                 about five minutes and 6 GB of memory
    python benchmarks/bench_bits.py --only layers

*layers* times a 3x3 convolution of several sizes, packed with each kind of activations and weights, in turns with
PyTorch's. *unet* builds Stable Diffusion 1.5's U-Net with random weights, converts, packs, saves and loads it, and runs
one step of a 512x512 image, each stage in a process of its own, whose peak memory is that of the stage. Seconds are the
processor time of one thread, which other programs on the machine hardly change. Results go to
benchmarks/results/bits.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Job, channels_last, interleaved, machine
from torch import nn

import binarize
from binarize.layers import BinaryConv2d
from binarize.methods import Method
from binarize.packed import PackedConv2d

SHAPES = ((64, 64), (320, 64), (640, 32), (1280, 16))  # channels, and the side of the image
KINDS: dict[str, dict[str, Any]] = {
    "1/1": {},
    "1/4": {"activation": {"name": "lsq", "bits": 4}},
    "1/8": {"activation": {"name": "lsq", "bits": 8}},
    "1/32": {"activation": "none"},
    "ternary/1": {"weight": "twn"},
    "ternary/32": {"weight": "twn", "activation": "none"},
}
STAGES = ("float", "pack", "load")
METHODS: dict[str, dict[str, Any]] = {
    "weight-only": {"name": "custom", "activation": "none", "keep_bias": True},
    "1/1": {"name": "bidiffsr"},
}
LINEAR = ["*.attentions.*"]  # all linear layers of the transformer blocks


def processor_seconds(job: Job) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    job()
    return time.process_time() - start


def layers(rounds: int) -> list[dict[str, Any]]:
    """Return the milliseconds of a layer of each size and kind."""
    rows = []
    for channels, side in SHAPES:
        x = channels_last(torch.randn(1, channels, side, side))
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
        jobs: dict[str, Job] = {"float32": lambda conv=conv, x=x: conv(x)}  # type: ignore[misc]
        for name, options in KINDS.items():
            layer = PackedConv2d(BinaryConv2d.from_float(copy.deepcopy(conv), Method(**options)).eval())
            jobs[name] = lambda layer=layer, x=x: layer(x)  # type: ignore[misc]
        with torch.no_grad():
            times = interleaved(jobs, rounds, warmup=3, clock=processor_seconds)
        rows.append({"channels": channels, "side": side, "ms": {name: 1e3 * value for name, value in times.items()}})
    return rows


def build() -> nn.Module:
    """Return the U-Net of Stable Diffusion 1.5, with random weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().requires_grad_(False)


def step(unet: nn.Module) -> float:
    """Return the seconds of a denoising step of a 512x512 image, without guidance; the second of two calls."""
    sample, text = channels_last(torch.randn(1, 4, 64, 64)), torch.randn(1, 77, 768)
    with torch.no_grad():
        for _ in range(2):
            elapsed = processor_seconds(lambda: unet(sample, torch.tensor([700]), text))
    return elapsed


def peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_stage(stage: str, method: str, folder: Path) -> dict[str, Any]:
    """Run one stage in this process, and return its seconds and bytes."""
    found: dict[str, Any] = {"stage": stage, "method": method, "seconds": {}}
    clock = time.process_time()

    def lap(name: str) -> None:
        nonlocal clock
        found["seconds"][name], clock = time.process_time() - clock, time.process_time()
        found[f"peak after {name}"] = peak()

    if stage == "load":
        unet = binarize.load(folder)
        lap("load")
    else:
        torch.manual_seed(0)
        unet = build()
        found["parameters"] = sum(p.numel() for p in unet.parameters())
        lap("build")
    if stage == "pack":
        binarize.convert(unet, METHODS[method], structure="keep", linear=LINEAR)
        lap("convert")
        binarize.pack(unet)
        lap("pack")
        binarize.save(unet, folder)
        lap("save")
        found["file bytes"] = sum(path.stat().st_size for path in folder.iterdir())
    else:
        found["seconds"]["step"] = step(unet)
        found["peak after step"] = peak()
    return found


def unet_rows() -> list[dict[str, Any]]:
    """Run all stages, each in its own process."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for stage, method in (("float", "float32"), *((s, m) for m in METHODS for s in STAGES[1:])):
            where = Path(folder) / method.replace("/", "-")
            command = [sys.executable, __file__, "--stage", stage, "--method", method, "--folder", str(where)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("layers", "unet"))
    parser.add_argument("--json", type=Path, default=RESULTS / "bits.json")
    parser.add_argument("--rounds", type=int, default=15)
    for name in ("--stage", "--method"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage:
        print(json.dumps(run_stage(args.stage, args.method, args.folder)))
        return
    results = json.loads(args.json.read_text()) if args.json.is_file() else {}
    results["machine"] = machine()
    if args.only != "unet":
        results["layers"] = layers(args.rounds)
    if args.only != "layers":
        results["unet"] = unet_rows()
    args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
