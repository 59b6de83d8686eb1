"""The padded canvas that a network of several levels needs, and how images and noise are extended to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# What is drawn beyond an image's edge must be a function of the call's arguments alone: with `latents` given, a call
# without a generator is deterministic, and an image's own noise does not depend on how far it is padded.
_RIM_SEED = 0


def pad_image(image: Tensor, height: int, width: int) -> Tensor:
    """Extend images at the bottom and the right; each side is mirrored, or its edge repeated where it is too short.

    Args:
        image: (B, C, H, W).
        height: At least H.
        width: At least W.

    Returns:
        (B, C, height, width).
    """
    down, right = height - image.shape[-2], width - image.shape[-1]
    if down:  # a mirror image without the edge itself has one pixel less than the side
        image = F.pad(image, (0, 0, 0, down), mode="reflect" if down < image.shape[-2] else "replicate")
    if right:
        image = F.pad(image, (0, right, 0, 0), mode="reflect" if right < image.shape[-1] else "replicate")
    return image


def pad_noise(noise: Tensor, height: int, width: int) -> Tensor:
    """Extend noise at the bottom and the right by white noise that is the same in every call.

    Mirrored or repeated noise would be structure, which a denoiser takes for an image.

    Args:
        noise: (B, C, H, W).
        height: At least H.
        width: At least W.

    Returns:
        (B, C, height, width).
    """
    batch, channels, inner_height, inner_width = noise.shape
    rim = torch.Generator().manual_seed(_RIM_SEED)
    for axis, shape in (
        (-1, (1, channels, inner_height, width - inner_width)),
        (-2, (1, channels, height - inner_height, width)),
    ):
        if shape[axis]:
            extra = torch.randn(shape, generator=rim, dtype=torch.float32).to(noise).expand(batch, -1, -1, -1)
            noise = torch.cat([noise, extra], dim=axis)
    return noise
