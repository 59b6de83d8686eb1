"""The quantity that a network diffuses: images, or scaled residuals to the upscaled low-resolution image."""

from torch import Tensor


def diffused_of(image: Tensor, upscaled: Tensor, residual_scale: float | None) -> Tensor:
    """Return x_0 of an image (B, C, H, W) in [0, 1]: (image - upscaled) / residual_scale, or with None the image.

    residual_scale is the standard deviation of image - upscaled over the training data.
    """
    return image if residual_scale is None else (image - upscaled) / residual_scale


def image_of(diffused: Tensor, upscaled: Tensor, residual_scale: float | None) -> Tensor:
    """Return the image of an x_0, the inverse of `diffused_of`; values may leave [0, 1]."""
    return diffused if residual_scale is None else upscaled + residual_scale * diffused
