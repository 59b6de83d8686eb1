"""What packed operators check, and how they lay pictures out, before compiled code reads memory by address."""

from __future__ import annotations

import torch
from torch import Tensor

from binarize.errors import BinarizeError


def check_devices(what: str, x: Tensor, *others: Tensor | None) -> None:
    """Raise unless all tensors are where the input is.

    Raises:
        BinarizeError: Naming both devices.
    """
    device = x.device
    for other in others:
        if other is not None and other.device != device:
            raise BinarizeError(
                f"{what}: the input is on {x.device} and the layer on {other.device}; move one of them, such as "
                f"x.to({str(other.device)!r})."
            )


def check_shape(what: str, tensor: Tensor | None, wanted: tuple[int | None, ...]) -> None:
    """Raise unless a tensor, if there is one, has a shape; None stands for any size.

    Raises:
        BinarizeError: Naming both shapes.
    """
    if tensor is None:
        return
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(wanted)
    for size, want in zip(sizes, wanted, strict=False):
        fits = fits and (want is None or size == want)
    if not fits:
        told = ", ".join("any" if w is None else str(w) for w in wanted)
        raise BinarizeError(f"{what} must have the shape ({told}); got {sizes}.")


def pixels(x: Tensor) -> Tensor:
    """Return ``x`` with the channels of a pixel side by side; slices of channels are left as they are."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)
