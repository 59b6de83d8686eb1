"""What a packed layer runs, and how it notices that a parameter, part or hook of the layer has changed."""

from __future__ import annotations

import ctypes
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from binarize.kernels.product import compute_dtype
from binarize.layers.lowering import LoweredLayer

if TYPE_CHECKING:
    from binarize.packed.layers import PackedLayer

_version, _kind, _training = attrgetter("_version"), attrgetter("dtype", "device"), itemgetter("training")
_requires_grad = attrgetter("requires_grad")


def _bytes_at(pointer: int, t: Tensor) -> memoryview:
    """Return the memory from a tensor's first element to its last, which must not be read once the tensor is gone."""
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return memoryview((ctypes.c_uint8 * ((last + 1) * t.element_size())).from_address(pointer)).cast("B")


class CompiledLayer:
    """What a packed layer runs, and the tensors and modules that it was made from.

    ``convs`` has a convolution per basis; their outputs are added up.
    """

    def __init__(self, layer: PackedLayer, lowered: LoweredLayer) -> None:
        self.lowered = lowered
        self.convs = layer._lay_out(lowered)
        self._device = layer.words.device
        self._copied: list[nn.Parameter] = []  # filled by `watch`

    def watch(self, layer: PackedLayer) -> CompiledLayer:
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
        sources = self._sources(layer)
        self._copied = [t for t in sources if isinstance(t, nn.Parameter)]
        laid_out = [t for t in sources if type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.numel()]
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

    def is_trained(self) -> bool:
        """Return whether a parameter of which ``convs`` have a copy requires a gradient, which it cannot get."""
        return any(map(_requires_grad, self._copied))

    def timestep_group(self, x: Tensor) -> Tensor | None:
        """Return the timestep group of each sample of ``x``, on the layer's device, or None."""
        lowered = self.lowered
        if lowered.context is None:
            return None
        group = lowered.context.group(lowered.groups, x.shape[0])
        return group if group.device == self._device else group.to(self._device)


def as_under_autocast(y: Tensor, x: Tensor, compiled: CompiledLayer) -> Tensor:
    """Return an output in the dtype that autocast gives an unpacked layer: that of products, or of a sum with x."""
    if not torch._C._is_any_autocast_enabled():
        return y
    dtype = compute_dtype(x)
    if dtype == y.dtype or compiled.lowered.transform.shortcut:
        return y
    return y.to(dtype)
