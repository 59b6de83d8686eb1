"""Full-precision modules through fused nodes where these are faster: GroupNorm with SiLU, and 3x3 convolutions."""

from __future__ import annotations

from typing import TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.deprecation import renamed_argument
from binarize.kernels import ops, training
from binarize.kernels.autograd import CompiledNormSiLUFunction, Conv3x3Function, NormSiLUFunction
from binarize.kernels.bitpack import LANES
from binarize.kernels.capture import is_captured
from binarize.kernels.row_sums import RowSums
from binarize.layers.declared import is_hooked, runs_own_forward

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def is_plain(module: nn.Module | None, kind: type[ModuleT]) -> TypeGuard[ModuleT]:
    """Return whether a module is exactly of one class and has no hooks, so that a fused node can replace it."""
    return type(module) is kind and runs_own_forward(module) and not is_hooked(module)


def is_conv3x3(module: nn.Module) -> bool:
    """Return whether `binarize.kernels.ops.conv3x3` computes a module: 3x3, padding 1, C_in a multiple of 16."""
    return _is_conv(module, 3) and module.in_channels % LANES == 0


def is_conv1x1(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a module is a plain nn.Conv2d that multiplies each pixel by a matrix."""
    return _is_conv(module, 1)


def _is_conv(module: nn.Module, side: int) -> TypeGuard[nn.Conv2d]:
    """Return whether a module is a plain nn.Conv2d with a square kernel that keeps the size of its input."""
    if not is_plain(module, nn.Conv2d):
        return False
    geometry = module.kernel_size, module.stride, module.dilation, module.padding, module.padding_mode, module.groups
    pad = side // 2
    return geometry == ((side, side), (1, 1), (1, 1), (pad, pad), "zeros", 1)


def norm_factors(
    norm: nn.GroupNorm, x: Tensor, channel_bias: Tensor | None = None, row_sums: RowSums | None = None
) -> Tensor:
    """Return `binarize.kernels.ops.norm_factors` of a GroupNorm."""
    return ops.norm_factors(x, channel_bias, norm.num_groups, norm.weight, norm.bias, norm.eps, row_sums=row_sums)


@renamed_argument("shift", "channel_bias")
def norm_silu(
    x: Tensor, norm: nn.GroupNorm, dropout: nn.Dropout | None = None, channel_bias: Tensor | None = None
) -> Tensor:
    """Return ``dropout(silu(norm(x + channel_bias)))``, keeping only the norm's input for the backward.

    As a chain of modules they keep three tensors and a mask. Without a gradient, on a CPU, the arithmetic is that of a
    packed network bit for bit, since another rounding would flip signs further on. A norm of another class than
    nn.GroupNorm, or one with hooks, is called as a module. ``channel_bias`` is ``(B, C)``.
    """
    drops = dropout is not None and dropout.training and dropout.p > 0
    plain = is_plain(norm, nn.GroupNorm) and not (x.is_meta or is_captured())
    compiled = plain and training.compiled(x) is not None and (dropout is None or is_plain(dropout, nn.Dropout))
    if compiled and not torch.is_grad_enabled() and not drops:
        return ops.norm_silu(x, norm_factors(norm, x, channel_bias))
    if channel_bias is not None:
        x = x + channel_bias[:, :, None, None]
        compiled = compiled and training.compiled(x) is not None
    fits = plain and norm.affine and torch.is_grad_enabled()
    if not fits or (x.dtype != norm.weight.dtype and x.device.type != "cpu"):
        y = F.silu(norm(x))
    elif compiled and norm.weight.dtype != torch.float64:
        p = dropout.p if drops and dropout is not None else 0.0
        out: Tensor = CompiledNormSiLUFunction.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, p)
        return out
    else:
        y = NormSiLUFunction.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return y if dropout is None else dropout(y)


def conv3x3(conv: nn.Module, x: Tensor) -> Tensor:
    """Return ``conv(x)``, by Winograd's algorithm where it is faster: with gradients, on CPUs with AVX-512.

    It computes a plain nn.Conv2d that `is_conv3x3`, with float32 weights, widths of 32 or more that are multiples of
    16, and channels_last images of at least 4x4; in bfloat16 unless the processor has AMX tiles. Any other module is
    called.
    """
    if torch.is_grad_enabled() and not (x.is_meta or is_captured()) and is_conv3x3(conv):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        kernels, weight = training.compiled(x), cast(Tensor, conv.weight)
        if kernels is not None and kernels.winograd.trains(x.new_empty((0, *x.shape[1:]), dtype=dtype), weight):
            out: Tensor = Conv3x3Function.apply(x.to(dtype), weight, conv.bias)
            return out
    return cast(Tensor, conv(x))
