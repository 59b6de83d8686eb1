"""The element-wise steps of a binary convolution, forward and backward, and the product that they surround.

Each step is one function with the same meaning on every device. On a CPU, where memory traffic decides what training
costs, `binarize.kernels.cpu.elementwise` does each of them in one pass if numba is installed; here is the same in
PyTorch.

Rows of parameters are ``(R, C)`` with R = 1, or one row for each sample. Arithmetic is done in float32 where tensors
are half precision, else in their own dtype.
"""

from __future__ import annotations

import importlib
import platform
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from binarize.kernels.signs import SignZero, sign_

Surrogate = Literal["approx", "clip", "identity"]


class Geometry(NamedTuple):
    """What torch.nn.functional.conv2d calls by the same names."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


STEPS = 127  # of the magnitudes in [0, 1] that `encode` tells apart
_POINTWISE = Geometry((1, 1), (0, 0), (1, 1), 1)
SAME_3X3 = Geometry((1, 1), (1, 1), (1, 1), 1)  # with taps of 3 x 3


class Activation(NamedTuple):
    """Rows of an RPReLU."""

    shift_in: Tensor
    slope: Tensor
    shift_out: Tensor


def fast(first: Tensor, *others: Tensor | None) -> ModuleType | None:
    """Return `binarize.kernels.cpu.elementwise` if it takes these tensors and the backend is not plain torch."""
    for tensor in (first, *others):
        if tensor is not None and not (
            tensor.device.type == "cpu"
            and tensor.dtype in (torch.float32, torch.bfloat16, torch.int16, torch.uint8)
            and tensor.is_contiguous(memory_format=torch.channels_last)
        ):
            return None
    from binarize.packed import backends  # which imports the layers

    return _steps_cpu() if backends.cpu_kernels() is not None else None


@cache
def _steps_cpu() -> ModuleType:
    return importlib.import_module("binarize.kernels.cpu.elementwise")


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that element-wise arithmetic is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def broadcast(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Shape rows ``(R, C)`` for ``(B, C, H, W)``."""
    return rows.to(dtype).view(*rows.shape, 1, 1)


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """Return x + b in the wide dtype; x itself where there is nothing to do. ``x`` may come from `encode`."""
    if x.dtype == torch.uint8:
        return x.to(torch.float32).sub_(127.5).div_(STEPS)
    dtype = wide(x.dtype)
    return x.to(dtype) if shift is None else x + broadcast(shift, dtype)


def encode(x: Tensor, shift: Tensor | None) -> Tensor:
    """Return x + b in one byte: its sign, and its magnitude cut into 127 steps of [0, 1] with one more for all above.

    The middle of a step is at most 1/254 from what was there, which is 1/127 in max(0, 2 - 2|v|); the sign and whether
    the magnitude is above 1 are exact. The other functions take the result as ``x`` with a shift of 0.
    """
    quick = fast(x)
    if quick is not None:
        return quick.encode(x, shift)
    v = shifted(x, shift)
    size = v.abs()
    step = torch.where(size <= 1, (size * STEPS).floor_().clamp_max_(STEPS - 1), STEPS)
    return torch.where(v >= 0, 128 + step, STEPS - step).to(torch.uint8)


def signs(x: Tensor, shift: Tensor | None, zero: SignZero, dtype: torch.dtype) -> Tensor:
    """Return sign(x + b) in ``dtype``."""
    quick = fast(x) if dtype in (torch.float32, torch.bfloat16) else None
    if quick is not None:
        return quick.signs(x, shift, zero, dtype)
    v = shifted(x, shift)
    return sign_(v.clone() if v is x else v, zero).to(dtype)


def gradient_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that the backward's convolutions are computed in.

    x86 CPUs convolve in bfloat16 at half the speed of float32 where they have no AMX tiles (measured), so there
    float32 it is.
    """
    from binarize.kernels.cpu.threads import has_tiles  # which imports the layers

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    slow = dtype == torch.bfloat16 and device.type == "cpu" and x86 and not has_tiles()
    return torch.float32 if slow else dtype


def product_backward(
    grad: Tensor,
    signs: Tensor,
    weight: Tensor,
    geometry: Geometry,
    needed: tuple[bool, bool],
    coarse: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the signs and of the weights, each where it is needed.

    A 3x3 convolution is done by Winograd's algorithm where there are kernels for it.

    Args:
        grad: ``(B, C_out, H', W')``.
        signs: ``(B, C_in, H, W)``.
        weight: Scaled codes ``(C_out, C_in / groups, kh, kw)``.
        geometry: Of the convolution.
        needed: For the signs, for the weights.
        coarse: Rounding errors of 1e-5 of the result's size are no more than those of what is given.
    """
    quick = fast(grad, signs)
    floats = grad.dtype == signs.dtype == torch.float32
    if quick is not None and floats and quick.wide_fits(signs, weight, geometry):
        of_signs = quick.wide_conv_of_input(grad, weight, coarse) if needed[0] else None
        return of_signs, quick.wide_conv_of_weight(signs, grad, coarse) if needed[1] else None
    pointwise = weight.shape[2:] == (1, 1) and geometry == _POINTWISE
    if pointwise and all(t.is_contiguous(memory_format=torch.channels_last) for t in (grad, signs)):
        # A matrix product, where torch's convolution on CPUs would go through a slow fallback.
        pixels, columns = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (grad, signs))
        b, _, h, w = signs.shape
        of_signs = (pixels @ weight[:, :, 0, 0]).view(b, h, w, -1).permute(0, 3, 1, 2) if needed[0] else None
        return of_signs, (pixels.T @ columns)[:, :, None, None] if needed[1] else None
    of_signs, of_weight, _ = torch.ops.aten.convolution_backward(
        grad, signs, weight, None, *geometry[:3], False, [0, 0], geometry.groups, [*needed, False]
    )
    return of_signs, of_weight


def activate(
    dot: Tensor, scale: Tensor | None, post: Activation | None, shortcut: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return RPReLU(scale * dot) + shortcut in ``dtype``; ``dot`` may be overwritten.

    Args:
        dot: ``(B, C, H, W)``.
        scale: ``(C,)`` or None for 1.
        post: The RPReLU's rows, or None for the identity.
        shortcut: Of dot's shape, or None for 0.
        dtype: Of the result.
    """
    quick = fast(dot, shortcut) if post is not None and dtype in (torch.float32, torch.bfloat16) else None
    if quick is not None:
        return quick.activate(dot, scale, post, shortcut, dtype)
    y = dot.to(wide(dtype))
    if scale is not None:
        y = y.mul_(scale.to(y.dtype).view(-1, 1, 1))
    if post is not None:
        shift_in, slope, shift_out = (broadcast(rows, y.dtype) for rows in post)
        y = y.add_(shift_in)
        below = y.clamp_max(0).mul_(slope)
        y = y.relu_().add_(below).add_(shift_out)
    if shortcut is not None:
        y = y.add_(shortcut)
    return y.to(dtype)


def activate_backward(
    grad: Tensor, dot: Tensor, scale: Tensor | None, post: Activation, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of scale * dot in ``dtype``, and those of shift_in, slope and shift_out as rows.

    Args:
        grad: Gradient of the RPReLU's output, ``(B, C, H, W)``.
        dot: ``(B, C, H, W)``.
        scale: ``(C,)`` or None for 1.
        post: The RPReLU's rows.
        dtype: Of the first result.
    """
    quick = fast(grad, dot) if dtype in (torch.float32, torch.bfloat16) else None
    if quick is not None:
        return quick.activate_backward(grad, dot, scale, post, dtype)
    shift_in, slope, _ = (broadcast(rows, wide(grad.dtype)) for rows in post)
    u = dot.to(slope.dtype, copy=True)
    if scale is not None:
        u = u.mul_(scale.to(u.dtype).view(-1, 1, 1))
    u = u.add_(shift_in)
    wide_grad = grad.to(u.dtype)
    rows = post.slope.shape[0]
    inner = torch.where(u > 0, wide_grad, wide_grad * slope)
    of_slope = u.clamp_max_(0).mul_(wide_grad)
    of_in, of_slope, of_out = (_to_rows(total, rows) for total in (inner, of_slope, wide_grad))
    return inner.to(dtype), of_in, of_slope, of_out


def sign_backward(
    grad: Tensor,
    x: Tensor,
    shift: Tensor | None,
    through: Tensor | None,
    surrogate: Surrogate,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Return through + grad * surrogate'(x + b) in ``dtype``, and b's gradient as rows; ``grad`` may be overwritten.

    Args:
        grad: Gradient of the signs, of x's shape.
        x: ``(B, C, H, W)``.
        shift: Rows b, or None.
        through: Gradient that reaches x by the shortcut, or None.
        surrogate: "approx" for max(0, 2 - 2|v|), "clip" for 1{|v| <= 1}, "identity" for 1.
        dtype: Of the first result.
    """
    quick = fast(grad, x, through) if dtype in (torch.float32, torch.bfloat16) else None
    if quick is not None:
        return quick.sign_backward(grad, x, shift, through, surrogate, dtype)
    inner = grad.to(wide(dtype))
    if surrogate != "identity":
        inner = inner.mul_(_slope_of(shifted(x, shift), surrogate))
    of_shift = None if shift is None else _to_rows(inner, shift.shape[0])
    if through is not None:
        inner = inner.add_(through)
    return inner.to(dtype), of_shift


def _slope_of(v: Tensor, surrogate: Surrogate) -> Tensor:
    distance = v.abs()
    if surrogate == "clip":
        return distance <= 1
    return distance.mul_(-2).add_(2).clamp_min_(0)


def _to_rows(values: Tensor, rows: int) -> Tensor:
    """Sum ``(B, C, H, W)`` over pixels, and over samples where they share one row."""
    if rows == 1:
        return values.sum((0, 2, 3)).unsqueeze(0)
    return values.sum((2, 3))
