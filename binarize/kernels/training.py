"""The steps of a binary convolution in training, forward and backward, with one meaning on every device.

On a CPU, where memory traffic dominates, `binarize.kernels.cpu.elementwise` does each step in one pass over
channels_last memory; here is the same in PyTorch.

Rows of parameters are ``(R, C)`` with R = 1, or one row per sample. Arithmetic is float32 for half precision tensors,
else in their own dtype.
"""

from __future__ import annotations

import platform
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from binarize.kernels import backends
from binarize.kernels.binary_conv import SAME_3X3, Geometry
from binarize.kernels.capture import is_captured
from binarize.kernels.cpu.threads import has_amx
from binarize.kernels.signs import SignZero, sign_

Surrogate = Literal["approx", "clip", "identity"]
LEVELS = 127  # of the magnitudes in [0, 1] that `encode` distinguishes
_PLAIN = (Tensor, torch.nn.Parameter)  # a tensor of another class may have no memory
_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.int16, torch.uint8)


class RPReLURows(NamedTuple):
    """The rows of an RPReLU."""

    shift_in: Tensor
    slope: Tensor
    shift_out: Tensor


def compiled(first: Tensor, *others: Tensor | None) -> Any:
    """Return the CPU backend if it runs and supports these tensors, else None."""
    if is_captured():
        return None
    for t in (first, *others):
        on_cpu = t is None or (type(t) in _PLAIN and t.device.type == "cpu" and t.dtype in _COMPILED_DTYPES)
        if not on_cpu or (t is not None and not t.is_contiguous(memory_format=torch.channels_last)):
            return None
    return backends.cpu_kernels()


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of element-wise arithmetic on tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def broadcast(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Reshape rows ``(R, C)`` to broadcast against ``(B, C, H, W)``."""
    return rows.to(dtype).view(*rows.shape, 1, 1)


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """Return ``x + shift`` in `acc_dtype`, or x itself where nothing changes. ``x`` may come from `encode`."""
    if x.dtype == torch.uint8:
        return x.to(torch.float32).sub_(127.5).div_(LEVELS)
    dtype = acc_dtype(x.dtype)
    return x.to(dtype) if shift is None else x + broadcast(shift, dtype)


def encode(x: Tensor, shift: Tensor | None) -> Tensor:
    """Return ``x + shift`` in one byte: its sign, and its magnitude in 127 steps of [0, 1] and one above.

    The middle of a step is within 1/254 of the value, which is 1/127 in max(0, 2 - 2|v|). The sign, and whether the
    magnitude exceeds 1, are exact. The other functions take the result as ``x`` with a shift of 0.
    """
    kernels = compiled(x)
    if kernels is not None:
        return kernels.elementwise.encode(x, shift)
    v = shifted(x, shift)
    size = v.abs()
    step = torch.where(size <= 1, (size * LEVELS).floor_().clamp_max_(LEVELS - 1), LEVELS)
    return torch.where(v >= 0, 128 + step, LEVELS - step).to(torch.uint8)


def signs(x: Tensor, shift: Tensor | None, zero: SignZero, dtype: torch.dtype) -> Tensor:
    """Return ``sign(x + shift)`` in ``dtype``."""
    kernels = compiled(x) if dtype in (torch.float32, torch.bfloat16) else None
    if kernels is not None:
        return kernels.elementwise.signs(x, shift, zero, dtype)
    v = shifted(x, shift)
    return sign_(v.clone() if v is x else v, zero).to(dtype)


def gradient_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the backward's convolutions.

    It is float32 for bfloat16 on x86 CPUs without AMX tiles, where bfloat16 takes twice as long (measured).
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    slow = dtype == torch.bfloat16 and device.type == "cpu" and x86 and not has_amx()
    return torch.float32 if slow else dtype


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, needed: tuple[bool, bool],
    low_precision: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of a convolution's input ``x`` and its weight, each if it is ``needed``.

    ``low_precision`` says that rounding errors of 1e-5 of the result are acceptable, since the arguments have larger
    ones.
    """
    kernels = compiled(grad, x)
    if kernels is not None and grad.dtype == x.dtype == torch.float32 and (geometry, groups) == (SAME_3X3, 1):
        winograd = kernels.winograd
        if winograd.trains(x, weight):
            tiles = [winograd.tile_size(t, low_precision) for t in (grad, x)]
            of_x = winograd.conv3x3(grad, weight, None, None, None, tiles[0], transposed=True) if needed[0] else None
            return of_x, winograd.weight_gradient(x, grad, tiles[1]) if needed[1] else None
    pointwise = weight.shape[2:] == (1, 1) and (geometry, groups) == (Geometry(), 1)
    if pointwise and all(t.is_contiguous(memory_format=torch.channels_last) for t in (grad, x)):
        # A matrix product; torch's convolution on CPUs would take a slow path.
        rows, columns = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (grad, x))
        b, _, h, w = x.shape
        of_x = (rows @ weight[:, :, 0, 0]).view(b, h, w, -1).permute(0, 3, 1, 2) if needed[0] else None
        return of_x, (rows.T @ columns)[:, :, None, None] if needed[1] else None
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], groups,
        [*needed, False],
    )  # fmt: skip
    return of_x, of_weight


def activate(
    dot: Tensor, scale: Tensor | None, rprelu: RPReLURows | None, shortcut: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``RPReLU(scale * dot) + shortcut`` in ``dtype``, None leaving a step out; ``dot`` may be overwritten."""
    half_or_float = dtype in (torch.float32, torch.bfloat16)
    kernels = compiled(dot, shortcut) if rprelu is not None and half_or_float else None
    if kernels is not None:
        return kernels.elementwise.activate(dot, scale, rprelu, shortcut, dtype)
    y = dot.to(acc_dtype(dtype))
    if scale is not None:
        y = y.mul_(scale.to(y.dtype).view(-1, 1, 1))
    if rprelu is not None:
        shift_in, slope, shift_out = (broadcast(rows, y.dtype) for rows in rprelu)
        y = y.add_(shift_in)
        below = y.clamp_max(0).mul_(slope)
        y = y.relu_().add_(below).add_(shift_out)
    if shortcut is not None:
        y = y.add_(shortcut)
    return y.to(dtype)


def activate_backward(
    grad: Tensor, dot: Tensor, scale: Tensor | None, rprelu: RPReLURows, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of ``scale * dot`` in ``dtype``, and those of shift_in, slope and shift_out as rows.

    ``grad`` is the gradient of the RPReLU's output, ``(B, C, H, W)``.
    """
    kernels = compiled(grad, dot) if dtype in (torch.float32, torch.bfloat16) else None
    if kernels is not None:
        return kernels.elementwise.activate_backward(grad, dot, scale, rprelu, dtype)
    shift_in, slope, _ = (broadcast(rows, acc_dtype(grad.dtype)) for rows in rprelu)
    u = dot.to(slope.dtype, copy=True)
    if scale is not None:
        u = u.mul_(scale.to(u.dtype).view(-1, 1, 1))
    u = u.add_(shift_in)
    grad = grad.to(u.dtype)
    rows = rprelu.slope.shape[0]
    inner = torch.where(u > 0, grad, grad * slope)
    of_slope = u.clamp_max_(0).mul_(grad)
    of_in, of_slope, of_out = (_to_rows(total, rows) for total in (inner, of_slope, grad))
    return inner.to(dtype), of_in, of_slope, of_out


def sign_backward(
    grad: Tensor,
    x: Tensor,
    shift: Tensor | None,
    shortcut_grad: Tensor | None,
    surrogate: Surrogate,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Return ``shortcut_grad + grad * surrogate'(x + shift)`` in ``dtype``, and the shift's gradient as rows.

    ``grad``, the gradient of the signs, may be overwritten; ``shortcut_grad`` reaches x through the shortcut. The
    surrogate's slope is max(0, 2 - 2|v|) for "approx", 1{|v| <= 1} for "clip" and 1 for "identity".
    """
    kernels = compiled(grad, x, shortcut_grad) if dtype in (torch.float32, torch.bfloat16) else None
    if kernels is not None:
        return kernels.elementwise.sign_backward(grad, x, shift, shortcut_grad, surrogate, dtype)
    inner = grad.to(acc_dtype(dtype))
    if surrogate != "identity":
        distance = shifted(x, shift).abs()
        inner = inner.mul_(distance <= 1 if surrogate == "clip" else distance.mul_(-2).add_(2).clamp_min_(0))
    of_shift = None if shift is None else _to_rows(inner, shift.shape[0])
    if shortcut_grad is not None:
        inner = inner.add_(shortcut_grad)
    return inner.to(dtype), of_shift


def _to_rows(values: Tensor, rows: int) -> Tensor:
    """Sum ``(B, C, H, W)`` over pixels, and over samples if they share one row."""
    return values.sum((0, 2, 3)).unsqueeze(0) if rows == 1 else values.sum((2, 3))
