"""How much a converted model's layers keep for the backward."""

from typing import TypeVar

from torch import nn

from binarize.conversion.export import binary_layers
from binarize.errors import BinarizeError, did_you_mean
from binarize.kernels.autograd import MEMORY_MODES, Memory
from binarize.layers import BinaryConvNd

ModelT = TypeVar("ModelT", bound=nn.Module)


def memory_mode(model: ModelT, mode: Memory) -> ModelT:
    """Choose what binary convolutions keep between forward and backward.

    - "exact", the default: their input, and gradients are those of the formula up to rounding.
    - "compact": one byte for each element of their input, and the input itself can be freed. Outputs, the sign of every
      input and the gradients of weights, scales and RPReLUs are the same; the gradient that a layer passes on to its
      input is that of an input rounded to 127 steps of [0, 1]. ApproxSign's factor max(0, 2 - 2|x|) then differs by at
      most 1/127; STE-clip's and the identity's do not differ at all.

    It concerns 1-D and 2-D convolutions whose activation is ApproxSign, STE-clip or the identity, whose weights are
    (scaled) signs and where sign(0) is +1; other binary layers do what they do. A model can be switched at any time;
    the mode is not saved with it.
    """
    if mode not in MEMORY_MODES:
        modes = ", ".join(MEMORY_MODES)
        raise BinarizeError(f"memory_mode: unknown mode {mode!r}; modes: {modes}.{did_you_mean(mode, MEMORY_MODES)}")
    layers = [layer for _, layer in binary_layers(model) if isinstance(layer, BinaryConvNd)]
    if not layers:
        raise BinarizeError(f"memory_mode: {type(model).__name__} has no binary convolution; call convert first.")
    for layer in layers:
        layer.memory = mode
    return model
