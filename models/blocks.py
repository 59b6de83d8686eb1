"""The building blocks of SRUNet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.kernels.capture import is_captured
from binarize.kernels.row_sums import RowSums
from binarize.layers.fused import conv3x3, norm_silu
from binarize.packed.blocks import PackableBlock, PackedBlock, fuse, norm_silu_conv

_CPU: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # unknown to older versions of PyTorch
_AVX512_BF16 = bool(_CPU.get("avx512_bf16"))
_FEW_PIXELS = 2048  # The scores of all pairs of so many pixels fit into a CPU's cache.


class SinusoidalTime(nn.Module):
    """sin and cos of t exp(-ln(1e4) k / (C / 2)), sines first: the released networks' encoding of integer timesteps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, timesteps: Tensor) -> Tensor:
        """Encode ``(B,)`` floating-point timesteps as ``(B, C)``."""
        half = self.channels // 2
        k = torch.arange(half, dtype=timesteps.dtype, device=timesteps.device) / half
        angles = timesteps.unsqueeze(1) * torch.exp(-math.log(1e4) * k)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class SelfAttention(nn.Module):
    """Single-head self-attention over all pixels after a GroupNorm, scores / sqrt(C), added to its input (SR3)."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``(B, C, H, W)``; the shape stays."""
        q, k, v = (part.flatten(2).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=1))
        out: Tensor = self.out(attend(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(C)) v of three ``(B, N, C)``."""
    plain = q.device.type == "cpu" and not (torch.is_grad_enabled() or is_captured())
    if plain and _AVX512_BF16 and q.dtype == torch.bfloat16 and q.shape[1] <= _FEW_PIXELS:
        # On CPUs, PyTorch's operator multiplies in float32, which takes twice as long as products in bfloat16.
        scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=q.shape[2] ** -0.5)
        return torch.bmm(scores.softmax(dim=2), v)
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)


def _take_submodules(block: nn.Module, other: nn.Module) -> None:
    for name in ("fusion", "norm1", "conv1", "time", "norm2", "dropout", "conv2", "residual", "attention"):
        setattr(block, name, getattr(other, name))
    block.train(other.training)


class ResBlock(PackableBlock):
    """GroupNorm -> Swish -> conv, + time, GroupNorm -> Swish -> dropout -> conv, + residual.

    ``in_channels`` is the width of the concatenation where there is a skip, which ``fusion`` maps to ``out_channels``
    first if it is not None.
    """

    def __init__(
        self, in_channels: int, out_channels: int, time_channels: int, norm_groups: int, dropout: float,
        fusion: nn.Module | None = None, attention: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        width = in_channels if fusion is None else out_channels
        self.fusion = fusion
        self.norm1 = nn.GroupNorm(norm_groups, width)
        self.conv1 = nn.Conv2d(width, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.residual = nn.Conv2d(width, out_channels, 1) if width != out_channels else nn.Identity()
        self.attention = SelfAttention(out_channels, norm_groups) if attention else None

    def forward(self, x: Tensor, time: Tensor, skip: Tensor | None = None, time_bias: Tensor | None = None) -> Tensor:
        """Map ``(B, C_in, H, W)``, the embedding ``(B, C_time)`` and an optional skip to ``(B, C, H, W)``.

        ``time_bias`` is the output of ``time`` for SiLU of the embedding, ``(B, C)``, if it is known.
        """
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        if self.fusion is not None:
            x = self.fusion(x)
        h = conv3x3(self.conv1, norm_silu(x, self.norm1))
        bias = self.time(F.silu(time)) if time_bias is None else time_bias
        h = conv3x3(self.conv2, norm_silu(h, self.norm2, self.dropout, channel_bias=bias))
        h = h + self.residual(x)
        return h if self.attention is None else self.attention(h)

    def packed_form(self) -> PackedResBlock:
        """Return the block with the operations around its convolutions fused into them."""
        return PackedResBlock(self)


class PackedResBlock(PackedBlock):
    """A ResBlock of a packed network, with the same submodules; see `ResBlock` for its inputs."""

    norm1: nn.GroupNorm
    norm2: nn.GroupNorm
    conv1: nn.Module
    conv2: nn.Module
    time: nn.Module
    residual: nn.Module
    fusion: nn.Module | None
    attention: nn.Module | None

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        _take_submodules(self, block)

    def forward(self, x: Tensor, time: Tensor, skip: Tensor | None = None, time_bias: Tensor | None = None) -> Tensor:
        """Do what `ResBlock.forward` does."""
        if skip is not None:
            x = fuse(self.fusion, x, skip)
        sums = RowSums()
        h = norm_silu_conv(self.norm1, self.conv1, x, out_sums=sums)
        bias = self.time(F.silu(time)) if time_bias is None else time_bias
        h = norm_silu_conv(self.norm2, self.conv2, h, channel_bias=bias, residual=self.residual(x), x_sums=sums)
        return h if self.attention is None else self.attention(h)

    def unpacked_form(self) -> ResBlock:
        """Return a ResBlock with this block's submodules."""
        block = ResBlock.__new__(ResBlock)
        nn.Module.__init__(block)
        _take_submodules(block, self)
        return block


class EncoderLevel(nn.Module):
    """The ResBlocks of one resolution and the downsampler after them."""

    blocks: nn.ModuleList
    down: nn.Module | None

    def __init__(self, blocks: Sequence[ResBlock], down: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.down = down


class DecoderLevel(nn.Module):
    """The fusing ResBlocks of one resolution and the upsampler after them."""

    blocks: nn.ModuleList
    up: nn.Module | None

    def __init__(self, blocks: Sequence[ResBlock], up: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.up = up


def fine_detail(image: Tensor, factor: float) -> Tensor:
    """Return (image - its mean over 3x3 pixels) * factor; at borders the mean is over the pixels inside.

    The factor, a few hundredths for images in [0, 1], scales the differences to about one.
    """
    of_columns = _less_mean(image.mT).mT
    return (_less_mean(image) + F.avg_pool2d(of_columns, (1, 3), 1, (0, 1), count_include_pad=False)) * factor


def _less_mean(image: Tensor) -> Tensor:
    """Return the image minus its mean over 3 pixels of a row.

    It is a sum of differences of neighbours, which are small and nearly exact. Subtracting the mean itself would leave
    few correct digits, and `fine_detail` magnifies the error.
    """
    steps = image.diff()
    inside = 3 * F.avg_pool2d(torch.ones_like(image), (1, 3), 1, (0, 1))
    return (F.pad(steps, (1, 0)) - F.pad(steps, (0, 1))) / inside
