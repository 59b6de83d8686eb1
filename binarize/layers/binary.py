"""BinaryConv2d and BinaryLinear: a convolution or linear layer with 1-bit weights and activations.

`binarize.layers.conv_nd` adds one and three dimensions. See `binarize.layers.pipeline.PartPipeline` for the stages.
Padding is applied after the sign, so a tap outside the image contributes 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.autograd import BinaryConvFunction, BinaryConvOptions, Memory
from binarize.kernels.binary_conv import Geometry
from binarize.kernels.capture import is_captured
from binarize.kernels.product import (
    BinaryWeight,
    binary_conv,
    binary_linear,
    compute_dtype,
    float_product,
    scaled_weight,
)
from binarize.layers import parts as layer_parts
from binarize.layers.adapters import Original
from binarize.layers.lowering import LoweredLayer, lower, trains_as_one_node
from binarize.layers.method import Method, get_method
from binarize.layers.parts import (
    ActivationBinarizer,
    Branch,
    LayerKind,
    LayerSpec,
    PartKind,
    WeightBinarizer,
    runs_as_declared,
)
from binarize.layers.pipeline import Depth, PartPipeline
from binarize.layers.timestep_aware import RPReLU
from binarize.timestep import TimestepContext

LayerT = TypeVar("LayerT", bound="BinaryLayer")
Parts = Mapping[PartKind, nn.Module | None]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class BinaryLayer(PartPipeline):
    """Base class of the binary convolutions and of BinaryLinear.

    ``original`` is what `binarize.revert` puts in its place if that is not a plain layer of torch.nn.
    """

    weight: nn.Parameter
    original: Original | None = None
    weight_binarizer: nn.Module
    stored_scales: layer_parts.StoredScales

    @classmethod
    def from_float(
        cls: type[LayerT], plain: Any, method: Method | str, context: TimestepContext | None = None, *,
        parts: Parts | None = None, had_bias: bool | None = None,
    ) -> LayerT:  # fmt: skip
        """Return the binary form of a plain layer, such as nn.Conv2d for BinaryConv2d, in its mode.

        The layer's weight becomes the latent weight, as the same Parameter unless a branch takes a share of it.
        Timestep-aware parts read ``context``.
        ``parts`` are existing modules to use instead of the method's, by stage; a bias is then kept as it is, and
        ``had_bias`` says whether the layer before conversion had one. If they have no weight binarizer, the method's is
        built.
        """
        layer = cls.__new__(cls)  # `__init__` would allocate weights
        nn.Module.__init__(layer)
        layer._build(plain, get_method(method), context, parts, had_bias)
        return layer.train(plain.training)

    @classmethod
    def from_parts(cls: type[LayerT], plain: Any, method: Method, parts: Parts, *, had_bias: bool) -> LayerT:
        """Return a layer of existing parts; deprecated in favour of `from_float`."""
        message = f"{cls.__name__}.from_parts is now from_float(plain, method, parts=parts, had_bias=had_bias)"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        layer: LayerT = cls.from_float(plain, method, parts=parts, had_bias=had_bias)
        return layer.eval()

    def _build(
        self, plain: Any, method: Method, context: TimestepContext | None, parts: Parts | None = None,
        had_bias: bool | None = None,
    ) -> None:  # fmt: skip
        spec = self._take_geometry(plain, method, context)
        self.weight, keeps_bias = plain.weight, method.keep_bias or parts is not None
        if parts is None:
            branch = self._built("branch", method, spec)
            spec = self._give_to(branch, spec)
            kinds = [kind for kind in layer_parts.PART_KINDS if kind != "branch"]
            parts = {**{kind: self._built(kind, method, spec) for kind in kinds}, "branch": branch}
        elif "weight" not in parts:
            parts = {**parts, "weight": self._built("weight", method, spec)}
        for kind, part in parts.items():
            self.add_module("weight_binarizer" if kind == "weight" else kind, part)
        self.method, self.post_after_shortcut, self.clamps_latent = method, method.post_after_shortcut, method.clamps
        self.had_bias = plain.bias is not None if had_bias is None else had_bias
        binarizer = self.weight_binarizer
        self.bases, self.stored_scales = layer_parts.stored_form(binarizer)
        self.register_parameter("bias", None)
        if plain.bias is not None and keeps_bias:
            bias = plain.bias
            if had_bias is None:
                bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
            self.bias = bias
        elif plain.bias is not None and method.fold_bias:
            stages = set(self.stages()) - {"shortcut", "post", "branch"}
            if not isinstance(self.post, RPReLU) or stages or self.post_after_shortcut:
                raise BinarizeError(
                    f"{method.name}: fold_bias=True needs an RPReLU right after the convolution (post='taa' or "
                    "'rprelu', no scale, no norm, the shortcut added last); use keep_bias=True, or let the bias be "
                    "dropped."
                )
            self.post.fold_bias_(plain.bias.detach())

    @torch.no_grad()
    def _give_to(self, branch: nn.Module | None, spec: LayerSpec) -> LayerSpec:
        """Take a branch's share from the latent weights, as a new Parameter, and return the spec with what remains."""
        share = branch.as_weight() if isinstance(branch, Branch) else None
        if share is None:
            return spec
        rest = spec.weight.detach() - share
        self.weight = nn.Parameter(rest.view_as(self.weight), requires_grad=self.weight.requires_grad)
        return replace(spec, weight=rest)

    def _built(self, kind: PartKind, method: Method, spec: LayerSpec) -> nn.Module | None:
        part = layer_parts.build_part(kind, method.part(kind), spec)
        if part is None:
            if kind in ("activation", "weight"):
                raise BinarizeError(f"{method.name}: the {kind} binarizer cannot be None.")
            return None
        if spec.weight.is_meta:  # the part was created where the model is being built; only its dtype may differ
            return part.to(dtype=spec.weight.dtype)
        return part.to(device=spec.weight.device, dtype=spec.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:  # as nn.Conv2d and nn.Linear name it, since some networks use the name
        """Apply the layer to ``(B, C_in, ...)``, or a linear one to ``(..., C_in)``."""
        x = input
        shifted = self.shifted(x)
        values, weight = self.padded(self.activation(shifted)), self.weight_binarizer(self.latent())
        if self.has_many_values():
            y = float_product(values, scaled_weight(weight, compute_dtype(values)), *self.steps)
        elif self.steps:
            y = binary_conv(values, weight, *self.steps)
        else:
            y = binary_linear(values, weight)
        return self.run_stages(self.stages(), y, x, shifted)

    def _take_geometry(self, plain: Any, method: Method, context: TimestepContext | None) -> LayerSpec:
        raise NotImplementedError  # pragma: no cover - both subclasses define it

    def latent(self) -> Tensor:
        """Return the latent weights as the weight binarizer takes them."""
        return self.weight

    def clamp_latent_(self) -> None:
        """Clamp the latent weights to [-1, 1] if the method does so after each optimizer step (BNN)."""
        if self.clamps_latent:
            with torch.no_grad():
                self.weight.clamp_(-1, 1)

    @torch.no_grad()
    def binary_weight(self) -> BinaryWeight:
        """Return the codes ``(n, *weight.shape)`` and scales ``(n, C_out)`` that the forward uses now."""
        if self.weight.is_meta:  # shapes alone: many operators on meta tensors import TorchDynamo, for a second
            shape, empty = self.weight.shape, self.weight.new_empty
            return BinaryWeight(empty(shape), empty(self.bases, *shape), empty(self.bases, self.widths[1]))
        surrogate, codes, scales = self.weight_binarizer(self.latent())
        return BinaryWeight(surrogate.view_as(self.weight), codes.view(-1, *self.weight.shape), scales)

    def _with_latents(self, plain: Any) -> Any:
        share = self.branch.as_weight() if isinstance(self.branch, Branch) else None
        plain.weight = self.weight
        if share is not None:
            whole = self.weight.detach() + share.detach().view_as(self.weight)
            plain.weight = nn.Parameter(whole, requires_grad=self.weight.requires_grad)
        if self.had_bias:
            plain.bias = nn.Parameter(self.weight.new_zeros(self.widths[1])) if self.bias is None else self.bias
        return plain.train(self.training)


class BinaryConvNd(BinaryLayer):
    """Base class of the binary convolutions of one, two and three dimensions, with nn.Conv2d's arguments.

    A 1-D convolution is computed as a 2-D one of height 1, which is what its parts see. Subclasses set ``plain_class``.
    """

    plain_class: type[nn.Conv1d | nn.Conv2d | nn.Conv3d]

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1, padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1, groups: int = 1, padding_mode: PaddingMode = "zeros", *,
        method: Method | str = "bidiffsr", context: TimestepContext | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        conv = cast(Any, self.plain_class)(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False,
            padding_mode=padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        self._build(conv, get_method(method), context)

    def _take_geometry(self, conv: Any, method: Method, context: TimestepContext | None) -> LayerSpec:
        self.in_channels, self.out_channels = self.widths = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.groups, self.padding_mode = conv.groups, conv.padding_mode
        self.memory: Memory = "exact"
        self.declared_padding = conv.padding
        pad = explicit_padding(conv)
        self.padding = pad[-2::-2]
        symmetric = pad[::2] == pad[1::2]
        flat = (1,) * (2 - len(pad) // 2)  # the height of a 1-D convolution
        pad += (0, 0) * len(flat)
        self.pad_codes = None if symmetric and conv.padding_mode == "zeros" else pad
        kernel, stride, dilation = (*flat, *conv.kernel_size), (*flat, *conv.stride), (*flat, *conv.dilation)
        padding = pad[-2::-2]
        self.steps = stride, padding if self.pad_codes is None else (0,) * len(padding), dilation, conv.groups
        self.kernel = kernel[-2:]
        self.geometry = Geometry(stride[-2:], cast(Any, pad[:4]), dilation[-2:])
        if len(kernel) == 3:
            self.depth = Depth(kernel[0], stride[0], cast(Any, pad[4:]), dilation[0])
        weight = conv.weight.detach().unsqueeze(2) if flat else conv.weight
        return LayerSpec(
            self.kind, *self.widths, weight, stride, padding, self.pad_codes, self.padding_mode, dilation,
            method.groups, context, method.sign_zero,
        )  # fmt: skip

    def to_float(self) -> Any:
        """Return the plain convolution with the latent weights, as the same Parameter unless a branch has a share."""
        conv = cast(Any, self.plain_class)(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.declared_padding, self.dilation,
            self.groups, bias=self.had_bias, padding_mode=self.padding_mode, device="meta",
        )  # fmt: skip
        return self._with_latents(conv)

    def extra_repr(self) -> str:
        """Say what nn.Conv2d says, and the method."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}"
        for name, usual in (("dilation", (1,) * len(self.dilation)), ("groups", 1), ("padding_mode", "zeros")):
            text += "" if getattr(self, name) == usual else f", {name}={getattr(self, name)!r}"
        return f"{text}, method={self.method.name!r}"


class BinaryConv2d(BinaryConvNd):
    """A 2-D convolution with 1-bit weights and activations: ``(B, C_in, H, W)`` to ``(B, C_out, H', W')``.

    Sizes are given as to nn.Conv2d, and padding is applied after the sign. A ``padding_mode`` other than "zeros" pads
    the signs, so that borders stay two-valued. ``method`` is a method's name or instance, whose parts make up the
    layer; timestep-aware parts read ``context``.
    """

    kind: LayerKind = "conv2d"
    plain_class: type[nn.Conv1d | nn.Conv2d | nn.Conv3d] = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``(B, C_in, H, W)``."""
        # A compiler fuses the modules itself, and chooses what to keep for the backward.
        if self._trains_as_one_node() and not (input.is_meta or is_captured()):
            lowered = lower(self)
            if lowered is not None:
                return self._run_node(input, lowered)
        return super().forward(input)

    def _trains_as_one_node(self) -> bool:
        activation, binarizer = self.activation, self.weight_binarizer
        return (
            isinstance(activation, ActivationBinarizer)
            and isinstance(binarizer, WeightBinarizer)
            and activation.surrogate is not None
            and runs_as_declared(activation, "surrogate")
            and binarizer.is_plain_sign
            and runs_as_declared(binarizer, "is_plain_sign")
            and activation.sign_zero == binarizer.sign_zero
            and self.scale is None
            and self.pad_codes is None
        )

    def _run_node(self, x: Tensor, lowered: LoweredLayer) -> Tensor:
        activation, binarizer = cast(ActivationBinarizer, self.activation), cast(WeightBinarizer, self.weight_binarizer)
        if x.device.type == "cpu" and x.stride(1) == 1:  # a slice of channels, such as CP-Down's
            x = x.contiguous(memory_format=torch.channels_last)
        source = x if lowered.fuses_pre else self.shifted(x)
        transform, rest = lowered.transform, lowered.rest
        if not (trains_as_one_node(transform) and not rest):
            transform, rest = type(transform)(), self.stages()
        surrogate = cast(Any, activation.surrogate)
        options = BinaryConvOptions(
            self.geometry, self.groups, activation.sign_zero, surrogate, binarizer.clip, transform.shortcut != 0,
            self.memory, compute_dtype(x),
        )  # fmt: skip
        rows = [lowered.gather(each, x.shape[0]) for each in (lowered.shift, *transform.rprelu())]
        latent = self.latent()
        scale = binarizer.weight_scale(latent)
        y: Tensor = BinaryConvFunction.apply(options, source, latent, scale, *rows)
        return self.run_stages(rest, y, x, source)


class BinaryLinear(BinaryLayer):
    """A linear layer with 1-bit weights and activations: ``(B, ..., C_in)`` to ``(B, ..., C_out)``.

    ``method`` is a method's name or instance, whose parts make up the layer; timestep-aware parts read ``context``.
    """

    kind: LayerKind = "linear"

    def __init__(
        self, in_features: int, out_features: int, *, method: Method | str = "bidiffsr",
        context: TimestepContext | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
        self._build(linear, get_method(method), context)

    def _take_geometry(self, linear: nn.Linear, method: Method, context: TimestepContext | None) -> LayerSpec:
        self.in_features, self.out_features = self.widths = linear.in_features, linear.out_features
        self.geometry, self.kernel = Geometry(), (1, 1)
        shared = {"groups": method.groups, "context": context, "sign_zero": method.sign_zero}
        return LayerSpec("linear", *self.widths, linear.weight, **shared)  # type: ignore[arg-type]

    def to_float(self) -> nn.Linear:
        """Return the plain linear layer with the latent weights, as the same Parameter unless a branch has a share."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.had_bias, device="meta")
        return cast(nn.Linear, self._with_latents(linear))

    def extra_repr(self) -> str:
        """Say what nn.Linear says, and the method."""
        return f"{self.in_features}, {self.out_features}, method={self.method.name!r}"


def explicit_padding(conv: Any) -> tuple[int, ...]:
    """Return the padding of a convolution as F.pad takes it, (left, right, top, bottom, ...), strings resolved."""
    padding: Any = conv.padding
    sides: list[int] = []
    for i in reversed(range(len(conv.kernel_size))):
        total = conv.dilation[i] * (conv.kernel_size[i] - 1)
        before = 0 if padding == "valid" else total // 2 if padding == "same" else padding[i]
        sides += [before, total - before if padding == "same" else before]
    return tuple(sides)
