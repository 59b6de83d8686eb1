"""Read the binary layers of a model: their weights as bits or codes, and parameter groups for an optimizer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.ops import TRAIN_PACKED
from binarize.kernels.product import BinaryWeight
from binarize.layers import BinaryLayer
from binarize.modules import unwrap
from binarize.packed import PackedLayer


@dataclass(frozen=True)
class BinaryLayerState:
    """The weights of one binary layer, ``sum_k scales[k] * codes[k]``.

    Attributes:
        codes: ``(n, *shape)`` int8 in {-1, +1} (0 where a latent weight is exactly 0 and sign(0) is 0), or None with
            ``packed=True``.
        bits: ``(n, ceil(weights / 8))`` uint8, most significant bit first, 1 for +1; or None without.
        scales: ``(n, C_out)`` in the model's dtype.
        shape: Shape of the weight tensor.
        zeros: Number of latent weights with sign 0; their bit is 1.
    """

    codes: Tensor | None
    bits: Tensor | None
    scales: Tensor
    shape: tuple[int, ...]
    zeros: int


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryLayer]]:
    """Iterate over the name and module of each binary layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, BinaryLayer))


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """Iterate over the name and module of each packed layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, PackedLayer))


def binary_state(model: nn.Module, *, packed: bool = False) -> dict[str, BinaryLayerState]:
    """Return the +-1 weights and scales of every binary layer, as int8 codes, or with ``packed`` as bits."""
    model = unwrap(model)
    weights = {}
    for name, layer in binary_layers(model):
        weight = layer.binary_weight()
        check_binary(name, weight)
        weights[name] = weight.codes.to(torch.int8), weight.scales
    for name, held in packed_layers(model):
        weights[name] = held.codes(), held.weight_scales().clone()
    if not weights:
        raise BinarizeError(f"this {type(model).__name__} has no binary layer; call binarize.convert first.")
    state = {}
    for name, (codes, scales) in weights.items():
        held_codes, bits = (None, pack_bits(codes)) if packed else (codes, None)
        zeros = int((codes == 0).sum())
        state[name] = BinaryLayerState(held_codes, bits, scales, tuple(codes.shape[1:]), zeros)
    return state


def check_binary(name: str, weight: BinaryWeight) -> None:
    """Raise BinarizeError if a layer is in the first stage of a two-stage training."""
    codes = weight.codes
    if not codes.is_meta and not torch.equal(codes, codes.sign()):
        raise BinarizeError(
            f"{name}: its weights are still full precision, in the first stage of a two-stage training; "
            "binarize.training_step(model, 1.0) makes them binary."
        )


def pack_bits(codes: Tensor) -> Tensor:
    """Return ``(n, ceil(m / 8))`` uint8 of codes ``(n, ...)``: 1 where a code is >= 0, most significant bit first."""
    flat = (codes >= 0).reshape(codes.shape[0], -1).to(torch.uint8)
    flat = nn.functional.pad(flat, (0, -flat.shape[1] % 8))
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=codes.device)
    return (flat.view(codes.shape[0], -1, 8) * weights).sum(-1, dtype=torch.uint8)


def param_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return optimizer groups: no weight decay on latent weights, shifts, slopes, scales, norms and biases.

    Weight decay on a latent weight cannot shrink its sign; it only makes the sign flip more easily.

    Args:
        model: A converted or plain model.
        weight_decay: For the full-precision weights of convolutions and linear layers.

    Returns:
        Two groups, ``{"params": [...], "weight_decay": ...}``, for a torch optimizer.

    Raises:
        BinarizeError: If the model is packed.
    """
    if any(True for _ in packed_layers(model)):
        raise BinarizeError(f"param_groups: this model is packed and has nothing to train; {TRAIN_PACKED}")
    latent = {id(layer.weight) for _, layer in binary_layers(model)}
    layers = (module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd | nn.Linear))
    decays = {id(layer.weight) for layer in layers} - latent
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in decays], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decays], "weight_decay": 0.0},
    ]
