"""PackedConv2d and PackedLinear: binary layers whose weights are bits and whose products count them.

A packed layer takes over the parts of the binary layer that it replaces, under the same names.
`binarize.layers.lowering` decides which of them run inside the kernel; the others run as modules before or after it, so
every method and every part of your own works.

Where activations have k bits, the kernel counts each bit's product. Where they are floats, or no kernel runs, a layer's
weights become floats for the time of its call, and one plain operator of PyTorch multiplies them. No two layers' float
weights exist at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.backends import kernels_for
from binarize.kernels.binary_conv import BinaryConv
from binarize.kernels.bitpack import (
    FilterShape,
    dense_codes,
    from_bits,
    from_dense,
    join_bytes,
    split_bytes,
    to_bits,
    to_dense,
)  # fmt: skip
from binarize.kernels.capture import is_captured
from binarize.kernels.ops import TRAIN_PACKED, WithoutGradient, binary_conv2d, norm_silu
from binarize.kernels.product import BinaryWeight, compute_dtype, float_product
from binarize.kernels.row_sums import RowSums
from binarize.layers import BinaryConvNd, BinaryLayer, BinaryLinear
from binarize.layers.adapters import Original
from binarize.layers.lowering import LoweredLayer, lower
from binarize.layers.parts import PART_KINDS, ActivationBinarizer, LayerKind, PartKind, StoredScales
from binarize.layers.pipeline import PartPipeline
from binarize.layers.structure import AccumulatingConv
from binarize.packed.compiled import CompiledLayer, as_under_autocast
from binarize.packed.levels import check_activation


class PackedWeight(NamedTuple):
    """The weights of a layer as a packed layer holds them."""

    shape: FilterShape  # the depth of a 3-D filter is folded into its height
    words: Tensor  # in a kernel's form, int32, or in the file's, uint8, where there is no kernel
    scales: Tensor | None  # ``(bases, C_out)``, ``(bases, 1)``, or None where they are 1


@torch.no_grad()
def pack_weight(layer: BinaryLayer, weight: BinaryWeight) -> PackedWeight:
    """Return the packed form of a layer's `binary_weight`; raise BinarizeError for an activation that has none."""
    check_activation(layer.activation)
    groups = layer.groups if isinstance(layer, BinaryConvNd) else 1
    rows = layer.kernel[0] if layer.depth is None else layer.depth.kernel * layer.kernel[0]
    shape = FilterShape(layer.widths[1], layer.widths[0] // groups, (rows, layer.kernel[1]), groups, layer.bases)
    codes, meta = weight.codes, weight.codes.is_meta
    # Operators on meta tensors may import TorchDynamo, for a second.
    bits = codes.new_empty(codes.shape, dtype=torch.uint8) if meta else (codes >= 0).to(torch.uint8)
    bits = bits.view(shape.bases, shape.out_channels, shape.in_channels, *shape.kernel)
    if lower(layer) is None:
        words = join_bytes(bits)
    elif meta:
        words = torch.empty(shape.memory, dtype=torch.int32, device="meta")
    else:
        words = from_bits(bits, shape)
    scales = {"filter": weight.scales, "tensor": weight.scales[:, :1], "none": None}[layer.stored_scales]
    return PackedWeight(shape, words, None if scales is None else scales.detach().clone())


class PackedLayer(PartPipeline):
    """Base class of the packed convolutions and of PackedLinear."""

    shape: FilterShape
    words: Tensor  # see `PackedWeight`
    scales: Tensor | None
    stored_scales: StoredScales
    original: Original | None = None  # see `BinaryLayer`

    def _take(self, layer: BinaryLayer, weight: PackedWeight | None) -> None:
        self.widths, self.kernel, self.bases, self.geometry = layer.widths, layer.kernel, layer.bases, layer.geometry
        self.depth, self.original, self.weight_shape = layer.depth, layer.original, layer.weight.shape
        self.shape, words, scales = pack_weight(layer, layer.binary_weight()) if weight is None else weight
        for part in PART_KINDS:
            if part != "weight":
                self.add_module(part, getattr(layer, part))
        self.method, self.had_bias = layer.method, layer.had_bias
        self.post_after_shortcut = layer.post_after_shortcut
        self.register_parameter("bias", layer.bias)
        self.stored_scales = layer.stored_scales
        self.learned_scales = any(True for _ in layer.weight_binarizer.parameters())
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("scales", scales)
        self._compiled: CompiledLayer | None = None
        self.train(False)

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
        return to_dense(self.words, self.shape) if self.has_kernel else self.words

    def load_bits(self, bits: Tensor) -> None:
        """Replace the weights by those of `bits`, and move them to its device."""
        self.words, self._compiled = from_dense(bits, self.shape) if self.has_kernel else bits, None

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel can count the bits; else the activations are floats."""
        return self.words.dtype == torch.int32

    def codes(self) -> Tensor:
        """Return the weights, ``(bases, *weight shape)`` int8 in {-1, +1}."""
        bits = to_bits(self.words, self.shape) if self.has_kernel else split_bytes(self.words, self.shape)
        return (2 * bits.to(torch.int8) - 1).view(self.bases, *self.weight_shape)

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
        """Keep the parts in evaluation mode. In training mode, `backward()` of the output raises BinarizeError."""
        super().train(False)
        self.training = mode
        return self

    def clamp_latent_(self) -> None:
        """Raise BinarizeError: a packed layer cannot be trained. `binarize.training_step` calls this."""
        raise BinarizeError(f"training_step: this model is packed and has nothing to train; {TRAIN_PACKED}")

    def run_without_kernel(self, x: Tensor) -> Tensor:
        """Apply a layer that has no kernel, by modules and one operator with float weights that exist for its time."""
        shifted = self.shifted(x)
        values = self.padded(self.activation(shifted))
        dtype, shape = compute_dtype(values), self.shape
        w_hat = dense_codes(self.bits, shape, dtype)
        w_hat *= self.weight_scales().to(dtype).view(shape.bases, -1, 1, 1, 1)
        depth = () if self.depth is None else (self.depth.kernel,)
        kernel = (*depth, *self.kernel) if self.steps else ()
        w_hat = (w_hat[0] if len(w_hat) == 1 else w_hat.sum(0)).view(shape.out_channels, shape.in_channels, *kernel)
        y = self.run_stages(self.stages(), float_product(values, w_hat, *self.steps), x, shifted)
        if self._requires_gradient(x) and not is_captured():
            # As with a kernel: some parameters would get a gradient, and the weights would not.
            y = WithoutGradient.apply(y.detach().requires_grad_())
        return y

    def _requires_gradient(self, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return self.training or x.requires_grad or any(p.requires_grad for p in self.parameters())

    # The kernel

    def compiled(self) -> CompiledLayer | None:
        """Return what the kernel runs, or None; it is made once, and again when the layer changes.

        Within a graph that is captured, and under transforms, it is made anew, from the parameters as they are there.
        """
        if not self.has_kernel:
            return None
        compiled = self._compiled
        if is_captured() or compiled is None or not compiled.is_current():
            lowered = lower(self)
            if lowered is None:
                check_activation(self.activation)  # which may have been replaced
            compiled = None if lowered is None else CompiledLayer(self, lowered)
            if compiled is not None and not is_captured():
                self._compiled = compiled.watch(self)
        return compiled

    def kernel_for(self, x: Tensor) -> CompiledLayer | None:
        """Return what the kernel runs for inputs like ``x``, or None if plain operators have to run.

        Bits would cut off the gradient of an activation without a word, so plain operators run if one is required.
        """
        compiled = self.compiled()
        if compiled is None or not compiled.lowered.planes:
            return compiled
        if self._requires_gradient(x):
            return None
        if is_captured():
            return compiled
        plane = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        return None if kernels_for(plane) is None else compiled

    def count(
        self, x: Tensor, compiled: CompiledLayer, input_norm: Tensor | None = None, residual: Tensor | None = None,
        group: Tensor | None = None, row_sums: RowSums | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the sum of the products of images ``(B, C_in, H, W)`` with all bases, for all bits of their values."""
        planes, convs = compiled.lowered.planes, compiled.convs
        if not planes:
            x = self._pad(x)
            y = binary_conv2d(x, convs[0], group, input_norm, residual=residual, row_sums=row_sums)
            for conv in convs[1:]:
                y = y + binary_conv2d(x, conv, group, input_norm)
            return y
        integers, step = cast(ActivationBinarizer, self.activation).integers(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        total: Tensor | None = None
        for place, weight in enumerate(planes):
            plane = self._pad((integers >> place & 1).to(dtype))
            for conv in convs:
                y = binary_conv2d(plane, conv) * weight
                total = y if total is None else total + y
        assert total is not None
        return (total * step.to(dtype)).to(x.dtype)

    @torch.no_grad()
    def _lay_out(self, lowered: LoweredLayer) -> list[BinaryConv]:
        thresholds, unsigned = self.thresholds(lowered), lowered.levels == (0, 1)
        geometry = self.geometry if self.padding_mode == "zeros" else self.geometry._replace(pad=(0, 0, 0, 0))
        shape = replace(self.shape, bases=1, kernel=self.kernel)
        convs = []
        for words, scale in self._products(thresholds.dtype):
            transform = replace(lowered.transform, scale=scale)
            convs.append(BinaryConv.lay_out(words, shape, geometry, thresholds, transform, unsigned=unsigned))
        return convs

    @torch.no_grad()
    def thresholds(self, lowered: LoweredLayer) -> Tensor:
        """Return the least input ``(1 or K, C_in)`` whose bit is 1, in the dtype of the arithmetic."""
        floats = [t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()]
        acc_dtype = torch.float64 if any(t.dtype == torch.float64 for t in floats) else torch.float32
        # x + b >= 0 exactly where x >= -b. {0, 1} activations are 1 above 0.5, which itself rounds to 0.
        thresholds = torch.zeros(1, self.widths[0], dtype=acc_dtype, device=self.words.device)
        if lowered.levels == (0, 1):
            thresholds = torch.nextafter(thresholds + 0.5, thresholds + 1)
        return thresholds if lowered.shift is None else thresholds - lowered.shift.to(acc_dtype)

    def _products(self, dtype: torch.dtype) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Yield the words and scales of the products that the kernel computes."""
        return zip(self.words, self.weight_scales().to(dtype), strict=True)

    def _input(self, x: Tensor, compiled: CompiledLayer) -> Tensor:
        """Return the input; if the layer is being trained, as one that requires a gradient, so that backward() fails.

        Otherwise PyTorch would say that nothing requires one, or leave out the layer's parameters without a word.
        """
        trained = (self.training or compiled.is_trained()) and torch.is_grad_enabled() and not is_captured()
        return x.detach().requires_grad_() if trained and not (x.requires_grad or x.is_inference()) else x

    def _pad(self, x: Tensor) -> Tensor:
        """Return what the kernel reads: it pads with zeros itself."""
        return x if self.padding_mode == "zeros" else self.padded(x)


class PackedConv(PackedLayer):
    """Base class of the packed convolutions."""

    def __init__(self, layer: BinaryConvNd, weight: PackedWeight | None = None) -> None:
        super().__init__()
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.groups, self.padding_mode = layer.padding, layer.groups, layer.padding_mode
        self.declared_padding, self.plain_class = layer.declared_padding, layer.plain_class
        self.pad_codes, self.steps = layer.pad_codes, layer.steps
        self._take(layer, weight)

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

    def forward(
        self, input: Tensor, input_norm: Tensor | None = None, residual: Tensor | None = None,
        row_sums: RowSums | None = None,
    ) -> Tensor:  # fmt: skip
        """Apply the layer to ``silu(x * input_norm[0] + input_norm[1])`` and add ``residual`` to the output.

        Both are part of the kernel's call if it computes the whole layer; see `binarize.kernels.ops.binary_conv2d`.
        ``row_sums``, for the blocks of packed networks, may be filled then.
        """
        compiled = self.kernel_for(input)
        if compiled is None:
            y = self.run_without_kernel(input if input_norm is None else norm_silu(input, input_norm))
            return y if residual is None else y + residual
        x, lowered, added_last = self._input(input, compiled), compiled.lowered, None
        if not lowered.is_one_kernel:
            x = x if input_norm is None else norm_silu(x, input_norm)
            input_norm, residual, row_sums, added_last = None, None, None, residual
        source = x if lowered.fuses_pre else self.shifted(x)
        y = self.count(source, compiled, input_norm, residual, compiled.timestep_group(x), row_sums)
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

    def __init__(self, layer: BinaryLinear, weight: PackedWeight | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._take(layer, weight)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer. The tokens of a sample are the pixels of an image whose rows the threads share."""
        compiled = self.kernel_for(input)
        if compiled is None:
            return self.run_without_kernel(input)
        x = self._input(input, compiled)
        source = x if compiled.lowered.fuses_pre else self.shifted(x)
        batch, tokens = x.shape[0], x.shape[1:-1].numel()
        width = row_width(tokens)
        pixels = source.reshape(batch, tokens // width, width, source.shape[-1]).permute(0, 3, 1, 2)
        y = self.count(pixels, compiled, group=compiled.timestep_group(x))
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
