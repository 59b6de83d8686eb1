"""What a network diffuses: pictures themselves, or what they add to their enlargement."""

from __future__ import annotations

from torch import Tensor


def diffused_of(picture: Tensor, enlarged: Tensor, residual_scale: float | None) -> Tensor:
    """Return x_0 of a picture: the picture, or (picture - enlarged) / residual_scale.

    Args:
        picture: (B, C, H, W), in [0, 1].
        enlarged: The enlarged low-resolution picture of the same shape.
        residual_scale: The standard deviation of picture - enlarged over the training data; None diffuses pictures.
    """
    return picture if residual_scale is None else (picture - enlarged) / residual_scale


def image_of(diffused: Tensor, enlarged: Tensor, residual_scale: float | None) -> Tensor:
    """Return the picture of an x_0, the inverse of `diffused_of`; values may leave [0, 1]."""
    return diffused if residual_scale is None else enlarged + residual_scale * diffused
