"""Limit how far results leave the levels of their neighbourhood in the low-resolution image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_REACH = 2  # low-resolution pixels: as far as bicubic upscaling reads


def limit_overshoot(image: Tensor, low: Tensor, overshoot: float) -> Tensor:
    """Clamp each channel to the range of the 5x5 low-resolution pixels around, widened by a share of it on each side.

    This is neighbourhood clamping, as in temporal antialiasing (Karis, "High-Quality Temporal Supersampling", SIGGRAPH
    2014). Lines and letters keep their colours; details keep room, because their neighbourhood has contrast.

    Args:
        image: (..., C, h * scale, w * scale).
        low: (..., C, h, w).
        overshoot: A share of the local range, at least 0.
    """
    scale = image.shape[-1] // low.shape[-1]
    batch = low.reshape(-1, *low.shape[-3:])
    padded = F.pad(batch, [_REACH] * 4, mode="replicate")
    highest, lowest = F.max_pool2d(padded, 2 * _REACH + 1, 1), -F.max_pool2d(-padded, 2 * _REACH + 1, 1)
    room = overshoot * (highest - lowest)
    bounds = [_repeated(bound.reshape(low.shape), scale).to(image) for bound in (lowest - room, highest + room)]
    return torch.clamp(image, *bounds)


def _repeated(low: Tensor, scale: int) -> Tensor:
    return low.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
