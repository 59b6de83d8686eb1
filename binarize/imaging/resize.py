"""MATLAB's ``imresize`` for whole scale factors: the degradation and the bicubic enlargement of super-resolution.

Both are the separable cubic convolution of Keys (1981) with a = -1/2, borders mirrored with the edge pixel repeated,
one axis after the other. The filter is written out here because PyTorch's antialiased bicubic one, which has the same
kernel, cuts the kernel off at the border, is wrong for pictures one pixel wide (2.14) and has weights that do not sum
to one exactly in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil, floor
from typing import TypeVar

import numpy as np
import torch

from binarize.errors import BinarizeError

Pixels = TypeVar("Pixels", np.ndarray, torch.Tensor)

# Far below the smallest gap between two weighted sums of 8-bit pixels and far above float64's error: an exact tie
# rounds up whatever the order of summation, so that every device gives the same integers.
_TIE = 1e-7


def degrade(hr: Pixels, scale: int) -> Pixels:
    """Shrink an 8-bit picture as MATLAB's ``imresize(hr, 1 / scale)`` does, bit for bit.

    The picture is first cropped at the right and the bottom to a multiple of ``scale``. The vertical axis is filtered
    and rounded to 8 bits, then the horizontal one. At x2 and x4 this equals the low-resolution pictures that the
    field's data sets ship. At scales that are no power of two an exact tie rounds up; MATLAB's own result hangs there
    on its order of summation.

    Args:
        hr: uint8, either a numpy array (H, W) or (H, W, C), or a tensor (..., C, H, W).
        scale: Whole factor of at least 1.

    Returns:
        The same kind of object, ``H // scale`` by ``W // scale`` pixels.

    Raises:
        BinarizeError: If the picture is not 8-bit, is smaller than ``scale``, or the scale is not a whole number.
    """
    _check_scale(scale)
    planes, restore = _planes(hr, "degrade")
    height, width = planes.shape[-2:]
    if height < scale or width < scale:
        raise BinarizeError(f"degrade: a picture of {width}x{height} pixels is smaller than the scale {scale}")
    planes = planes[..., : height - height % scale, : width - width % scale]
    for axis in (-2, -1):
        planes = _round(_shrink(planes.to(_exact(scale)), scale, axis))
    return restore(planes)


def upscale_bicubic(lr: Pixels, scale: int) -> Pixels:
    """Enlarge a picture as MATLAB's ``imresize(lr, scale)`` does; the condition picture and the baseline "bicubic".

    Floating-point pictures are clamped to [0, 1] and not rounded; 8-bit ones are rounded after each axis, the vertical
    one first, as MATLAB rounds. Both see two low-resolution pixels around each point, so the enlargement of a crop
    differs from the crop of the enlargement within ``2 * scale`` pixels of the cut.

    Args:
        lr: A floating-point tensor (..., C, h, w) in [0, 1], or 8-bit pixels as in :func:`degrade`.
        scale: Whole factor of at least 1.

    Returns:
        The same kind and dtype, ``h * scale`` by ``w * scale`` pixels. Half precision is computed in float32.

    Raises:
        BinarizeError: If the pixels are neither 8-bit nor a floating-point tensor, or the scale is not a whole number.
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
        pixels = _round(_grow(pixels.to(_exact(scale)), scale, axis))
    return restore(pixels)


def _check_scale(scale: int) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, np.integer)) or scale < 1:
        raise BinarizeError(f"scale must be a whole number of at least 1, got {scale!r}")


def _check_shape(tensor: torch.Tensor, caller: str) -> None:
    if tensor.ndim < 2 or 0 in tensor.shape:
        raise BinarizeError(
            f"{caller}: expected a tensor (..., C, H, W) with at least one pixel, got {tuple(tensor.shape)}"
        )


def _planes(pixels: Pixels, caller: str) -> tuple[torch.Tensor, Callable[[torch.Tensor], Pixels]]:
    """Return 8-bit pixels as a (..., H, W) tensor, and the function that turns a result back into the caller's kind."""
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim in (2, 3) and pixels.size > 0:
        if pixels.ndim == 2:
            return torch.from_numpy(np.ascontiguousarray(pixels)), _as_numpy
        channels_first = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return channels_first, _channels_last
    if isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8:
        _check_shape(pixels, caller)
        return pixels, lambda tensor: tensor
    given = f"{type(pixels).__name__} of {getattr(pixels, 'dtype', '?')} {tuple(getattr(pixels, 'shape', ()))}"
    allowed = "uint8 pixels: a numpy array (H, W) or (H, W, C), or a tensor (..., C, H, W)"
    if caller == "upscale_bicubic":
        allowed += ", or a floating-point tensor in [0, 1]"
    raise BinarizeError(f"{caller}: expected {allowed}; got {given}")


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy()


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy().transpose(1, 2, 0))


def _exact(scale: int) -> torch.dtype:
    # The weights are multiples of 2**-12 at x4 (coarser below): with 8-bit pixels every partial sum fits float32.
    return torch.float32 if scale in (1, 2, 4) else torch.float64


def _shrink(planes: torch.Tensor, scale: int, axis: int) -> torch.Tensor:
    """Filter one axis down, the kernel widened against aliasing."""
    lines = _mirror(planes, 2 * scale, axis).transpose(axis, -1)
    last = lines.shape[-1] - 5 * scale  # of the windows' starts
    windows = (
        lines[..., 2 * scale + at : 2 * scale + at + last + 1 : scale] * weight
        for at, weight in _taps((scale - 1) / 2, scale)
    )
    return _sum(windows).transpose(axis, -1)


def _grow(planes: torch.Tensor, scale: int, axis: int) -> torch.Tensor:
    """Filter one axis up: every ``scale``-th result has the same weights."""
    lines = _mirror(planes, 2, axis).transpose(axis, -1)
    size = lines.shape[-1] - 4
    phases = []
    for phase in range(scale):
        taps = _taps((phase + 0.5) / scale - 0.5, 1)
        phases.append(_sum(lines[..., 2 + at : 2 + at + size] * weight for at, weight in taps))
    return torch.stack(phases, dim=-1).flatten(-2).transpose(axis, -1)


def _taps(centre: float, stretch: int) -> list[tuple[int, float]]:
    """Return offset and weight of the pixels that the kernel, stretched and centred so, covers; weights sum to 1."""
    reach = range(ceil(centre - 2 * stretch), floor(centre + 2 * stretch) + 1)
    weights = [(at, _cubic(abs(at - centre) / stretch)) for at in reach]
    total = sum(weight for _, weight in weights)
    return [(at, weight / total) for at, weight in weights if weight]


def _cubic(x: float) -> float:
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _sum(terms: Iterator[torch.Tensor]) -> torch.Tensor:
    # In this order everywhere and with no fused multiply-add, so that a pixel's value does not depend on its place.
    total = next(terms)
    for term in terms:
        total += term
    return total


def _mirror(planes: torch.Tensor, pad: int, axis: int) -> torch.Tensor:
    """Extend an axis by ``pad`` on both sides, mirrored with the edge repeated, over and over where it is short."""
    size = planes.shape[axis]
    index = torch.arange(-pad, size + pad, device=planes.device) % (2 * size)
    return planes.index_select(axis, torch.minimum(index, 2 * size - 1 - index))


def _round(planes: torch.Tensor) -> torch.Tensor:
    return planes.add(0.5 + _TIE).floor_().clamp_(0, 255).to(torch.uint8)
