"""GroupNorm and SiLU in two passes: the statistics, then everything else in whatever reads the picture next.

GroupNorm is x * factor + offset with a factor and an offset for each sample and channel. `norm_factors` finds them in
one pass over x; the packed convolution (or `norm_silu`, in front of a full-precision one) applies them while it reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.kernels import backends
from binarize.kernels.inputs import check_devices, check_shape
from binarize.kernels.operator import operator


@operator()
def norm_factors(
    x: Tensor, row: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return what makes GroupNorm of ``x + row`` a multiplication and an addition.

    Args:
        x: ``(B, C, H, W)``.
        row: ``(B, C)``, added to every pixel before the norm, or None.
        groups: Of GroupNorm.
        weight: ``(C,)`` of GroupNorm.
        bias: ``(C,)`` of GroupNorm.
        eps: Of GroupNorm.

    Returns:
        ``(2, B, C)``, factors and offsets: ``group_norm(x + row) = x * factors + offsets``. float32, or float64 for
        float64.
    """
    check_devices("GroupNorm", x, row, weight, bias)
    check_shape("GroupNorm: the input", x, (None, None, None, None))
    check_shape("GroupNorm: row", row, (x.shape[0], x.shape[1]))
    for name, values in (("weight", weight), ("bias", bias)):
        check_shape(f"GroupNorm: {name}", values, (x.shape[1],))
    kernels = backends.kernels_for(x)
    if kernels is not None:
        found: Tensor = kernels.norm_factors(x, row, groups, weight, bias, eps)
        return found
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    mean, square = wide.mean((2, 3)).double(), wide.square().mean((2, 3)).double()
    if row is not None:
        shift = row.to(mean.dtype)
        square = square + 2 * shift * mean + shift * shift
        mean = mean + shift
    batch, channels = mean.shape
    by_group = (batch, groups, channels // groups)
    group_mean, group_square = mean.view(by_group).mean(2), square.view(by_group).mean(2)
    scale = torch.rsqrt((group_square - group_mean.square()).clamp_min(0) + eps)
    factors = scale.repeat_interleave(channels // groups, 1)
    offsets = (-group_mean * scale).repeat_interleave(channels // groups, 1)
    if weight is not None:
        factors, offsets = factors * weight, offsets * weight
    if bias is not None:
        offsets = offsets + bias
    if row is not None:
        offsets = offsets + row * factors
    return torch.stack([factors, offsets]).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


@norm_factors.register_fake
def _(x, row, groups, weight, bias, eps):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((2, x.shape[0], x.shape[1]), dtype=dtype)


@operator()
def norm_silu(x: Tensor, norm: Tensor) -> Tensor:
    """Return silu(x * norm[0] + norm[1]).

    Args:
        x: ``(B, C, H, W)``.
        norm: ``(2, B, C)``, from `norm_factors`.

    Returns:
        ``(B, C, H, W)`` in x's dtype, channels last.
    """
    check_devices("SiLU", x, norm)
    check_shape("SiLU: norm", norm, (2, x.shape[0], x.shape[1]))
    kernels = backends.kernels_for(x)
    if kernels is not None:
        out: Tensor = kernels.norm_silu(x, norm)
        return out
    factors, offsets = norm[:, :, :, None, None]
    out = F.silu(x.to(norm.dtype) * factors + offsets).to(x.dtype)
    return out.contiguous(memory_format=torch.channels_last)


@norm_silu.register_fake
def _(x, norm):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.channels_last)


@operator()
def shuffle(hidden: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Return CS-Fusion's two mixtures: hidden's odd channels with skip's even ones, and the other way round.

    Args:
        hidden: ``(B, h, H, W)``, h even.
        skip: ``(B, s, H, W)``, s even.

    Returns:
        Twice ``(B, (h + s) / 2, H, W)``, channels last.
    """
    check_devices("CS-Fusion", hidden, skip)
    check_shape("CS-Fusion: the skip", skip, (hidden.shape[0], None, *hidden.shape[2:]))
    kernels = backends.cpu_kernels(hidden)
    if kernels is not None and hidden.shape[1] % 32 == 0 and skip.shape[1] % 32 == 0:
        first, second = kernels.unzip(hidden, skip)
        return first, second
    mixed = [torch.cat([hidden[:, 1 - i :: 2], skip[:, i::2]], dim=1) for i in range(2)]
    first, second = (m.contiguous(memory_format=torch.channels_last) for m in mixed)
    return first, second


@shuffle.register_fake
def _(hidden, skip):  # type: ignore[no-untyped-def]
    batch, channels, height, width = hidden.shape
    shape = (batch, (channels + skip.shape[1]) // 2, height, width)
    return tuple(hidden.new_empty(shape).to(memory_format=torch.channels_last) for _ in range(2))


def factors_of(norm: nn.GroupNorm, x: Tensor, row: Tensor | None = None) -> Tensor:
    """Return `norm_factors` of a GroupNorm."""
    return norm_factors(x, row, norm.num_groups, norm.weight, norm.bias, norm.eps)
