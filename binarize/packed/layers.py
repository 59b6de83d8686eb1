"""PackedConv2d and PackedLinear: a binary layer whose weights are bits and whose product counts them.

A packed layer keeps the parts of the binary layer that it replaces, under the same names, and runs as many of them as
it can inside the operator: the shift or the threshold before the sign; the scale, BatchNorm in eval mode, (R)PReLU,
Hardtanh or ReLU and the identity shortcut after it. Parts that the operator does not know run as modules before or
after it, so every method and every own part works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from operator import attrgetter, is_
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.bitpack import FilterShape, from_bits, from_dense, to_bits, to_dense
from binarize.kernels.ops import (
    NO_SHORTCUT,
    SHORTCUT_FIRST,
    SHORTCUT_LAST,
    Geometry,
    Product,
    Term,
    count_filters,
    lay_out_table,
    lay_out_thresholds,
)
from binarize.layers import BinaryConv2d, BinaryLinear
from binarize.layers.delayed import Delayed
from binarize.layers.parts import PART_KINDS, PartKind
from binarize.layers.shortcut import PoolShortcut
from binarize.layers.timestep_aware import ChannelScale, RPReLU, Shift, TokenBatchNorm

# Exactly these: a subclass may compute something else, and then runs as the module that it is.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, TokenBatchNorm)
_POSTS = (RPReLU, nn.Hardtanh, nn.ReLU6, nn.ReLU)
Stage = Literal["bias", "scale", "norm", "post", "shortcut"]


@dataclass
class _Fused:
    """What the operator does of a layer's tail, and what is left for modules.

    Attributes:
        stages: Names of the stages inside the operator, in order.
        rest: Names of the stages after it, in order.
        shortcut: The operator's ``shortcut``.
        low: The operator's clamp.
        high: The operator's clamp.
    """

    stages: list[Stage] = field(default_factory=list)
    rest: list[Stage] = field(default_factory=list)
    shortcut: int = NO_SHORTCUT
    low: float = -math.inf
    high: float = math.inf


class _Made:
    """A layer's products, and what they were made from.

    Attributes:
        terms: A product for each of the layer's terms, which are added.
    """

    def __init__(self, layer: _PackedLayer) -> None:
        self.terms = layer._make_terms()
        self._timed = [part for part in layer.timed() if part.groups > 1]
        self._device = layer.words.device

    def watch(self, layer: _PackedLayer) -> _Made:
        """Note what they were made from, so that `is_current` can tell."""
        held: list[tuple[dict[str, Any], str, Any]] = [
            (place, name, value)
            for module in layer.modules()
            for place in (module._modules, module._parameters, module._buffers)
            for name, value in cast(dict[str, Any], place).items()
        ]
        tensors: list[Tensor] = [value for *_, value in held if isinstance(value, Tensor)]
        self._places = [place for place, _, _ in held]
        self._names, self._values = [name for _, name, _ in held], [value for *_, value in held]
        self._tensors, self._kinds = tensors, list(map(_kind, tensors))
        self._counted = [t for t in tensors if not t.is_inference()]
        self._versions = list(map(_version, self._counted))
        return self

    def is_current(self) -> bool:
        """Say whether the layer is what it was when they were made."""
        return (
            all(map(is_, map(dict.get, self._places, self._names), self._values))
            and list(map(_version, self._counted)) == self._versions
            and list(map(_kind, self._tensors)) == self._kinds
        )

    def group(self) -> Tensor | None:
        """Return each sample's group of timesteps, ``(B,)`` or ``(1,)`` int64, or None if nothing depends on it."""
        for part in self._timed:
            if part.context is not None:
                group = part.context.group(part.groups)
                return group if group.device == self._device else group.to(self._device)
        return None


# What changes when a tensor is written to, and when its data is replaced by another kind of data.
_version, _kind = attrgetter("_version"), attrgetter("dtype", "device")


class _PackedLayer(nn.Module):
    """What PackedConv2d and PackedLinear share: the bits, the parts, the operator's tables."""

    kind: Literal["conv2d", "linear"]
    pre: nn.Module | None
    activation: nn.Module
    scale: nn.Module | None
    norm: nn.Module | None
    post: nn.Module | None
    shortcut: nn.Module | None
    words: Tensor
    pad_codes: tuple[int, ...] | None
    padding_mode: str
    scales: Tensor | None
    bias: nn.Parameter | None

    def _take(self, layer: Any, shape: FilterShape, geometry: Geometry) -> None:
        self.shape, self.geometry = shape, geometry
        for part in PART_KINDS:
            if part != "weight":
                self.add_module(part, getattr(layer, part))
        self.method, self.had_bias = layer.method, layer.had_bias
        self.post_after_shortcut = layer.post_after_shortcut
        self.register_parameter("bias", layer.bias)
        self.stored_scales = getattr(layer.weight_binarizer, "stored_scales", "filter")
        self.learned_scales = any(True for _ in layer.weight_binarizer.parameters())
        weight = layer.binary_weight()
        bits = (
            (weight.codes >= 0).to(torch.uint8).view(shape.terms, shape.out_channels, shape.in_channels, *shape.kernel)
        )
        words = torch.empty(shape.memory, dtype=torch.int32, device="meta") if bits.is_meta else from_bits(bits, shape)
        self.register_buffer("words", words, persistent=False)
        stored = {"filter": weight.scales, "tensor": weight.scales[:, :1], "none": None}[self.stored_scales]
        self.register_buffer("scales", None if stored is None else stored.detach().clone())
        self.levels = levels_of(self.activation)
        self.inside = self.pre is None or (type(self.pre) is Shift and self.levels == (-1, 1))
        self.fused = self._plan()
        self._made: _Made | None = None
        self.train(layer.training)

    # What is stored

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "bits"] = to_dense(self.words, self.shape)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "bits"
        bits = state_dict.get(key)
        super()._load_from_state_dict(
            {k: v for k, v in state_dict.items() if k != key},
            prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs,
        )  # fmt: skip
        if bits is None:
            missing_keys.append(key)
        elif tuple(bits.shape) != self.shape.dense or bits.dtype != torch.uint8:
            error_msgs.append(
                f"{key}: expected uint8 of shape {self.shape.dense}; got {bits.dtype} of shape {tuple(bits.shape)}."
            )
        else:
            device = bits.device if self.words.is_meta else self.words.device
            self.words = from_dense(bits.to(device), self.shape)
        self._made = None

    def codes(self) -> Tensor:
        """Return the weights, ``(terms, *weight shape)`` int8 in {-1, +1}."""
        codes = 2 * to_bits(self.words, self.shape).to(torch.int8) - 1
        return codes if self.kind == "conv2d" else codes.flatten(2)

    def weight_scales(self) -> Tensor:
        """Return the scale of every filter, ``(terms, C_out)``."""
        size = (self.shape.terms, self.shape.out_channels)
        if self.scales is None:
            return torch.ones(size, dtype=self.float_dtype, device=self.words.device)
        return self.scales.expand(size)

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of what is not bits; float32 where there is nothing else."""
        floats = (t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())
        return next(floats, torch.float32)

    def parts(self) -> dict[PartKind, nn.Module | None]:
        """Return the parts of the layer but its weight binarizer, by stage."""
        return {kind: getattr(self, kind) for kind in PART_KINDS if kind != "weight"}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._made = None  # what they are made from changes, and not always in a way that shows
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # a copy makes its own, and a pickle does not carry them

    def clamp_latent_(self) -> None:
        """Refuse to be trained: `binarize.training_step` calls this.

        Raises:
            BinarizeError: Always.
        """
        raise BinarizeError(
            "training_step: this model is packed and has nothing to train; train the unpacked model, or call "
            "binarize.unpack(model), which gives +-1 latent weights and fixed scales."
        )

    # What the operator takes over

    def _plan(self) -> _Fused:
        """Return the longest run of the tail's stages that the operator can do in their order."""
        order: list[Stage] = ["bias", "scale", "norm"]
        order += ["shortcut", "post"] if self.post_after_shortcut else ["post", "shortcut"]
        present = [stage for stage in order if getattr(self, stage) is not None]
        plan = _Fused()
        if self.shape.terms > 1:  # their sum comes before any stage
            plan.rest = present
            return plan
        for i, stage in enumerate(present):
            if not self._can(stage):
                plan.rest = present[i:]
                break
            plan.stages.append(stage)
            if stage == "shortcut":
                plan.shortcut = SHORTCUT_FIRST if self.post_after_shortcut and "post" in present else SHORTCUT_LAST
            if isinstance(self.post, nn.Hardtanh) and stage == "post":
                plan.low, plan.high = float(self.post.min_val), float(self.post.max_val)
            if isinstance(self.post, nn.ReLU) and stage == "post":
                plan.low = 0.0
        return plan

    def _can(self, stage: Stage) -> bool:
        part = getattr(self, stage)
        if stage == "bias":
            return True
        if stage == "scale":
            return type(part) is ChannelScale and part.row_scale is None and part.column_scale is None
        if stage == "norm":
            return type(part) in _NORMS and part.track_running_stats
        if stage == "post":
            return type(part) in _POSTS
        same = self.shape.out_channels == self.shape.in_channels * self.shape.groups
        return type(part) is PoolShortcut and same and self.inside and self._keeps_size()

    def _keeps_size(self) -> bool:
        (sh, sw), (left, right, top, bottom), (dh, dw) = self.geometry
        kh, kw = self.shape.kernel
        return sh == sw == 1 and top + bottom == dh * (kh - 1) and left + right == dw * (kw - 1)

    def _rows(self) -> int:
        return max((part.groups for part in self.timed()), default=1)

    def timed(self) -> list[Shift | RPReLU]:
        """Return the parts whose parameters may depend on the timestep."""
        return [part for part in (self.pre, self.post) if isinstance(part, Shift | RPReLU)]

    def made(self) -> _Made:
        """Return what the layer gives the operator, made once and again when the layer changes."""
        if torch.compiler.is_compiling():
            return _Made(self)
        made = self._made
        if made is None or not made.is_current():
            made = self._made = _Made(self).watch(self)
        return made

    @torch.no_grad()
    def _make_terms(self) -> list[Product]:
        shape, rows, halve = replace(self.shape, terms=1), self._rows(), self.levels == (0, 1)
        channels, device = shape.in_channels * shape.groups, self.words.device
        floats = [t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()]
        wide = torch.float64 if any(t.dtype == torch.float64 for t in floats) else torch.float32

        # x + b >= 0 where x >= -b, exactly; {0, 1} activations are 1 above 0.5, which rounds to 0.
        zero = torch.zeros(rows, channels, dtype=wide, device=device)
        limit = zero if self.levels == (-1, 1) else torch.nextafter(zero + 0.5, zero + 1)
        if self.inside and isinstance(self.pre, Shift):
            limit = limit - self.pre.bias.to(wide)
        thresholds, terms = lay_out_thresholds(limit, shape), []
        for words, scales in zip(self.words, self.weight_scales().to(wide), strict=True):
            columns = torch.zeros(6, rows, shape.out_channels, dtype=wide, device=device)
            columns[0], columns[1], columns[4] = scales, 1.0, 1.0
            for stage in self.fused.stages:
                self._fold(stage, columns, wide)
            tensors = words, count_filters(words, shape, halve), thresholds, lay_out_table(columns, shape)
            fused = self.fused
            terms.append(Product(Term(tensors, shape, self.geometry, halve, fused.low, fused.high, fused.shortcut)))
        return terms

    def _fold(self, stage: Stage, columns: Tensor, wide: torch.dtype) -> None:
        part = getattr(self, stage)
        if stage == "bias":
            columns[2] += part.to(wide)
        elif stage == "scale":
            columns[1:3] *= part.scale.to(wide)
        elif stage == "norm":
            factor = torch.rsqrt(part.running_var.to(wide) + part.eps)
            if part.weight is not None:
                factor = factor * part.weight.to(wide)
            columns[1:3] *= factor
            columns[2] -= part.running_mean.to(wide) * factor
            if part.bias is not None:
                columns[2] += part.bias.to(wide)
        elif isinstance(part, RPReLU):
            columns[3], columns[4], columns[5] = (t.to(wide) for t in (part.shift_in, part.slope, part.shift_out))

    # The forward

    @property
    def absorbs(self) -> bool:
        """Whether the layer is one call of the operator, so that what stands around it can be folded into it."""
        return self.shape.terms == 1 and self.inside and not self.fused.rest

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode: a packed layer has nothing to train, and its statistics are settled."""
        return super().train(False)

    def _run(
        self, x: Tensor, norm: Tensor | None = None, row: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Apply the layer to ``(B, C_in, H, W)``; the rest is for layers that `absorbs` what is around them."""
        source = x if self.inside else self._shifted(x)
        if self.pad_codes is not None:
            source = F.pad(source, self.pad_codes, mode=self.padding_mode)
        made = self.made()
        group = made.group()
        y: Tensor | None = None
        for product in made.terms:
            term = self._apply_product(product, source, group, norm, row, residual)
            y = term if y is None else y + term
        assert y is not None
        for stage in self.fused.rest:
            y = self._tail(stage, y, x)
        return y

    def _apply_product(self, product: Product, x: Tensor, *given: Tensor | None) -> Tensor:
        return product(x, *given)

    def _shifted(self, x: Tensor) -> Tensor:
        return x if self.pre is None else self.pre(x)

    def _tail(self, stage: Stage, y: Tensor, x: Tensor) -> Tensor:
        part = getattr(self, stage)
        if stage == "bias":
            return y + (part.view(-1, 1, 1) if self.kind == "conv2d" else part).to(y.dtype)
        if stage == "scale":
            out: Tensor = part(y, x if getattr(part, "of_input", False) else self._shifted(x))
        elif stage == "shortcut":
            out = part(y, x)
        else:
            out = part(y)
        return out


class PackedConv2d(_PackedLayer):
    """A binary convolution for inference: bits in memory, xnor and population count on a CPU, tensor cores on CUDA.

    Made by `binarize.pack` from a `BinaryConv2d`; its state dict holds ``bits`` (dense, see the file format) and
    ``scales`` in place of the latent weights.

    Args:
        layer: The binary convolution; parts and parameters are taken over, not copied.

    Shapes:
        x: ``(B, C_in, H, W)`` float32, bfloat16 or float64, best in channels_last; output ``(B, C_out, H', W')``.

    Raises:
        BinarizeError: If the layer's activation does not say which two values it gives.
    """

    kind: Literal["conv2d", "linear"] = "conv2d"

    def __init__(self, layer: BinaryConv2d) -> None:
        super().__init__()
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.groups, self.padding_mode = layer.padding, layer.groups, layer.padding_mode
        self.declared_padding = layer.declared_padding
        pad = layer.pad_codes or (layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0])
        self.pad_codes = None if layer.padding_mode == "zeros" else pad
        pad = (0, 0, 0, 0) if self.pad_codes is not None else pad
        terms: Any = getattr(layer.weight_binarizer, "terms", 1)
        shape = FilterShape(
            layer.out_channels, layer.in_channels // layer.groups, layer.kernel_size, layer.groups, int(terms)
        )
        self._take(layer, shape, Geometry(layer.stride, pad, layer.dilation))

    def forward(
        self, x: Tensor, norm: Tensor | None = None, row: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: ``(B, C_in, H, W)``.
            norm: ``(2, B, C_in)``: take silu(x * norm[0] + norm[1]) for x, if the layer `absorbs`.
            row: ``(B, C_out)``: add it to every pixel, if the layer `absorbs`.
            residual: ``(B, C_out, H', W')``: add it, if the layer `absorbs`.
        """
        return self._run(x, norm, row, residual)

    def extra_repr(self) -> str:
        """Say what nn.Conv2d says, and the method."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{text}, padding={self.padding}, groups={self.groups}, method={self.method.name!r}"


class PackedLinear(_PackedLayer):
    """A binary linear layer for inference; see `PackedConv2d`.

    Args:
        layer: The binary linear layer.

    Shapes:
        x: ``(B, ..., C_in)``; output ``(B, ..., C_out)``.
    """

    kind: Literal["conv2d", "linear"] = "linear"

    def __init__(self, layer: BinaryLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.pad_codes, self.padding_mode = None, "zeros"
        terms: Any = getattr(layer.weight_binarizer, "terms", 1)
        self._take(layer, FilterShape(layer.out_features, layer.in_features, (1, 1), 1, int(terms)), Geometry())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self._run(x)

    def _apply_product(self, product: Product, x: Tensor, *given: Tensor | None) -> Tensor:
        """Take the tokens of a sample as the pixels of a picture; rows are what threads share out."""
        batch, tokens = x.shape[0], x.shape[1:-1].numel()
        width = next(w for w in (64, 32, 16, 8, 4, 2, 1) if tokens % w == 0)
        pixels = x.reshape(batch, tokens // width, width, x.shape[-1]).permute(0, 3, 1, 2)
        y = product(pixels, *given).permute(0, 2, 3, 1)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Say what nn.Linear says, and the method."""
        return f"{self.in_features}, {self.out_features}, method={self.method.name!r}"


def levels_of(activation: nn.Module) -> tuple[int, int]:
    """Return the two values that an activation binarizer gives.

    Raises:
        BinarizeError: If it does not say, or still computes in full precision, being delayed.
    """
    if isinstance(activation, Delayed) and not activation.progress.is_meta and not activation.active:
        raise BinarizeError(
            "pack: activations are still full precision, since training has not come to where they become binary; call "
            "binarize.training_step(model, 1.0) to make them binary."
        )
    levels = getattr(activation, "levels", None)
    kinds = type(activation).__mro__
    computes = next(i for i, kind in enumerate(kinds) if "forward" in vars(kind))
    own = not kinds[computes].__module__.startswith("binarize.")
    if own and "levels" not in vars(activation) and not any("levels" in vars(kind) for kind in kinds[: computes + 1]):
        levels = None  # inherited from a class that computes something else
    if levels not in ((-1, 1), (0, 1)):
        raise BinarizeError(
            f"pack: {type(activation).__name__} does not say which two values it gives; give it an attribute levels = "
            f"(-1, 1) if it is sign(x), or (0, 1) if it is 1 for x > 0.5. Got {levels!r}."
        )
    return cast(tuple[int, int], levels)
