"""What operators check, and how they lay out images, before compiled code reads memory by address."""

from __future__ import annotations

import torch
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.kernels.binary_conv import BinaryConv


def check_devices(what: str, x: Tensor, *others: Tensor | None) -> None:
    """Raise BinarizeError, naming both devices, unless all tensors are on the device of ``x``."""
    on_cpu = x.is_cpu  # cheaper to ask for than a device
    for other in others:
        if other is not None and not (on_cpu and other.is_cpu) and other.device != x.device:
            raise BinarizeError(
                f"{what}: the input is on {x.device} and the layer on {other.device}; move one of them, such as "
                f"x.to({str(other.device)!r})."
            )


def check_shape(what: str, tensor: Tensor | None, expected: tuple[int | None, ...]) -> None:
    """Raise BinarizeError unless ``tensor``, if given, has the expected shape; None stands for any size."""
    if tensor is None or tensor.shape == expected:
        return
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(want not in (None, size) for size, want in zip(shape, expected, strict=True)):
        sizes = ", ".join("any" if want is None else str(want) for want in expected)
        raise BinarizeError(f"{what} must have the shape ({sizes}); got {shape}.")


def as_channels_last(x: Tensor) -> Tensor:
    """Return ``x`` with the channels of a pixel side by side; a slice of channels is returned as it is."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def check_inputs(x: Tensor, conv: BinaryConv, *inputs: Tensor | None) -> None:
    """Raise BinarizeError unless the inputs of `binarize.kernels.ops.binary_conv2d` fit the convolution."""
    what, shape, (group, input_norm, channel_bias, residual) = "packed convolution", conv.shape, inputs
    check_devices(what, x, *conv.tensors, *inputs)
    channels = shape.in_channels * shape.groups
    check_shape(f"{what}: the input", x, (None, channels, None, None))
    batch = x.shape[0]
    if group is not None and (group.dtype != torch.int64 or tuple(group.shape) not in ((1,), (batch,))):
        raise BinarizeError(
            f"{what}: timestep_group must be int64 of shape ({batch},) or (1,); got {group.dtype} of shape "
            f"{tuple(group.shape)}."
        )
    check_shape(f"{what}: input_norm", input_norm, (2, batch, channels))
    check_shape(f"{what}: channel_bias", channel_bias, (batch, shape.out_channels))
    size = conv.geometry.output(x.shape[2], x.shape[3], shape.kernel)
    check_shape(f"{what}: the residual", residual, (batch, shape.out_channels, *size))
