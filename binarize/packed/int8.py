"""Full-precision layers of packed networks whose weights are stored in 8 bits.

Files have integers, and a step for each output channel, in place of the weights. In memory, the layer
has the floats that these give, and runs as any other full-precision layer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from binarize.packed.layers import PackedLayer

INTEGERS, STEP = "weight_int8", "weight_step"
_LEVELS = 127
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_log = logging.getLogger("binarize")
_writing: ContextVar[bool] = ContextVar("writing", default=False)


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
    """Round the weights of a layer, see `round_to_int8`."""
    weight: Any = layer.weight
    if weight.is_meta:  # shapes alone
        integers = weight.new_empty(weight.shape, dtype=torch.int8)
        step = weight.new_empty(len(weight), dtype=torch.int32)
    else:
        integers, step = round_to_int8(weight)
    for name, tensor in ((INTEGERS, integers), (STEP, step)):
        layer.register_buffer(name, tensor, persistent=False)
    if _exchange not in layer._state_dict_hooks.values():
        layer.register_state_dict_post_hook(_exchange)
        layer.register_load_state_dict_pre_hook(_take)
    restore_weights(layer)


def restore_weights(layer: nn.Module) -> None:
    """Compute the weights of a layer from its integers, on their device, unless these are on the meta device."""
    integers, step = layer._buffers[INTEGERS], layer._buffers[STEP]
    if integers is not None and step is not None and not (integers.is_meta or step.is_meta):
        weight: Any = layer.weight
        layer.weight = nn.Parameter(_floats(integers, step).to(weight.dtype), requires_grad=False)


def forget_integers(layer: nn.Module) -> None:
    """Make the floats a layer's only weights."""
    del layer._buffers[INTEGERS], layer._buffers[STEP]


@contextmanager
def writing() -> Iterator[None]:
    """Let state dicts have what files have: the integers and steps of a layer in place of its weights."""
    token = _writing.set(True)
    try:
        yield
    finally:
        _writing.reset(token)


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers from -127 to 127, int8, and steps ``(C_out,)``, whose products are nearest to the weights.

    A step is max |w| / 127 in float32 with 17 significant bits, so that the products are exact, and rounding them gives
    the same integers and steps. Steps are the bits of float32, as int32, because PyTorch does not convert integers when
    a network changes its dtype.
    """
    floats = weight.detach().float()
    largest = floats.flatten(1).abs().amax(1) if floats.numel() else floats.new_zeros(len(floats))
    step = (largest / _LEVELS).view(torch.int32) + 64 & -128
    divisor = step.view(torch.float32)
    ratio = floats / _per_channel(torch.where(divisor > 0, divisor, 1.0), weight)
    return ratio.round().clamp(-_LEVELS, _LEVELS).to(torch.int8), step


def _floats(integers: Tensor, step: Tensor) -> Tensor:
    return integers * _per_channel(step.view(torch.float32), integers)


def _per_channel(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.dim() - 1))


def _exchange(module: nn.Module, state_dict: Any, prefix: str, _: Any) -> None:
    """Put integers and steps in place of the weights, for files and for networks without weights as yet."""
    if not has_int8_weights(module):
        return
    weight: Any = module.weight
    if weight.is_meta or _writing.get():
        state_dict[prefix + INTEGERS], state_dict[prefix + STEP] = _current(module, prefix + "weight")
        del state_dict[prefix + "weight"]


def _current(module: nn.Module, name: str) -> tuple[Any, Any]:
    integers, step, weight = module._buffers[INTEGERS], module._buffers[STEP], module.weight
    assert isinstance(integers, Tensor)
    assert isinstance(step, Tensor)
    assert isinstance(weight, Tensor)
    if weight.is_meta or torch.equal(_floats(integers, step).to(weight), weight):
        return integers, step
    rounded = round_to_int8(weight)
    if not torch.equal(_floats(*rounded).to(weight), weight):
        _log.warning("%s has changed since the network was packed, and is rounded to 8 bits again.", name)
    return rounded


def _take(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    given: Mapping[str, Any] = {name: state_dict.get(prefix + name) for name in (INTEGERS, STEP)}
    if not has_int8_weights(module) or any(tensor is None for tensor in given.values()):
        return
    for name, tensor in given.items():
        module._buffers[name] = tensor
        del state_dict[prefix + name]
    weight = _floats(given[INTEGERS], given[STEP])
    state_dict[prefix + "weight"] = nn.Parameter(weight, requires_grad=False)
