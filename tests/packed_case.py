"""A counting oracle that knows nothing of bits, random problems for it, and small networks."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import binarize
from binarize.kernels.binary_conv import (
    BinaryConv,
    Geometry,
    OutputTransform,
    Shortcut,
    lay_out_coefficients,
    lay_out_thresholds,
)
from binarize.kernels.bitpack import FilterShape, from_bits
from binarize.models import SRUNet

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def dot_products(
    codes: np.ndarray,
    weight: np.ndarray,
    stride: tuple[int, int],
    pad: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> np.ndarray:
    """Convolve integers tap by tap in int64; pad is (left, right, top, bottom), of zeros."""
    left, right, top, bottom = pad
    x = np.pad(codes.astype(np.int64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    batch, _, height, width = x.shape
    out, per_group, kh, kw = weight.shape
    tall = (height - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    wide = (width - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    y = np.zeros((batch, groups, out // groups, tall, wide), np.int64)
    w = weight.astype(np.int64).reshape(groups, out // groups, per_group, kh, kw)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dilation[0], i * dilation[0] + (tall - 1) * stride[0] + 1, stride[0])
            columns = slice(j * dilation[1], j * dilation[1] + (wide - 1) * stride[1] + 1, stride[1])
            taps = x[:, :, rows, columns].reshape(batch, groups, per_group, tall, wide)
            y += np.einsum("bgchw,goc->bgohw", taps, w[..., i, j])
    return y.reshape(batch, out, tall, wide)


def codes_of(x: Tensor, thresholds: Tensor, unsigned: bool) -> np.ndarray:
    """Return the codes of ``(B, C, H, W)`` with a threshold per sample and channel, ``(B, C)``."""
    above = x.double().numpy() >= thresholds.double().numpy()[:, :, None, None]
    return above.astype(np.int64) if unsigned else 2 * above.astype(np.int64) - 1


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
    codes = codes_of(x, thresholds[chosen], unsigned)
    expected = dot_products(codes, 2 * weight - 1, stride, pad, dilation, groups)
    return Problem(x, conv, {"timestep_group": group}, expected)


def scatter(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Draw every shift, slope, scale, bias and statistic of a model at random."""

    def random(like: Tensor, low: float, high: float) -> Tensor:
        drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * drawn).to(like.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 2 and "binarizer" not in name:
                continue
            gentle = name.endswith(("shift_in", "shift_out", "bias"))
            if gentle:
                parameter.add_(random(parameter, -0.4, 0.4))
            elif parameter.dim() <= 2 and "weight_binarizer" not in name:
                parameter.mul_(random(parameter, 0.5, 1.5)).add_(random(parameter, -0.1, 0.1))
            else:
                parameter.mul_(random(parameter, 0.5, 1.5))
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
    model = binarize.convert(SRUNet(**options), method)
    scatter(model)
    return model.eval()


def inputs(size: int = 16, batch: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, condition = torch.randn(2, batch, 3, size, size, dtype=torch.float64).to(dtype)
    return x, torch.tensor(EVERY_GROUP)[torch.arange(batch) % 5], condition


def with_everything(
    problem: Problem, seed: int, normed: bool, added: bool, clamped: bool, shortcut: int
) -> tuple[Tensor, BinaryConv, dict[str, Tensor | None]]:
    """Return a problem's input, its convolution with a random output transform, and random optional inputs."""
    generator = torch.Generator().manual_seed(seed)
    x, shape, options = problem.x, problem.conv.shape, dict(problem.options)
    rows, batch, channels = len(problem.conv.thresholds), x.shape[0], shape.out_channels

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    limits = (-1.0, 2.0) if clamped else (-math.inf, math.inf)
    adds = shortcut if problem.expected.shape == tuple(x.shape) else 0
    affine, rprelu = [random(channels) for _ in range(3)], [random(rows, channels) for _ in range(3)]
    transform = OutputTransform(*affine, *rprelu, *limits, Shortcut(adds))
    table = transform.coefficients(rows, channels, torch.float32, x.device)
    conv = dataclasses.replace(
        problem.conv, coefficients=lay_out_coefficients(table, shape),
        low=limits[0], high=limits[1], shortcut=Shortcut(adds), compiled={},
    )  # fmt: skip
    if normed:
        x = x + 0.125  # thresholds are 0, and SiLU is 0 only at 0
        conv = dataclasses.replace(conv, thresholds=lay_out_thresholds(torch.zeros(rows, x.shape[1]), shape))
        options["input_norm"] = torch.stack([random(batch, x.shape[1]).sign(), random(batch, x.shape[1]).sign() / 16])
    if added:
        options["channel_bias"] = random(batch, channels)
        options["residual"] = random(*problem.expected.shape).to(x.dtype)
    return x, conv, options
