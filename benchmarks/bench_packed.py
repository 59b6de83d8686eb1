"""Packed inference on a CPU, compared with float convolutions and with the released network.

    python benchmarks/bench_packed.py                 everything, about 25 minutes on two cores
    python benchmarks/bench_packed.py --quick         one image size and few rounds, a few minutes
    python benchmarks/bench_packed.py --only layers

The rows of a table are timed in turns, and a cell is the median, so ratios within one run are reliable. Results go to
benchmarks/results/packed.json and packed.png; `python benchmarks/tables.py` writes them into the documentation.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, forward, interleaved, machine, networks, released
from packed_layers import layer_rows, roofline_rows
from PIL import Image
from tables import section
from torch import Tensor, nn

import binarize
from binarize.models import SuperResolutionPipeline
from binarize.packed import PackedConv2d

SECTIONS = ("layers", "roofline", "networks", "flips", "memory", "files")


def network_rows(sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Time a denoising step of each network."""
    models, rows = networks(), []
    for size in sizes:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            jobs = {name: forward(model, dtype, size) for name, (model, dtype) in models.items()}
            times = interleaved(jobs, max(2, rounds if size < 512 else rounds // 2))
            rows.append({"size": size, "threads": threads, "seconds": times})
            listed = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in times.items())
            print(f"{size}x{size}, {threads} thread(s): {listed}", flush=True)
    return rows


def flip_rows(count: int) -> list[dict[str, Any]]:
    """Compare the packed with the unpacked network: outputs, and the share of signs that differ."""
    unet = released()
    packed = binarize.pack(copy.deepcopy(unet))
    total = flipped = 0
    errors = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        sample, condition = (torch.randn(2, 3, 64, 64, generator=generator) for _ in range(2))
        timesteps = torch.randint(0, 2000, (2,), generator=generator)
        expected, expected_signs = output_and_signs(unet, (sample, timesteps, condition))
        out, signs = output_and_signs(packed, (sample, timesteps, condition))
        errors.append(float((out - expected).abs().mean() / expected.abs().mean()))
        for name, codes in expected_signs.items():
            total += codes.numel()
            flipped += int((codes != signs[name]).sum())
    share = flipped / total
    print(f"{count} inputs: relative mean error at most {max(errors):.1e}, {share:.1e} of the signs differ")
    return [{"inputs": count, "worst mean error of the output's scale": max(errors), "share of flipped signs": share}]


def output_and_signs(model: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output of a network and the signs of each binary layer's input, by layer."""
    signs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, PackedConv2d | binarize.layers.BinaryConv2d):

            def record(layer: Any, args: tuple[Any, ...], name: str = name) -> None:
                x = args[0]
                if len(args) > 1 and args[1] is not None:  # the layer applies the norm before it
                    x = F.silu(x * args[1][0][:, :, None, None] + args[1][1][:, :, None, None])
                signs[name] = layer.pre(x) >= 0

            handles.append(module.register_forward_pre_hook(record))
    out = model(*arguments).sample
    for handle in handles:
        handle.remove()
    return out, signs


UPSCALE = """
import runpy
try:
    runpy.run_module("binarize", run_name="__main__", alter_sys=True)
finally:
    print("peak KiB:", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""  # prints the peak itself, because `resource` counts the parent's peak too


def memory_rows() -> list[dict[str, Any]]:
    """Measure the peak resident memory of ``binarize upscale``. Return no rows on systems other than Linux."""
    rows: list[dict[str, Any]] = []
    if sys.platform != "linux":
        return rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        SuperResolutionPipeline(binarize.pack(released()), scale=2).save_pretrained(folder / "model")
        options = ["--model", str(folder / "model"), "--steps", "1", "--tile"]
        for output, tile in ((512, 256), (1024, 256), (1536, 256), (1024, 512)):
            photo = folder / f"{output}-{tile}.png"
            Image.effect_noise((output // 2, output // 2), 50).convert("RGB").save(photo)
            command = [sys.executable, "-c", UPSCALE, "upscale", str(photo), *options, str(tile)]
            environment = {**os.environ, "OMP_NUM_THREADS": "2"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            rows.append({"output": output, "tile": tile, "peak bytes": int(done.stdout.split("peak KiB:")[1]) * 1024})
            print(f"{output}x{output} output, tile {tile}: {rows[-1]['peak bytes'] / 1e6:.0f} MB", flush=True)
    return rows


def file_rows() -> list[dict[str, Any]]:
    """Measure the size of saved networks and the time to load them."""
    unet = released()
    packed, rows = binarize.pack(copy.deepcopy(unet)), []
    integers = binarize.pack(copy.deepcopy(unet), full_precision="int8")
    in_memory = sum(t.numel() * t.element_size() for t in [*packed.parameters(), *packed.buffers()])
    with tempfile.TemporaryDirectory() as folder:
        for name, model, dtype in (
            ("training form", unet, None),
            ("packed float32", packed, None),
            ("packed float16", packed, torch.float16),
            ("packed int8, the rest float16", integers, torch.float16),
        ):
            target = Path(folder) / name
            binarize.save(model, target, dtype=dtype)
            seconds = interleaved({"load": lambda target=target: binarize.load(target)}, 3)["load"]
            size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
            rows.append({"what": name, "bytes": size, "load seconds": seconds})
            print(f"{name}: {size / 1e6:.2f} MB, loads in {seconds:.2f} s", flush=True)
    rows.append({"what": "summary's count", "bytes": binarize.summary(unet).bytes})
    rows.append({"what": "tensors of the packed network in memory", "bytes": in_memory})
    return rows


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the speed-up of each layer and the time of each network."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    layers = [row for row in results.get("layers", []) if row.get("threads") == 1]
    left.barh([row["layer"] for row in layers], [row["speed-up over float32"] for row in layers], color="#3b6ea5")
    left.set_xlabel("speed-up over F.conv2d in float32, one thread")
    left.invert_yaxis()
    steps = [row for row in results.get("networks", []) if row["threads"] == 2]
    for name in steps[0]["seconds"] if steps else []:
        right.plot([row["size"] for row in steps], [row["seconds"][name] for row in steps], marker="o", label=name)
    right.set(xscale="log", yscale="log", xlabel="image side, pixels", ylabel="seconds per step, two threads")
    right.set_xticks([row["size"] for row in steps], [str(row["size"]) for row in steps])
    right.minorticks_off()
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one image size and few rounds")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="one section; may be repeated")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    rounds = 3 if options.quick else options.rounds
    sizes = [256] if options.quick else [64, 128, 256, 512]
    measurements: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "layers": lambda: layer_rows(rounds),
        "roofline": lambda: roofline_rows(rounds),
        "networks": lambda: network_rows(sizes, rounds),
        "flips": lambda: flip_rows(3 if options.quick else 20),
        "memory": memory_rows,
        "files": file_rows,
    }
    names = options.only or SECTIONS
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "packed.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = machine()
    for name in names:
        print(f"-- {name}", flush=True)
        results[name] = measurements[name]()
        path.write_text(json.dumps(results, indent=1) + "\n")
        gc.collect()
    plot(results, RESULTS / "packed.png")
    for name in names:
        print(f"\n{section('packed-' + name, {path.stem: results})}")


if __name__ == "__main__":
    main()
