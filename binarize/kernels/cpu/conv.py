"""The binary convolution on a CPU: lays out a call's parameters, scratch memory and tasks, and starts the worker."""

from __future__ import annotations

from array import array
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from binarize.kernels.binary_conv import BinaryConv, Geometry, Shortcut
from binarize.kernels.bitpack import FilterShape
from binarize.kernels.checks import as_channels_last, check_inputs
from binarize.kernels.cpu import threads
from binarize.kernels.cpu.compile import worker
from binarize.kernels.cpu.fields import Conv
from binarize.kernels.cpu.parameters import (
    STRIP_BYTES,
    TASKS_PER_THREAD,
    aligned,
    as_floats,
    empty_fields,
    set_image,
    set_row_sums,
    set_scratch,
)
from binarize.kernels.malloc import keep_freed_memory
from binarize.kernels.row_sums import RowSums

COMPILED_SIZES = 8  # how many input sizes a layer keeps the parameters of


def run(
    x: Tensor, conv: BinaryConv, timestep_group: Tensor | None = None, input_norm: Tensor | None = None,
    channel_bias: Tensor | None = None, residual: Tensor | None = None, row_sums: RowSums | None = None,
) -> Tensor:  # fmt: skip
    """Apply a binary convolution; see `binarize.kernels.ops.binary_conv2d`."""
    # All that can be wrong with a call, or need other parameters.
    key = (
        threads.count(), x.dtype, x.shape, timestep_group is None or (timestep_group.shape, timestep_group.dtype),
        input_norm is None or input_norm.shape, channel_bias is None or channel_bias.shape,
        residual is None or residual.shape,
    )  # fmt: skip
    compiled = conv.compiled.get(key)
    if compiled is None:
        keep_freed_memory()
        check_inputs(x, conv, timestep_group, input_norm, channel_bias, residual)
        if len(conv.compiled) > COMPILED_SIZES:
            conv.compiled.clear()
        compiled = conv.compiled[key] = CompiledConv(conv, x.shape, x.dtype, input_norm is not None)
    return compiled(x, timestep_group, input_norm, channel_bias, residual, row_sums)


class _Plan(NamedTuple):
    """A call's parameters before addresses are known."""

    fields: array[int]
    tasks: int
    scratch: int
    height: int
    width: int


class CompiledConv:
    """A binary convolution for inputs of one ``size`` ``(B, C_in, H, W)`` and dtype: all that its calls share."""

    def __init__(self, conv: BinaryConv, size: tuple[int, ...], dtype: torch.dtype, has_norm: bool) -> None:
        count, limits = threads.count(), (conv.low, conv.high)
        input_size = size[0], size[2], size[3], dtype.itemsize
        plan = _plan(input_size, conv.shape, conv.geometry, conv.unsigned, has_norm, count, limits, conv.shortcut)
        self._plan, self._threads, self._worker = plan, min(count, plan.tasks), worker("conv")
        self._size = size[0], conv.shape.out_channels, plan.height, plan.width
        self._dtype, self._lanes, self._tensors = dtype, conv.shape.lanes, _dense_tensors(conv)

    def __call__(
        self, x: Tensor, timestep_group: Tensor | None, input_norm: Tensor | None, channel_bias: Tensor | None,
        residual: Tensor | None, row_sums: RowSums | None,
    ) -> Tensor:  # fmt: skip
        """Apply the convolution."""
        batch = self._size[0]
        out = torch.empty(self._size, dtype=self._dtype, device="cpu", memory_format=torch.channels_last)
        if out.numel() == 0:
            return out
        p, x = self._plan.fields[:], as_channels_last(x)
        alive = [set_scratch(p, Conv.SCRATCH, self._threads, self._plan.scratch)]
        set_image(p, Conv.X, x)
        set_image(p, Conv.OUT, out)
        # Read anew at each call: memory that has been shared with another process is elsewhere.
        p[Conv.FILTERS], p[Conv.BASE], p[Conv.THRESHOLDS], p[Conv.TABLE] = (t.data_ptr() for t in self._tensors)
        p[Conv.FILTER_SUMS] = p[Conv.BASE] + 4 * self._lanes
        if timestep_group is not None:
            dense = timestep_group.is_contiguous() and timestep_group.shape[0] == batch
            alive.append(timestep_group if dense else timestep_group.expand(batch).contiguous())
            p[Conv.GROUP] = alive[-1].data_ptr()
        if input_norm is not None:
            alive.append(as_floats(input_norm))
            p[Conv.NORM_FACTORS] = alive[-1].data_ptr()
            p[Conv.NORM_OFFSETS] = p[Conv.NORM_FACTORS] + 4 * input_norm.shape[1] * input_norm.shape[2]
        if channel_bias is not None:
            alive.append(as_floats(channel_bias.expand(batch, -1)))
            p[Conv.CHANNEL_BIAS] = alive[-1].data_ptr()
        if residual is not None:
            alive.append(as_channels_last(residual.to(self._dtype)))
            set_image(p, Conv.RESIDUAL, alive[-1])
        set_row_sums(p, Conv.ROW_SUMS, row_sums, out)
        threads.run(self._worker, p.buffer_info()[0], self._plan.tasks, self._threads)
        return out


def _dense_tensors(conv: BinaryConv) -> tuple[Tensor, ...]:
    """Return the convolution's tensors as kernels read them, shared by all input sizes."""
    tensors: tuple[Tensor, ...] | None = conv.compiled.get("tensors")
    if tensors is None:
        # Module.to(memory_format=torch.channels_last) reorders every tensor of four axes, words of bits as well.
        filters, correction = conv.filters.detach().contiguous(), conv.padding_correction.contiguous()
        tensors = filters, correction, as_floats(conv.thresholds), as_floats(conv.coefficients)
        conv.compiled["tensors"] = tensors
    return tensors


@lru_cache(maxsize=512)
def _plan(
    input_size: tuple[int, int, int, int], shape: FilterShape, geometry: Geometry, unsigned: bool, has_norm: bool,
    threads: int, limits: tuple[float, float], shortcut: Shortcut,
) -> _Plan:  # fmt: skip
    (batch, height, width, size), (kh, kw) = input_size, shape.kernel
    out_height, out_width = geometry.output(height, width, shape.kernel)
    left, right, top, _ = geometry.pad
    channels = shape.groups * shape.in_channels
    packed_row = (left + width + right) * shape.groups * shape.words * 4
    strip = min(
        -(-out_height * batch // (TASKS_PER_THREAD * threads)), STRIP_BYTES // (packed_row * geometry.stride[0])
    )
    strip = max(1, min(strip, out_height))

    reach = (kw - 1) * geometry.dilation[1]
    starts = [x * geometry.stride[1] - left for x in range(out_width)]
    inside = [i for i, start in enumerate(starts) if unsigned or (start >= 0 and start + reach < width)]
    first, last = (inside[0], inside[-1] + 1) if inside else (out_width, out_width)
    borders = first + out_width - last

    window = (kh - 1) * geometry.dilation[0] + 1
    rows = (strip - 1) * geometry.stride[0] + window
    scratch = aligned(4 * kh * kw * shape.words) + aligned(8 * out_width) + aligned((borders + 1) * shape.lanes * 4)
    scratch += aligned(rows * packed_row)
    if has_norm:
        scratch += aligned(window * width * channels * size)
    tasks = -(-out_height // strip) * batch
    values = {
        Conv.COUNT: tasks, Conv.STRIP: strip, Conv.BF16: int(size == 2),
        Conv.HEIGHT: height, Conv.WIDTH: width, Conv.OUT_HEIGHT: out_height, Conv.OUT_WIDTH: out_width,
        Conv.GROUPS: shape.groups, Conv.GROUP_IN: shape.in_channels,
        Conv.GROUP_OUT: shape.out_channels // shape.groups, Conv.WORDS: shape.words, Conv.OUT_BLOCKS: shape.blocks,
        Conv.KERNEL_H: kh, Conv.KERNEL_W: kw, Conv.STRIDE_H: geometry.stride[0], Conv.STRIDE_W: geometry.stride[1],
        Conv.LEFT: left, Conv.RIGHT: right, Conv.TOP: top,
        Conv.DILATION_H: geometry.dilation[0], Conv.DILATION_W: geometry.dilation[1],
        Conv.BORDERS: borders, Conv.INNER_FIRST: first, Conv.INNER_LAST: last, Conv.UNSIGNED: int(unsigned),
        Conv.SHORTCUT: int(shortcut != Shortcut.NONE), Conv.EARLY: int(shortcut == Shortcut.FIRST),
        Conv.LIMITS: array("q", array("f", limits).tobytes())[0],
    }  # fmt: skip
    p = empty_fields(Conv)
    for field, value in values.items():
        p[field] = value
    return _Plan(p, tasks, scratch, out_height, out_width)
