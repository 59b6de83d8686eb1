"""Padding of images and noise to the size multiple of a network with several levels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The padding is a function of the arguments alone: with `latents` given, a call without a generator is deterministic,
# and the noise of the image itself does not depend on the width of the padding.
_PADDING_SEED = 0


def pad_image(image: Tensor, height: int, width: int) -> Tensor:
    """Extend images at the bottom and the right by reflection, or by repeating the edge if a side is too short.

    Args:
        image: (B, C, H, W).
        height: At least H.
        width: At least W.

    Returns:
        (B, C, height, width).
    """
    down, right = height - image.shape[-2], width - image.shape[-1]
    if down:  # a reflection leaves out the edge itself, so it has one pixel less than the side
        image = F.pad(image, (0, 0, 0, down), mode="reflect" if down < image.shape[-2] else "replicate")
    if right:
        image = F.pad(image, (0, right, 0, 0), mode="reflect" if right < image.shape[-1] else "replicate")
    return image


def pad_noise(noise: Tensor, height: int, width: int) -> Tensor:
    """Extend noise at the bottom and the right by white noise that is the same in every call.

    A denoiser would treat the structure of reflected or repeated noise as image content.

    Args:
        noise: (B, C, H, W).
        height: At least H.
        width: At least W.

    Returns:
        (B, C, height, width).
    """
    batch, channels, inner_height, inner_width = noise.shape
    generator = torch.Generator().manual_seed(_PADDING_SEED)
    for axis, shape in (
        (-1, (1, channels, inner_height, width - inner_width)),
        (-2, (1, channels, height - inner_height, width)),
    ):
        if shape[axis]:
            extra = torch.randn(shape, generator=generator, dtype=torch.float32).to(noise).expand(batch, -1, -1, -1)
            noise = torch.cat([noise, extra], dim=axis)
    return noise
