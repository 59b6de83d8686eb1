"""Full-precision layers of packed networks whose weights are stored in 8 bits.

The integers and the largest weight of each output channel replace the weights in the state dict. The layer computes
with the floats that they give, so that everything that runs a full-precision layer runs this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from binarize.packed.layers import PackedLayer

INTEGERS, LARGEST = "weight_int8", "weight_max"
_LEVELS = 127
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def full_precision_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the convolutions and linear layers outside packed layers whose weights are floats of their own."""
    inside = {id(part) for layer in model.modules() if isinstance(layer, PackedLayer) for part in layer.modules()}
    users = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, _LAYERS) and id(module) not in inside:
            weight = module._parameters.get("weight")
            if weight is not None and weight.is_floating_point() and users[id(weight)] == 1:
                yield module


def has_int8_weights(module: nn.Module) -> bool:
    """Return whether `round_weights` rounded a layer's weights."""
    return INTEGERS in module._buffers


@torch.no_grad()
def round_weights(layer: nn.Module) -> None:
    """Round the weights ``(C_out, ...)`` of a layer to integers times the step of their channel, see `steps`."""
    weight: Any = layer.weight
    if weight.is_meta:  # shapes alone
        integers, largest = weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight))
    else:
        largest = weight.flatten(1).abs().amax(1) if weight.numel() else weight.new_zeros(len(weight))
        step = steps(largest)
        ratio = weight / _per_channel(torch.where(step > 0, step, 1.0), weight)
        integers = ratio.round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
    layer.register_buffer(INTEGERS, integers)
    layer.register_buffer(LARGEST, largest)
    layer.register_state_dict_post_hook(_leave_out_weight)
    layer.register_load_state_dict_pre_hook(_add_weight)
    restore_weights(layer)


@torch.no_grad()
def restore_weights(layer: nn.Module) -> None:
    """Compute the weights of a layer from its integers, on whose device they will be."""
    integers, largest = layer._buffers[INTEGERS], layer._buffers[LARGEST]
    if integers is None or largest is None or integers.is_meta:
        return
    layer.weight = nn.Parameter(_floats(integers, largest), requires_grad=False)


def forget_integers(layer: nn.Module) -> None:
    """Make the floats a layer's only weights."""
    del layer._buffers[INTEGERS], layer._buffers[LARGEST]


def steps(largest: Tensor) -> Tensor:
    """Return the steps, float32 ``(C_out,)``, for the largest weights: max |w| / 127 with 17 significant bits.

    With so few, products with integers up to 127 are exact, and the integers can be found in the products.
    """
    return ((largest.float() / _LEVELS).view(torch.int32) + 64 & -128).view(torch.float32)


def _floats(integers: Tensor, largest: Tensor) -> Tensor:
    return (integers * _per_channel(steps(largest), integers)).to(largest.dtype)


def _per_channel(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.dim() - 1))


def _leave_out_weight(module: nn.Module, state_dict: Any, prefix: str, _: Any) -> None:
    if has_int8_weights(module):
        del state_dict[prefix + "weight"]


def _add_weight(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    integers, largest = state_dict.get(prefix + INTEGERS), state_dict.get(prefix + LARGEST)
    if has_int8_weights(module) and integers is not None and largest is not None:
        state_dict[prefix + "weight"] = nn.Parameter(_floats(integers, largest), requires_grad=False)
