"""A counting oracle that knows nothing of bits, random problems for it, and small networks."""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import binarize
from binarize.kernels import backends, binary_conv
from binarize.kernels.binary_conv import BinaryConv, Geometry, OutputTransform, Shortcut
from binarize.kernels.bitpack import FilterShape, from_bits
from binarize.models import SRUNet

needs_inductor = pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="the C++ that PyTorch's compiler writes for a processor without vectors does not compile (PyTorch 2.14)",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CLOSE = {dtype: {"rtol": 1.6e-2, "atol": 2e-2} for dtype in (torch.bfloat16, torch.float16)}
CLOSE[torch.float32] = {"rtol": 1e-5, "atol": 1e-4}
MODES: dict[str, Any] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def on_each(names: Any, call: Callable[[], Tensor]) -> list[Tensor]:
    """Return what a call gives on each of some backends."""
    results = []
    for name in names:
        with torch.no_grad(), backends.use(name):
            results.append(call())
    return results


def dot_products(codes: Any, weight: Any, stride: Any, pad: Any, dilation: Any, groups: int) -> np.ndarray:
    """Convolve tap by tap; integers stay int64. pad is (left, right, top, bottom), of zeros."""
    left, right, top, bottom = pad
    x = np.pad(codes, ((0, 0), (0, 0), (top, bottom), (left, right)))
    batch, _, height, width = x.shape
    out, per_group, kh, kw = weight.shape
    tall = (height - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    wide = (width - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    y = np.zeros((batch, groups, out // groups, tall, wide), np.result_type(x, weight))
    w = weight.reshape(groups, out // groups, per_group, kh, kw)
    for i, j in itertools.product(range(kh), range(kw)):
        rows = slice(i * dilation[0], i * dilation[0] + (tall - 1) * stride[0] + 1, stride[0])
        columns = slice(j * dilation[1], j * dilation[1] + (wide - 1) * stride[1] + 1, stride[1])
        taps = x[:, :, rows, columns].reshape(batch, groups, per_group, tall, wide)
        y += np.einsum("bgchw,goc->bgohw", taps, w[..., i, j])
    return y.reshape(batch, out, tall, wide)


def padded(x: np.ndarray, padding: Any, kernel: Any, dilation: Any, mode: str) -> np.ndarray:
    """Pad ``(B, C, H, W)`` as the documentation of nn.Conv2d says."""
    totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    sides = [(total // 2, total - total // 2) for total in totals]
    if not isinstance(padding, str):
        sides = [(size, size) for size in padding]
    return np.pad(x, [(0, 0), (0, 0), *sides], mode=MODES[mode])


LAYOUTS = ("contiguous", "channels_last", "channel_slice", "pixel_slice", "transposed", "expanded", "repeated_pixel")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the same values in another memory layout."""
    batch, channels, height, width = x.shape
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "channel_slice":
        wider = x.new_full((batch, channels + 7, height, width), math.nan).to(memory_format=torch.channels_last)
        wider[:, 3 : 3 + channels] = x
        return wider[:, 3 : 3 + channels]
    if layout == "pixel_slice":
        wider = x.new_full((batch, channels, height + 2, 2 * width), math.nan).to(memory_format=torch.channels_last)
        wider[:, :, 1:-1, ::2] = x
        return wider[:, :, 1:-1, ::2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded" and batch > 1:
        return x[:1].expand(batch, -1, -1, -1)
    if layout == "repeated_pixel":  # pixels of a row are one in memory
        return x[..., :1].contiguous(memory_format=torch.channels_last).expand(-1, -1, -1, width)
    return x.contiguous()


@dataclass
class Problem:
    """A convolution, its inputs, and its dot products by the oracle."""

    x: Tensor
    conv: BinaryConv
    options: dict[str, Tensor | None]
    expected: np.ndarray


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Problem:
    """Draw a convolution with odd widths, groups, strides, dilations, paddings, levels, rows and memory layouts."""
    small = st.integers(1, 3)
    groups, batch, rows = draw(small), draw(small), draw(small)
    widths = st.one_of(st.integers(1, 70), st.sampled_from([31, 32, 33, 63, 64, 65, 96, 128]))
    shape = FilterShape(groups * draw(st.integers(1, 40)), draw(widths), (draw(small), draw(small)), groups)
    stride, dilation = (draw(small), draw(small)), (draw(small), draw(small))
    pad = tuple(draw(st.integers(0, 3)) for _ in range(4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, shape.kernel, strict=True)]
    height = draw(st.integers(max(1, reach[0] - pad[2] - pad[3]), reach[0] + 8))
    width = draw(st.integers(max(1, reach[1] - pad[0] - pad[1]), reach[1] + 20))
    geometry = Geometry(stride, pad, dilation)
    unsigned, mixed = draw(st.booleans()), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    channels = groups * shape.in_channels

    # Multiples of 1/4, which bfloat16 holds exactly; every third value equals its threshold.
    x = torch.from_numpy(rng.integers(-3, 4, (batch, channels, height, width)) / 4)
    x = laid_out(x.to(draw(st.sampled_from(dtypes))), draw(st.sampled_from(LAYOUTS)))
    thresholds = torch.from_numpy(rng.integers(-1, 2, (rows, channels)) / 4)
    group = torch.from_numpy(rng.integers(0, rows, batch if draw(st.booleans()) else 1)) if mixed else None
    weight = rng.integers(0, 2, (shape.out_channels, shape.in_channels, *shape.kernel))
    words = from_bits(torch.from_numpy(weight.astype(np.uint8)).unsqueeze(0), shape)[0]
    acc_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    conv = BinaryConv.lay_out(words, shape, geometry, thresholds.to(acc_dtype), OutputTransform(), unsigned=unsigned)
    chosen = torch.zeros(batch, dtype=torch.long) if group is None else group.expand(batch)
    above = (x.double() >= thresholds[chosen][:, :, None, None]).long().numpy()
    expected = dot_products(above if unsigned else 2 * above - 1, 2 * weight - 1, stride, pad, dilation, groups)
    return Problem(x, conv, {"timestep_group": group}, expected)


def scatter(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Draw every shift, slope, scale, bias and statistic of a model at random."""

    def random(like: Tensor, low: float, high: float) -> Tensor:
        drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * drawn).to(like.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            binarizer = "weight_binarizer" in name
            if name.endswith(("shift_in", "shift_out", "bias")):
                parameter.add_(random(parameter, -0.4, 0.4))
            elif parameter.dim() <= 2 or binarizer:
                parameter.mul_(random(parameter, 0.5, 1.5))
                parameter.add_(0 if binarizer else random(parameter, -0.1, 0.1))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(random(buffer, -0.5, 0.5))
            if name.endswith("running_var"):
                buffer.mul_(random(buffer, 0.5, 2.0))
    return model


SMALL: dict[str, Any] = {"base_channels": 16, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 4}
EVERY_GROUP = (3, 450, 900, 1300, 1999)  # of the 2000 timesteps; bidiffsr cuts them into five groups


def network(method: Any = "bidiffsr", **options: Any) -> SRUNet:
    """A converted network with everything at random."""
    return scatter(binarize.convert(SRUNet(**options), method)).eval()


def inputs(size: int = 16, batch: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, condition = torch.randn(2, batch, 3, size, size, dtype=torch.float64).to(dtype)
    return x, torch.tensor(EVERY_GROUP)[torch.arange(batch) % 5], condition


@st.composite
def with_everything(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, BinaryConv, dict[str, Any]]:
    """Draw a problem's input, its convolution with a random output transform, and random optional inputs."""
    problem, generator = draw(problems(dtypes)), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    normed, added, clamped = (draw(st.booleans()) for _ in range(3))
    x, shape, options = problem.x, problem.conv.shape, dict(problem.options)
    rows, batch, channels = len(problem.conv.thresholds), x.shape[0], shape.out_channels

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    limits = (-1.0, 2.0) if clamped else (-math.inf, math.inf)
    adds = Shortcut(draw(st.sampled_from([0, 1, 2])) if problem.expected.shape == tuple(x.shape) else 0)
    affine, rprelu = [random(channels) for _ in range(3)], [random(rows, channels) for _ in range(3)]
    table = OutputTransform(*affine, *rprelu).coefficients(rows, channels, torch.float32, x.device)
    changes = {"coefficients": binary_conv.lay_out_coefficients(table, shape), "compiled": {}}
    if normed:
        x = x + 0.125  # thresholds are 0, and SiLU is 0 only at 0
        changes["thresholds"] = binary_conv.lay_out_thresholds(torch.zeros(rows, x.shape[1]), shape)
        options["input_norm"] = torch.stack([random(batch, x.shape[1]).sign(), random(batch, x.shape[1]).sign() / 16])
    if added:
        options["channel_bias"] = random(batch, channels)
        options["residual"] = random(*problem.expected.shape).to(x.dtype)
    return x, dataclasses.replace(problem.conv, low=limits[0], high=limits[1], shortcut=adds, **changes), options


class MadeTensor(NamedTuple):
    """A tensor that an operator made."""

    dtype: torch.dtype
    numel: int
    nbytes: int


class MadeTensors(TorchDispatchMode):
    """Records the tensors that operators make in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[MadeTensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = (t for t in tree_leaves(out) if isinstance(t, Tensor) and not t.is_meta)
        self.tensors.extend(MadeTensor(t.dtype, t.numel(), t.nbytes) for t in made)
        return out
