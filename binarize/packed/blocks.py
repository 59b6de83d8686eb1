"""Blocks of a packed network: operations around a convolution are fused into it.

Between two convolutions a U-Net normalises, activates, adds and concatenates. Each of these is a pass over the image
that takes longer than a packed convolution. These functions do the same arithmetic in fewer passes, and speed up
full-precision convolutions as well.

`binarize.pack` replaces every `PackableBlock` by its packed form, and `binarize.unpack` puts it back.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.kernels.ops import conv3x3, norm_silu, shuffle
from binarize.kernels.product import compute_dtype
from binarize.kernels.row_sums import RowSums
from binarize.layers.fused import is_conv1x1, is_conv3x3, is_plain, norm_factors
from binarize.layers.structure import CSFusion, sum_convs
from binarize.packed.layers import PackedConv2d


class PackableBlock(nn.Module):
    """Base class of blocks that have a faster form in a packed network."""

    @abstractmethod
    def packed_form(self) -> PackedBlock:
        """Return a block with the same submodules under the same names that computes the same in fewer passes."""


class PackedBlock(nn.Module):
    """Base class of the packed forms of blocks."""

    @abstractmethod
    def unpacked_form(self) -> PackableBlock:
        """Return the block that this one replaces, with the same submodules."""


def needs_gradient(x: Tensor, *modules: nn.Module) -> bool:
    """Return whether modules have to compute a gradient, which fused operators do not."""
    trained = x.requires_grad or any(p.requires_grad for module in modules for p in module.parameters())
    return trained and torch.is_grad_enabled()


def norm_silu_conv(
    norm: nn.GroupNorm, conv: nn.Module, x: Tensor, channel_bias: Tensor | None = None, residual: Tensor | None = None,
    x_sums: RowSums | None = None, out_sums: RowSums | None = None,
) -> Tensor:  # fmt: skip
    """Return ``conv(silu(norm(x + channel_bias))) + residual``; the bias is ``(B, C_in)``.

    ``x_sums`` are the row sums of x, if known. ``out_sums`` receives those of the output.
    """
    if not is_plain(norm, nn.GroupNorm):
        out: Tensor = conv(F.silu(norm(x if channel_bias is None else x + channel_bias[:, :, None, None])))
        return out if residual is None else out + residual
    factors = norm_factors(norm, x, channel_bias, x_sums)
    if isinstance(conv, PackedConv2d):
        # Hooks and other forward methods may change the output in place, and know no row sums.
        plain = is_plain(conv, PackedConv2d) and not nn.modules.module._has_any_global_hook()
        packed: Tensor = conv(x, factors, residual, out_sums) if plain else conv(x, factors, residual)
        return packed
    if is_conv3x3(conv):
        bias = cast("Tensor | None", conv.bias)
        return conv3x3(x, cast(Tensor, conv.weight), bias, factors, residual, row_sums=out_sums)
    y: Tensor = conv(norm_silu(x, factors))
    return y if residual is None else y + residual


def fuse(fusion: nn.Module | None, hidden: Tensor, skip: Tensor) -> Tensor:
    """Return a decoder's fusion of hidden and skip, without concatenating them first if it can."""
    if not isinstance(fusion, CSFusion) or fusion.form != "published" or hidden.shape[1] % 2 or skip.shape[1] % 2:
        joined = torch.cat([hidden, skip], dim=1)
        return joined if fusion is None else fusion(joined)
    first, second = fusion.convs
    if not (is_conv1x1(first) and is_conv1x1(second)):
        return sum_convs(fusion.convs, shuffle(hidden, skip))
    # Two full-precision 1x1 convolutions of shuffled channels are two products with shuffled weights. The first one is
    # a convolution, which adds the bias to its sums; `addmm` would first fill its output with the bias.
    half, dtype = hidden.shape[1] // 2, compute_dtype(hidden)
    weights = torch.stack([first.weight, second.weight], dim=2)[..., 0, 0].to(dtype)
    of_hidden, of_skip = weights[:, :half].flip(2).flatten(1), weights[:, half:].flatten(1)
    hidden, skip = hidden.to(dtype), skip.to(dtype)
    biases = [conv.bias for conv in (first, second) if conv.bias is not None]
    bias = sum(biases[1:], biases[0]).to(dtype) if biases else None
    out = F.conv2d(hidden, of_hidden[:, :, None, None], bias).permute(0, 2, 3, 1)
    pixels = out.reshape(-1, out.shape[3]).addmm_(skip.permute(0, 2, 3, 1).reshape(-1, skip.shape[1]), of_skip.T)
    return pixels.view(out.shape).permute(0, 3, 1, 2)
