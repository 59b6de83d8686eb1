"""Whole blocks of a packed network: what stands around its convolutions is folded into them.

Between two convolutions a U-Net normalises, activates, adds and concatenates, each a pass over the picture, and each
longer than a packed convolution. These functions do the same arithmetic in fewer passes. Full-precision convolutions
profit as well.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from binarize.kernels.norm import factors_of, norm_silu, shuffle
from binarize.kernels.winograd import is_wide, wide_conv
from binarize.layers.structure import CSFusion, accumulate
from binarize.packed.layers import PackedConv2d


def norm_silu_conv(
    norm: nn.GroupNorm, conv: nn.Module, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return ``conv(silu(norm(x + shift))) + residual``.

    Args:
        norm: GroupNorm.
        conv: A packed or any other convolution.
        x: ``(B, C_in, H, W)``.
        shift: ``(B, C_in)`` or None.
        residual: ``(B, C_out, H', W')`` or None.
    """
    factors = factors_of(norm, x, shift)
    if isinstance(conv, PackedConv2d) and conv.absorbs:
        packed: Tensor = conv(x, factors, None, residual)
        return packed
    if is_wide(conv):
        bias = cast(Tensor | None, conv.bias)
        wide: Tensor = wide_conv(x, cast(Tensor, conv.weight), bias, factors, residual)
        return wide
    y: Tensor = conv(norm_silu(x, factors))
    return y if residual is None else y.add_(residual)


def fuse(fusion: nn.Module | None, hidden: Tensor, skip: Tensor) -> Tensor:
    """Return what a decoder's fusion makes of hidden and skip, without their concatenation where it can.

    Two full-precision 1x1 convolutions of a shuffle are two matrix products of what was shuffled, with weights
    shuffled.
    """
    if not isinstance(fusion, CSFusion) or fusion.form != "published" or hidden.shape[1] % 2 or skip.shape[1] % 2:
        joined = torch.cat([hidden, skip], dim=1)
        return joined if fusion is None else fusion(joined)
    first, second = fusion.convs
    if type(first) is not nn.Conv2d or type(second) is not nn.Conv2d:
        one, two = shuffle(hidden, skip)
        return accumulate(second, two, first(one))
    half = hidden.shape[1] // 2
    weights = [conv.weight.flatten(1) for conv in (first, second)]
    of_hidden = torch.stack([weights[1][:, :half], weights[0][:, :half]], dim=2).flatten(1)
    of_skip = torch.stack([weights[0][:, half:], weights[1][:, half:]], dim=2).flatten(1)
    pixels = [x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in (hidden, skip)]
    if first.bias is None or second.bias is None:
        out = pixels[0] @ of_hidden.T
    else:
        out = torch.addmm(first.bias + second.bias, pixels[0], of_hidden.T)
    out.addmm_(pixels[1], of_skip.T)
    batch, _, height, width = hidden.shape
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2)
