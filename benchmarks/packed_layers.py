"""Times of packed convolutions, their bounds, and the composition of a denoising step; used by `bench_packed`."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import TIMESTEP, Job, channels_last, forward, full_precision, inputs, interleaved, released
from popcount_peak import MAX_WORDS, popcount_peak
from torch import Tensor, nn

import binarize
from binarize.packed import PackedConv2d

FLOAT_BYTES = 4
CALLS = 5  # consecutive calls of a layer, as in timers of single operators: code and data stay in the caches
FLOAT32 = {"float32 NCHW": torch.contiguous_format, "float32 NHWC": torch.channels_last}


class LayerShape(NamedTuple):
    """The shape of a convolution at an image of 256x256."""

    c_in: int
    c_out: int
    kernel: int
    size: int

    @property
    def label(self) -> str:
        """The name in the tables."""
        return f"{self.c_in} -> {self.c_out}, {self.kernel}x{self.kernel}, {self.size}x{self.size}"

    @property
    def gmacs(self) -> float:
        """10^9 multiply-accumulates."""
        return self.c_in * self.c_out * self.kernel**2 * self.size**2 / 1e9


def distinct_layers(unet: nn.Module) -> dict[LayerShape, tuple[str, int]]:
    """Return each shape of a packed convolution with the name of the first layer that has it, and their number."""
    found: dict[LayerShape, tuple[str, int]] = {}
    handles = []
    for name, module in unet.named_modules():
        if isinstance(module, PackedConv2d):

            def record(layer: Any, _: Any, out: Tensor, name: str = name) -> None:
                shape = LayerShape(layer.in_channels, layer.out_channels, layer.kernel_size[0], out.shape[-1])
                first, count = found.get(shape, (name, 0))
                found[shape] = first, count + 1

            handles.append(module.register_forward_hook(record))
    sample, condition = inputs(256)
    unet(sample, TIMESTEP, condition)
    for handle in handles:
        handle.remove()
    return found


def float32_jobs(x: Tensor, weight: Tensor) -> dict[str, Job]:
    """Return PyTorch's convolution in both memory formats."""
    jobs: dict[str, Job] = {}
    for name, layout in FLOAT32.items():
        image, filters = (t.contiguous(memory_format=layout) for t in (x, weight))
        jobs[name] = lambda x=image, w=filters: F.conv2d(x, w, padding=w.shape[-1] // 2)
    return jobs


def int8_convolution(x: Tensor, weight: Tensor) -> Job | None:
    """Return PyTorch's quantized convolution, or None if this build has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codes = channels_last(torch.quantize_per_tensor(x, 0.05, 128, torch.quint8))
            filters = torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8)
            pad = [weight.shape[-1] // 2] * 2
            prepacked = torch.ops.quantized.conv2d_prepack(filters, None, [1, 1], pad, [1, 1], 1)
            torch.ops.quantized.conv2d(codes, prepacked, 1.0, 128)
    except (AttributeError, RuntimeError):
        return None
    return lambda: torch.ops.quantized.conv2d(codes, prepacked, 1.0, 128)


def layer_rows(rounds: int) -> list[dict[str, Any]]:
    """Time every distinct binary convolution on one and two threads."""
    packed = binarize.pack(released())
    packed_bf16, peak = copy.deepcopy(packed).to(torch.bfloat16), popcount_peak()
    rows: list[dict[str, Any]] = []
    for shape, (name, count) in distinct_layers(packed).items():
        layer, layer_bf16 = packed.get_submodule(name), packed_bf16.get_submodule(name)
        x = torch.randn(1, shape.c_in, shape.size, shape.size)
        weight = layer.codes()[0].float()
        x_last = channels_last(x)
        x_bf16, w_bf16 = x_last.bfloat16(), channels_last(weight).bfloat16()
        jobs: dict[str, Job] = {
            **float32_jobs(x, weight),
            "bfloat16": lambda x=x_bf16, w=w_bf16: F.conv2d(x, w, padding=w.shape[-1] // 2),
            "packed": lambda x=x_last, f=layer: f(x),
            "packed bfloat16": lambda x=x_bf16, f=layer_bf16: f(x),
        }
        quantized = int8_convolution(x, weight)
        if quantized is not None:
            jobs["int8"] = quantized
        for threads in (1, 2):
            torch.set_num_threads(threads)
            step = torch.tensor([TIMESTEP])
            with binarize.timesteps(packed, step), binarize.timesteps(packed_bf16, step):
                times = interleaved(jobs, rounds, warmup=2, calls=CALLS)
            speed = shape.gmacs / times["packed"]
            row = {
                "layer": shape.label,
                "count": count,
                "threads": threads,
                "ms": {key: 1e3 * value for key, value in times.items()},
                "speed-up over float32": min(times[layout] for layout in FLOAT32) / times["packed"],
                "GMAC/s": speed,
                "share of peak": None if peak is None else speed / (peak * threads),
            }
            rows.append(row)
            print(f"{shape.label:26} {threads} thread(s)  x{row['speed-up over float32']:.1f}  {speed:5.0f} GMAC/s")
    print(f"popcount peak of one core: {peak and round(peak)} GMAC/s")
    return [{"popcount peak, GMAC/s a core": peak}, *rows]


def roofline_rows(rounds: int) -> list[dict[str, Any]]:
    """Measure what bounds each layer on one thread, and what a denoising step consists of.

    "counting" and "arithmetic" are the times at the popcount peak for sums of the layer's length, without and with the
    output transform. "copy" is the time to copy a tensor of the layer's size.
    """
    packed = binarize.pack(released())
    peaks: dict[int, tuple[float | None, float | None]] = {}
    rows: list[dict[str, Any]] = []
    for shape, (name, count) in distinct_layers(packed).items():
        torch.set_num_threads(1)
        words = min(MAX_WORDS, shape.kernel**2 * -(-shape.c_in // 32))
        if words not in peaks:
            peaks[words] = popcount_peak(words), popcount_peak(words, with_output_transform=True)
        counting, arithmetic = peaks[words]
        layer = packed.get_submodule(name)
        x = channels_last(torch.randn(1, shape.c_in, shape.size, shape.size))
        y = torch.empty_like(x)
        jobs: dict[str, Job] = {
            "copy": lambda x=x, y=y: y.copy_(x),
            "packed": lambda x=x, f=layer: f(x),
            **float32_jobs(x, torch.randn(shape.c_out, shape.c_in, shape.kernel, shape.kernel)),
        }
        with binarize.timesteps(packed, torch.tensor([TIMESTEP])):
            times = interleaved(jobs, rounds, warmup=2, calls=CALLS)
        rows.append(
            {
                "layer": shape.label,
                "count": count,
                "words": words,
                "peak, GMAC/s": counting,
                "ms": {
                    "float32": 1e3 * min(times[layout] for layout in FLOAT32),
                    "packed": 1e3 * times["packed"],
                    "counting": counting and 1e3 * shape.gmacs / counting,
                    "arithmetic": arithmetic and 1e3 * shape.gmacs / arithmetic,
                    "copy": 1e3 * times["copy"],
                },
            }
        )
        print(rows[-1], flush=True)
    rows.append(step_composition(packed, rounds))
    print(rows[-1], flush=True)
    return rows


PARTS = {
    "binarize::packed_conv2d": "binary convolutions",
    "binarize::conv3x3": "full-precision 3x3 convolutions",
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


def step_composition(packed: nn.Module, rounds: int) -> dict[str, Any]:
    """Profile a denoising step at 256x256 on two threads, and time it beside the full-precision network.

    "bounds" are the least times of some parts, see `work`: bits at the speed of `popcount_peak`, products in float32 at
    that of a large matrix product, and bytes at that of a copy, whichever takes longer.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(2)
    step = forward(packed, torch.float32, 256)
    times = interleaved({"packed": step, "full precision": forward(full_precision(), torch.float32, 256)}, rounds)
    macs_a_second, bytes_a_second, bits_a_second = float_peak(), memory_peak(), popcount_peak()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for _ in range(rounds):
            step()
    parts = dict.fromkeys([*PARTS.values(), "the rest"], 0.0)
    bounds = dict.fromkeys([PARTS[operator] for operator in BOUNDED], 0.0)
    for event in profiled.key_averages(group_by_input_shape=True):
        part = PARTS.get(event.key, "the rest")
        parts[part] += event.self_cpu_time_total / 1e6 / rounds
        if event.key in BOUNDED:
            macs, moved = work(event.key, [shape for shape in event.input_shapes if shape])
            bounds[part] += max(macs / macs_a_second, moved / bytes_a_second) * event.count / rounds
    if bits_a_second is not None:
        bits = sum(shape.gmacs * count for shape, (_, count) in distinct_layers(packed).items())
        bounds["binary convolutions"] = bits / bits_a_second / 2
    peaks = {
        "float32, GMAC/s": macs_a_second / 1e9,
        "memory, GB/s": bytes_a_second / 1e9,
        "bits, GMAC/s": bits_a_second,
    }
    return {"size": 256, "threads": 2, "seconds": times, "parts": parts, "bounds": bounds, "peaks": peaks}


BOUNDED = (
    "binarize::conv3x3", "binarize::norm_factors", "binarize::norm_silu", "aten::mkldnn_convolution", "aten::addmm",
    "aten::addmm_", "aten::_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip


def work(operator: str, shapes: list[list[int]]) -> tuple[float, int]:
    """Return the products in float32, and the bytes that an operator of these input shapes reads and writes at least.

    Convolutions have a stride of 1; those of 3x3 take a quarter of the products by Winograd's F(4x4, 3x3). The first
    input of addmm is the output's shape, or a bias.
    """
    first = math.prod(shapes[0])
    if operator in ("binarize::conv3x3", "aten::mkldnn_convolution"):
        out_channels, *filters = shapes[1]
        outputs = out_channels * first // shapes[0][1]
        macs = outputs * math.prod(filters) / (4 if operator == "binarize::conv3x3" else 1)
        return macs, FLOAT_BYTES * (first + outputs)
    if operator in ("aten::addmm", "aten::addmm_"):
        a, b = shapes[1:3]
        return a[0] * a[1] * b[1], FLOAT_BYTES * (a[0] * a[1] + a[1] * b[1] + a[0] * b[1])
    if operator == "aten::_scaled_dot_product_flash_attention_for_cpu":
        return 2 * first * shapes[1][-2], FLOAT_BYTES * 4 * first
    return 0, FLOAT_BYTES * first * (1 if operator == "binarize::norm_factors" else 2)


def float_peak(side: int = 2048) -> float:
    """Return the multiply-accumulates a second of a matrix product in float32."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    return side**3 / interleaved({"": lambda: a @ b}, 7)[""]


def memory_peak(values: int = 2**26) -> float:
    """Return the bytes a second, read and written, of a copy."""
    a, b = torch.zeros(values), torch.ones(values)
    return 2 * FLOAT_BYTES * values / interleaved({"": lambda: b.copy_(a)}, 7)[""]
