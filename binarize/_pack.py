"""binarize.pack: latent weights out, bits in."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from binarize._convert import conversion, record_config
from binarize._export import binary_layers, check_binary, packed_layers
from binarize.errors import BinarizeError
from binarize.layers import BinaryConv2d
from binarize.packed.layers import PackedConv2d, PackedLinear

ModelT = TypeVar("ModelT", bound=nn.Module)


def pack(model: ModelT) -> ModelT:
    """Replace every binary layer by a packed one, in place, and return the model in eval mode.

    The outputs stay the same; the float latents are gone, so the model can no longer be trained. `binarize.save` (or
    ``save_pretrained``) then writes 1 bit for a binary weight. Everything is checked first: a call that fails leaves
    the model as it was. Activations that are exactly 0 count as +1, also where ``sign_zero="zero"`` gave them 0.

    Args:
        model: A converted model.

    Returns:
        The same object.

    Raises:
        BinarizeError: If the model is not converted or already packed, a layer still has full-precision weights (the
            first stage of a two-stage training), or an own activation does not say its two levels.
    """
    record = conversion(model)
    if record.packed:
        raise BinarizeError(f"pack: this {type(model).__name__} is packed already.")
    made: dict[int, nn.Module] = {}
    for name, layer in binary_layers(model):
        check_binary(name, layer.binary_weight())
        made[id(layer)] = PackedConv2d(layer) if isinstance(layer, BinaryConv2d) else PackedLinear(layer)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, made[id(module)])
    for module in model.modules():
        pack_block = getattr(module, "pack_", None)
        if callable(pack_block):
            pack_block()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 4 and not parameter.is_meta:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    record.packed = True
    record_config(model, record)
    return model.eval()


def is_packed(model: nn.Module) -> bool:
    """Say whether a model has packed layers."""
    return any(True for _ in packed_layers(model))
