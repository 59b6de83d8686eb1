"""The modules of a network that is exported: each binary layer and each GroupNorm is one node."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.binary_conv import OutputTransform, Shortcut
from binarize.kernels.product import float_product
from binarize.layers.declared import is_hooked, runs_own_forward
from binarize.layers.fused import is_plain
from binarize.layers.lowering import LoweredLayer, lower
from binarize.layers.pipeline import Depth
from binarize.modules import replace_modules
from binarize.onnx.functions import DOMAIN, ROWS, Kind, Step, function_inputs, function_name
from binarize.packed import PackedConv1d, PackedLayer, PackedLinear
from binarize.packed.blocks import PackedBlock


def prepare(model: nn.Module) -> nn.Module:
    """Replace the packed layers and blocks of a model, in place, by modules that ONNX's exporter can translate."""
    blocks = {id(block): block.unpacked_form() for block in model.modules() if isinstance(block, PackedBlock)}
    replace_modules(model, blocks)
    new: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            new[id(module)] = _node_of(name, module)
        elif is_plain(module, nn.GroupNorm) and module.affine:
            new[id(module)] = _GroupNorm(module)
    replace_modules(model, new)
    return model


def _node_of(name: str, layer: PackedLayer) -> nn.Module:
    if is_hooked(layer) or not runs_own_forward(layer):
        raise BinarizeError(
            f"export: {name} has hooks or another forward than {type(layer).__name__}'s, which a file cannot hold; "
            "remove them first."
        )
    lowered = lower(layer)
    if lowered is None or lowered.planes:
        return _ManyValues1d(layer) if isinstance(layer, PackedConv1d) else _ManyValues(layer)
    if isinstance(layer, PackedLinear):
        return _Linear(layer)
    return _Conv1d(layer) if isinstance(layer, PackedConv1d) else _Conv2d(layer)


class _GroupNorm(nn.Module):
    """A GroupNorm with affine parameters."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, ...)``."""
        if x.dim() < 3:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        attributes: dict[str, Any] = {
            "groups": [0, self.num_groups, -1],
            "weight_groups": [1, self.num_groups, -1],
            "channels": [0, -1, *[1] * (x.dim() - 2)],
            "epsilon": float(self.eps),
        }
        return _node("GroupNorm", [x, self.weight, self.bias], attributes, x.shape)


def _node(name: str, inputs: list[Tensor], attributes: dict[str, Any], shape: Any) -> Tensor:
    out: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", inputs, attributes, dtype=torch.float32, shape=shape)
    return out


class _Product(nn.Module):
    """The product with one basis of binary weights and what follows it, as one node."""

    def __init__(
        self, kind: Kind, layer: PackedLayer, lowered: LoweredLayer, bits: Tensor, transform: OutputTransform
    ) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.steps: list[Step] = ["Unsigned"] if lowered.levels == (0, 1) else []
        self.attributes: dict[str, Any] = {"weight_shape": list(layer.weight_shape)}
        self.register_buffer("bits", bits)
        self._add("Shift", layer.thresholds(lowered))
        self._add("Scale", transform.scale)
        self._add("Factor", transform.factor)
        self._add("Offset", transform.offset)
        if transform.shortcut == Shortcut.FIRST:
            self.steps.append("EarlyShortcut")
        self._add("RPReLU", *transform.rprelu())
        if math.isfinite(transform.low) or math.isfinite(transform.high):
            self.steps.append("Clamp")
            self.attributes |= {"low": float(transform.low), "high": float(transform.high)}
        if transform.shortcut == Shortcut.LAST:
            self.steps.append("Shortcut")

    def _add(self, step: Literal["Shift", "Scale", "Factor", "Offset", "RPReLU"], *rows: Tensor | None) -> None:
        """Add a step whose inputs are rows ``(K, C)``, or ``(C,)``; those of equal values are stored once."""
        present = [torch.atleast_2d(row.detach().float()) for row in rows if row is not None]
        if not present:
            return
        groups = max(map(len, present))
        named: Step = step if groups == 1 else cast(Step, f"Timestep{step}")
        self.steps.append(named)
        for name, row in zip(ROWS[named], present, strict=True):
            row = row.expand(groups, -1)
            self.register_buffer(name, (row[:, :1] if bool((row == row[:, :1]).all()) else row).clone())

    def forward(self, x: Tensor, group: Tensor | None, shape: Any, attributes: dict[str, Any]) -> Tensor:
        """Return the product ``shape``; ``attributes`` are those of the kind of layer."""
        tensors = {"x": x, "timestep_group": group, **dict(self.named_buffers())}
        inputs = [cast(Tensor, tensors[name]) for name in function_inputs(self.steps)]
        return _node(function_name(self.kind, self.steps), inputs, {**self.attributes, **attributes}, shape)


class _Layer(nn.Module):
    """Base class of the layers: ``layer`` has the parts that run as modules."""

    kind: Kind = "BinaryConv"

    def __init__(self, layer: PackedLayer) -> None:
        super().__init__()
        lowered = lower(layer)
        assert lowered is not None  # see `_node_of`
        self.layer, self.lowered = layer, lowered
        scales: Any = [None] * layer.bases if layer.scales is None else layer.weight_scales()
        products = zip(layer.bits, scales, strict=True)
        self.products = nn.ModuleList(
            _Product(self.kind, layer, lowered, bits, replace(lowered.transform, scale=scale))
            for bits, scale in products
        )

    def run(self, x: Tensor, source: Tensor, shape: Any, attributes: dict[str, Any]) -> Tensor:
        """Return the sum of the products; ``source`` is what the kernel reads of the input ``x``."""
        group = self.lowered.timestep_group(x.shape[0])
        total: Tensor | None = None
        for product in self.products:
            y = product(source, group, shape, attributes)
            total = y if total is None else total + y
        assert total is not None
        return total


class _Conv2d(_Layer):
    """A binary 2-D or 3-D convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``(B, C_in, [D,] H, W)``."""
        x, layer = input, self.layer
        source = layer._pad(x if self.lowered.fuses_pre else layer.shifted(x))
        depth = Depth(1, 1, (0, 0), 1) if layer.depth is None else layer.depth
        geometry, dims = layer.geometry, source.dim() - 2
        left, right, top, bottom = geometry.pad
        pads = [depth.pad[0], top, left][-dims:], [depth.pad[1], bottom, right][-dims:]
        if layer.padding_mode != "zeros":
            pads = [0] * dims, [0] * dims
        strides = [depth.stride, *geometry.stride][-dims:]
        dilations = [depth.dilation, *geometry.dilation][-dims:]
        attributes = {
            "strides": strides, "pads": [*pads[0], *pads[1]], "dilations": dilations, "group": layer.shape.groups,
            "row_axes": list(range(2, 2 + dims)),
        }  # fmt: skip
        size = list(source.shape[2:])
        for axis, (taps, stride) in enumerate(zip([depth.kernel, *layer.kernel][-dims:], strides, strict=True)):
            change = pads[0][axis] + pads[1][axis] - dilations[axis] * (taps - 1)
            if change or stride > 1:  # symbolic sizes stay simple, which is faster to trace
                size[axis] = (size[axis] + change - 1) // stride + 1
        y = self.run(x, source, [x.shape[0], layer.shape.out_channels, *size], attributes)
        return layer.run_stages(self.lowered.rest, y, x)


class _Conv1d(_Conv2d):
    """A binary 1-D convolution, as one of height 1."""

    def __init__(self, layer: PackedLayer) -> None:
        super().__init__(layer)
        for product in self.products:
            cast(Any, product).attributes["weight_shape"].insert(2, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``(B, C_in, L)``."""
        return super().forward(input.unsqueeze(2)).squeeze(2)


class _Linear(_Layer):
    """A binary linear layer."""

    kind: Kind = "BinaryLinear"

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``(B, ..., C_in)``."""
        x, layer = input, self.layer
        source = x if self.lowered.fuses_pre else layer.shifted(x)
        tokens = source.reshape(x.shape[0], -1, x.shape[-1])
        shape = [x.shape[0], tokens.shape[1], layer.shape.out_channels]
        y = self.run(x, tokens, shape, {}).reshape(*x.shape[:-1], layer.shape.out_channels)
        return layer.run_stages(self.lowered.rest, y, x)


class _ManyValues(nn.Module):
    """A layer whose activations have more than two values: its bits are nodes, the rest are PyTorch's operators."""

    bits: Tensor
    scales: Tensor | None

    def __init__(self, layer: PackedLayer) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("bits", layer.bits)
        self.register_buffer("scales", None if layer.scales is None else layer.weight_scales())
        depth = () if layer.depth is None else (layer.depth.kernel,)
        kernel = (*depth, *layer.kernel) if layer.steps else ()
        self.shape = [layer.shape.out_channels, layer.shape.in_channels, *kernel]

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer; see `PackedLayer.run_without_kernel`."""
        layer, total = self.layer, None
        for basis, bits in enumerate(self.bits):
            weight = _node("Signs", [bits], {"shape": self.shape}, self.shape)
            if self.scales is not None:
                weight = weight * self.scales[basis].view(-1, *[1] * (len(self.shape) - 1))
            total = weight if total is None else total + weight
        assert total is not None
        shifted = layer.shifted(input)
        values = layer.padded(layer.activation(shifted))
        return layer.run_stages(layer.stages(), float_product(values, total, *layer.steps), input, shifted)


class _ManyValues1d(_ManyValues):
    """Such a 1-D convolution, as one of height 1."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``(B, C_in, L)``."""
        return super().forward(input.unsqueeze(2)).squeeze(2)
