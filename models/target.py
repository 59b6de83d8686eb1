"""The quantity that a network diffuses: images, or scaled residuals to the upscaled low-resolution image."""

from __future__ import annotations

from torch import Tensor


def diffused_of(image: Tensor, upscaled: Tensor, residual_scale: float | None) -> Tensor:
    """Return x_0 of an image: the image, or (image - upscaled) / residual_scale.

    Args:
        image: (B, C, H, W), in [0, 1].
        upscaled: The upscaled low-resolution image of the same shape.
        residual_scale: The standard deviation of image - upscaled over the training data; None diffuses images.
    """
    return image if residual_scale is None else (image - upscaled) / residual_scale


def image_of(diffused: Tensor, upscaled: Tensor, residual_scale: float | None) -> Tensor:
    """Return the image of an x_0, the inverse of `diffused_of`; values may leave [0, 1]."""
    return diffused if residual_scale is None else upscaled + residual_scale * diffused
