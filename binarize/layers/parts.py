"""Parts: the exchangeable pieces of a binary layer, found by name.

A binary layer is a pipeline ``pre -> activation -> product with binary weights -> scale -> norm -> post`` with a
shortcut around it. Each stage is a *part*: a factory that gets a `LayerSpec` and returns a module. A method names its
parts; any of them can be replaced alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.layers.signs import SignZero
from binarize.registry import Registry
from binarize.timestep import TimestepContext

PartKind = Literal["activation", "weight", "pre", "scale", "norm", "post", "shortcut"]
Factory = Callable[..., nn.Module]
Part = str | Mapping[str, Any] | Factory | None
"""A part as a method names it: a registered name, ``{"name": ..., **options}``, ``"module:name"``, a factory or None."""


@dataclass(frozen=True)
class LayerSpec:
    """What a part's factory may know of the layer it is built for.

    Attributes:
        kind: "conv2d", whose tensors are (B, C, H, W), or "linear", whose tensors are (..., C).
        in_channels: C_in.
        out_channels: C_out.
        weight: The latent weights; parts that initialise from them read it at construction only.
        stride: Of the convolution, (1, 1) for linear layers.
        padding: Zeros (or mirrored codes) on each side of a convolution's input.
        dilation: Of the convolution.
        groups: K, how many timestep groups timestep-aware parts hold.
        context: Where timestep-aware parts read the timestep, or None if the host has none.
        sign_zero: What sign(0) is.
    """

    kind: Literal["conv2d", "linear"]
    in_channels: int
    out_channels: int
    weight: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    context: TimestepContext | None = None
    sign_zero: SignZero = "plus"

    @property
    def channel_dim(self) -> int:
        """Where the channels of an activation are: 1 for convolutions, -1 for linear layers."""
        return 1 if self.kind == "conv2d" else -1


_KINDS: tuple[PartKind, ...] = ("activation", "weight", "pre", "scale", "norm", "post", "shortcut")
_PARTS: dict[str, Registry[Factory]] = {kind: Registry(f"{kind} part") for kind in _KINDS}


def register_part(kind: PartKind, name: str) -> Callable[[Factory], Factory]:
    """Return a decorator that registers a factory ``f(spec, **options) -> nn.Module`` as a part.

    Args:
        kind: The stage it serves.
        name: How methods and recipes refer to it.

    Raises:
        BinarizeError: If the kind is unknown or the name is taken.
    """
    if kind not in _PARTS:
        raise BinarizeError(f"unknown kind of part {kind!r}; kinds: {', '.join(_PARTS)}.")
    return _PARTS[kind].register(name)


def list_parts(kind: PartKind) -> list[str]:
    """Return the names registered for one stage, sorted."""
    if kind not in _PARTS:
        raise BinarizeError(f"unknown kind of part {kind!r}; kinds: {', '.join(_PARTS)}.")
    return list(_PARTS[kind])


def build_part(kind: PartKind, part: Part, spec: LayerSpec) -> nn.Module | None:
    """Build one stage of a layer.

    Raises:
        BinarizeError: If the name is unknown, an option does not fit, or the factory does not return a module.
    """
    if part is None:
        return None
    options: dict[str, Any] = {}
    if isinstance(part, Mapping):
        options = dict(part)
        if "name" not in options:
            raise BinarizeError(f"a {kind} part given as a mapping needs a 'name'; got {dict(part)!r}.")
        part = options.pop("name")
    factory = find_factory(kind, part) if isinstance(part, str) else part
    if not callable(factory):
        raise BinarizeError(f"a {kind} part must be a name, a mapping, a factory or None; got {part!r}.")
    try:
        module = factory(spec, **options)
    except TypeError as error:
        raise BinarizeError(f"{kind} part {part!r} cannot be built with options {options!r}: {error}.") from error
    if not isinstance(module, nn.Module):
        raise BinarizeError(f"{kind} part {part!r} must return an nn.Module; got {type(module).__name__}.")
    return module


def find_factory(kind: PartKind, name: str) -> Factory:
    """Return a factory by its registered name or as ``"module:name"``."""
    if ":" not in name:
        return _PARTS[kind][name]
    module_name, _, attribute = name.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
        for step in attribute.split("."):
            target = getattr(target, step)
    except (ImportError, AttributeError) as error:
        raise BinarizeError(f"{kind} part {name!r} cannot be imported: {error}.") from error
    return target


def part_to_config(kind: str, part: Part) -> Any:
    """Return a part in a form that JSON and YAML can hold.

    Raises:
        BinarizeError: If the part is a lambda or another object that no import path reaches.
    """
    if part is None or isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        return dict(part)
    module, name = getattr(part, "__module__", None), getattr(part, "__qualname__", None)
    if not module or not name or "<" in name or module == "__main__":
        raise BinarizeError(
            f"the {kind} part {part!r} cannot be saved, since no import path leads to it; register it with "
            f"@binarize.register_part({kind!r}, 'its-name') or define it at the top of an importable module."
        )
    return f"{module}:{name}"
