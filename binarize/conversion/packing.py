"""binarize.pack: latent weights out, bits in; and binarize.unpack, the way back."""

import logging
import math
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import nn

from binarize.conversion.export import binary_layers, check_binary, packed_layers
from binarize.conversion.record import Conversion, FullPrecision, conversion, is_converted, record_config
from binarize.errors import BinarizeError
from binarize.kernels.backends import kernels_for
from binarize.layers import (
    ActivationBinarizer,
    BinaryConv1d,
    BinaryConv2d,
    BinaryConv3d,
    BinaryLayer,
    BinaryLinear,
    FixedWeight,
)
from binarize.layers.binary import Parts
from binarize.layers.lowering import lower
from binarize.methods import Method
from binarize.modules import replace_modules
from binarize.packed import PackedConv1d, PackedConv2d, PackedConv3d, PackedLayer, PackedLinear
from binarize.packed.blocks import PackableBlock, PackedBlock
from binarize.packed.int8 import forget_integers, full_precision_layers, has_int8_weights, round_weights
from binarize.packed.layers import PackedConv, PackedWeight, freeze, pack_weight
from binarize.timestep import TimestepContext

_log = logging.getLogger("binarize")
ModelT = TypeVar("ModelT", bound=nn.Module)
Latents = Literal["signs", "random"]
_PACKED: dict[type[BinaryLayer], type[Any]] = {
    BinaryConv1d: PackedConv1d, BinaryConv2d: PackedConv2d, BinaryConv3d: PackedConv3d, BinaryLinear: PackedLinear
}  # fmt: skip


def pack(model: ModelT, *, full_precision: FullPrecision = "float") -> ModelT:
    """Replace every binary layer by a packed one, in place, and return the model in eval mode.

    The outputs stay the same; the float latents are gone, so the packed model cannot be trained; see `unpack`.
    `binarize.save` (or ``save_pretrained``) then writes 1 bit for a binary weight. Everything is checked first: a call
    that fails leaves the model as it was. Activations that are exactly 0 count as +1, also where ``sign_zero="zero"``
    gave them 0.

    Args:
        model: A converted model.
        full_precision: "int8" rounds the weights of full-precision convolutions and linear layers to 8 bits, with one
            step for each output channel. Files store the integers, and the model computes with floats as before. A
            model that is packed with "float" can be rounded later.

    Raises:
        BinarizeError: If the model is not converted or already packed, `full_precision` is unknown, a layer still has
            full-precision weights (the first stage of a two-stage training) or activations, or a custom activation
            declares neither ``levels`` nor ``bits``.
    """
    record = conversion(model)
    if full_precision not in get_args(FullPrecision):
        raise BinarizeError(f"pack: full_precision={full_precision!r}; allowed: 'float' and 'int8'.")
    if record.packed:
        if (record.full_precision, full_precision) != ("float", "int8"):
            raise BinarizeError(f"pack: this {type(model).__name__} is packed already.")
        record_config(model, replace(record, full_precision="int8"))
        _round_full_precision(model)
        return model
    # The largest first: otherwise bits would lie above the temporaries of smaller layers in the heap, and pin them.
    layers = dict(sorted(binary_layers(model), key=lambda item: -item[1].weight.numel()))
    weights = [_checked_weight(name, layer) for name, layer in layers.items()]
    made = [packed_form(layer, weight) for layer, weight in zip(layers.values(), weights, strict=True)]
    # This writes to the host's configuration, which may fail.
    record_config(model, replace(record, packed=True, full_precision=full_precision))
    replace_modules(model, dict(zip(map(id, layers.values()), made, strict=True)))
    replace_modules(model, {id(b): b.packed_form() for b in model.modules() if isinstance(b, PackableBlock)})
    freeze(model)
    record.packed = True
    if full_precision == "int8":
        _round_full_precision(model)
    return model.eval()


def _round_full_precision(model: nn.Module) -> None:
    for layer in list(full_precision_layers(model)):
        round_weights(layer)
    freeze(model)
    conversion(model).full_precision = "int8"


def _checked_weight(name: str, layer: BinaryLayer) -> PackedWeight:
    weight = layer.binary_weight()
    check_binary(name, weight)
    return pack_weight(layer, weight)


def packed_form(layer: BinaryLayer, weight: PackedWeight | None = None) -> PackedLayer:
    """Return the packed form of a binary layer, which takes over its parts, and its weights if they are packed."""
    packed: PackedLayer = next(_PACKED[kind] for kind in type(layer).__mro__ if kind in _PACKED)(layer, weight)
    return packed


def pack_if_possible(model: nn.Module, like: torch.Tensor | None = None) -> bool:
    """Pack any model if it is binary and there are kernels for it; return whether it is packed.

    A model of which no layer has a kernel, since all activations are floats, stays as it is.
    ``like`` is a tensor with the device and dtype for which kernels are needed; None for those of the parameters.
    """
    if is_packed(model):
        return True
    tensors = model.parameters() if like is None else [like]
    if not is_converted(model) or any(kernels_for(tensor) is None for tensor in tensors):
        return False
    if all(layer.has_many_values() and lower(layer) is None for _, layer in binary_layers(model)):
        return False
    try:
        pack(model)
    except BinarizeError as error:
        _log.info("The network computes with floats: %s", error)
        return False
    return True


def unpack(model: ModelT, *, latents: Latents = "signs") -> ModelT:
    """Replace every packed layer by a binary one again, in place, and return the model in eval mode.

    The magnitudes of the latent weights that were packed are gone. A call that fails leaves the model as it was.

    Args:
        model: A packed model.
        latents: How to choose the latent weights. "signs" gives latents of +-1 and fixed scales
            (`binarize.layers.FixedWeight`). It works with any method, and the outputs stay the same. The signs can be
            trained, the scales only if the method learned them. "random" keeps the method, for further training. The
            latents have the packed signs and random half-normal magnitudes, drawn from PyTorch's default generator.
            Their mean is the stored scale of the filter or the tensor; methods without scales get the magnitudes of a
            new layer. The outputs stay the same, except where an activation is exactly 0 and ``sign_zero="zero"``.

    Raises:
        BinarizeError: If the model is not packed, `latents` is unknown, or `latents` is "random" and the method's
            weights are not ``sign(w)``, alone or times the mean of ``|w|``.
    """
    record = conversion(model)
    if latents not in get_args(Latents):
        raise BinarizeError(f"unpack: latents={latents!r}; allowed: 'signs' and 'random'.")
    if not record.packed:
        raise BinarizeError(f"unpack: this {type(model).__name__} is not packed.")
    made: dict[int, nn.Module] | None = None
    if latents == "random":
        made = {id(layer): _with_random_latents(name, layer, record.context) for name, layer in packed_layers(model)}
        unpacked = replace(record, packed=False, full_precision="float")
    else:
        unpacked = _fixed_record(model)
    record_config(model, unpacked)  # writes to the host's configuration, which may fail
    unpack_layers(model, made)
    for layer in filter(has_int8_weights, model.modules()):
        forget_integers(layer)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    record.method, record.overrides, record.packed = unpacked.method, unpacked.overrides, False
    record.full_precision = "float"
    return model.eval()


def unpack_layers(model: nn.Module, made: dict[int, nn.Module] | None = None) -> None:
    """Replace the packed layers in any module by binary ones, in place; a record of the conversion stays as it is.

    ``made`` maps the id of each packed layer to its binary layer. By default, latents are +-1.
    """
    if made is None:
        made = {id(layer): _unpacked(layer) for _, layer in packed_layers(model)}
    replace_modules(model, made)
    replace_modules(model, {id(b): b.unpacked_form() for b in model.modules() if isinstance(b, PackedBlock)})


def _fixed_record(model: nn.Module) -> Conversion:
    record = conversion(model)
    fixed = [(layer.method, _fixed_method(layer)) for _, layer in packed_layers(model)]  # parts may be unhashable

    def with_fixed_weights(method: Method) -> Method:
        return next((new for old, new in fixed if old == method), method)

    overrides = {k: None if v is None else with_fixed_weights(v) for k, v in record.overrides.items()}
    method = with_fixed_weights(record.method)
    return replace(record, method=method, overrides=overrides, packed=False, full_precision="float")


def _unpacked(layer: PackedLayer) -> BinaryLayer:
    codes, scales = layer.codes(), layer.weight_scales()
    latent = codes[0].to(layer.float_dtype)
    if isinstance(layer, PackedConv1d):  # whose weight binarizer sees a height of 1
        codes = codes.unsqueeze(3)
    weight = FixedWeight(codes[0].to(layer.float_dtype), **_fixed_options(layer))
    with torch.no_grad():
        weight.scales.copy_(scales)
        if weight.codes is not None:
            weight.codes.copy_(codes[1:])
    for part in filter(None, layer.parts().values()):
        for inner in part.modules():
            if isinstance(inner, ActivationBinarizer):
                inner.sign_zero = "plus"
    return _binary_form(layer, _fixed_method(layer), latent, {**layer.parts(), "weight": weight})


@torch.no_grad()
def _with_random_latents(name: str, layer: PackedLayer, context: TimestepContext | None) -> BinaryLayer:
    codes, dtype = layer.codes(), torch.promote_types(layer.float_dtype, torch.float32)
    scales = layer.weight_scales().to(dtype)
    magnitudes = torch.randn(codes[0].shape, dtype=dtype, device=codes.device).abs().clamp(min=1e-3)
    drawn = magnitudes.flatten(1).mean(1) if layer.stored_scales == "filter" else magnitudes.mean()
    # Without scales, as large as those of a new layer.
    mean = 0.5 / math.sqrt(magnitudes[0].numel()) if layer.stored_scales == "none" else scales[0].clamp(min=1e-12)
    latent = codes[0] * magnitudes * (mean / drawn).view(-1, *[1] * (magnitudes.dim() - 1))
    binary = _binary_form(layer, layer.method, latent.to(layer.float_dtype), layer.parts(), context)
    found = binary.binary_weight()
    same = torch.equal(found.codes.to(torch.int8), codes)
    tolerance = max(1e-3, 4 * torch.finfo(layer.float_dtype).eps)
    if not same or not torch.allclose(found.scales.to(dtype), scales, rtol=tolerance):
        raise BinarizeError(
            f"unpack: layer {name} has method {layer.method.name!r}, whose weights are not the sign of the latents, "
            "alone or times their mean magnitude, so random latents cannot give the packed weights; use "
            "latents='signs'."
        )
    return binary


def _binary_form(
    layer: PackedLayer, method: Method, latent: torch.Tensor, parts: Parts, context: TimestepContext | None = None
) -> BinaryLayer:
    """Return a binary layer with the geometry of a packed one."""
    plain: Any
    if isinstance(layer, PackedConv):
        plain = cast(Any, layer.plain_class)(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.declared_padding,
            layer.dilation, layer.groups, bias=False, padding_mode=layer.padding_mode, device="meta",
        )  # fmt: skip
    else:
        plain = nn.Linear(*layer.widths, bias=False, device="meta")
    plain.weight, plain.bias = nn.Parameter(latent), layer.bias
    kind = next(binary for binary, packed in _PACKED.items() if type(layer) is packed)
    binary = kind.from_float(plain, method, context, parts=parts, had_bias=layer.had_bias).eval()
    binary.original = layer.original
    return binary


def _fixed_options(layer: PackedLayer) -> dict[str, Any]:
    return {"terms": layer.shape.bases, "stored_scales": layer.stored_scales, "learned": layer.learned_scales}


def _fixed_method(layer: PackedLayer) -> Method:
    return layer.method.replace(weight={"name": "fixed", **_fixed_options(layer)}, sign_zero="plus")


def is_packed(model: nn.Module) -> bool:
    """Return True if a model has packed layers."""
    return any(True for _ in packed_layers(model))
