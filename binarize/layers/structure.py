"""Dimension-consistent structure: CP-Down, CP-Up and CS-Fusion, and the plainer blocks they are compared with.

They consist of plain nn.Conv2d, so they work in full precision and any method can binarize them. Every convolution in
CP-Down, CP-Up and CS-Fusion keeps its width, so that an identity shortcut can run around it (Chen et al. 2024,
BI-DiffSR, sections 3.2 and 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.backends import cpu_kernels
from binarize.kernels.bitpack import LANES
from binarize.kernels.capture import is_captured
from binarize.kernels.ops import skips_dispatcher
from binarize.layers.shortcut import pool_channels


class AccumulatingConv(nn.Module):
    """Base class of convolutions that can add their output to a tensor while they write it."""

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """Return ``total + self(x)``."""
        return cast(Tensor, total + self(x))


def sum_convs(convs: nn.ModuleList, parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of ``conv(part)`` over the pairs."""
    total: Tensor = convs[0](parts[0])
    for conv, part in zip(convs[1:], parts[1:], strict=True):
        total = conv.add_to(total, part) if isinstance(conv, AccumulatingConv) else total + conv(part)
    return total


def pixel_shuffle(parts: Sequence[Tensor]) -> Tensor:
    """Return ``F.pixel_shuffle`` by 2 of the concatenation of images along their channels."""
    first = parts[0]
    kind = first.dtype, first.shape[0], first.shape[2:]
    alike = all((x.dtype, x.shape[0], x.shape[2:]) == kind and x.shape[1] % 4 == 0 for x in parts)
    if not (alike and all(map(_copies_faster, parts))):
        return F.pixel_shuffle(torch.cat(list(parts), dim=1), 2)
    widths = [part.shape[1] // 4 for part in parts]
    size = first.shape[0], sum(widths), 2 * first.shape[2], 2 * first.shape[3]
    out = torch.empty(size, dtype=first.dtype, device=first.device, memory_format=torch.channels_last)
    for target, part in zip(out.split(widths, dim=1), parts, strict=True):
        if kernels := _kernels(target, part):
            kernels.pixel_shuffle(part, target)
            continue
        for pixels, phase in _phases(target, part):
            pixels.copy_(phase)
    return out


def pixel_unshuffle(x: Tensor) -> Tensor:
    """Return ``F.pixel_unshuffle`` by 2."""
    if not _copies_faster(x) or x.shape[2] % 2 or x.shape[3] % 2:
        return F.pixel_unshuffle(x, 2)
    size = x.shape[0], 4 * x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if kernels := _kernels(x, out):
        kernels.pixel_shuffle(out, x, back=True)
        return out
    for pixels, phase in _phases(x, out):
        phase.copy_(pixels)
    return out


def _kernels(image: Tensor, shuffled: Tensor) -> Any:
    """Return the compiled kernels if they can copy between an image and its shuffled form, else None."""
    fits = image.shape[1] % LANES == 0 and image.numel() > 0 and skips_dispatcher(image, shuffled)
    return cpu_kernels(image) if fits else None


def _copies_faster(x: Tensor) -> bool:
    """Return whether copies take less time than PyTorch's operator: without a gradient, in channels_last, on a CPU."""
    differentiated = torch.is_grad_enabled() and x.requires_grad
    plain = type(x) is Tensor and x.dim() == 4 and x.device.type == "cpu" and not (differentiated or is_captured())
    return plain and x.is_contiguous(memory_format=torch.channels_last)


def _phases(image: Tensor, shuffled: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the four phases of an image ``(B, C, 2 H, 2 W)``, and the same pixels of ``(B, 4 C, H, W)``."""
    for y in range(2):
        for x in range(2):
            yield image[:, :, y::2, x::2], shuffled[:, 2 * y + x :: 4]


class CPDown(nn.Module):
    """Channel-preserving downsampling: split the channels, one convolution each, sum, PixelUnshuffle(2).

    ``(B, C, H, W)`` with even H and W becomes ``(B, 4 C / s, H / 2, W / 2)`` with s ``splits``, of which C is a
    multiple: 2 double the width, as published; 4 keep it.
    """

    def __init__(self, channels: int, splits: int = 2) -> None:
        super().__init__()
        if splits < 1 or channels % splits:
            raise BinarizeError(f"CPDown: {channels} channels cannot be split into {splits} equal parts.")
        width = channels // splits
        self.in_channels, self.out_channels = channels, 4 * width
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(splits))

    def forward(self, x: Tensor) -> Tensor:
        """Halve the spatial size."""
        return pixel_unshuffle(sum_convs(self.convs, x.chunk(len(self.convs), dim=1)))


class CPUp(nn.Module):
    """Channel-preserving upsampling: several convolutions of the same input, concatenated, PixelShuffle(2).

    ``(B, C, H, W)`` becomes ``(B, m C / 4, 2 H, 2 W)`` with m ``branches``: 2 halve the width, as published; 4 keep it.
    """

    def __init__(self, channels: int, branches: int = 2) -> None:
        super().__init__()
        if branches < 1 or (branches * channels) % 4:
            raise BinarizeError(f"CPUp: {branches} branches of {channels} channels are not a multiple of 4 channels.")
        self.in_channels, self.out_channels = channels, branches * channels // 4
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        """Double the spatial size."""
        return pixel_shuffle([conv(x) for conv in self.convs])


class _Shuffle(torch.autograd.Function):
    """The published mixing as one node. Its backward fills one tensor; that of slices would add up four padded ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden: int) -> tuple[Tensor, ...]:
        ctx.hidden, ctx.channels = hidden, x.shape[1]
        return tuple(torch.cat(pair, dim=1) for pair in _opposite_parities(x, hidden))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        b, _, h, w = grads[0].shape
        channels_last = grads[0].is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty((b, ctx.channels, h, w), dtype=grads[0].dtype, device=grads[0].device, memory_format=layout)
        for (first, second), grad in zip(_opposite_parities(out, ctx.hidden), grads, strict=True):
            first.copy_(grad[:, : first.shape[1]])
            second.copy_(grad[:, first.shape[1] :])
        return out, None


def _opposite_parities(x: Tensor, hidden: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    h, s = x[:, :hidden], x[:, hidden:]
    return (h[:, 1::2], s[:, 0::2]), (h[:, 0::2], s[:, 1::2])


class CSFusion(nn.Module):
    """Channel-shuffle fusion of [hidden, skip]: mix both so that their distributions match, then convolve 1x1 and add.

    The concatenation ``(B, h + s, H, W)`` becomes ``(B, C, H, W)``. With n = (h + s) / C groups:

    - n = 2, as published: f1 = [hidden odd channels, skip even], f2 = [hidden even, skip odd] (counted from 0), then
      conv1(f1) + conv2(f2). Equation 3 of the paper pairs equal parities; its code and every released checkpoint pair
      opposite ones, as this does.
    - another whole n: f_j is every n-th channel of the concatenation, starting at j.
    - otherwise one 1x1 convolution from h + s to C channels.
    """

    def __init__(self, hidden_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.hidden_channels, self.skip_channels, self.out_channels = hidden_channels, skip_channels, out_channels
        total = hidden_channels + skip_channels
        whole = total % out_channels == 0 and total // out_channels >= 2
        self.terms = total // out_channels if whole else 1
        self.form = "general" if not whole else "published" if self.terms == 2 else "strided"
        width = out_channels if whole else total
        self.convs = nn.ModuleList(nn.Conv2d(width, out_channels, 1) for _ in range(self.terms))

    def mix(self, x: Tensor) -> list[Tensor]:
        """Return the shuffled inputs of the convolutions."""
        if self.form == "published":
            if torch.is_grad_enabled() and x.requires_grad and not is_captured():
                return list(_Shuffle.apply(x, self.hidden_channels))
            return [torch.cat(pair, dim=1) for pair in _opposite_parities(x, self.hidden_channels)]
        if self.form == "strided":
            return [x[:, j :: self.terms] for j in range(self.terms)]
        return [x]

    def forward(self, x: Tensor) -> Tensor:
        """Fuse the concatenation of hidden and skip."""
        return sum_convs(self.convs, self.mix(x))


class AddFusion(nn.Module):
    """hidden + skip, without parameters; different widths are pooled to the output's."""

    def __init__(self, hidden_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.hidden_channels, self.out_channels = hidden_channels, out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Fuse the concatenation of hidden and skip."""
        hidden, skip = x[:, : self.hidden_channels], x[:, self.hidden_channels :]
        return pool_channels(hidden, self.out_channels) + pool_channels(skip, self.out_channels)


class ConcatFusion(nn.Module):
    """One 1x1 convolution of the concatenation ``(B, h + s, H, W)`` to C channels."""

    def __init__(self, hidden_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(hidden_channels + skip_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Fuse the concatenation of hidden and skip."""
        return cast(Tensor, self.conv(x))


class SplitFusion(nn.Module):
    """One 1x1 convolution on each of hidden and skip, added: CS-Fusion without the shuffle."""

    def __init__(self, hidden_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        self.convs = nn.ModuleList(nn.Conv2d(width, out_channels, 1) for width in (hidden_channels, skip_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Fuse the concatenation of hidden and skip."""
        return sum_convs(self.convs, [x[:, : self.hidden_channels], x[:, self.hidden_channels :]])


class _Resampler(nn.Module):
    """One 3x3 convolution, before or after a change of the spatial size."""

    def __init__(self, channels: int, width: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.conv = nn.Conv2d(channels, width, 3, stride, padding=1)


def _even(name: str, channels: int) -> int:
    if channels % 2:
        raise BinarizeError(f"{name}: needs an even number of channels; got {channels}.")
    return channels


class PixelDown(_Resampler):
    """One convolution C -> C / 2, then PixelUnshuffle(2): (B, C, H, W) -> (B, 2 C, H / 2, W / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__(_even("PixelDown", channels), channels // 2, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the spatial size."""
        return pixel_unshuffle(self.conv(x))


class PixelUp(_Resampler):
    """One convolution C -> 2 C, then PixelShuffle(2): (B, C, H, W) -> (B, C / 2, 2 H, 2 W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(_even("PixelUp", channels), 2 * channels, channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Double the spatial size."""
        return pixel_shuffle([self.conv(x)])


class ConvDown(_Resampler):
    """SR3's downsampling, a stride-2 convolution: (B, C, H, W) -> (B, C, H / 2, W / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the spatial size."""
        return cast(Tensor, self.conv(x))


class ConvUp(_Resampler):
    """SR3's upsampling, nearest neighbour then a convolution: (B, C, H, W) -> (B, C, 2 H, 2 W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Double the spatial size."""
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2, mode="nearest")))
