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

from binarize.kernels.capture import is_transformed


class BinaryWeight(NamedTuple):
    """The result of a weight binarizer: ``w_hat = sum_k scales[k] * codes[k]``."""

    surrogate: Tensor  # of w's shape; its autograd graph takes the gradient of ``w_hat`` to w. Its values are not used.
    codes: Tensor  # ``(n, *w.shape)`` in {-1, +1} (or 0 where sign(0) is 0), detached
    scales: Tensor  # ``(n, C_out)``, detached


_CONVOLUTIONS: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class _ScaledCodes(torch.autograd.Function):
    """The scaled weights ``w_hat``, in the dtype of the product, whose gradient is passed on to the surrogate."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.dtype = surrogate.dtype
        return _scaled_sum(codes, scales)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None


class _BinaryConv(torch.autograd.Function):
    """The product with codes, scaled afterwards. Its gradients, of any order, are those of a product with ``w_hat``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_hat: Tensor, codes: Tensor, scales: Tensor, *geometry: Any) -> Tensor:
        ctx.save_for_backward(x, w_hat)
        ctx.geometry = geometry  # stride, padding, dilation and groups
        return _scaled_convs(x, codes, scales, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_hat = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        if x.is_contiguous(memory_format=torch.channels_last):
            grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
            grad, x, w_hat, None, stride, padding, dilation, False, [0] * len(stride), groups, needed
        )
        return grad_x, grad_w, None, None, None, None, None, None


class _BinaryLinear(torch.autograd.Function):
    """The product with codes, as `_BinaryConv`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_hat: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, w_hat)
        return _scaled_products(x, codes, scales)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_hat = ctx.saved_tensors
        grad_x = grad @ w_hat if ctx.needs_input_grad[0] else None
        grad_w = None
        if ctx.needs_input_grad[1]:
            grad_w = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return grad_x, grad_w, None, None


def _scaled_sum(codes: Tensor, scales: Tensor) -> Tensor:
    columns = scales.view(*scales.shape, *[1] * (codes.dim() - 2))
    return reduce(add, (code * scale for code, scale in zip(codes, columns, strict=True)))


def _scaled_convs(x: Tensor, codes: Tensor, scales: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    convolve, columns = _CONVOLUTIONS[x.dim()], scales.view(*scales.shape, *[1] * (x.dim() - 2))
    pairs = zip(codes, columns, strict=True)
    return reduce(add, (convolve(x, code, None, *geometry) * scale for code, scale in pairs))


def _scaled_products(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return reduce(add, (F.linear(x, code) * scale for code, scale in zip(codes, scales, strict=True)))


def _without_values(surrogate: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return weights that are 0 and have the surrogate's derivatives, or None if it has none."""
    if torch.jit.is_tracing() and not (surrogate.requires_grad and torch.is_grad_enabled()):
        return None
    return (surrogate - surrogate.detach()).to(dtype)


def scaled_weight(weight: BinaryWeight, dtype: torch.dtype) -> Tensor:
    """Return the scaled weights ``w_hat``, whose gradient is passed on to the surrogate."""
    codes, scales = weight.codes.to(dtype), weight.scales.to(dtype)
    if is_transformed():
        w_hat, zeros = _scaled_sum(codes, scales), _without_values(weight.surrogate, dtype)
        return w_hat if zeros is None else w_hat + zeros
    out: Tensor = _ScaledCodes.apply(weight.surrogate, codes, scales)
    return out


def float_product(x: Tensor, w_hat: Tensor, *geometry: Any) -> Tensor:
    """Multiply activations of many values with scaled weights: a convolution with a geometry, else a linear layer.

    One operator for any number of bases. Two-valued activations are multiplied with the codes instead, and scaled
    afterwards, which keeps the dot products whole numbers.
    """
    x = x.to(w_hat.dtype)
    return _CONVOLUTIONS[x.dim()](x, w_hat, None, *geometry) if geometry else F.linear(x, w_hat)


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
    x, codes, scales = x.to(dtype), weight.codes.to(dtype), weight.scales.to(dtype)
    geometry = stride, padding, dilation, groups
    if is_transformed():
        y, zeros = _scaled_convs(x, codes, scales, geometry), _without_values(weight.surrogate, dtype)
        return y if zeros is None else y + _CONVOLUTIONS[x.dim()](x, zeros, None, *geometry)
    if not torch.is_grad_enabled():
        return _scaled_convs(x, codes, scales, geometry)
    return _BinaryConv.apply(x, _ScaledCodes.apply(weight.surrogate, codes, scales), codes, scales, *geometry)


def binary_linear(x: Tensor, weight: BinaryWeight) -> Tensor:
    """Multiply two-valued activations ``(..., C_in)`` with binary weights, codes ``(n, C_out, C_in)``, and scale."""
    dtype = compute_dtype(x)
    x, codes, scales = x.to(dtype), weight.codes.to(dtype), weight.scales.to(dtype)
    if is_transformed():
        y, zeros = _scaled_products(x, codes, scales), _without_values(weight.surrogate, dtype)
        return y if zeros is None else y + F.linear(x, zeros)
    if not torch.is_grad_enabled():
        return _scaled_products(x, codes, scales)
    return _BinaryLinear.apply(x, _ScaledCodes.apply(weight.surrogate, codes, scales), codes, scales)
