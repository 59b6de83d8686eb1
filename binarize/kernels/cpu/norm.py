"""GroupNorm's statistics, SiLU and CS-Fusion's shuffle on a CPU: starts their workers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from binarize.kernels.checks import as_channels_last
from binarize.kernels.cpu import threads
from binarize.kernels.cpu.compile import workers
from binarize.kernels.cpu.fields import Norm, Shuffle
from binarize.kernels.cpu.parameters import STRIP_BYTES, TASKS_PER_THREAD, as_floats, set_image


def norm_factors(
    x: Tensor, channel_bias: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return GroupNorm's factors and offsets; see `binarize.kernels.ops.norm_factors`."""
    x = as_channels_last(x)
    p, tasks, strips = _strips(x)
    sums = torch.zeros(x.shape[0], strips, 2, x.shape[1], dtype=torch.float32)
    out = torch.empty(2, x.shape[0], x.shape[1], dtype=torch.float32)
    epsilon = np.array([eps])
    rows = None if channel_bias is None else channel_bias.expand(x.shape[0], -1)
    alive = [None if t is None else as_floats(t) for t in (weight, bias, rows)]
    p[Norm.GROUPS], p[Norm.SUMS], p[Norm.EPS] = groups, sums.data_ptr(), epsilon.ctypes.data
    p[Norm.WEIGHT], p[Norm.BIAS], p[Norm.SHIFT] = (0 if t is None else t.data_ptr() for t in alive)
    p[Norm.FACTORS], p[Norm.OFFSETS] = out[0].data_ptr(), out[1].data_ptr()
    threads.run(workers()["moments"], p.ctypes.data, tasks)
    threads.run(workers()["factors"], p.ctypes.data, 1)
    return out


def norm_silu(x: Tensor, input_norm: Tensor) -> Tensor:
    """Return ``silu(x * input_norm[0] + input_norm[1])``; see `binarize.kernels.ops.norm_silu`."""
    x = as_channels_last(x)
    out = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    input_norm = as_floats(input_norm)
    p, tasks, _ = _strips(x)
    set_image(p, Norm.OUT, out)
    p[Norm.FACTORS], p[Norm.OFFSETS] = input_norm[0].data_ptr(), input_norm[1].data_ptr()
    threads.run(workers()["silu"], p.ctypes.data, tasks)
    return out


def shuffle(hidden: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Return CS-Fusion's two mixtures, widths being multiples of 32; see `binarize.kernels.ops.shuffle`."""
    hidden, skip = as_channels_last(hidden), as_channels_last(skip)
    batch, _, height, width = hidden.shape
    size = (batch, (hidden.shape[1] + skip.shape[1]) // 2, height, width)
    outs = [torch.empty(size, dtype=hidden.dtype, memory_format=torch.channels_last) for _ in range(2)]
    p = np.zeros(len(Shuffle), np.int64)
    p[Shuffle.COUNT], p[Shuffle.BF16] = batch * height, int(hidden.dtype == torch.bfloat16)
    p[Shuffle.HEIGHT : Shuffle.HIDDEN] = height, width, hidden.shape[1], skip.shape[1]
    set_image(p, Shuffle.HIDDEN, hidden)
    set_image(p, Shuffle.SKIP, skip)
    p[Shuffle.FIRST], p[Shuffle.SECOND] = (out.data_ptr() for out in outs)
    threads.run(workers()["shuffle"], p.ctypes.data, batch * height)
    return outs[0], outs[1]


def _strips(x: Tensor) -> tuple[np.ndarray, int, int]:
    """Return the parameters of a pass over all pixels, its number of tasks, and the strips of a sample."""
    batch, channels, height, width = x.shape
    rows = max(1, min(STRIP_BYTES // max(1, width * channels * x.element_size()), -(-height // TASKS_PER_THREAD)))
    strips = -(-height // rows)
    p = np.zeros(len(Norm), np.int64)
    p[Norm.COUNT], p[Norm.STRIPS], p[Norm.ROWS] = batch * strips, strips, rows
    p[Norm.HEIGHT], p[Norm.WIDTH], p[Norm.CHANNELS] = height, width, channels
    p[Norm.BF16] = int(x.dtype == torch.bfloat16)
    set_image(p, Norm.X, x)
    return p, batch * strips, strips
