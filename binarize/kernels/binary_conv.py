"""A binary convolution as plain data: what every backend computes, with no nn.Module in it.

The layer's formula, for input x, timestep group g and a dot product of signs ``dot``::

    h   = silu(x * input_norm[0] + input_norm[1])       if an input norm is given, else x
    dot = conv(where(h >= threshold_g, 1, -1), sign(weight))    an exact integer; padding contributes 0
    y   = dot * scale * factor + offset                 + h if shortcut is FIRST
    y   = clamp(PReLU_g(y + shift_in_g) + shift_out_g)  + h if shortcut is LAST
    out = y + channel_bias + residual
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from binarize.kernels.bitpack import LANES, WORD, FilterShape

COEFFICIENTS = 6  # of an output channel: scale, factor, offset, shift_in, slope, shift_out


class Shortcut(IntEnum):
    """Where the layer's input is added."""

    NONE = 0
    LAST = 1  # after the activation and the clamp
    FIRST = 2  # before the activation


class Geometry(NamedTuple):
    """How a convolution moves over its input. Padding is applied after the sign."""

    stride: tuple[int, int] = (1, 1)  # (height, width)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)  # (left, right, top, bottom)
    dilation: tuple[int, int] = (1, 1)  # (height, width)

    def output(self, height: int, width: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the output."""
        left, right, top, bottom = self.pad
        out_height = height + top + bottom - self.dilation[0] * (kernel[0] - 1) - 1
        out_width = width + left + right - self.dilation[1] * (kernel[1] - 1) - 1
        return out_height // self.stride[0] + 1, out_width // self.stride[1] + 1

    @property
    def padding(self) -> tuple[int, int]:
        """(height, width) as torch.nn.functional.conv2d takes it, for padding that is the same on opposite sides."""
        return self.pad[2], self.pad[0]

    def keeps_size(self, kernel: tuple[int, int]) -> bool:
        """Return whether the output has the height and width of the input, whatever they are."""
        (left, right, top, bottom), (dh, dw) = self.pad, self.dilation
        return self.stride == (1, 1) and (top + bottom, left + right) == (dh * (kernel[0] - 1), dw * (kernel[1] - 1))


SAME_3X3 = Geometry(pad=(1, 1, 1, 1))  # of a 3x3 convolution with padding 1


@dataclass(frozen=True)
class OutputTransform:
    """What follows the dot products of a binary convolution. None stands for a step that is left out.

    The kernels run the steps in the order of the fields; a shortcut is added before ``shift_in`` or at the end. Each
    ``then_*`` method returns the transform followed by a step, or None if the step would have to run earlier.
    """

    scale: Tensor | None = None  # ``(C_out,)``, the scale of the weights. It is not merged with ``factor``: both round.
    factor: Tensor | None = None  # ``(C_out,)``, of a BatchNorm or a channel scale
    offset: Tensor | None = None  # ``(C_out,)``, of a bias or a BatchNorm
    shift_in: Tensor | None = None  # ``(K, C_out)``, the RPReLU's first shift, one row per timestep group
    slope: Tensor | None = None  # ``(K, C_out)``, the RPReLU's slope below 0
    shift_out: Tensor | None = None  # ``(K, C_out)``, the RPReLU's last shift
    low: float = -math.inf  # lower limit
    high: float = math.inf  # upper limit
    shortcut: Shortcut = Shortcut.NONE  # where the layer's input is added

    @property
    def _activates(self) -> bool:
        rows = self.shift_in, self.slope, self.shift_out
        return any(row is not None for row in rows) or math.isfinite(self.low) or math.isfinite(self.high)

    def then_affine(self, factor: Tensor | None = None, offset: Tensor | None = None) -> OutputTransform | None:
        """Append ``y * factor + offset``, each ``(C_out,)`` or None."""
        if self._activates or self.shortcut:
            return None
        new_factor, new_offset = self.factor, self.offset
        if factor is not None:
            new_factor = factor if new_factor is None else new_factor * factor
            new_offset = None if new_offset is None else new_offset * factor
        if offset is not None:
            new_offset = offset if new_offset is None else new_offset + offset
        return replace(self, factor=new_factor, offset=new_offset)

    def then_rprelu(
        self, shift_in: Tensor | None = None, slope: Tensor | None = None, shift_out: Tensor | None = None
    ) -> OutputTransform | None:
        """Append ``prelu(y + shift_in, slope) + shift_out``, each ``(1 or K, C_out)`` or None."""
        if self._activates or self.shortcut == Shortcut.LAST:
            return None
        return replace(self, shift_in=shift_in, slope=slope, shift_out=shift_out)

    def then_clamp(self, low: float = -math.inf, high: float = math.inf) -> OutputTransform | None:
        """Append a clamp to ``[low, high]``."""
        if math.isfinite(self.low) or math.isfinite(self.high) or self.shortcut == Shortcut.LAST:
            return None
        return replace(self, low=low, high=high)

    def then_shortcut(self, position: Shortcut) -> OutputTransform | None:
        """Append the sum with the layer's input."""
        if self.shortcut or (position == Shortcut.FIRST and self._activates):
            return None
        return replace(self, shortcut=position)

    def rprelu(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three rows of the RPReLU: all of them, steps that are left out as 0, 1 and 0, or none."""
        rows = self.shift_in, self.slope, self.shift_out
        present = next((row for row in rows if row is not None), None)
        if present is None:
            return rows
        first, slope, last = (
            present.new_full((1, present.shape[1]), default) if row is None else row
            for row, default in zip(rows, (0.0, 1.0, 0.0), strict=True)
        )
        return first, slope, last

    def coefficients(self, groups: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the six coefficients of every output channel, ``(6, K, C_out)``."""
        table = torch.zeros(COEFFICIENTS, groups, channels, dtype=dtype, device=device)
        columns = (self.scale, self.factor, self.offset, self.shift_in, self.slope, self.shift_out)
        for i, (values, default) in enumerate(zip(columns, (1, 1, 0, 0, 1, 0), strict=True)):
            if values is not None:  # indexed, since what iterates over a tensor cannot be replayed with gradients
                table[i].copy_(values.detach())
            elif default:
                table[i].fill_(default)
        return table


@dataclass(frozen=True, eq=False)
class BinaryConv:
    """A binary convolution with one basis of weights, laid out for the kernels; made by `BinaryConv.lay_out`."""

    shape: FilterShape  # of the filters
    geometry: Geometry  # of the convolution
    filters: Tensor  # ``(groups * blocks, kh * kw * words, 16)`` int32, see `binarize.kernels.bitpack`
    padding_correction: Tensor  # ``(1 + kh * kw, lanes)`` int32, from `padding_correction`
    # ``(K, groups * words * 32)``: a bit is 1 where the input is at least this; spare ones are infinite
    thresholds: Tensor
    coefficients: Tensor  # ``(K, groups * blocks, 6, 16)``: scale, factor, offset, shift in, slope and shift out
    unsigned: bool = False  # whether activations are {0, 1} rather than {-1, +1}
    low: float = -math.inf  # lower limit of the output, before a shortcut that comes last
    high: float = math.inf  # upper limit
    shortcut: Shortcut = Shortcut.NONE  # where the input is added
    compiled: dict[Any, Any] = field(default_factory=dict, repr=False)  # what a backend keeps per input size

    @classmethod
    def lay_out(
        cls, filters: Tensor, shape: FilterShape, geometry: Geometry, thresholds: Tensor, transform: OutputTransform,
        *, unsigned: bool = False, correction: Tensor | None = None,
    ) -> BinaryConv:  # fmt: skip
        """Lay out one basis of packed words for the kernels.

        ``thresholds`` are ``(1 or K, C_in)``, in the dtype of the layer's arithmetic; ``transform`` has 1 or K rows.
        ``correction`` is from `padding_correction`, where it is known.
        """
        rows = [len(t) for t in (thresholds, transform.shift_in, transform.slope, transform.shift_out) if t is not None]
        groups, dtype, device = max(rows), thresholds.dtype, filters.device
        table = transform.coefficients(groups, shape.out_channels, dtype, device)
        return cls(
            shape, geometry, filters,
            padding_correction(filters, shape, unsigned) if correction is None else correction,
            lay_out_thresholds(thresholds.expand(groups, -1), shape),
            lay_out_coefficients(table, shape),
            unsigned, transform.low, transform.high, transform.shortcut,
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors that the operator takes: filters, padding correction, thresholds and coefficients."""
        return self.filters, self.padding_correction, self.thresholds, self.coefficients

    @property
    def sizes(self) -> list[int]:
        """The integers that the operator takes: shape and geometry, for `BinaryConv.from_sizes`."""
        shape = self.shape
        return [shape.out_channels, shape.in_channels, *shape.kernel, shape.groups, *itertools.chain(*self.geometry)]

    @staticmethod
    def from_sizes(sizes: Sequence[int]) -> tuple[FilterShape, Geometry]:
        """Return the shape and geometry that `sizes` was made from."""
        out_channels, in_channels, kh, kw, groups, sh, sw, left, right, top, bottom, dh, dw = sizes
        shape = FilterShape(out_channels, in_channels, (kh, kw), groups)
        return shape, Geometry((sh, sw), (left, right, top, bottom), (dh, dw))


def lay_out_coefficients(table: Tensor, shape: FilterShape) -> Tensor:
    """Return ``(K, groups * blocks, 6, 16)`` of coefficients ``(6, K, C_out)``."""
    group_out = shape.out_channels // shape.groups
    by_group = F.pad(table.view(COEFFICIENTS, -1, shape.groups, group_out), (0, -group_out % LANES))
    by_group[1, ..., group_out:] = 1  # the factor of a spare lane, so that kernels see at a glance whether all are 1
    by_group = by_group.view(COEFFICIENTS, -1, shape.groups * shape.blocks, LANES)
    return by_group.permute(1, 2, 0, 3).contiguous()


def channel_coefficients(laid_out: Tensor, shape: FilterShape) -> Tensor:
    """Return the inverse of `lay_out_coefficients`, ``(6, K, C_out)``."""
    by_group = laid_out.view(-1, shape.groups, shape.blocks, COEFFICIENTS, LANES).permute(3, 0, 1, 2, 4)
    by_group = by_group.reshape(COEFFICIENTS, -1, shape.groups, shape.blocks * LANES)
    return by_group[..., : shape.out_channels // shape.groups].reshape(COEFFICIENTS, -1, shape.out_channels)


def lay_out_thresholds(values: Tensor, shape: FilterShape) -> Tensor:
    """Return thresholds ``(K, groups * words * 32)`` of values ``(K, C_in * groups)``."""
    by_group = values.reshape(-1, shape.groups, shape.in_channels)
    return F.pad(by_group, (0, -shape.in_channels % WORD), value=math.inf).flatten(1).contiguous()


def padding_correction(filters: Tensor, shape: FilterShape, unsigned: bool) -> Tensor:
    """Return what turns counts of differing bits into dot products, at borders as well, ``(1 + kh * kw, lanes)`` int32.

    A zero has no 1-bit code, so taps outside the input are read as -1 and corrected with the sum of the tap's weights.
    The first row is the dot product of no differing bits; the others are each tap's sum of weights. Padding bits of
    ``filters`` must be 0, as `from_bits` leaves them.
    """
    taps = shape.kernel[0] * shape.kernel[1]
    if filters.is_meta:
        return torch.empty(1 + taps, shape.lanes, dtype=torch.int32, device="meta")
    ones = _count_ones(filters)  # unpacking the bits would take 32 times the memory of the words
    ones = ones.view(-1, taps, shape.words, LANES).sum(2, dtype=torch.int32)  # padding bits are 0
    lanes = torch.arange(shape.blocks * LANES, device=filters.device) < shape.out_channels // shape.groups
    sums = (2 * ones - shape.in_channels).transpose(0, 1).reshape(taps, shape.groups, -1) * lanes
    sums = sums.reshape(taps, -1)
    full = torch.full((1, sums.shape[1]), taps * shape.in_channels, dtype=torch.int32, device=sums.device)
    if unsigned:  # sum a w = (sum s w + sum w) / 2 with a = (s + 1) / 2
        full = (full + sums.sum(0, dtype=torch.int32)) // 2
    return torch.cat([full, sums])


def _count_ones(words: Tensor) -> Tensor:
    """Return the number of ones in each int32."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    halves = eights + (eights >> 8)
    return (halves + (halves >> 16)) & 0x3F
