"""The packed convolution as one PyTorch operator, and the same in plain torch.

``binarize::packed_conv2d`` is everything a binary layer does: (norm -> SiLU ->) shift -> sign -> pack -> xnor-popcount
-> scale -> affine -> PReLU -> clamp -> + shortcut (-> + row -> + residual). On a CPU numba's kernel runs it in float32
and bfloat16, on CUDA Triton's in these and float16; everywhere else, and in float64, plain torch does, with the same
integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.kernels import backends
from binarize.kernels.bitpack import LANES, WORD, FilterShape, to_bits
from binarize.kernels.cpu import threads as _threads
from binarize.kernels.inputs import check_devices, check_shape
from binarize.kernels.operator import goes_straight, operator

if TYPE_CHECKING:
    from binarize.kernels.cpu.conv import Prepared

PREPARED_SIZES = 8  # for so many sizes of inputs a layer keeps the kernels' parameters
NO_SHORTCUT, SHORTCUT_LAST, SHORTCUT_FIRST = 0, 1, 2
SCALE, FACTOR, OFFSET, SHIFT_IN, SLOPE, SHIFT_OUT = range(6)


class Geometry(NamedTuple):
    """How a convolution moves over its input; padding is of zeros, after the sign.

    Attributes:
        stride: (height, width).
        pad: (left, right, top, bottom).
        dilation: (height, width).
    """

    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output(self, height: int, width: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the output."""
        left, right, top, bottom = self.pad
        tall = height + top + bottom - self.dilation[0] * (kernel[0] - 1) - 1
        wide = width + left + right - self.dilation[1] * (kernel[1] - 1) - 1
        return tall // self.stride[0] + 1, wide // self.stride[1] + 1


def to_list(shape: FilterShape, geometry: Geometry) -> list[int]:
    """Return both as the operator's ``shape`` argument."""
    return [
        shape.out_channels, shape.in_channels, *shape.kernel, shape.groups,
        *geometry.stride, *geometry.pad, *geometry.dilation,
    ]  # fmt: skip


def from_list(values: Sequence[int]) -> tuple[FilterShape, Geometry]:
    """Return what `to_list` was given."""
    out_channels, in_channels, kh, kw, groups, sh, sw, left, right, top, bottom, dh, dw = values
    shape = FilterShape(out_channels, in_channels, (kh, kw), groups)
    return shape, Geometry((sh, sw), (left, right, top, bottom), (dh, dw))


_read = lru_cache(maxsize=512)(from_list)


# Written out, since PyTorch 2.6 does not read list[int] from annotations.
_SCHEMA = (
    "(Tensor x, Tensor filters, Tensor counts, Tensor thresholds, Tensor table, Tensor? group, SymInt[] shape, "
    "bool halve, float low, float high, int shortcut, Tensor? norm, Tensor? row, Tensor? residual) -> Tensor"
)


@operator(_SCHEMA)
def packed_conv2d(
    x: Tensor,
    filters: Tensor,
    counts: Tensor,
    thresholds: Tensor,
    table: Tensor,
    group: Tensor | None,
    shape: list[int],
    halve: bool,
    low: float,
    high: float,
    shortcut: int,
    norm: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Convolve the signs of ``x`` with one term's packed filters, and everything after that.

    Args:
        x: ``(B, C_in, H, W)`` float32, bfloat16, float16 or float64.
        filters: ``(groups * blocks, kh * kw * words, 16)`` int32, as `binarize.kernels.bitpack` has them.
        counts: ``(1 + kh * kw, lanes)`` int32, from `count_filters`.
        thresholds: ``(K, groups * words * 32)``: a bit is set where the input is at least this; spare ones infinite.
        table: ``(K, groups * blocks, 6, 16)``: scale, factor, offset, shift in, slope and shift out.
        group: ``(B,)`` or ``(1,)`` int64, each sample's row of the two, or None for row 0.
        shape: From `to_list`.
        halve: Whether activations are {0, 1} rather than {-1, +1}.
        low: Outputs are at least this, before a shortcut that comes last.
        high: Outputs are at most this.
        shortcut: 0 for none, 1 to add the input after the activation, 2 before it.
        norm: ``(2, B, C_in)`` float32; the layer's input is then silu(x * norm[0] + norm[1]).
        row: ``(B, C_out)`` to add to every pixel.
        residual: ``(B, C_out, H', W')`` to add.

    Returns:
        ``(B, C_out, H', W')`` in x's dtype, channels last.

    Raises:
        BinarizeError: If the tensors are on different devices, or do not have the shapes above, or ``group`` not its
            dtype.
    """
    filter_shape, geometry = _read(tuple(shape))
    check_devices("packed convolution", x, filters, counts, thresholds, table, group, norm, row, residual)
    _check_sizes(filter_shape, geometry, x, group, norm, row, residual)
    kernels = backends.kernels_for(x)
    run = plain_conv2d if kernels is None else kernels.packed_conv2d
    return run(
        x, filters, counts, thresholds, table, group, filter_shape, geometry,
        halve=halve, low=low, high=high, shortcut=shortcut, norm=norm, row=row, residual=residual,
    )  # fmt: skip


@packed_conv2d.register_fake
def _(x, filters, counts, thresholds, table, group, shape, halve, low, high, shortcut, norm, row, residual):  # type: ignore[no-untyped-def]
    filter_shape, geometry = from_list(shape)
    height, width = geometry.output(x.shape[2], x.shape[3], filter_shape.kernel)
    out = x.new_empty((x.shape[0], filter_shape.out_channels, height, width))
    return out.to(memory_format=torch.channels_last)


def _check_sizes(
    shape: FilterShape,
    geometry: Geometry,
    x: Tensor,
    group: Tensor | None,
    norm: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
) -> None:
    channels = shape.in_channels * shape.groups
    check_shape("packed convolution: the input", x, (None, channels, None, None))
    batch = x.shape[0]
    if group is not None and (group.dtype != torch.int64 or tuple(group.shape) not in ((1,), (batch,))):
        raise BinarizeError(
            f"packed convolution: group must be int64 of shape ({batch},) or (1,); got {group.dtype} of shape "
            f"{tuple(group.shape)}."
        )
    check_shape("packed convolution: norm", norm, (2, batch, channels))
    check_shape("packed convolution: row", row, (batch, shape.out_channels))
    if residual is not None:
        size = geometry.output(x.shape[2], x.shape[3], shape.kernel)
        check_shape("packed convolution: the residual", residual, (batch, shape.out_channels, *size))


class Term(NamedTuple):
    """What stays the same from call to call of `packed_conv2d`, and is named and explained there.

    Attributes:
        tensors: ``filters``, ``counts``, ``thresholds`` and ``table``.
        shape: Of the filters.
        geometry: Of the convolution.
        halve: As the operator has it.
        low: As the operator has it.
        high: As the operator has it.
        shortcut: As the operator has it.
    """

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    shape: FilterShape
    geometry: Geometry
    halve: bool
    low: float
    high: float
    shortcut: int


class Product:
    """One term of a packed layer, to be applied to inputs.

    Where the dispatcher has nothing to add to a call, it goes straight to the compiled kernels, whose parameters are
    kept for inputs of the same size: all that takes as long as the kernels of a small layer.

    Args:
        term: What is applied.
    """

    def __init__(self, term: Term) -> None:
        self.term = term
        self._list = to_list(term.shape, term.geometry)
        self._prepared: dict[tuple[object, ...], Prepared | None] = {}
        self._laid_out: Term | None = None  # with the tensors as the CPU's kernels read them

    def __call__(
        self,
        x: Tensor,
        group: Tensor | None,
        norm: Tensor | None = None,
        row: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Apply the operator."""
        if goes_straight(x, group, norm, row, residual):
            # All that could be wrong with a call, or need other parameters.
            key = (
                backends.current(), _threads.workers(), x.dtype, x.shape,
                *(t if t is None else t.shape for t in (norm, row, residual, group)), group is None or group.dtype,
            )  # fmt: skip
            run = self._prepared[key] if key in self._prepared else self._prepare(key, x, group, norm, row, residual)
            if run is not None:
                return run(x, group, norm, row, residual)
        tensors, _, _, halve, low, high, shortcut = self.term
        return packed_conv2d(x, *tensors, group, self._list, halve, low, high, shortcut, norm, row, residual)

    def _prepare(
        self,
        key: tuple[object, ...],
        x: Tensor,
        group: Tensor | None,
        norm: Tensor | None,
        row: Tensor | None,
        residual: Tensor | None,
    ) -> Prepared | None:
        """Return what runs calls like this one, if the CPU's compiled kernels do."""
        kernels = backends.kernels_for(x)
        _check_sizes(self.term.shape, self.term.geometry, x, group, norm, row, residual)
        run: Prepared | None = None
        if kernels is not None and hasattr(kernels, "Prepared") and goes_straight(*self.term.tensors):
            if self._laid_out is None:
                self._laid_out = kernels.lay_out(self.term)
            run = kernels.Prepared(x.shape, x.dtype, norm is not None, self._laid_out)
        if len(self._prepared) >= PREPARED_SIZES:
            self._prepared.clear()
        self._prepared[key] = run
        return run


def plain_conv2d(
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
    """Do what `packed_conv2d` says in plain torch, on any device: the kernels' oracle and their stand-in."""
    wide = torch.promote_types(table.dtype, x.dtype)
    h = x.to(wide)
    if norm is not None:
        h = F.silu(h * norm[0].to(wide)[:, :, None, None] + norm[1].to(wide)[:, :, None, None])
        h = h.to(x.dtype).to(wide)
    rows = torch.zeros(1, dtype=torch.long, device=x.device) if group is None else group
    limits = thresholds.view(-1, shape.groups, shape.words * WORD)[:, :, : shape.in_channels].flatten(1)[rows]
    codes = (h >= limits[:, :, None, None]).to(wide)
    if not halve:
        codes = 2 * codes - 1
    weights = 2 * to_bits(filters.unsqueeze(0), shape)[0].to(wide) - 1
    padded = F.pad(codes, geometry.pad)
    dot = F.conv2d(padded, weights, None, geometry.stride, 0, geometry.dilation, shape.groups)
    scale, factor, offset, shift_in, slope, shift_out = _columns(table, shape)[:, rows].to(wide).unbind()
    y = dot * scale * factor + offset
    if shortcut == SHORTCUT_FIRST:
        y = y + h
    y = y + shift_in
    y = torch.where(y > 0, y, y * slope) + shift_out
    if math.isfinite(low) or math.isfinite(high):
        y = y.clamp(low, high)
    if shortcut == SHORTCUT_LAST:
        y = y + h
    if row is not None:
        y = y + row.to(wide)[:, :, None, None]
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _columns(table: Tensor, shape: FilterShape) -> Tensor:
    """Return the six columns of a table as ``(6, K, C_out, 1, 1)``."""
    by_group = table.view(-1, shape.groups, shape.blocks, 6, LANES).permute(3, 0, 1, 2, 4)
    by_group = by_group.reshape(6, -1, shape.groups, shape.blocks * LANES)
    return by_group[..., : shape.out_channels // shape.groups].reshape(6, -1, shape.out_channels, 1, 1)


def lay_out_table(columns: Tensor, shape: FilterShape) -> Tensor:
    """Return a table ``(K, groups * blocks, 6, 16)`` of columns ``(6, K, C_out)``."""
    group_out = shape.out_channels // shape.groups
    by_group = F.pad(columns.view(6, -1, shape.groups, group_out), (0, -group_out % LANES))
    by_group[FACTOR, ..., group_out:] = 1  # so that all factors are 1 where nothing is folded in
    by_group = by_group.view(6, -1, shape.groups * shape.blocks, LANES)
    return by_group.permute(1, 2, 0, 3).contiguous()


def lay_out_thresholds(values: Tensor, shape: FilterShape) -> Tensor:
    """Return thresholds ``(K, groups * words * 32)`` of values ``(K, C_in * groups)``."""
    by_group = values.view(-1, shape.groups, shape.in_channels)
    return F.pad(by_group, (0, -shape.in_channels % WORD), value=math.inf).flatten(1).contiguous()


def count_filters(filters: Tensor, shape: FilterShape, halve: bool) -> Tensor:
    """Return, for one term, the dot product of no differing bits and each tap's sum of weights.

    Args:
        filters: ``(groups * blocks, kh * kw * words, 16)`` int32.
        shape: Of the filters.
        halve: Whether activations are {0, 1}.

    Returns:
        ``(1 + kh * kw, lanes)`` int32. A tap outside the input is read as -1, so its sum is what a border adds.
    """
    taps = shape.kernel[0] * shape.kernel[1]
    if filters.is_meta:
        return torch.empty(1 + taps, shape.lanes, dtype=torch.int32, device="meta")
    signs = 2 * to_bits(filters.unsqueeze(0), shape)[0].to(torch.int32) - 1
    sums = signs.view(shape.groups, -1, shape.in_channels, taps).sum(2, dtype=torch.int32).permute(2, 0, 1)
    sums = F.pad(sums, (0, -sums.shape[2] % LANES)).reshape(taps, -1)
    full = torch.full((1, sums.shape[1]), taps * shape.in_channels, dtype=torch.int32, device=sums.device)
    if halve:  # sum a w = (sum s w + sum w) / 2 with a = (s + 1) / 2
        full = (full + sums.sum(0, dtype=torch.int32)) // 2
    return torch.cat([full, sums])
