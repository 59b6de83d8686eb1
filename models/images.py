"""Conversion between the pipeline's images and those of Pillow, numpy and torch, alone, in lists or in batches."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.imaging import DecodedImage, to_image
from binarize.imaging.limits import check_memory

# Resizing in other libraries overshoots [0, 1] by rounding errors; a larger excess means other units.
_TOLERANCE = 1e-4

_ALLOWED = (
    "a PIL image, a binarize.imaging.DecodedImage, a numpy array (H, W) or (H, W, 1 to 4), a tensor (1 to 4, H, W), "
    "a batch of either with a leading axis, or a list of these"
)


def as_images(image: Any) -> list[DecodedImage]:
    """Return the pipeline's input as a list of images, in order; floating-point input keeps its precision."""
    if isinstance(image, list | tuple):
        if not image:
            raise BinarizeError("image is an empty list; pass at least one image.")
        return [decoded for item in image for decoded in as_images(item)]
    if isinstance(image, DecodedImage):
        return [image]
    if isinstance(image, Image.Image):
        return [to_image(image)]
    if isinstance(image, np.ndarray | Tensor) and image.ndim in (2, 3, 4):  # which may be more than its memory
        check_memory(4 * math.prod(image.shape), f"an image of shape {tuple(image.shape)}", "pass smaller ones.")
    if isinstance(image, np.ndarray) and image.ndim in (2, 3, 4):
        with_channels = image[..., None] if image.ndim == 2 else image
        batch = torch.from_numpy(_scaled(with_channels)).movedim(-1, -3)
        return [_from_tensor(item, image.shape) for item in (batch if image.ndim == 4 else batch[None])]
    if isinstance(image, Tensor) and (image.is_meta or image.layout is not torch.strided or image.is_quantized):
        raise BinarizeError("image is a tensor without values, sparse or quantized; pass a dense one with values.")
    if isinstance(image, Tensor) and image.ndim in (3, 4):
        values = image.detach() if image.is_floating_point() else torch.from_numpy(_scaled(image.cpu().numpy()))
        return [_from_tensor(item, image.shape) for item in (values if image.ndim == 4 else values[None])]
    shape = f" of shape {tuple(image.shape)}" if isinstance(image, np.ndarray | Tensor) else ""
    given = type(image).__name__ + shape
    is_path = isinstance(image, str | os.PathLike)
    hint = " Open a file with binarize.imaging.read_image(path)." if is_path else ""
    raise BinarizeError(f"image must not be of type {given}; allowed: {_ALLOWED}.{hint}")


def _scaled(values: np.ndarray) -> np.ndarray:
    """Scale unsigned integers to [0, 1] by the range of their type; leave floating point as it is.

    The result is contiguous and writable, in the byte order of the machine, as torch needs.
    """
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "u" and size <= 2:
        return np.ascontiguousarray(values, dtype=np.float32) / np.float32(256**size - 1)
    if kind == "f":
        return np.require(values, np.float64 if size > 4 else np.float32, ["C", "W"])
    raise BinarizeError(
        f"image has the type {values.dtype}; allowed: uint8, uint16, or floating point from 0 to 1. "
        "Convert it with .astype('uint8') or divide it by its largest level."
    )


def _from_tensor(values: Tensor, shape: Sequence[int]) -> DecodedImage:
    channels, height, width = values.shape
    if channels not in (1, 2, 3, 4) or height == 0 or width == 0:
        raise BinarizeError(f"image has the shape {tuple(shape)}; allowed: {_ALLOWED}.")
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    low, high = values.min().item(), values.max().item()
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # also if one of them is NaN
        raise BinarizeError(
            f"image has values from {low:g} to {high:g}; floating-point images go from 0 to 1. Divide 8-bit levels "
            "by 255, or pass them as uint8; map [-1, 1] with (x + 1) / 2."
        )
    values = values.clamp(0, 1)
    colour, alpha = (values[:-1], values[-1:]) if channels in (2, 4) else (values, None)
    return DecodedImage(colour.expand(3, -1, -1), alpha, mode={1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels])


def to_output(source: DecodedImage, rgb: Tensor, alpha: Tensor | None, output_type: str) -> Any:
    """Return one upscaled image, (3, H, W) and (1, H, W) in [0, 1], as "pil", "np" or "pt".

    Pillow's result has the mode of ``source``; the others have alpha as the fourth channel.
    """
    if output_type == "pil":
        return source.with_pixels(rgb, alpha).to_pil()
    values = rgb if alpha is None else torch.cat([rgb, alpha])
    return values if output_type == "pt" else np.ascontiguousarray(values.movedim(0, -1).float().cpu().numpy())


def to_batch(images: list[Any], output_type: str) -> Any:
    """Return the pipeline's output: a list, or for "np" and "pt" a batch if all images have the same shape."""
    if output_type == "pil" or len({image.shape for image in images}) > 1:
        return images
    return np.stack(images) if output_type == "np" else torch.stack(images)
