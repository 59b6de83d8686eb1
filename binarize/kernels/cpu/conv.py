"""Calls the compiled kernels on tensors: lays out their parameters, scratch memory and tasks."""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from binarize.kernels.bitpack import FilterShape
from binarize.kernels.cpu import threads as _threads
from binarize.kernels.cpu.compile import workers
from binarize.kernels.cpu.conv_worker import Conv, Norm, Unzip
from binarize.kernels.inputs import pixels
from binarize.kernels.ops import Geometry, Term

Fields = MutableSequence[int] | np.ndarray  # parameters of a worker, int64
ALIGN = 64
# An output strip's input should stay in the second-level cache from packing until the shortcut reads it again, beside
# the next strip's, which is read ahead.
STRIP_BYTES = 100_000
TASKS_PER_THREAD = 4


class _Plan(NamedTuple):
    """What a convolution's parameters are before addresses are known."""

    fields: array[int]
    tasks: int
    scratch: int
    height: int
    width: int


class Prepared:
    """A convolution of inputs of one size and dtype, with every address in its place that calls share.

    Args:
        size: ``(B, C_in, H, W)`` of the inputs.
        dtype: Of the inputs.
        normed: Whether calls give a ``norm``.
        term: What is applied, from `lay_out`.
    """

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, normed: bool, term: Term) -> None:
        batch, _, height, width = size
        tensors, shape, geometry, halve, low, high, shortcut = term
        threads, item = _threads.workers(), dtype.itemsize
        plan = _plan(batch, height, width, shape, geometry, halve, item, normed, threads, low, high, shortcut)
        self._out, self._dtype, self._lanes = (batch, shape.out_channels, plan.height, plan.width), dtype, shape.lanes
        self._plan, self._threads = plan, min(threads, plan.tasks)
        self._tensors, self._worker = tensors, workers()["conv"]

    def __call__(
        self, x: Tensor, group: Tensor | None, norm: Tensor | None, row: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """Do what `binarize.kernels.ops.packed_conv2d` says."""
        out = torch.empty(self._out, dtype=self._dtype, device="cpu", memory_format=torch.channels_last)
        if out.numel() == 0:
            return out
        p, x = self._plan.fields[:], pixels(x)
        held = [scratch(p, Conv.SCRATCH, self._threads, self._plan.scratch)]
        place(p, Conv.X, x)
        place(p, Conv.OUT, out)
        # Asked anew, since memory may be shared with another process in the meantime, and is then elsewhere.
        p[Conv.FILTERS], p[Conv.BASE], p[Conv.THRESHOLDS], p[Conv.TABLE] = (t.data_ptr() for t in self._tensors)
        p[Conv.FILTER_SUMS] = p[Conv.BASE] + 4 * self._lanes
        if group is not None:
            dense = group.is_contiguous() and group.shape[0] == self._out[0]
            held.append(group if dense else group.expand(self._out[0]).contiguous())
            p[Conv.GROUP] = held[-1].data_ptr()
        if norm is not None:
            held.append(floats(norm))
            p[Conv.NORM_FACTORS] = held[-1].data_ptr()
            p[Conv.NORM_OFFSETS] = p[Conv.NORM_FACTORS] + 4 * norm.shape[1] * norm.shape[2]
        if row is not None:
            held.append(floats(row.expand(self._out[0], -1)))
            p[Conv.ROW_ADD] = held[-1].data_ptr()
        if residual is not None:
            held.append(pixels(residual.to(self._dtype)))
            place(p, Conv.RESIDUAL, held[-1])
        _threads.run(self._worker, p.buffer_info()[0], self._plan.tasks, self._threads)
        return out


def packed_conv2d(
    x: Tensor,
    filters: Tensor,
    counts: Tensor,
    thresholds: Tensor,
    table: Tensor,
    group: Tensor | None,
    shape: FilterShape,
    geometry: Geometry,
    *,
    halve: bool,
    low: float,
    high: float,
    shortcut: int,
    norm: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Do what `binarize.kernels.ops.packed_conv2d` says with the compiled kernels."""
    term = Term((filters, counts, thresholds, table), shape, geometry, halve, low, high, shortcut)
    return Prepared(x.shape, x.dtype, norm is not None, lay_out(term))(x, group, norm, row, residual)


def lay_out(term: Term) -> Term:
    """Return the term with its tensors as the kernels read them.

    Dense, since Module.to(memory_format=torch.channels_last) turns over every tensor of four axes, words of bits as
    well.
    """
    filters, counts, thresholds, table = term.tensors
    dense = filters.detach().contiguous(), counts.contiguous(), floats(thresholds), floats(table)
    return term._replace(tensors=dense)


def floats(values: Tensor) -> Tensor:
    """Return the values as the kernels read what is not a picture: dense, in float32."""
    return values.float().contiguous()


def norm_factors(
    x: Tensor, row: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Do what `binarize.kernels.norm.norm_factors` says with the compiled kernels."""
    x = pixels(x)
    p, tasks, strips = _strips(x)
    sums = torch.zeros(x.shape[0], strips, 2, x.shape[1], dtype=torch.float32)
    out = torch.empty(2, x.shape[0], x.shape[1], dtype=torch.float32)
    small = np.array([eps])
    held = [None if t is None else floats(t) for t in (weight, bias)]
    held.append(None if row is None else floats(row.expand(x.shape[0], -1)))
    p[Norm.GROUPS], p[Norm.SUMS], p[Norm.EPS] = groups, sums.data_ptr(), small.ctypes.data
    p[Norm.WEIGHT], p[Norm.BIAS], p[Norm.SHIFT] = (0 if t is None else t.data_ptr() for t in held)
    p[Norm.FACTORS], p[Norm.OFFSETS] = out[0].data_ptr(), out[1].data_ptr()
    _threads.run(workers()["moments"], p.ctypes.data, tasks)
    _threads.run(workers()["factors"], p.ctypes.data, 1)
    return out


def norm_silu(x: Tensor, norm: Tensor) -> Tensor:
    """Do what `binarize.kernels.norm.norm_silu` says with the compiled kernels."""
    x = pixels(x)
    out = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    norm = floats(norm)
    p, tasks, _ = _strips(x)
    place(p, Norm.OUT, out)
    p[Norm.FACTORS], p[Norm.OFFSETS] = norm[0].data_ptr(), norm[1].data_ptr()
    _threads.run(workers()["silu"], p.ctypes.data, tasks)
    return out


def unzip(hidden: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `binarize.kernels.norm.shuffle` says with the compiled kernels, widths being multiples of 32."""
    hidden, skip = pixels(hidden), pixels(skip)
    batch, _, height, width = hidden.shape
    shape = (batch, (hidden.shape[1] + skip.shape[1]) // 2, height, width)
    outs = [torch.empty(shape, dtype=hidden.dtype, memory_format=torch.channels_last) for _ in range(2)]
    p = np.zeros(len(Unzip), np.int64)
    p[Unzip.COUNT], p[Unzip.HALF] = batch * height, int(hidden.dtype == torch.bfloat16)
    p[Unzip.HEIGHT], p[Unzip.WIDTH] = height, width
    p[Unzip.HIDDEN_CHANNELS], p[Unzip.SKIP_CHANNELS] = hidden.shape[1], skip.shape[1]
    place(p, Unzip.HIDDEN, hidden)
    place(p, Unzip.SKIP, skip)
    p[Unzip.FIRST], p[Unzip.SECOND] = (out.data_ptr() for out in outs)
    _threads.run(workers()["unzip"], p.ctypes.data, batch * height)
    return outs[0], outs[1]


def _strips(x: Tensor) -> tuple[np.ndarray, int, int]:
    """Return the parameters of a pass over all pixels, how many tasks it has, and how many strips a sample has."""
    batch, channels, height, width = x.shape
    rows = max(1, min(STRIP_BYTES // max(1, width * channels * x.element_size()), -(-height // TASKS_PER_THREAD)))
    strips = -(-height // rows)
    p = np.zeros(len(Norm), np.int64)
    p[Norm.COUNT], p[Norm.STRIPS], p[Norm.ROWS] = batch * strips, strips, rows
    p[Norm.HEIGHT], p[Norm.WIDTH], p[Norm.CHANNELS] = height, width, channels
    p[Norm.HALF] = int(x.dtype == torch.bfloat16)
    place(p, Norm.X, x)
    return p, batch * strips, strips


def scratch(p: Fields, at: int, workers: int, size: int) -> Tensor:
    """Give so many workers so many bytes each, as long as the result lives: set the field ``at`` and the next."""
    memory = torch.empty(workers * size + ALIGN, dtype=torch.uint8, device="cpu")
    p[at], p[at + 1] = aligned(memory.data_ptr()), size
    return memory


def place(p: Fields, field: int, x: Tensor) -> None:
    """Set the field and the next three: where a picture is, and its strides from sample, row and pixel to the next."""
    size, strides = x.element_size(), x.stride()
    p[field], p[field + 1], p[field + 2], p[field + 3] = (
        x.data_ptr(),
        strides[0] * size,
        strides[2] * size,
        strides[3] * size,
    )


@lru_cache(maxsize=512)
def _plan(
    batch: int,
    height: int,
    width: int,
    shape: FilterShape,
    geometry: Geometry,
    halve: bool,
    size: int,
    normed: bool,
    threads: int,
    low: float,
    high: float,
    shortcut: int,
) -> _Plan:
    kh, kw = shape.kernel
    out_height, out_width = geometry.output(height, width, shape.kernel)
    left, right, top, _ = geometry.pad
    channels = shape.groups * shape.in_channels
    strip = min(-(-out_height * batch // (TASKS_PER_THREAD * threads)), STRIP_BYTES // (width * channels * size))
    strip = max(1, min(strip, out_height))

    reach = (kw - 1) * geometry.dilation[1]
    starts = [x * geometry.stride[1] - left for x in range(out_width)]
    inside = [i for i, start in enumerate(starts) if halve or (start >= 0 and start + reach < width)]
    first, last = (inside[0], inside[-1] + 1) if inside else (out_width, out_width)
    borders = first + out_width - last

    pixel, lines = (
        shape.groups * shape.words * 4,
        (strip - 1) * geometry.stride[0] + (kh - 1) * geometry.dilation[0] + 1,
    )
    room = aligned(4 * kh * kw * shape.words) + aligned(8 * out_width) + aligned((borders + 1) * shape.lanes * 4)
    room += aligned(lines * (left + width + right) * pixel)
    if normed:
        room += aligned(lines * width * channels * size)
    tasks = -(-out_height // strip) * batch
    p = array("q", bytes(8 * len(Conv)))
    p[Conv.COUNT], p[Conv.STRIP] = tasks, strip
    p[Conv.HEIGHT], p[Conv.WIDTH], p[Conv.OUT_HEIGHT], p[Conv.OUT_WIDTH] = height, width, out_height, out_width
    p[Conv.GROUPS], p[Conv.GROUP_IN], p[Conv.GROUP_OUT] = (
        shape.groups,
        shape.in_channels,
        shape.out_channels // shape.groups,
    )
    p[Conv.WORDS], p[Conv.OUT_BLOCKS], p[Conv.KERNEL_H], p[Conv.KERNEL_W] = shape.words, shape.blocks, kh, kw
    p[Conv.HALF] = int(size == 2)
    p[Conv.STRIDE_H], p[Conv.STRIDE_W] = geometry.stride
    p[Conv.LEFT], p[Conv.RIGHT], p[Conv.TOP] = left, right, top
    p[Conv.DILATION_H], p[Conv.DILATION_W] = geometry.dilation
    p[Conv.BORDERS], p[Conv.INNER_FIRST], p[Conv.INNER_LAST], p[Conv.HALVE] = borders, first, last, int(halve)
    p[Conv.SHORTCUT], p[Conv.EARLY] = int(shortcut != 0), int(shortcut == 2)
    p[Conv.AHEAD] = min(threads, tasks)
    p[Conv.LIMITS] = array("q", array("f", [low, high]).tobytes())[0]
    return _Plan(p, tasks, room, out_height, out_width)


def aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
