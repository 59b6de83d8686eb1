"""Parameters, operations and bytes of a network, counted as the field publishes them.

- Parameters: all of them, a binary weight as 1/32.
- Operations: multiply-accumulates, a binary one as 1/64; products inside attention count as MACs; 5 per element for
  GroupNorm and LayerNorm, 2 for BatchNorm in eval mode, 1 for nearest-neighbour upsampling. Biases, shifts, signs,
  scales, activations, additions, softmax and shuffles are not counted.
- Bytes: what a packed file holds: 1 bit for a binary weight, 4 bytes for everything else, scales included.

These rules reproduce the figures of BI-DiffSR's Table 2. Nothing is computed: a copy of the network runs on the meta
device, and operations are counted where they reach PyTorch's dispatcher, whatever module they come from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from binarize.conversion.packing import unpack_layers
from binarize.errors import BinarizeError
from binarize.layers import BinaryConv2d, BinaryLinear
from binarize.modules import meta_copy

NORM_COST = {"native_group_norm": 5, "native_layer_norm": 5, "_fused_rms_norm": 5}
BATCH_NORM_COST = 2


@dataclass(frozen=True)
class SummaryRow:
    """One module that holds parameters or computes.

    Attributes:
        name: Its path in the model.
        type: Its class.
        bits: 1 for a binary layer, else 32.
        output: Shape of its last output, or () if it did not run.
        raw_params: Parameters as stored for training.
        params: Parameters with a binary weight as 1/32 for each of its bits (two in two-basis weights).
        macs: Multiply-accumulates, by bit-width.
        ops: Operations with a binary MAC as 1/64.
        bytes: Bytes on disk when packed.
    """

    name: str
    type: str
    bits: int
    output: tuple[int, ...]
    raw_params: int
    params: float
    macs: dict[int, int]
    ops: float
    bytes: int


@dataclass(frozen=True)
class Summary:
    """What a network costs.

    Attributes:
        params: Parameters, a binary weight as 1/32.
        raw_params: Parameters as stored for training.
        ops: Operations, a binary MAC as 1/64.
        macs_by_bits: Multiply-accumulates by bit-width, {1: ..., 32: ...}.
        bytes: Bytes on disk when packed.
        rows: One `SummaryRow` per module.
        input: What the network was run on.
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
        """Return a table for a terminal, or the totals alone."""
        if not layers:
            return self._totals()
        cells = [_HEAD, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_HEAD))]
        lines = [
            "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in cells
        ]
        return "\n".join([*lines, "", self._totals()])

    def to_markdown(self, *, layers: bool = True) -> str:
        """Return Markdown: the totals, and a table with one line per module."""
        lines = [self._totals().replace("\n", "  \n")]
        if layers:
            lines += [
                "",
                "| " + " | ".join(_HEAD) + " |",
                "|" + "|".join(["---"] * 3 + ["--:"] * (len(_HEAD) - 3)) + "|",
            ]
            lines += ["| " + " | ".join(_cells(row)) + " |" for row in self.rows]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(asdict(self), indent=2)

    def _totals(self) -> str:
        macs = ", ".join(f"{count / 1e9:.4f} G at {bits} bit" for bits, count in sorted(self.macs_by_bits.items()))
        return (
            f"parameters  {self.params / 1e6:.3f} M (binary weights / 32); {self.raw_params:,} raw\n"
            f"operations  {self.ops / 1e9:.3f} G (binary MACs / 64) for {self.input}\n"
            f"MACs        {macs}\n"
            f"packed      {self.bytes / 1e6:.2f} MB on disk; {4 * self.raw_params / 1e6:.2f} MB as float32"
        )


_HEAD = ["module", "type", "output", "bits", "raw params", "params", "MACs (M)", "OPs (M)", "bytes"]


def _cells(row: SummaryRow) -> list[str]:
    return [
        row.name,
        row.type,
        "x".join(map(str, row.output)),
        str(row.bits),
        f"{row.raw_params:,}",
        f"{row.params:,.1f}",
        f"{sum(row.macs.values()) / 1e6:,.3f}",
        f"{row.ops / 1e6:,.3f}",
        f"{row.bytes:,}",
    ]


@dataclass
class _Count:
    macs: dict[int, int] = field(default_factory=dict)
    other: int = 0
    output: tuple[int, ...] = ()


def summary(model: nn.Module, example_inputs: Any = None) -> Summary:
    """Count parameters, operations and bytes of a network, converted or not.

    Args:
        model: Any nn.Module; it is not run and not changed. A packed one gives the figures of the binary one.
        example_inputs: What the forward gets: a tensor, a tuple of arguments or a dict of keyword arguments. Without
            it, SRUNet is run at 3x256x256, batch 1, diffusers' U-Nets at their configured size, and anything else on
            one 3x224x224 picture.

    Raises:
        BinarizeError: If the network cannot run on the inputs.
    """
    inputs, described = _inputs(model, example_inputs)
    ghost = meta_copy(model).eval()
    unpack_layers(ghost)  # packed blocks do several modules' work at once
    counts, order = _run(ghost, inputs)
    seen: set[int] = set()
    rows = [_row(name, module, counts.get(name, _Count()), seen) for name, module in order]
    rows = [row for row in rows if row.raw_params or row.ops]
    macs: dict[int, int] = {}
    for row in rows:
        for bits, count in row.macs.items():
            macs[bits] = macs.get(bits, 0) + count
    return Summary(
        params=sum(row.params for row in rows),
        raw_params=sum(row.raw_params for row in rows),
        ops=sum(row.ops for row in rows),
        macs_by_bits=macs,
        bytes=sum(row.bytes for row in rows),
        rows=tuple(rows),
        input=described,
    )


def _row(name: str, module: nn.Module, count: _Count, seen: set[int]) -> SummaryRow:
    binary = isinstance(module, BinaryConv2d | BinaryLinear)
    owned = [p for p in _owned(module) if id(p) not in seen]  # a tied parameter counts once
    seen.update(id(p) for p in owned)
    raw = sum(p.numel() for p in owned)
    weights = sum(p.numel() for p in owned if p is module.weight) if binary else 0
    inside = cast(nn.Module, module.weight_binarizer) if binary else None
    latent = set() if inside is None else {id(t) for t in (module.weight, *inside.parameters(), *inside.buffers())}
    size = sum(p.numel() for p in owned if id(p) not in latent) * 4
    size += sum(b.numel() * b.element_size() for b in _buffers(module) if id(b) not in latent)
    if binary:
        size += _binary_bytes(module)  # type: ignore[arg-type]
    ops = sum(macs / (64 if bits == 1 else 1) for bits, macs in count.macs.items()) + count.other
    return SummaryRow(
        name=name,
        type=type(module).__name__,
        bits=1 if binary else 32,
        output=count.output,
        raw_params=raw,
        params=raw - weights + _terms(module) * weights / 32,
        macs=dict(count.macs),
        ops=ops,
        bytes=size,
    )


def _terms(module: nn.Module) -> int:
    return int(getattr(getattr(module, "weight_binarizer", None), "terms", 1))


def _binary_bytes(layer: BinaryConv2d | BinaryLinear) -> int:
    weights, channels = layer.weight.numel(), layer.weight.shape[0]
    binarizer = layer.weight_binarizer
    stored = {"filter": channels, "tensor": 1, "none": 0}[getattr(binarizer, "stored_scales", "filter")]
    return _terms(layer) * (math.ceil(weights / 8) + 4 * stored)


def _owned(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of one row: of a binary layer with its parts, else the module's direct ones."""
    return list(module.parameters(recurse=isinstance(module, BinaryConv2d | BinaryLinear)))


def _buffers(module: nn.Module) -> list[Tensor]:
    return list(module.buffers(recurse=isinstance(module, BinaryConv2d | BinaryLinear)))


def _run(
    model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[dict[str, _Count], list[tuple[str, nn.Module]]]:
    counts: dict[str, _Count] = {}
    rows: list[tuple[str, nn.Module]] = []
    stack: list[tuple[str, nn.Module]] = []
    inside: set[str] = set()
    handles = []
    for name, module in model.named_modules():
        owner = next((n for n in _ancestors(name) if n in inside), name)
        if owner == name:
            rows.append((name, module))
            if isinstance(module, BinaryConv2d | BinaryLinear):
                inside.add(name)

        def enter(module: nn.Module, args: Any, owner: str = owner) -> None:
            stack.append((owner, module))

        def leave(module: nn.Module, args: Any, output: Any, owner: str = owner, name: str = name) -> None:
            stack.pop()
            if owner == name and isinstance(output, Tensor):
                counts.setdefault(name, _Count()).output = tuple(output.shape)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    args, kwargs = inputs
    try:
        with torch.no_grad(), _Counter(counts, stack), _plain_attention():
            model(*args, **kwargs)
    except BinarizeError:
        raise
    except Exception as error:
        raise BinarizeError(
            f"summary: {type(model).__name__} cannot run on {_describe(args, kwargs)}: "
            f"{type(error).__name__}: {error}. Pass example_inputs that its forward accepts."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return counts, rows


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


@contextmanager
def _plain_attention() -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


class _Counter(TorchDispatchMode):
    """Adds each operation that reaches the dispatcher to the module that is running."""

    def __init__(self, counts: dict[str, _Count], stack: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # which imports triton where it is installed

        self.flops = flop_registry
        self.counts, self.stack = counts, stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__
        owner, module = self.stack[-1] if self.stack else ("", None)
        if packet in self.flops:
            macs = int(self.flops[packet](*args, **(kwargs or {}), out_val=out)) // 2
            binary = isinstance(module, BinaryConv2d | BinaryLinear)
            held = self.counts.setdefault(owner, _Count()).macs
            held[1 if binary else 32] = held.get(1 if binary else 32, 0) + macs
        elif name in NORM_COST or "batch_norm" in name:
            cost = NORM_COST.get(name, BATCH_NORM_COST)
            self.counts.setdefault(owner, _Count()).other += cost * args[0].numel()
        elif "upsample_nearest" in name:
            self.counts.setdefault(owner, _Count()).other += out.numel()
        return out


def _inputs(model: nn.Module, given: Any) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], str]:
    if given is None:
        given = default_inputs(model)
    args: tuple[Any, ...]
    if isinstance(given, Tensor):
        args, kwargs = (given,), dict[str, Any]()
    elif isinstance(given, Mapping):
        args, kwargs = (), dict(given)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        args, kwargs = tuple(given), {}
    else:
        raise BinarizeError(
            f"summary: example_inputs must be a tensor, a tuple of arguments or a dict; got {type(given).__name__}."
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to("meta", dtype if value.is_floating_point() else None)

    return cast(tuple[tuple[Any, ...], dict[str, Any]], tree_map(move, (args, kwargs))), _describe(args, kwargs)


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    shapes = ["x".join(map(str, v.shape)) for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.dim() > 1]
    return ", ".join(shapes) or "scalars"


def default_inputs(model: nn.Module) -> tuple[Any, ...] | dict[str, Any]:
    """Return meta tensors that the model's family is usually counted on, batch 1."""
    config = getattr(model, "config", None)
    get = config.get if isinstance(config, Mapping) else lambda key, default=None: default
    names = {c.__name__ for c in type(model).__mro__}
    if "SRUNet" in names:
        channels = get("out_channels", 3)
        multiple = cast(int, model.size_multiple)
        size = 256 if 256 % multiple == 0 else multiple
        picture = torch.empty(1, channels, size, size, device="meta")
        condition = torch.empty(1, get("in_channels", 6) - channels, size, size, device="meta")
        return picture, torch.zeros(1, dtype=torch.long, device="meta"), condition
    if "UNet2DModel" in names or "UNet2DConditionModel" in names:
        size = get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        given: dict[str, Any] = {
            "sample": torch.empty(1, get("in_channels", 3), height, width, device="meta"),
            "timestep": torch.zeros(1, dtype=torch.long, device="meta"),
        }
        if "UNet2DConditionModel" in names:
            width = get("cross_attention_dim", 1280)
            width = width if isinstance(width, int) else width[-1]
            given["encoder_hidden_states"] = torch.empty(1, 77, width, device="meta")
        return given
    return (torch.empty(1, 3, 224, 224, device="meta"),)
