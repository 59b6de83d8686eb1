"""The binary product: a convolution or matrix product with +-1 codes, scaled afterwards.

Scaling after the product keeps the dot products exact integers in float32 (below 2^24), so that a packed model, which
counts bits, evaluates the same float expression. The backward computes the published gradient: that of the scaled
weights ``w_hat = sum_k alpha_k codes_k``, which is the weight gradient of a plain convolution, not multiplied by alpha
again.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class BinaryWeight(NamedTuple):
    """The result of a weight binarizer: ``w_hat = sum_k scales[k] * codes[k]``."""

    surrogate: Tensor  # of w's shape; its autograd graph takes the gradient of ``w_hat`` to w. Its values are not used.
    codes: Tensor  # ``(n, *w.shape)`` in {-1, +1} (or 0 where sign(0) is 0), detached
    scales: Tensor  # ``(n, C_out)``, detached


_CONVOLUTIONS: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class _BinaryConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Tensor, codes: Tensor, scales: Tensor, *geometry: Any) -> Tensor:
        ctx.save_for_backward(x, codes, scales)
        ctx.geometry, ctx.weight_dtype = geometry, surrogate.dtype  # stride, padding, dilation and groups
        convolve, columns = _CONVOLUTIONS[x.dim()], scales.view(*scales.shape, *[1] * (x.dim() - 2))
        pairs = zip(codes, columns, strict=True)
        return reduce(add, (convolve(x, code, None, *geometry) * scale for code, scale in pairs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scales = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        weight = (codes * scales.view(*scales.shape, *[1] * (codes.dim() - 2))).sum(0)
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        if x.is_contiguous(memory_format=torch.channels_last):
            grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, needed
        )
        if grad_w is not None:
            grad_w = grad_w.to(ctx.weight_dtype)
        return grad_x, grad_w, None, None, None, None, None, None


class _BinaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes, scales)
        ctx.weight_dtype = surrogate.dtype
        return reduce(add, (F.linear(x, code) * scale for code, scale in zip(codes, scales, strict=True)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scales = ctx.saved_tensors
        weight = (codes * scales.unsqueeze(-1)).sum(0)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_w = None
        if ctx.needs_input_grad[1]:
            grad_w = (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
        return grad_x, grad_w, None, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the product of x: autocast's if it is enabled, else x's."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta":
        return x.dtype
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def binary_conv2d(
    x: Tensor, weight: BinaryWeight, stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1), groups: int = 1,
) -> Tensor:  # fmt: skip
    """Convolve two-valued activations with binary weights and scale the result.

    ``x`` is ``(B, C_in, H, W)``, in {-1, +1} or {0, 1}; ``weight`` has codes ``(n, C_out, C_in / groups, kh, kw)``.
    Padding adds zeros, which contribute 0. The result has x's dtype, or the autocast dtype under autocast.
    """
    return binary_conv(x, weight, stride, padding, dilation, groups)


def binary_conv(
    x: Tensor, weight: BinaryWeight, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
    groups: int,
) -> Tensor:  # fmt: skip
    """Return `binary_conv2d` for one, two or three dimensions, ``(B, C_in, ...)``."""
    dtype = compute_dtype(x)
    codes, scales = weight.codes.to(dtype), weight.scales.to(dtype)
    return _BinaryConv.apply(x.to(dtype), weight.surrogate, codes, scales, stride, padding, dilation, groups)


def binary_linear(x: Tensor, weight: BinaryWeight) -> Tensor:
    """Multiply two-valued activations ``(..., C_in)`` with binary weights, codes ``(n, C_out, C_in)``, and scale."""
    dtype = compute_dtype(x)
    codes, scales = weight.codes.to(dtype), weight.scales.to(dtype)
    return _BinaryLinear.apply(x.to(dtype), weight.surrogate, codes, scales)
