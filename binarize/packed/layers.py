"""PackedConv2d and PackedLinear: binary layers whose weights are bits and whose products count them.

A packed layer takes over the parts of the binary layer that it replaces, under the same names.
`binarize.layers.lowering` decides which of them run inside the kernel; the others run as modules before or after it, so
every method and every part of your own works.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter, is_, itemgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.binary_conv import BinaryConv
from binarize.kernels.bitpack import FilterShape, from_bits, from_dense, to_bits, to_dense
from binarize.kernels.capture import is_captured
from binarize.kernels.ops import binary_conv2d, norm_silu
from binarize.kernels.product import compute_dtype
from binarize.layers import BinaryConvNd, BinaryLayer, BinaryLinear
from binarize.layers.adapters import Original
from binarize.layers.delayed import Delayed
from binarize.layers.lowering import LoweredLayer, lower
from binarize.layers.parts import PART_KINDS, LayerKind, PartKind, StoredScales, levels_of
from binarize.layers.pipeline import PartPipeline
from binarize.layers.structure import AccumulatingConv

_version, _kind, _training = attrgetter("_version"), attrgetter("dtype", "device"), itemgetter("training")


def _bytes_at(pointer: int, t: Tensor) -> memoryview:
    """Return the memory from a tensor's first element to its last, which must not be read once the tensor is gone."""
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return memoryview((ctypes.c_uint8 * ((last + 1) * t.element_size())).from_address(pointer)).cast("B")


class _Compiled:
    """What a packed layer runs, and the tensors and modules that it was made from.

    ``convs`` has a convolution per basis; their outputs are added up.
    """

    def __init__(self, layer: PackedLayer) -> None:
        lowered = lower(layer)
        if lowered is None:
            raise _undeclared_levels(layer.activation)
        self.lowered = lowered
        self.convs = layer._lay_out(lowered)
        self._device = layer.words.device

    def watch(self, layer: PackedLayer) -> _Compiled:
        """Remember the layer's modules and tensors for `is_current`."""
        held: list[tuple[dict[str, Any], str, Any]] = [
            (place, name, value)
            for module in layer.modules()
            for place in (module._modules, module._parameters, module._buffers)
            for name, value in cast(dict[str, Any], place).items()
        ]
        self._places, self._names = [place for place, _, _ in held], [name for _, name, _ in held]
        self._values = [value for *_, value in held]
        # Of these, ``convs`` have copies: where they lie and what is there is compared, which no version misses.
        laid_out = [t for t in self._sources(layer) if type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.numel()]
        self._laid_out, self._pointers = laid_out, list(map(Tensor.data_ptr, laid_out))
        self._memory = [_bytes_at(pointer, t) for pointer, t in zip(self._pointers, laid_out, strict=True)]
        self._contents = list(map(bytearray, self._memory))  # which compare with other memory without a copy
        compared = set(map(id, laid_out))
        self._tensors = [t for t in self._values if isinstance(t, Tensor) and id(t) not in compared]
        self._kinds = list(map(_kind, self._tensors))
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._versions = list(map(_version, self._versioned))
        self._attributes = [vars(module) for module in layer.modules()]
        self._classes = [type(part) for part in layer.parts().values() if part is not None]
        self._hooks = [d[name] for d in self._attributes for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._state = self._modules_state()
        return self

    def _sources(self, layer: PackedLayer) -> list[Tensor]:
        """Return the tensors, but for the bits, of which ``convs`` have copies: the others are read where they are."""
        stages = ("pre", *self.lowered.stages) if self.lowered.shift is not None else self.lowered.stages
        held = [layer.scales, *(getattr(layer, stage) for stage in stages)]
        modules = [module for module in held if isinstance(module, nn.Module)]
        inside = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        return inside + [t for t in held if isinstance(t, Tensor)]

    def _modules_state(self) -> tuple[list[Any], ...]:
        """Return each module's mode, how many attributes (``forward`` may be one) and hooks it has, and its class's."""
        attributes = self._attributes
        own = list(map(_training, attributes)), list(map(len, attributes)), list(map(len, self._hooks))
        call = nn.Module.__call__  # which tracers replace
        return *own, [(kind.forward, kind.__call__ is call) for kind in self._classes]

    def is_current(self) -> bool:
        """Return whether nothing of the layer has been replaced, written to, hooked or switched to another mode.

        Versions do not count writes through ``.data``, so parameters on a CPU are compared themselves; they are small.
        On a GPU that would wait for the device.
        """
        return (
            self._modules_state() == self._state
            and all(map(is_, map(dict.get, self._places, self._names), self._values))
            and list(map(_version, self._versioned)) == self._versions
            and list(map(_kind, self._tensors)) == self._kinds
            and list(map(Tensor.data_ptr, self._laid_out)) == self._pointers
            and self._contents == self._memory
        )

    def timestep_group(self, x: Tensor) -> Tensor | None:
        """Return the timestep group of each sample of ``x``, on the layer's device, or None."""
        lowered = self.lowered
        if lowered.context is None:
            return None
        group = lowered.context.group(lowered.groups, x.shape[0])
        return group if group.device == self._device else group.to(self._device)


class PackedLayer(PartPipeline):
    """Base class of the packed convolutions and of PackedLinear."""

    shape: FilterShape
    words: Tensor
    scales: Tensor | None
    stored_scales: StoredScales
    pad_codes: tuple[int, ...] | None = None
    original: Original | None = None  # see `BinaryLayer`

    def _take(self, layer: BinaryLayer) -> None:
        self.widths, self.kernel, self.bases, self.geometry = layer.widths, layer.kernel, layer.bases, layer.geometry
        self.depth, self.original, self.weight_shape = layer.depth, layer.original, layer.weight.shape
        groups = layer.groups if isinstance(layer, BinaryConvNd) else 1
        rows = self.kernel[0] if self.depth is None else self.depth.kernel * self.kernel[0]
        shape = FilterShape(self.widths[1], self.widths[0] // groups, (rows, self.kernel[1]), groups, self.bases)
        self.shape = shape  # the depth of a filter is folded into its height
        for part in PART_KINDS:
            if part != "weight":
                self.add_module(part, getattr(layer, part))
        self.method, self.had_bias = layer.method, layer.had_bias
        self.post_after_shortcut = layer.post_after_shortcut
        self.register_parameter("bias", layer.bias)
        self.stored_scales = layer.stored_scales
        self.learned_scales = any(True for _ in layer.weight_binarizer.parameters())
        weight = layer.binary_weight()
        bits = (weight.codes >= 0).to(torch.uint8)
        bits = bits.view(shape.bases, shape.out_channels, shape.in_channels, *shape.kernel)
        words = torch.empty(shape.memory, dtype=torch.int32, device="meta") if bits.is_meta else from_bits(bits, shape)
        self.register_buffer("words", words, persistent=False)
        stored = {"filter": weight.scales, "tensor": weight.scales[:, :1], "none": None}[self.stored_scales]
        self.register_buffer("scales", None if stored is None else stored.detach().clone())
        check_levels(self.activation)
        self._compiled: _Compiled | None = None
        self.train(layer.training)

    # The state dict holds the bits densely.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "bits"] = self.bits

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _, _, missing_keys, _, error_msgs = args
        key = prefix + "bits"
        bits = state_dict.get(key)
        super()._load_from_state_dict({k: v for k, v in state_dict.items() if k != key}, prefix, *args)
        if bits is None:
            missing_keys.append(key)
        elif tuple(bits.shape) != self.shape.dense or bits.dtype != torch.uint8:
            error_msgs.append(
                f"{key}: expected uint8 of shape {self.shape.dense}; got {bits.dtype} of shape {tuple(bits.shape)}."
            )
        else:
            self.load_bits(bits.to(bits.device if self.words.is_meta else self.words.device))
        self._compiled = None

    @property
    def bits(self) -> Tensor:
        """The weights as the state dict has them: uint8 ``(bases, ceil(weights / 8))``, most significant bit first."""
        return to_dense(self.words, self.shape)

    def load_bits(self, bits: Tensor) -> None:
        """Replace the weights by those of `bits`, and move them to its device."""
        self.words, self._compiled = from_dense(bits, self.shape), None

    def codes(self) -> Tensor:
        """Return the weights, ``(bases, *weight shape)`` int8 in {-1, +1}."""
        codes = 2 * to_bits(self.words, self.shape).to(torch.int8) - 1
        return codes.view(self.bases, *self.weight_shape)

    def weight_scales(self) -> Tensor:
        """Return the scale of every filter, ``(bases, C_out)``."""
        size = (self.shape.bases, self.shape.out_channels)
        if self.scales is None:
            return torch.ones(size, dtype=self.float_dtype, device=self.words.device)
        return self.scales.expand(size)

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of the floating-point tensors; float32 if there are none."""
        floats = (t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())
        return next(floats, torch.float32)

    def parts(self) -> dict[PartKind, nn.Module | None]:
        """Return the parts of the layer, except its weight binarizer, by stage."""
        return {kind: getattr(self, kind) for kind in PART_KINDS if kind != "weight"}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._compiled = None  # not every change of a tensor can be seen afterwards
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}  # a copy compiles its own

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode."""
        return super().train(False)

    def clamp_latent_(self) -> None:
        """Raise BinarizeError: a packed layer cannot be trained. `binarize.training_step` calls this."""
        raise BinarizeError(
            "training_step: this model is packed and has nothing to train; train the unpacked model, or call "
            "binarize.unpack(model), which gives +-1 latent weights and fixed scales."
        )

    # The kernel

    def compiled(self) -> _Compiled:
        """Return what the layer runs; it is made once, and again when the layer changes.

        Within a graph that is captured, and under transforms, it is made anew, from the parameters as they are there.
        """
        if is_captured():
            return _Compiled(self)
        compiled = self._compiled
        if compiled is None or not compiled.is_current():
            compiled = self._compiled = _Compiled(self).watch(self)
        return compiled

    @torch.no_grad()
    def _lay_out(self, lowered: LoweredLayer) -> list[BinaryConv]:
        floats = [t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()]
        acc_dtype = torch.float64 if any(t.dtype == torch.float64 for t in floats) else torch.float32
        # x + b >= 0 exactly where x >= -b. {0, 1} activations are 1 above 0.5, which itself rounds to 0.
        thresholds = torch.zeros(1, self.widths[0], dtype=acc_dtype, device=self.words.device)
        unsigned = lowered.levels == (0, 1)
        if unsigned:
            thresholds = torch.nextafter(thresholds + 0.5, thresholds + 1)
        if lowered.shift is not None:
            thresholds = thresholds - lowered.shift.to(acc_dtype)
        geometry = self.geometry if self.pad_codes is None else self.geometry._replace(pad=(0, 0, 0, 0))
        shape = replace(self.shape, bases=1, kernel=self.kernel)
        convs = []
        for words, scale in self._products(acc_dtype):
            transform = replace(lowered.transform, scale=scale)
            convs.append(BinaryConv.lay_out(words, shape, geometry, thresholds, transform, unsigned=unsigned))
        return convs

    def _products(self, dtype: torch.dtype) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Yield the words and scales of the products that the kernel computes."""
        return zip(self.words, self.weight_scales().to(dtype), strict=True)

    def _pad(self, x: Tensor) -> Tensor:
        return x if self.pad_codes is None else F.pad(x, self.pad_codes, mode=self.padding_mode)


def as_under_autocast(y: Tensor, x: Tensor, compiled: _Compiled) -> Tensor:
    """Return an output in the dtype that autocast gives an unpacked layer: that of products, or of a sum with x."""
    if not torch._C._is_any_autocast_enabled():
        return y
    dtype = compute_dtype(x)
    if dtype == y.dtype or compiled.lowered.transform.shortcut:
        return y
    return y.to(dtype)


class PackedConv(PackedLayer):
    """Base class of the packed convolutions."""

    def __init__(self, layer: BinaryConvNd) -> None:
        super().__init__()
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.groups, self.padding_mode = layer.padding, layer.groups, layer.padding_mode
        self.declared_padding, self.plain_class = layer.declared_padding, layer.plain_class
        self.pad_codes = None if layer.padding_mode == "zeros" else layer.pad_codes
        self._take(layer)

    def extra_repr(self) -> str:
        """Return what nn.Conv2d shows, and the method."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{text}, padding={self.padding}, groups={self.groups}, method={self.method.name!r}"


class PackedConv2d(PackedConv, AccumulatingConv):
    """A binary convolution for inference, with bits in memory: ``(B, C_in, H, W)`` to ``(B, C_out, H', W')``.

    CPUs compute it with xnor and population count, CUDA GPUs on tensor cores; inputs are ideally channels_last.
    `binarize.pack` makes it from a `BinaryConv2d`, whose parts and parameters are taken over, not copied. Its state
    dict holds ``bits`` (dense, see the file format) and ``scales`` in place of latent weights. The next call follows
    every change of its parameters and modules, except, on a GPU, one written through a parameter's ``.data``: call
    ``layer.to(device)`` after it. ``words`` must be loaded, not written to.
    """

    kind: LayerKind = "conv2d"

    def forward(self, input: Tensor, input_norm: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Apply the layer to ``silu(x * input_norm[0] + input_norm[1])`` and add ``residual`` to the output.

        Both are part of the kernel's call if it computes the whole layer; see `binarize.kernels.ops.binary_conv2d`.
        """
        x, compiled = input, self.compiled()
        lowered, added_last = compiled.lowered, None
        if not lowered.is_one_kernel:
            x = x if input_norm is None else norm_silu(x, input_norm)
            input_norm, residual, added_last = None, None, residual
        source = self._pad(x if lowered.fuses_pre else self.shifted(x))
        group = compiled.timestep_group(x)
        y = binary_conv2d(source, compiled.convs[0], group, input_norm, residual=residual)
        for conv in compiled.convs[1:]:
            y = y + binary_conv2d(source, conv, group, input_norm)
        y = as_under_autocast(y, x, compiled)
        if lowered.rest:
            y = self.run_stages(lowered.rest, y, x)
        return y if added_last is None else y + added_last

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """Return ``total + self(x)``, added while the output is written if the kernel can."""
        return cast(Tensor, self(x, residual=total))


class PackedLinear(PackedLayer):
    """A binary linear layer for inference, ``(B, ..., C_in)`` to ``(B, ..., C_out)``; see `PackedConv2d`."""

    kind: LayerKind = "linear"

    def __init__(self, layer: BinaryLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._take(layer)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer. The tokens of a sample are the pixels of an image whose rows the threads share."""
        x, compiled = input, self.compiled()
        source = x if compiled.lowered.fuses_pre else self.shifted(x)
        batch, tokens = x.shape[0], x.shape[1:-1].numel()
        width = row_width(tokens)
        pixels = source.reshape(batch, tokens // width, width, source.shape[-1]).permute(0, 3, 1, 2)
        group = compiled.timestep_group(x)
        y = binary_conv2d(pixels, compiled.convs[0], group)
        for conv in compiled.convs[1:]:
            y = y + binary_conv2d(pixels, conv, group)
        y = as_under_autocast(y, x, compiled).permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)
        return self.run_stages(compiled.lowered.rest, y, x)

    def extra_repr(self) -> str:
        """Return what nn.Linear shows, and the method."""
        return f"{self.in_features}, {self.out_features}, method={self.method.name!r}"


def row_width(pixels: int) -> int:
    """Return how wide to make an image of independent pixels; the threads share its rows."""
    return next(w for w in (64, 32, 16, 8, 4, 2, 1) if pixels % w == 0)


def freeze(model: nn.Module) -> None:
    """Give the parameters of a packed model what inference needs: no gradient, and the layout of the kernels."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 4 and not parameter.is_meta:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def check_levels(activation: nn.Module) -> None:
    """Raise BinarizeError unless an activation is binary now and declares its two values."""
    if isinstance(activation, Delayed) and not activation.progress.is_meta and not activation.active:
        raise BinarizeError(
            "pack: activations are still full precision, since training has not reached the step from which they are "
            "binary; call binarize.training_step(model, 1.0) to make them binary."
        )
    if levels_of(activation) is None:
        raise _undeclared_levels(activation)


def _undeclared_levels(activation: nn.Module) -> BinarizeError:
    return BinarizeError(
        f"pack: {type(activation).__name__} does not declare the two values that it returns; give it an attribute "
        "levels = (-1, 1) if it is sign(x), or (0, 1) if it is 1 for x > 0.5. Got "
        f"{getattr(activation, 'levels', None)!r}."
    )
