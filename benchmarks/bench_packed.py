"""Packed inference against float convolutions and against the released network's form, layer by layer and whole.

    python benchmarks/bench_packed.py                 everything, about 25 minutes on two cores
    python benchmarks/bench_packed.py --quick         the layers and one size, a few minutes
    python benchmarks/bench_packed.py --only layers

Each table's rows are timed in turns, round after round, so that a machine that slows down slows all of them; a cell is
the median. A turn of a single layer is several calls in a row, most of which find their code and data in the caches, as
timers of single operators have it. Figures to rely on are ratios within one run. Results go to
benchmarks/results/packed.json and packed.png, and are printed as Markdown; `python benchmarks/tables.py` puts them into
the documentation.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tables import section
from textbook import textbook_twin
from torch import Tensor, nn

import binarize
from binarize.models import SRUNet, SuperResolutionPipeline
from binarize.packed import PackedConv2d

RESULTS = Path(__file__).parent / "results"
RECIPE = "bidiffsr_x2"
TIMESTEP = 700
CALLS = 5  # of a layer, in a turn
SECTIONS = ("layers", "roofline", "networks", "compiled", "mixed", "flips", "memory", "files")


def seconds(job: Callable[[], object]) -> float:
    """Return how long a job took."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def interleaved(
    jobs: dict[str, Callable[[], object]],
    rounds: int,
    warm: int = 1,
    clock: Callable[[Callable[[], object]], float] = seconds,
    calls: int = 1,
) -> dict[str, float]:
    """Return the median of what the clock says of each job, all run in turns of so many calls."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(warm + rounds):
        for name, job in jobs.items():
            found = [clock(job) for _ in range(calls)]
            if i >= warm:
                taken[name] += found
    return {name: statistics.median(times) for name, times in taken.items()}


def released(seed: int = 0) -> SRUNet:
    """Return the released configuration with every shift, slope and weight drawn at random."""
    torch.manual_seed(seed)
    unet: SRUNet = binarize.build(RECIPE).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("pre.bias", "shift_in", "shift_out")):
                parameter.normal_(std=0.1)
            elif name.endswith("slope"):
                parameter.uniform_(0.05, 0.5)
    return unet.requires_grad_(False)


def inputs(size: int, dtype: torch.dtype = torch.float32, batch: int = 1) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(size)
    pair = (torch.randn(batch, 3, size, size, generator=drawn), torch.rand(batch, 3, size, size, generator=drawn))
    return tuple(x.to(dtype).contiguous(memory_format=torch.channels_last) for x in pair)  # type: ignore[return-value]


def distinct_layers(unet: nn.Module) -> dict[tuple[int, int, int, int], tuple[str, int]]:
    """Return each (C_in, C_out, kernel, size at 256) of a packed convolution: the first one's name, how many."""
    found: dict[tuple[int, int, int, int], tuple[str, int]] = {}
    handles = []
    for name, module in unet.named_modules():
        if isinstance(module, PackedConv2d):

            def seen(layer: Any, _: Any, out: Tensor, name: str = name) -> None:
                key = layer.in_channels, layer.out_channels, layer.kernel_size[0], out.shape[-1]
                first, count = found.get(key, (name, 0))
                found[key] = first, count + 1

            handles.append(module.register_forward_hook(seen))
    sample, condition = inputs(256)
    unet(sample, TIMESTEP, condition)
    for handle in handles:
        handle.remove()
    return found


def tile_speed(words: int = 72, finished: bool = False) -> float | None:
    """Return binary GMAC/s of one core on data that never leaves its first cache, or None without numba.

    Args:
        words: Words of 32 bits that a sum counts; there are fewer to add up bit by bit in short ones. More than 72
            would leave that cache.
        finished: With what follows a product for every output (scale, RPReLU, shortcut), not the counting alone.
    """
    try:
        import numpy as np
        from llvmlite import ir
        from numba import njit, types
        from numba.extending import intrinsic

        from binarize.kernels.cpu import popcount as _tile
        from binarize.kernels.cpu.simd import INTS, store
    except ImportError:
        return None
    pixels, blocks = _tile.PIXELS, _tile.BLOCKS
    outputs, turns = pixels * blocks * 16, 360_000 // words
    finish, step = _tile.make_tile(pixels, blocks, bf16=False), 64 * blocks

    @intrinsic
    def count(context: Any, x: Any, offsets: Any, k: Any, w: Any, out: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x, offsets, k, w, out = args
            step = b.shl(k, ir.IntType(64)(2))
            pixel = _tile.chain(b, x, step, pixels)
            block = _tile.chain(b, w, b.shl(step, ir.IntType(64)(4)), blocks)
            nothing = [ir.Constant(INTS, None)] * (pixels * blocks)
            found = _tile.dots(b, _tile.Words(pixel, offsets, block, k), lambda: nothing, ir.IntType(1)(0))
            for i, value in enumerate(found):
                store(b, value, b.add(out, ir.IntType(64)(64 * i)), 64)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    @njit
    def repeat(x: int, offsets: int, k: int, w: int, out: int, zeros: int, whole: bool, turns: int) -> None:
        for _ in range(turns):
            if whole:
                finish(
                    x, zeros, zeros, 0, out, out, w, zeros, zeros, 0, 16, offsets, k, 64 * k, 4 * k, step, 0, step, 0,
                    1, -np.inf, np.inf, 0,
                )  # fmt: skip
            else:
                count(x, offsets, k, w, out)

    def aligned(count: int) -> Any:
        raw = np.random.default_rng(0).integers(-(2**31), 2**31, count + 16, dtype=np.int32)
        start = -raw.ctypes.data % 64 // 4
        return raw[start : start + count]

    x, w, out, zeros = aligned(pixels * words), aligned(blocks * words * 16), aligned(outputs), aligned(96 * blocks)
    zeros[:] = 0  # entries, bases, table and shortcut at once
    offsets = (4 * np.arange(words)).astype(np.int32)
    addresses = x.ctypes.data, offsets.ctypes.data, words, w.ctypes.data, out.ctypes.data, zeros.ctypes.data
    repeat(*addresses, finished, turns)
    best = min(seconds(lambda: repeat(*addresses, finished, turns)) for _ in range(20))
    return turns * outputs * words * 32 / best / 1e9


FLOAT32 = {"float32 NCHW": torch.contiguous_format, "float32 NHWC": torch.channels_last}


def float32_jobs(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return PyTorch's convolution in both memory layouts."""
    jobs: dict[str, Callable[[], object]] = {}
    for name, layout in FLOAT32.items():
        laid, filters = (t.contiguous(memory_format=layout) for t in (x, weight))
        jobs[name] = lambda x=laid, w=filters: F.conv2d(x, w, padding=w.shape[-1] // 2)
    return jobs


def layer_rows(rounds: int) -> list[dict[str, Any]]:
    packed = binarize.pack(released())
    narrow, peak = copy.deepcopy(packed).to(torch.bfloat16), tile_speed()
    rows = []
    for (c_in, c_out, kernel, size), (name, count) in distinct_layers(packed).items():
        layer, half = packed.get_submodule(name), narrow.get_submodule(name)
        x = torch.randn(1, c_in, size, size)
        weight = layer.codes()[0].float()
        x_last, w_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        x_half, w_half = x_last.bfloat16(), w_last.bfloat16()
        jobs: dict[str, Callable[[], object]] = {
            **float32_jobs(x, weight),
            "bfloat16": lambda x=x_half, w=w_half: F.conv2d(x, w, padding=w.shape[-1] // 2),
            "packed": lambda x=x_last, f=layer: f(x),
            "packed bfloat16": lambda x=x_half, f=half: f(x),
        }
        quantized = int8_convolution(x, weight)
        if quantized is not None:
            jobs["int8"] = quantized
        macs = c_in * c_out * kernel**2 * size**2 / 1e9
        for threads in (1, 2):
            torch.set_num_threads(threads)
            step = torch.tensor([TIMESTEP])
            with binarize.timesteps(packed, step), binarize.timesteps(narrow, step):
                taken = interleaved(jobs, rounds, warm=2, calls=CALLS)
            best = min(taken[layout] for layout in FLOAT32)
            speed = macs / taken["packed"]
            rows.append(
                {
                    "layer": f"{c_in} -> {c_out}, {kernel}x{kernel}, {size}x{size}",
                    "count": count,
                    "threads": threads,
                    "ms": {k: 1e3 * v for k, v in taken.items()},
                    "speed-up over float32": best / taken["packed"],
                    "GMAC/s": speed,
                    "share of peak": None if peak is None else speed / (peak * threads),
                }
            )
            times = f"x{rows[-1]['speed-up over float32']:.1f}  {speed:5.0f} GMAC/s"
            print(f"{rows[-1]['layer']:26} {threads} thread(s)  {times}", flush=True)
    print(f"popcount peak of one core: {peak and round(peak)} GMAC/s")
    return [{"popcount peak, GMAC/s a core": peak}, *rows]


def roofline_rows(rounds: int) -> list[dict[str, Any]]:
    """What bounds the layers on one thread, and a whole step at 256x256 on two.

    A layer has to count, scale, activate and add, at best as fast as on data in the first cache with sums of its
    length, and to read its input and write its output once, at best as fast as a copy does.
    """
    packed = binarize.pack(released())
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    peaks: dict[int, tuple[float | None, float | None]] = {}
    for (c_in, c_out, kernel, size), (name, count) in distinct_layers(packed).items():
        torch.set_num_threads(1)
        words = min(72, kernel**2 * -(-c_in // 32))
        peaks[words] = peaks[words] if words in peaks else (tile_speed(words), tile_speed(words, finished=True))
        layer, weight = packed.get_submodule(name), torch.randn(c_out, c_in, kernel, kernel)
        x = torch.randn(1, c_in, size, size).contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x)
        jobs: dict[str, Callable[[], object]] = {
            "copy": lambda x=x, y=y: y.copy_(x),
            "packed": lambda x=x, f=layer: f(x),
            **float32_jobs(x, weight),
        }
        with binarize.timesteps(packed, torch.tensor([TIMESTEP])):
            taken = interleaved(jobs, rounds, warm=2, calls=CALLS)
        macs = c_in * c_out * kernel**2 * size**2 / 1e9
        rows.append(
            {
                "layer": f"{c_in} -> {c_out}, {kernel}x{kernel}, {size}x{size}",
                "count": count,
                "words": words,
                "peak, GMAC/s": peaks[words][0],
                "ms": {
                    "float32": 1e3 * min(taken[layout] for layout in FLOAT32),
                    "packed": 1e3 * taken["packed"],
                    "counting": peaks[words][0] and 1e3 * macs / peaks[words][0],
                    "arithmetic": peaks[words][1] and 1e3 * macs / peaks[words][1],
                    "copy": 1e3 * taken["copy"],
                },
            }
        )
        print(rows[-1], flush=True)
    rows.append(parts_of_a_step(packed, rounds))
    print(rows[-1], flush=True)
    return rows


PARTS = {
    "binarize::packed_conv2d": "binary convolutions",
    "binarize::wide_conv": "full-precision 3x3 convolutions",
    "binarize::norm_factors": "norms",
    "binarize::norm_silu": "norms",
    "aten::mkldnn_convolution": "other convolutions and linear layers",
    "aten::addmm": "other convolutions and linear layers",
    "aten::addmm_": "other convolutions and linear layers",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "binarize::shuffle": "shuffles and copies",
    "aten::pixel_shuffle": "shuffles and copies",
    "aten::pixel_unshuffle": "shuffles and copies",
    "aten::cat": "shuffles and copies",
    "aten::copy_": "shuffles and copies",
}


def parts_of_a_step(packed: nn.Module, rounds: int) -> dict[str, Any]:
    """Say what a step at 256x256 spends its time on, beside the twin in full precision."""
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(2)
    ours, twin = call(packed, torch.float32, 256), call(full_precision(), torch.float32, 256)
    taken = interleaved({"packed": ours, "full precision": twin}, rounds)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(rounds):
            ours()
    parts = dict.fromkeys([*PARTS.values(), "the rest"], 0.0)
    for event in found.key_averages():
        parts[PARTS.get(event.key, "the rest")] += event.self_cpu_time_total / 1e6 / rounds
    return {"size": 256, "threads": 2, "seconds": taken, "parts": parts}


def int8_convolution(x: Tensor, weight: Tensor) -> Callable[[], object] | None:
    """Return torch's quantized convolution of the same shape, or None where this build has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codes = torch.quantize_per_tensor(x, 0.05, 128, torch.quint8).contiguous(memory_format=torch.channels_last)
            filters = torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8)
            pad = [weight.shape[-1] // 2] * 2
            prepacked = torch.ops.quantized.conv2d_prepack(filters, None, [1, 1], pad, [1, 1], 1)
            torch.ops.quantized.conv2d(codes, prepacked, 1.0, 128)
    except (AttributeError, RuntimeError):
        return None
    return lambda: torch.ops.quantized.conv2d(codes, prepacked, 1.0, 128)


def full_precision() -> SRUNet:
    torch.manual_seed(0)
    return SRUNet().eval().requires_grad_(False)


def networks() -> dict[str, tuple[nn.Module, torch.dtype]]:
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


def call(model: nn.Module, dtype: torch.dtype, size: int) -> Callable[[], object]:
    sample, condition = inputs(size, dtype)
    steps = torch.tensor([TIMESTEP])
    return lambda: model(sample, steps, condition)


def network_rows(sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    models, rows = networks(), []
    for size in sizes:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            jobs = {name: call(model, dtype, size) for name, (model, dtype) in models.items()}
            taken = interleaved(jobs, max(2, rounds if size < 512 else rounds // 2))
            rows.append({"size": size, "threads": threads, "seconds": taken})
            print(f"{size}x{size}, {threads} thread(s): " + told(taken), flush=True)
    return rows


def told(taken: dict[str, float]) -> str:
    base = next(iter(taken.values()))
    return ", ".join(f"{name} {seconds:.3f} s (x{base / seconds:.2f})" for name, seconds in taken.items())


def compiled_rows(size: int, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(2)
    models = networks()
    jobs = {name: call(*models[name], size) for name in ("textbook float32", "packed float32", "packed bfloat16")}
    for name in ("training form float32", "full precision float32", "full precision bfloat16"):
        model, dtype = models[name]
        jobs[f"{name}, compiled"] = call(torch.compile(model), dtype, size)
    taken = interleaved(jobs, rounds)
    print(f"{size}x{size}, 2 threads: " + told(taken), flush=True)
    return [{"size": size, "threads": 2, "seconds": taken}]


def mixed_rows(rounds: int) -> list[dict[str, Any]]:
    """Alternate a packed layer with a convolution of torch's: what both take, against each one's own time."""
    packed = binarize.pack(released())
    layer = packed.get_submodule("encoder.2.blocks.0.conv1")
    conv = nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(1, 256, 64, 64).contiguous(memory_format=torch.channels_last)
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with binarize.timesteps(packed, torch.tensor([TIMESTEP])):

            def times(job: Callable[[], object], n: int = 10) -> Callable[[], object]:
                return lambda: [job() for _ in range(n)]

            taken = interleaved(
                {
                    "packed": times(lambda: layer(x)),
                    "torch": times(lambda: conv(x)),
                    "in turns": times(lambda: (layer(x), conv(x))),
                },
                rounds,
            )
        apart = taken["packed"] + taken["torch"]
        rows.append({"threads": threads, "seconds": taken, "in turns over apart": taken["in turns"] / apart})
        print(
            f"mixed calls, {threads} thread(s): in turns takes {taken['in turns'] / apart:.2f} of both apart",
            flush=True,
        )
    return rows


def flip_rows(count: int) -> list[dict[str, Any]]:
    """Compare packed and unpacked: outputs, and the share of signs that rounding turned over."""
    unet = released()
    packed = binarize.pack(copy.deepcopy(unet))
    total = {"signs": 0, "flipped": 0}
    errors = []
    for seed in range(count):
        drawn = torch.Generator().manual_seed(seed)
        sample, condition = (torch.randn(2, 3, 64, 64, generator=drawn) for _ in range(2))
        steps = torch.randint(0, 2000, (2,), generator=drawn)
        expected, signs = with_signs(unet, (sample, steps, condition))
        out, other = with_signs(packed, (sample, steps, condition))
        errors.append(float((out - expected).abs().mean() / expected.abs().mean()))
        for name, codes in signs.items():
            total["signs"] += codes.numel()
            total["flipped"] += int((codes != other[name]).sum())
    share = total["flipped"] / total["signs"]
    row = {"inputs": count, "worst mean error of the output's scale": max(errors), "share of flipped signs": share}
    print(
        f"{count} inputs: mean error at most {max(errors):.1e} of the output's scale, {share:.1e} of the signs flipped"
    )
    return [row]


def with_signs(model: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a network's output and what goes into each binary layer, as signs."""
    signs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, PackedConv2d | binarize.layers.BinaryConv2d):

            def seen(layer: Any, given: tuple[Any, ...], name: str = name) -> None:
                x = given[0]
                if len(given) > 1 and given[1] is not None:  # the norm is folded in
                    x = F.silu(x * given[1][0][:, :, None, None] + given[1][1][:, :, None, None])
                signs[name] = layer.pre(x) >= 0

            handles.append(module.register_forward_pre_hook(seen))
    out = model(*arguments).sample
    for handle in handles:
        handle.remove()
    return out, signs


def peak_of(output: int, tile: int) -> None:
    """Enlarge a picture to ``output`` in tiles, and print the process's peak memory in bytes."""
    torch.set_num_threads(2)
    pipeline = SuperResolutionPipeline(binarize.pack(released()), scale=2)
    gc.collect()
    pipeline.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, output // 2, output // 2)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    pipeline(picture, num_inference_steps=1, tile=tile, output_type="pt", generator=torch.Generator().manual_seed(0))
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


def memory_rows() -> list[dict[str, Any]]:
    if not Path("/proc/self/clear_refs").exists():
        return []
    rows = []
    for output, tile in ((512, 256), (1024, 256), (1536, 256), (1024, 512)):
        command = [sys.executable, __file__, "--peak-of", str(output), str(tile)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append({"output": output, "tile": tile, "peak bytes": int(said.split()[-1])})
        print(
            f"{output}x{output} output, tile {tile}: {rows[-1]['peak bytes'] / 1e6:.0f} MB resident at the peak",
            flush=True,
        )
    return rows


def file_rows() -> list[dict[str, Any]]:
    unet = released()
    packed, rows = binarize.pack(copy.deepcopy(unet)), []
    counted = binarize.summary(unet).bytes
    held = sum(t.numel() * t.element_size() for t in [*packed.parameters(), *packed.buffers()])
    with tempfile.TemporaryDirectory() as folder:
        for name, model, dtype in (
            ("training form", unet, None),
            ("packed float32", packed, None),
            ("packed float16", packed, torch.float16),
        ):
            to = Path(folder) / name
            binarize.save(model, to, dtype=dtype)
            taken = interleaved({"load": lambda to=to: binarize.load(to)}, 3)["load"]
            size = sum(f.stat().st_size for f in to.iterdir() if f.suffix == ".safetensors")
            rows.append({"what": name, "bytes": size, "load seconds": taken})
            print(f"{name}: {size / 1e6:.2f} MB, loads in {taken:.2f} s", flush=True)
    rows.append({"what": "summary's count", "bytes": counted})
    rows.append({"what": "tensors of the packed network in memory", "bytes": held})
    print(f"summary counts {counted / 1e6:.2f} MB; tensors in memory {held / 1e6:.2f} MB")
    return rows


def plot(results: dict[str, Any], to: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    rows = [row for row in results.get("layers", []) if row.get("threads") == 1]
    left.barh([row["layer"] for row in rows], [row["speed-up over float32"] for row in rows], color="#3b6ea5")
    left.set_xlabel("times faster than F.conv2d in float32, one thread")
    left.invert_yaxis()
    shown = [row for row in results.get("networks", []) if row["threads"] == 2]
    for name in shown[0]["seconds"] if shown else []:
        right.plot([row["size"] for row in shown], [row["seconds"][name] for row in shown], marker="o", label=name)
    right.set(xscale="log", yscale="log", xlabel="picture, pixels a side", ylabel="seconds a step, two threads")
    right.set_xticks([row["size"] for row in shown], [str(row["size"]) for row in shown])
    right.minorticks_off()
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(to, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, few rounds, nothing compiled")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="one section; can be given again")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-of", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.peak_of:
        peak_of(*options.peak_of)
        return
    rounds = 3 if options.quick else options.rounds
    sizes = [256] if options.quick else [64, 128, 256, 512]
    todo: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "layers": lambda: layer_rows(rounds),
        "roofline": lambda: roofline_rows(rounds),
        "networks": lambda: network_rows(sizes, rounds),
        "compiled": lambda: compiled_rows(256, rounds),
        "mixed": lambda: mixed_rows(rounds),
        "flips": lambda: flip_rows(3 if options.quick else 20),
        "memory": memory_rows,
        "files": file_rows,
    }
    chosen = options.only or [name for name in SECTIONS if not (options.quick and name == "compiled")]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "packed.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = machine()
    for name in chosen:
        print(f"-- {name}", flush=True)
        results[name] = todo[name]()
        path.write_text(json.dumps(results, indent=1) + "\n")
        gc.collect()
    plot(results, RESULTS / "packed.png")
    for name in chosen:
        print(f"\n{section('packed-' + name, {path.name: results})}")


def machine() -> dict[str, Any]:
    """Return what the tables say of where their figures come from."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
    wanted = ("avx2", "avx512f", "avx512_vpopcntdq", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd")
    return f"{platform.machine()} with " + ", ".join(flag for flag in wanted if flag in flags.split())


if __name__ == "__main__":
    main()
