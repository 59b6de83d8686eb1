"""Full-precision 3x3 convolutions in training: what is left to wait for once the others are binary.

On a CPU with the kernels of `binarize.packed` they run by Winograd's algorithm, forward and backward: on tiles of 2 x 2
outputs, which rounds no more than torch's convolution does, and where the network runs in bfloat16 on tiles of 4 x 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from binarize.layers import steps
from binarize.layers.block import is_plain
from binarize.packed._wide import is_wide


class _WideConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased, quick = bias is not None, steps.fast(x)
        assert quick is not None
        return quick.wide_conv(x, weight, bias, coarse=x.dtype == torch.bfloat16)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        coarse = x.dtype == torch.bfloat16
        inner, source = (t.float().contiguous(memory_format=torch.channels_last) for t in (grad, x))
        of_x, of_weight = steps.product_backward(
            inner, source, weight, steps.SAME_3X3, ctx.needs_input_grad[:2], coarse=coarse
        )
        of_bias = inner.sum((0, 2, 3)) if ctx.biased else None
        return None if of_x is None else of_x.to(x.dtype), of_weight, of_bias


def conv3x3(conv: nn.Module, x: Tensor) -> Tensor:
    """Return ``conv(x)``, by the module where it is not a convolution that the kernels do, or nothing is learnt.

    Args:
        conv: Any module; a plain nn.Conv2d of 3x3 taps and padding 1, whose widths are multiples of 16 and whose
            weights are float32, goes through the kernels.
        x: ``(B, C_in, H, W)``.
    """
    learning = torch.is_grad_enabled() and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta)
    if learning and is_plain(conv, nn.Conv2d) and is_wide(conv):
        cast = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
        quick = steps.fast(cast)
        if quick is not None and quick.wide_fits(cast, conv.weight, steps.SAME_3X3):
            out: Tensor = _WideConv.apply(cast, conv.weight, conv.bias)
            return out
    return conv(x)
