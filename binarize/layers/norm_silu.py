"""GroupNorm, SiLU and dropout as one node of the autograd graph, which keeps its input alone.

As a chain of modules they keep three tensors and a mask. Where numba is installed, on a CPU, the node works in
channels_last memory in two passes each way, and draws the dropout's mask from a hash of the element's number under two
keys from torch's generator, so that it can be drawn again in the backward. Elsewhere it runs torch's operators, and
dropout stays the module that it is.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from binarize.kernels import training as steps
from binarize.layers.fused_conv import is_plain


class _FastNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, p: float) -> Tensor:
        ctx.fast = fast = cast(Any, steps.fast(x))
        ctx.groups, ctx.drop, normed = groups, fast.dropping(p), fast.moments(x, groups, eps)
        ctx.save_for_backward(x, weight, bias, *normed)
        return fast.norm_silu(x, normed, weight, bias, ctx.drop)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        fast, x = ctx.fast, x.contiguous(memory_format=torch.channels_last)  # a hook may give back another layout
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        grads = fast.norm_silu_backward(grad, x, fast.Normed(mean, rstd), weight, bias, ctx.drop, ctx.groups)
        return *grads, None, None, None


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        sizes = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], groups
        out, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.sizes, ctx.eps = sizes, eps
        return F.silu(out, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        batch, channels, pixels, groups = ctx.sizes
        out = torch.native_group_norm(x, weight, bias, batch, channels, pixels, groups, ctx.eps)[0]
        inner = torch.ops.aten.silu_backward(grad, out)
        del out
        grads = torch.ops.aten.native_group_norm_backward(
            inner, x, mean, rstd, weight, *ctx.sizes, ctx.needs_input_grad[:3]
        )
        return *grads, None, None


def norm_silu(x: Tensor, norm: nn.GroupNorm, dropout: nn.Dropout | None = None, shift: Tensor | None = None) -> Tensor:
    """Return dropout(silu(norm(x + shift))), keeping the norm's input alone for the backward.

    Without a gradient, on a CPU, it is the arithmetic that a packed network uses, to the last bit: another rounding
    would turn signs over further on.

    Args:
        x: ``(B, C, H, W)``.
        norm: The GroupNorm; with hooks, or of another class, it is called as the module that it is.
        dropout: The dropout, or None.
        shift: ``(B, C)``, added to every pixel, or None.

    Returns:
        ``(B, C, H, W)``.
    """
    if _as_packed(x, norm, dropout):
        from binarize.kernels.norm import factors_of
        from binarize.kernels.norm import norm_silu as apply

        return apply(x, factors_of(norm, x, shift))
    if shift is not None:
        x = x + shift[:, :, None, None]
    drops = dropout is not None and dropout.training and dropout.p > 0
    one_node = (
        is_plain(norm, nn.GroupNorm)
        and norm.affine
        and torch.is_grad_enabled()
        and not (torch.compiler.is_compiling() or x.is_meta or torch.jit.is_tracing())
    )
    if not one_node or (x.dtype != norm.weight.dtype and x.device.type != "cpu"):
        y = F.silu(norm(x))
    elif (
        steps.fast(x) is not None
        and (not drops or is_plain(dropout, nn.Dropout))
        and norm.weight.dtype != torch.float64
    ):
        p = dropout.p if drops and dropout is not None else 0.0
        out: Tensor = _FastNormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, p)
        return out
    else:
        y = _NormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return y if dropout is None else dropout(y)


def _as_packed(x: Tensor, norm: nn.GroupNorm, dropout: nn.Dropout | None) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_meta or not is_plain(norm, nn.GroupNorm):
        return False
    if dropout is not None and (dropout.training or not is_plain(dropout, nn.Dropout)):
        return False
    return steps.fast(x) is not None
