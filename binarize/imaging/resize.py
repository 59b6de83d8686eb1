"""MATLAB's ``imresize`` for integer scales: the degradation and the bicubic upscaling of super-resolution.

Both are the separable cubic convolution of Keys (1981) with a = -1/2, borders mirrored with the edge pixel repeated,
one axis after the other. PyTorch's antialiased bicubic filter has the same kernel but cuts it off at the border, is
wrong for images one pixel wide (2.14), and its weights do not sum to exactly one in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from math import ceil, floor
from typing import TypeVar

import numpy as np
import torch

from binarize.errors import BinarizeError

Pixels = TypeVar("Pixels", np.ndarray, torch.Tensor)

# Far below the smallest gap between two weighted sums of 8-bit pixels and far above float64's error: an exact tie
# rounds up in any order of summation, so every device gives the same integers.
_TIE = 1e-7


def degrade(hr: Pixels, scale: int) -> Pixels:
    """Downscale an 8-bit image as MATLAB's ``imresize(hr, 1 / scale)`` does, bit for bit.

    The image is cropped at the right and the bottom to a multiple of `scale`. The vertical axis is filtered and rounded
    to 8 bits, then the horizontal one. At x2 and x4 the result equals the low-resolution images of the field's data
    sets. At other scales an exact tie rounds up; MATLAB's own result depends on its order of summation there.

    `hr` is uint8, a numpy array (H, W) or (H, W, C) or a tensor (..., C, H, W), at least `scale` pixels wide and high.
    The result is the same kind of object, ``H // scale`` by ``W // scale`` pixels.
    """
    _check_scale(scale)
    planes, restore = _planes(hr, "degrade")
    height, width = planes.shape[-2:]
    if height < scale or width < scale:
        raise BinarizeError(f"degrade: an image of {width}x{height} pixels is smaller than the scale {scale}")
    planes = planes[..., : height - height % scale, : width - width % scale]
    for axis in (-2, -1):
        planes = _round(_shrink(planes.to(_exact_dtype(scale)), scale, axis))
    return restore(planes)


def upscale_bicubic(lr: Pixels, scale: int) -> Pixels:
    """Upscale an image as MATLAB's ``imresize(lr, scale)`` does: the condition image and the baseline "bicubic".

    Floating-point images are clamped to [0, 1] and not rounded. 8-bit images are rounded after each axis, the vertical
    one first, as in MATLAB. Each result depends on two low-resolution pixels to each side, so the result of a crop
    differs from the crop of the result within ``2 * scale`` pixels of the cut.

    `lr` is a floating-point tensor (..., C, h, w) in [0, 1], or 8-bit pixels as in `degrade`. The result has the same
    kind and dtype, ``h * scale`` by ``w * scale`` pixels. Half precision is computed in float32.
    """
    _check_scale(scale)
    if isinstance(lr, torch.Tensor) and lr.is_floating_point():
        _check_shape(lr, "upscale_bicubic")
        planes = lr if lr.dtype in (torch.float32, torch.float64) else lr.float()
        for axis in (-2, -1):
            planes = _grow(planes, scale, axis)
        return planes.clamp(0, 1).to(lr.dtype)
    pixels, restore = _planes(lr, "upscale_bicubic")
    for axis in (-2, -1):
        pixels = _round(_grow(pixels.to(_exact_dtype(scale)), scale, axis))
    return restore(pixels)


def _check_scale(scale: int) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, np.integer)) or scale < 1:
        raise BinarizeError(f"scale must be a whole number of at least 1, got {scale!r}")


def _check_shape(tensor: torch.Tensor, caller: str) -> None:
    if tensor.ndim < 2 or 0 in tensor.shape:
        raise BinarizeError(f"{caller}: expected a tensor (..., C, H, W) with pixels, got {tuple(tensor.shape)}")


def _planes(pixels: Pixels, caller: str) -> tuple[torch.Tensor, Callable[[torch.Tensor], Pixels]]:
    """Return 8-bit pixels as a (..., H, W) tensor, and a function that converts a result back to the caller's kind."""
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim in (2, 3) and pixels.size > 0:
        forward, back = ((2, 0, 1), (1, 2, 0)) if pixels.ndim == 3 else ((0, 1), (0, 1))
        channels_first = torch.from_numpy(np.ascontiguousarray(pixels.transpose(forward)))
        return channels_first, lambda tensor: np.ascontiguousarray(tensor.numpy().transpose(back))
    if isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8:
        _check_shape(pixels, caller)
        return pixels, lambda tensor: tensor
    given = f"{type(pixels).__name__} of {getattr(pixels, 'dtype', '?')} {tuple(getattr(pixels, 'shape', ()))}"
    allowed = "uint8 pixels: a numpy array (H, W) or (H, W, C), or a tensor (..., C, H, W)"
    if caller == "upscale_bicubic":
        allowed += ", or a floating-point tensor in [0, 1]"
    raise BinarizeError(f"{caller}: expected {allowed}; got {given}")


def _exact_dtype(scale: int) -> torch.dtype:
    # The weights are multiples of 2**-12 or of larger powers of 2, so with 8-bit pixels every partial sum fits float32.
    return torch.float32 if scale in (1, 2, 4) else torch.float64


def _shrink(planes: torch.Tensor, scale: int, axis: int) -> torch.Tensor:
    """Downscale one axis, with the kernel stretched against aliasing."""
    lines = mirror(planes, 2 * scale, axis).transpose(axis, -1)
    last = lines.shape[-1] - 5 * scale  # of the windows' starts
    taps = [(2 * scale + at, weight) for at, weight in _taps((scale - 1) / 2, scale)]
    windows = (lines[..., start : start + last + 1 : scale] * weight for start, weight in taps)
    return _sum(windows).transpose(axis, -1)


def _grow(planes: torch.Tensor, scale: int, axis: int) -> torch.Tensor:
    """Upscale one axis; every ``scale``-th result has the same weights."""
    lines = mirror(planes, 2, axis).transpose(axis, -1)
    size = lines.shape[-1] - 4
    phases = []
    for phase in range(scale):
        taps = _taps((phase + 0.5) / scale - 0.5, 1)
        phases.append(_sum(lines[..., 2 + at : 2 + at + size] * weight for at, weight in taps))
    return torch.stack(phases, dim=-1).flatten(-2).transpose(axis, -1)


def _taps(centre: float, stretch: int) -> list[tuple[int, float]]:
    """Return offset and weight of each pixel under a kernel of this centre and stretch; the weights sum to 1."""
    reach = range(ceil(centre - 2 * stretch), floor(centre + 2 * stretch) + 1)
    weights = [(at, _cubic(abs(at - centre) / stretch)) for at in reach]
    total = sum(weight for _, weight in weights)
    return [(at, weight / total) for at, weight in weights if weight]


def _cubic(x: float) -> float:
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _sum(products: Iterable[torch.Tensor]) -> torch.Tensor:
    # The same order everywhere and no fused multiply-add, so that a pixel's value does not depend on its position.
    return functools.reduce(torch.Tensor.add_, products)


def mirror(planes: torch.Tensor, pad: int, axis: int) -> torch.Tensor:
    """Pad an axis on both sides by repeated mirroring with the edge repeated."""
    size = planes.shape[axis]
    index = torch.arange(-pad, size + pad, device=planes.device)
    index = index % torch.full_like(index, 2 * size)  # a tensor, since ONNX's exporter takes no symbolic number here
    return planes.index_select(axis, torch.minimum(index, 2 * size - 1 - index))


def _round(planes: torch.Tensor) -> torch.Tensor:
    return planes.add(0.5 + _TIE).floor_().clamp_(0, 255).to(torch.uint8)
