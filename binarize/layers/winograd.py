"""Full-precision 3x3 convolutions in training: what is left to wait for once the others are binary.

On a CPU with the kernels of `binarize.packed` they run by Winograd's algorithm, forward and backward: on tiles of 2 x 2
outputs, which rounds no more than torch's convolution does, and where the network runs in bfloat16 on tiles of 4 x 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from binarize.kernels import training as steps
from binarize.layers.fused_conv import is_plain


class _WideConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        quick = steps.fast(x)
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
        of_bias = inner.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return None if of_x is None else of_x.to(x.dtype), of_weight, of_bias


def conv3x3(conv: nn.Module, x: Tensor) -> Tensor:
    """Return ``conv(x)``; through the kernels where they are faster, which is where gradients are recorded on a CPU.

    They do a plain nn.Conv2d of 3x3 taps and padding 1 with float32 weights whose widths are multiples of 16 and at
    least 32, on channels_last pictures of at least 4x4, on processors with AVX-512; in bfloat16 where these have no AMX
    tiles. Everything else, and a module with hooks, is called.

    Args:
        conv: Any module.
        x: ``(B, C_in, H, W)``.
    """
    from binarize.kernels.winograd import is_wide  # which imports the layers

    learning = torch.is_grad_enabled() and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta)
    if learning and is_plain(conv, nn.Conv2d) and is_wide(conv):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        quick, like = steps.fast(x), x.new_empty((0, *x.shape[1:]), dtype=dtype)
        if quick is not None and quick.wide_fits(like, conv.weight, steps.SAME_3X3):
            out: Tensor = _WideConv.apply(x.to(dtype), conv.weight, conv.bias)
            return out
    return conv(x)
