"""BinaryConv2d and BinaryLinear: a convolution or linear layer with 1-bit weights and activations.

``pre -> activation -> binary product * scale of the weights -> bias -> scale -> norm -> post``, with a shortcut that is
added after ``post`` (BI-DiffSR, BBCU) or before it (ReActNet, IR-Net). Zeros are padded AFTER the sign, so a border tap
contributes 0 and not +-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.product import BinaryWeight, binary_conv2d, binary_linear, compute_dtype
from binarize.kernels.training import Geometry
from binarize.layers.fused_conv import SURROGATES, BinaryBlock, Block, Memory, block_fits, is_plain, tail_fits
from binarize.layers.parts import PART_KINDS, LayerSpec, PartKind, build_part
from binarize.layers.timestep_aware import RPReLU, Shift
from binarize.timestep import TimestepContext

if TYPE_CHECKING:
    from binarize.methods import Method


LayerT = TypeVar("LayerT", bound="_BinaryLayer")


class _BinaryLayer(nn.Module):
    """What BinaryConv2d and BinaryLinear share: the pipeline of parts around the product."""

    kind: Literal["conv2d", "linear"]
    weight: nn.Parameter
    bias: nn.Parameter | None
    pre: nn.Module | None
    activation: nn.Module
    weight_binarizer: nn.Module
    scale: nn.Module | None
    norm: nn.Module | None
    post: nn.Module | None
    shortcut: nn.Module | None

    def _assemble(self, method: Method, spec: LayerSpec, bias: Tensor | None) -> None:
        parts = {kind: build_part(kind, method.part(kind), spec) for kind in PART_KINDS}
        for kind, part in parts.items():
            if part is None and kind in ("activation", "weight"):
                raise BinarizeError(f"{method.name}: the {kind} binarizer cannot be None.")
            parts[kind] = None if part is None else _like(part, self.weight.device, self.weight.dtype)
        self._place(method, parts, had_bias=bias is not None)
        if bias is not None and method.keep_bias:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        elif bias is not None and method.fold_bias:
            fold = getattr(self.post, "fold_bias_", None)
            if fold is None or self.norm is not None or self.scale is not None or self.post_after_shortcut:
                raise BinarizeError(
                    f"{method.name}: fold_bias=True needs an RPReLU right after the convolution (post='taa' or "
                    "'rprelu', no scale, no norm, the shortcut added last); use keep_bias=True, or let the bias be "
                    "dropped."
                )
            fold(bias.detach())

    def _place(self, method: Method, parts: Mapping[PartKind, nn.Module | None], *, had_bias: bool) -> None:
        for kind, part in parts.items():
            self.add_module("weight_binarizer" if kind == "weight" else kind, part)
        self.method = method
        self.post_after_shortcut = method.post_after_shortcut
        self.clamps_latent = method.clamps
        self.had_bias = had_bias
        self.register_parameter("bias", None)

    @classmethod
    def from_parts(
        cls: type[LayerT],
        plain: nn.Module,
        method: Method,
        parts: Mapping[PartKind, nn.Module | None],
        *,
        had_bias: bool,
    ) -> LayerT:
        """Return a layer of parts that there are already, in evaluation mode.

        Args:
            plain: The layer that it stands for; its weight becomes the latent weight, as the same Parameter, and its
                bias, if it has one, is kept as it is.
            method: What the parts are parts of.
            parts: A module or None for each stage.
            had_bias: Whether the layer that was converted had a bias.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_geometry(plain)
        layer.weight = cast(nn.Parameter, plain.weight)
        layer._place(method, parts, had_bias=had_bias)
        layer.bias = cast("nn.Parameter | None", plain.bias)
        return layer.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(B, C_in, H, W)`` or ``(..., C_in)``."""
        shifted = x if self.pre is None else self.pre(x)
        y = self._product(self.activation(shifted), self.weight_binarizer(self.weight))
        return self._finish(y, x, shifted)

    def _finish(self, y: Tensor, x: Tensor, shifted: Tensor) -> Tensor:
        """Apply what follows the product."""
        if self.bias is not None:
            y = y + (self.bias.view(-1, 1, 1) if self.kind == "conv2d" else self.bias).to(y.dtype)
        if self.scale is not None:
            y = self.scale(y, x if getattr(self.scale, "of_input", False) else shifted)
        if self.norm is not None:
            y = self.norm(y)
        if self.post is not None and not self.post_after_shortcut:
            y = self.post(y)
        if self.shortcut is not None:
            y = self.shortcut(y, x)
        if self.post is not None and self.post_after_shortcut:
            y = self.post(y)
        return y

    @classmethod
    def _converted(
        cls: type[LayerT], plain: nn.Module, method: Method | str, context: TimestepContext | None
    ) -> LayerT:
        layer = cls.__new__(cls)  # `__init__` would allocate weights of its own
        nn.Module.__init__(layer)
        layer._from(plain, method, context)
        layer.train(plain.training)
        return layer

    def _from(self, plain: Any, method: Method | str, context: TimestepContext | None) -> None:
        raise NotImplementedError  # pragma: no cover - both subclasses define it

    def _take_geometry(self, plain: Any) -> None:
        raise NotImplementedError  # pragma: no cover - both subclasses define it

    def _product(self, codes: Tensor, weight: BinaryWeight) -> Tensor:
        raise NotImplementedError  # pragma: no cover - both subclasses define it

    def clamp_latent_(self) -> None:
        """Clamp the latent weights to [-1, 1] where the method does so after each optimizer step (BNN)."""
        if self.clamps_latent:
            with torch.no_grad():
                self.weight.clamp_(-1, 1)

    @torch.no_grad()
    def binary_weight(self) -> BinaryWeight:
        """Return the codes ``(n, *weight.shape)`` and scales ``(n, C_out)`` that the forward uses now."""
        return cast(BinaryWeight, self.weight_binarizer(self.weight))


PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PlainT = TypeVar("PlainT", nn.Conv2d, nn.Linear)


def _with_latents(plain: PlainT, layer: _BinaryLayer) -> PlainT:
    plain.weight = layer.weight
    if layer.had_bias:
        bias = layer.bias
        plain.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0])) if bias is None else bias
    return plain.train(layer.training)


def _like(part: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    if device.type == "meta":  # the part was created where the model is being built; only its dtype may differ
        return part.to(dtype=dtype)
    return part.to(device=device, dtype=dtype)


class BinaryConv2d(_BinaryLayer):
    """A 2-D convolution with 1-bit weights and activations.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: Height and width of the kernel.
        stride: As in nn.Conv2d.
        padding: As in nn.Conv2d, "same" and "valid" included; applied after the sign.
        dilation: As in nn.Conv2d.
        groups: As in nn.Conv2d.
        padding_mode: As in nn.Conv2d; modes other than "zeros" pad the signs, so that borders stay two-valued.
        method: A method's name or instance; its parts make up the layer.
        context: Where timestep-aware parts read the timestep.

    Shapes:
        x: ``(B, C_in, H, W)``; output ``(B, C_out, H', W')``.
    """

    kind: Literal["conv2d", "linear"] = "conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        *,
        method: Method | str = "bidiffsr",
        context: TimestepContext | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=False,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self._from(conv, method, context)

    @classmethod
    def from_float(cls, conv: nn.Conv2d, method: Method | str, context: TimestepContext | None = None) -> BinaryConv2d:
        """Return the binary form of ``conv``; its weight becomes the latent weight, as the same Parameter."""
        return cls._converted(conv, method, context)

    def _from(self, conv: nn.Conv2d, method: Method | str, context: TimestepContext | None) -> None:
        from binarize.methods import get_method

        method = get_method(method)
        self._take_geometry(conv)
        self.weight = cast(nn.Parameter, conv.weight)
        spec = LayerSpec(
            kind="conv2d",
            in_channels=conv.in_channels,
            out_channels=conv.out_channels,
            weight=conv.weight,
            stride=self.stride,
            padding=self.padding,
            pad=self.pad_codes,
            padding_mode=conv.padding_mode,
            dilation=self.dilation,
            groups=method.groups,
            context=context,
            sign_zero=method.sign_zero,
        )
        self._assemble(method, spec, conv.bias)

    def _take_geometry(self, conv: nn.Conv2d) -> None:
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size = cast(tuple[int, int], conv.kernel_size)
        self.stride = cast(tuple[int, int], conv.stride)
        self.dilation = cast(tuple[int, int], conv.dilation)
        self.groups, self.padding_mode = conv.groups, conv.padding_mode
        self.memory: Memory = "exact"
        self.declared_padding = cast(str | tuple[int, int], conv.padding)
        left_right, top_bottom = _explicit_padding(conv)
        symmetric = left_right[0] == left_right[1] and top_bottom[0] == top_bottom[1]
        self.padding = (top_bottom[0], left_right[0])
        self.pad_codes = None if symmetric and conv.padding_mode == "zeros" else (*left_right, *top_bottom)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(B, C_in, H, W)``."""
        if not block_fits(self, x):
            return super().forward(x)
        if x.device.type == "cpu" and x.stride(1) == 1:  # a slice of channels, such as CP-Down's
            x = x.contiguous(memory_format=torch.channels_last)
        source, shift = x, None
        if isinstance(self.pre, Shift) and is_plain(self.pre, Shift):
            shift = self.pre.gather(self.pre.bias)
        elif self.pre is not None:
            source = self.pre(x)
        whole = tail_fits(self)
        post = self.post.gather_all() if whole and isinstance(self.post, RPReLU) else (None, None, None)
        binarizer: Any = self.weight_binarizer
        activation: Any = self.activation
        y: Tensor = BinaryBlock.apply(
            source,
            self.weight,
            binarizer.scale(self.weight),
            shift,
            *post,
            Block(
                geometry=Geometry(self.stride, self.padding, self.dilation, self.groups),
                zero=activation.sign_zero,
                surrogate=SURROGATES[type(activation)],
                clip_weight=binarizer.clip,
                shortcut=whole and self.shortcut is not None,
                memory=self.memory,
                dtype=compute_dtype(x),
            ),
        )
        return y if whole else self._finish(y, x, source)

    def _product(self, codes: Tensor, weight: BinaryWeight) -> Tensor:
        padding = self.padding
        if self.pad_codes is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            codes = F.pad(codes, self.pad_codes, mode=mode)
            padding = (0, 0)
        return binary_conv2d(codes, weight, self.stride, padding, self.dilation, self.groups)

    def to_float(self) -> nn.Conv2d:
        """Return the plain convolution with the latent weights, as the same Parameter."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.declared_padding,
            self.dilation,
            self.groups,
            bias=self.had_bias,
            padding_mode=self.padding_mode,
            device="meta",
        )
        return _with_latents(conv, self)

    def extra_repr(self) -> str:
        """Say what nn.Conv2d says, and the method."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return f"{text}, method={self.method.name!r}"


class BinaryLinear(_BinaryLayer):
    """A linear layer with 1-bit weights and activations.

    Args:
        in_features: C_in.
        out_features: C_out.
        method: A method's name or instance.
        context: Where timestep-aware parts read the timestep.

    Shapes:
        x: ``(B, ..., C_in)``; output ``(B, ..., C_out)``.
    """

    kind: Literal["conv2d", "linear"] = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        method: Method | str = "bidiffsr",
        context: TimestepContext | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._from(nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype), method, context)

    @classmethod
    def from_float(
        cls, linear: nn.Linear, method: Method | str, context: TimestepContext | None = None
    ) -> BinaryLinear:
        """Return the binary form of ``linear``; its weight becomes the latent weight, as the same Parameter."""
        return cls._converted(linear, method, context)

    def _from(self, linear: nn.Linear, method: Method | str, context: TimestepContext | None) -> None:
        from binarize.methods import get_method

        method = get_method(method)
        self._take_geometry(linear)
        self.weight = cast(nn.Parameter, linear.weight)
        spec = LayerSpec(
            kind="linear",
            in_channels=linear.in_features,
            out_channels=linear.out_features,
            weight=linear.weight,
            groups=method.groups,
            context=context,
            sign_zero=method.sign_zero,
        )
        self._assemble(method, spec, linear.bias)

    def _take_geometry(self, linear: nn.Linear) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def _product(self, codes: Tensor, weight: BinaryWeight) -> Tensor:
        return binary_linear(codes, weight)

    def to_float(self) -> nn.Linear:
        """Return the plain linear layer with the latent weights, as the same Parameter."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.had_bias, device="meta")
        return _with_latents(linear, self)

    def extra_repr(self) -> str:
        """Say what nn.Linear says, and the method."""
        return f"{self.in_features}, {self.out_features}, method={self.method.name!r}"


def _explicit_padding(conv: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return ((left, right), (top, bottom)) of a convolution, strings resolved."""
    padding: Any = conv.padding
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        pads = []
        for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True):
            total = dilation * (size - 1)
            pads.append((total // 2, total - total // 2))
        return pads[1], pads[0]
    return (padding[1], padding[1]), (padding[0], padding[0])
