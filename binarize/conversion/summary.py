"""Parameters, operations and bytes of a network, by the rules of published comparisons.

- Parameters: all of them, a binary weight as 1/32, a ternary one as 2/32, and one that is stored in 8 bits as 8/32.
- Operations: multiply-accumulates, a binary one as 1/64; that of a binary weight and a k-bit activation as k/64, and
  with a float as 1. Ternary and two-basis weights are two binary ones, but one with floats. Products inside attention
  and parts count as MACs; 5 per element for GroupNorm and LayerNorm, 2 for BatchNorm in eval mode, 1 for
  nearest-neighbor upsampling. Biases, shifts, signs, scales, activations, additions, softmax and shuffles are not
  counted.
- Bytes: the size of a packed file: 1 bit for a binary weight, 1 byte for a weight in 8 bits, 4 bytes for everything
  else, scales included.

These rules reproduce the figures of BI-DiffSR's Table 2. A copy of the network runs on the meta device, without
computing anything, and every operation that reaches PyTorch's dispatcher is counted.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from binarize.conversion.packing import unpack_layers
from binarize.errors import BinarizeError
from binarize.layers import BinaryLayer, Branch
from binarize.layers.parts import activation_bits
from binarize.modules import call_arguments, meta_copy, prefixes, unwrap
from binarize.packed.int8 import has_int8_weights
from binarize.tables import Column, Table

NORM_COST = {"native_group_norm": 5, "native_layer_norm": 5, "_fused_rms_norm": 5}
BATCH_NORM_COST = 2


@dataclass(frozen=True)
class SummaryRow:
    """One module that has parameters or computes, with figures as in `Summary`.

    Attributes:
        bits: 1 for a binary layer, 8 for one that is stored in 8 bits, else 32.
        activation_bits: Bits of the activations that a layer multiplies; 32 for floats.
        output: Shape of its last output, or () if it did not run.
        params: Parameters, a binary weight as 1/32 for each of its bits (two in two-basis weights).
    """

    name: str
    type: str
    bits: int
    activation_bits: int
    output: tuple[int, ...]
    raw_params: int
    params: float
    macs: dict[int, int]
    ops: float
    bytes: int


@dataclass(frozen=True)
class Summary:
    """Parameters, operations and bytes of a network.

    Attributes:
        params: Parameters, a binary weight as 1/32; ``raw_params`` counts them as stored for training.
        ops: Operations, a binary MAC as 1/64.
        macs_by_bits: Multiply-accumulates by the bits of the activations, {1: ..., 32: ...}; full precision is 32.
        bytes: Bytes on disk when packed.
        rows: One `SummaryRow` per module.
        input: Shapes of the inputs.
    """

    params: float
    raw_params: int
    ops: float
    macs_by_bits: dict[int, int]
    bytes: int
    rows: tuple[SummaryRow, ...]
    input: str

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, *, layers: bool = True) -> str:
        """Return a table for a terminal and the totals, or the totals alone."""
        return f"{self._table().to_text()}\n\n{self._totals()}" if layers else self._totals()

    def to_markdown(self, *, layers: bool = True) -> str:
        """Return the totals and a table as Markdown, or the totals alone."""
        totals = self._totals().replace("\n", "  \n")
        return f"{totals}\n\n{self._table().to_markdown()}" if layers else totals

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(asdict(self), indent=2)

    def _table(self) -> Table:
        output = Column("output", lambda shape: "x".join(map(str, shape)), "left")
        formats = {"raw params": ",", "params": ",.1f", "MACs (M)": ",.3f", "OPs (M)": ",.3f", "bytes": ","}
        columns = [*map(Column, ("module", "type")), output, Column("bits"), *map(Column, formats, formats.values())]
        rows = []
        for r in self.rows:
            macs, ops = sum(r.macs.values()) / 1e6, r.ops / 1e6
            bits = r.bits if r.bits == r.activation_bits else f"{r.bits}/{r.activation_bits}"
            rows.append((r.name, r.type, r.output, bits, r.raw_params, r.params, macs, ops, r.bytes))
        return Table(columns, rows)

    def _totals(self) -> str:
        macs = ", ".join(f"{count / 1e9:.4f} G at {bits} bit" for bits, count in sorted(self.macs_by_bits.items()))
        return (
            f"parameters  {self.params / 1e6:.3f} M (a weight of b bits as b / 32); {self.raw_params:,} raw\n"
            f"operations  {self.ops / 1e9:.3f} G (binary MACs / 64) for {self.input}\n"
            f"MACs        {macs}\n"
            f"packed      {self.bytes / 1e6:.2f} MB on disk; {4 * self.raw_params / 1e6:.2f} MB as float32"
        )


@dataclass
class _Count:
    macs: Counter[int] = field(default_factory=Counter)
    other: int = 0
    output: tuple[int, ...] = ()


def summary(model: nn.Module, example_inputs: Any = None) -> Summary:
    """Count parameters, operations and bytes of a network, converted or not.

    Args:
        model: Any nn.Module; it is not run and not changed. A packed model has the figures of the binary one,
            but for weights in 8 bits.
        example_inputs: Inputs of the forward: a tensor, a tuple of arguments or a dict of keyword arguments. By
            default, SRUNet is run at 3x256x256, batch 1, diffusers' U-Nets at their configured size, and any other
            network on one 3x224x224 image.
    """
    model = unwrap(model)
    args, kwargs = call_arguments(default_inputs(model) if example_inputs is None else example_inputs, "summary")
    described = _describe(args, kwargs)
    twin = meta_copy(model).eval()
    unpack_layers(twin)  # a packed block computes for several modules
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def to_meta(value: Any) -> Any:
        return value.to("meta", dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value

    counts = _run(twin, tree_map(to_meta, args), tree_map(to_meta, kwargs), described)
    seen: set[int] = set()
    rows = [_row(name, twin.get_submodule(name), count, seen) for name, count in counts.items()]
    rows = [row for row in rows if row.raw_params or row.ops]
    macs = sum((Counter(row.macs) for row in rows), Counter[int]())
    totals: dict[str, Any] = {
        key: sum(getattr(r, key) for r in rows) for key in ("params", "raw_params", "ops", "bytes")
    }
    return Summary(**totals, macs_by_bits=dict(macs), rows=tuple(rows), input=described)


def _row(name: str, module: nn.Module, count: _Count, seen: set[int]) -> SummaryRow:
    binary = isinstance(module, BinaryLayer)
    owned = [p for p in module.parameters(recurse=binary) if id(p) not in seen]  # a tied parameter counts once
    seen.update(id(p) for p in owned)
    raw = sum(p.numel() for p in owned)
    packed, weights, bases, size = set[int](), 0, 1, 0
    if isinstance(module, BinaryLayer):
        binarizer = module.weight_binarizer
        packed = {id(t) for t in (module.weight, *binarizer.parameters(), *binarizer.buffers())}
        weights = sum(p.numel() for p in owned if p is module.weight)
        bases = module.bases
        scales = {"filter": module.weight.shape[0], "tensor": 1, "none": 0}[module.stored_scales]
        size = bases * (math.ceil(module.weight.numel() / 8) + 4 * scales)
    bits = 1 if binary else 32
    if has_int8_weights(module):
        packed, bits = {id(module.weight)}, 8
        weights = sum(p.numel() for p in owned if p is module.weight)
    size += 4 * sum(p.numel() for p in owned if id(p) not in packed)
    size += sum(b.nbytes for b in module.buffers(recurse=binary) if id(b) not in packed)
    return SummaryRow(
        name=name,
        type=type(module).__name__,
        bits=bits,
        activation_bits=_activation_bits(module),
        output=count.output,
        raw_params=raw,
        params=raw - weights + bases * bits * weights / 32,
        macs=dict(count.macs),
        ops=sum(macs * (1 if bits == 32 else bits / 64) for bits, macs in count.macs.items()) + count.other,
        bytes=size,
    )


def _activation_bits(module: nn.Module) -> int:
    """Return the bits of what a module multiplies itself; 1 for a binary layer's activation that declares nothing."""
    if not isinstance(module, BinaryLayer):
        return 32
    bits = activation_bits(module.activation)
    return 1 if bits is None else bits


def _products(module: nn.Module, bits: int) -> int:
    """Return how many products each MAC of a module is: one operator does the work of all bases of k-bit layers."""
    return module.bases if isinstance(module, BinaryLayer) and 1 < bits < 32 else 1


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], described: str) -> dict[str, _Count]:
    """Return the counts of each module; the parts of a binary layer count as the layer."""
    counts: dict[str, _Count] = {}
    stack: list[tuple[_Count, int, int]] = []
    layers = {name for name, module in model.named_modules() if isinstance(module, BinaryLayer)}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            owner = next((prefix for prefix in prefixes(name)[:-1] if prefix in layers), name)
            count, bits = counts.setdefault(owner, _Count()), _activation_bits(module)
            entry = count, bits, _products(module, bits)

            def enter(module: nn.Module, args: Any, entry: Any = entry) -> None:
                stack.append(entry)

            def leave(module: nn.Module, args: Any, output: Any, whole: bool = owner == name) -> None:
                count, *_ = stack.pop()
                if isinstance(module, Branch):
                    count.macs[32] += module.macs(output.numel())
                if whole and isinstance(output, Tensor):
                    count.output = tuple(output.shape)

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        try:
            with torch.no_grad(), _Counter(stack), sdpa_kernel(SDPBackend.MATH):
                model(*args, **kwargs)
        except BinarizeError:
            raise
        except Exception as error:
            problem = f"{type(model).__name__} cannot run on {described}: {type(error).__name__}: {error}"
            raise BinarizeError(f"summary: {problem}. Pass example_inputs that its forward accepts.") from error
    return counts


class _Counter(TorchDispatchMode):
    """Adds each operation that reaches the dispatcher to the innermost module that is running."""

    def __init__(self, stack: Sequence[tuple[_Count, int, int]]) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # imports triton where it is installed

        self.flops = flop_registry
        self.stack = stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__
        count, bits, products = self.stack[-1]
        if packet in self.flops:
            macs = int(self.flops[packet](*args, **(kwargs or {}), out_val=out)) // 2
            count.macs[bits] += products * macs
        elif name in NORM_COST or "batch_norm" in name:
            count.other += NORM_COST.get(name, BATCH_NORM_COST) * args[0].numel()
        elif "upsample_nearest" in name:
            count.other += out.numel()
        return out


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    shapes = ["x".join(map(str, v.shape)) for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.dim() > 1]
    return ", ".join(shapes) or "scalars"


def default_inputs(model: nn.Module) -> tuple[Any, ...] | dict[str, Any]:
    """Return meta tensors of the size at which the model's family is usually counted, batch 1."""
    config = getattr(model, "config", None)
    get = (config if isinstance(config, Mapping) else {}).get
    names = {c.__name__ for c in type(model).__mro__}
    with torch.device("meta"):
        timestep = torch.zeros(1, dtype=torch.long)
        if "SRUNet" in names:
            channels, multiple = get("out_channels", 3), cast(int, model.size_multiple)
            size = 256 if 256 % multiple == 0 else multiple
            condition = torch.empty(1, get("in_channels", 6) - channels, size, size)
            return torch.empty(1, channels, size, size), timestep, condition
        if "UNet2DModel" in names or "UNet2DConditionModel" in names:
            sides, width = get("sample_size") or 64, get("cross_attention_dim", 1280)
            sides = (sides, sides) if isinstance(sides, int) else sides
            given = {"sample": torch.empty(1, get("in_channels", 3), *sides), "timestep": timestep}
            if get("num_class_embeds") is not None:
                given["class_labels"] = timestep
            if "UNet2DConditionModel" in names:
                given["encoder_hidden_states"] = torch.empty(1, 77, width if isinstance(width, int) else width[-1])
            return given
        return (torch.empty(1, 3, 224, 224),)
