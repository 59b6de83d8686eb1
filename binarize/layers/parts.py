"""Parts: the exchangeable pieces of a binary layer, registered by name.

A binary layer is a pipeline ``pre -> activation -> product with binary weights -> scale -> norm -> post`` with a
shortcut around it and a branch beside it. Each stage is a *part*: a factory that takes a `LayerSpec` and returns a
module. A method names its parts, and each of them can be replaced alone.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn

from binarize.errors import BinarizeError, did_you_mean
from binarize.kernels.binary_conv import OutputTransform
from binarize.kernels.signs import SignZero
from binarize.kernels.training import Surrogate
from binarize.layers.declared import runs_as_declared
from binarize.registry import IMPORT_FIRST, Registry
from binarize.timestep import TimestepContext
from binarize.trust import check_trusted, is_named_by_a_file

PartKind = Literal["activation", "weight", "pre", "scale", "norm", "post", "shortcut", "branch"]
PART_KINDS: tuple[PartKind, ...] = ("pre", "activation", "weight", "scale", "norm", "post", "shortcut", "branch")
LayerKind = Literal["conv2d", "conv3d", "linear"]
StoredScales = Literal["filter", "tensor", "none"]
Factory = Callable[..., nn.Module]
Part = str | Mapping[str, Any] | Factory | None
"""A part as a method names it: a registered name, ``"module:name"``, ``{"name": ..., **options}``, a factory, or None.

A factory is called as ``factory(spec, **options)``, once per layer, and returns a module. Modules are called as
follows:

- ``pre(x)``, ``activation(x)``, ``norm(y)`` and ``post(y)`` map a tensor to one of the same shape;
- ``weight(w)`` returns a `BinaryWeight`;
- ``scale(y, x)`` multiplies the product ``y``; ``x`` is the input of the sign, or the layer's own input if the module
  is a `Scale` with ``of_input``;
- ``shortcut(y, x)`` and ``branch(y, x)`` add something computed from the layer's input ``x`` to ``y``.
"""


class Site(NamedTuple):
    """Where a part stands in its layer."""

    adds_input: bool  # whether an identity shortcut there adds the input that the kernel reads
    post_follows: bool  # whether the activation function comes later


class LayerPart(nn.Module):
    """Base class of parts that a kernel can compute. Every method has a default that leaves the part a module.

    A part need not derive from it: any nn.Module runs as it is.
    """

    groups: int = 1  # K, the rows of its timestep-aware parameters
    context: TimestepContext | None = None  # where the timestep group comes from, or None

    def input_shift(self) -> Tensor | None:
        """Return ``(1 or K, C_in)`` if a ``pre`` part only adds this to the input, else None."""
        return None

    def lower(self, transform: OutputTransform, site: Site) -> OutputTransform | None:
        """Return ``transform`` followed by this part, or None if the part has to run as a module."""
        return None


class ActivationBinarizer(LayerPart):
    """Base class of activation binarizers. To be packed, one declares ``levels`` or ``bits``."""

    levels: tuple[int, int] | None = None  # (-1, 1) for sign(x), (0, 1) for x > 0.5; a kernel counts their bits
    bits: int | None = None  # of more values: k for 2^k of them, or 32 for floats
    plane_weights: tuple[int, ...] = ()  # what each bit of `integers` counts, the lowest first; () if there are none
    surrogate: Surrogate | None = None  # its gradient, if the training kernels know it
    sign_zero: SignZero = "plus"  # what sign(0) is

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values as whole numbers, int8 or uint8 of x's shape, and the scalar step that multiplies them."""
        raise NotImplementedError


class WeightBinarizer(LayerPart):
    """Base class of weight binarizers."""

    bases: int = 1  # how many scaled binary weights it returns
    stored_scales: StoredScales = "filter"  # in a file: one per "filter" or "tensor", or "none" where they are 1
    sign_zero: SignZero = "plus"  # what sign(0) is
    # whether it returns sign(w) times the detached `weight_scale`, whose gradient reaches w unchanged, or zeroed
    # where |w| > 1 with ``clip``. The training kernels then compute it.
    is_plain_sign: bool = False
    clip: bool = True  # see ``is_plain_sign``

    def weight_scale(self, w: Tensor) -> Tensor | None:
        """Return the scales ``(C_out,)`` of the first basis, or None where they are 1."""
        return None


class Branch(LayerPart):
    """Base class of full-precision branches that take over a share of the weights."""

    def as_weight(self) -> Tensor | None:
        """Return this share, of the shape of `LayerSpec.weight`, or None; the latent weights are what remains."""
        return None

    def macs(self, outputs: int) -> int:
        """Return the multiply-accumulates for so many output elements that are no operators of matrix products."""
        return 0


class Scale(LayerPart):
    """Base class of scales of the product."""

    of_input: bool = False  # whether it is computed from the layer's own input, not from the input of the sign


def stored_form(binarizer: nn.Module) -> tuple[int, StoredScales]:
    """Return ``bases`` and ``stored_scales`` of a weight binarizer of any class; ``terms`` is an old name of bases."""
    bases = getattr(binarizer, "bases", getattr(binarizer, "terms", WeightBinarizer.bases))
    return bases, getattr(binarizer, "stored_scales", WeightBinarizer.stored_scales)


def levels_of(activation: object) -> tuple[int, int] | None:
    """Return the two values that an activation binarizer declares, (-1, 1) or (0, 1), or None."""
    levels = getattr(activation, "levels", None)
    declared = levels in ((-1, 1), (0, 1)) and runs_as_declared(activation, "levels", hooks=True)
    return levels if declared else None


def activation_bits(activation: object) -> int | None:
    """Return the bits of an activation's values, 32 for floats, or None if its class declares neither form."""
    if levels_of(activation) is not None:
        return 1
    bits = getattr(activation, "bits", None)
    declared = type(bits) is int and bits > 1 and runs_as_declared(activation, "bits", hooks=True)
    return bits if declared else None


@dataclass(frozen=True)
class LayerSpec:
    """The layer that a part is built for, as its factory sees it."""

    kind: LayerKind  # with tensors (B, C, H, W), (B, C, D, H, W) or (..., C); a 1-D convolution is "conv2d" with H = 1
    in_channels: int  # C_in
    out_channels: int  # C_out
    weight: Tensor  # the latent weights, from which a part may initialise itself
    stride: tuple[int, ...] = (1, 1)  # of the convolution, (1, 1) for linear layers; three numbers if it is 3-D
    padding: tuple[int, ...] = (0, 0)  # zeros on each side of a convolution's input, ([depth,] height, width)
    # (left, right, top, bottom[, front, back]), if not zeros and the same on both sides
    pad: tuple[int, ...] | None = None
    padding_mode: str = "zeros"  # as in nn.Conv2d
    dilation: tuple[int, ...] = (1, 1)  # of the convolution
    groups: int = 1  # K, the number of timestep groups
    context: TimestepContext | None = None  # where timestep-aware parts read the timestep, or None if the host has none
    sign_zero: SignZero = "plus"  # what sign(0) is

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels: 1 for convolutions, -1 for linear layers."""
        return -1 if self.kind == "linear" else 1


def with_sign_zero(part: type[nn.Module]) -> Factory:
    """Return the factory of a part whose first argument is the layer's ``sign_zero``; the others are its options."""

    def factory(spec: LayerSpec, **options: Any) -> nn.Module:
        return part(spec.sign_zero, **options)

    factory.__signature__ = inspect.signature(part)  # type: ignore[attr-defined]  # names the options
    return factory


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Return ``(C,)`` as a factor or summand of ``(B, C, ...)``."""
    return values.view(-1, *[1] * (x.dim() - 2))


def feature_dims(x: Tensor, channel_dim: int) -> tuple[int, ...]:
    """Return the dimensions of one sample of ``(B, C, ...)``, or of one token of ``(..., C)``."""
    return tuple(range(1, x.dim())) if channel_dim == 1 else (-1,)


_PARTS: dict[str, Registry[Factory]] = {kind: Registry(f"{kind} part", fix=IMPORT_FIRST) for kind in PART_KINDS}
_TIMESTEP_AWARE: set[tuple[str, str]] = set()


def register_part(
    kind: PartKind, name: str, *, timestep_aware: bool = False, replace: bool = False
) -> Callable[[Factory], Factory]:
    """Return a decorator that registers a factory ``f(spec, **options) -> nn.Module`` as a part.

    ``name`` is how methods and recipes refer to it, and ``replace`` allows an existing name. A ``timestep_aware`` part
    reads ``spec.context`` if ``spec.groups`` is above 1; `binarize.convert` then attaches a timestep context to the
    model.
    """
    register = _registry(kind).register(name, replace=replace)

    def add(factory: Factory) -> Factory:
        registered = register(factory)
        (_TIMESTEP_AWARE.add if timestep_aware else _TIMESTEP_AWARE.discard)((kind, name))
        return registered

    return add


def list_parts(kind: PartKind) -> list[str]:
    """Return the names registered for one stage, sorted."""
    return list(_registry(kind))


def _registry(kind: str) -> Registry[Factory]:
    if kind not in _PARTS:
        raise BinarizeError(f"unknown kind of part {kind!r}; kinds: {', '.join(_PARTS)}.{did_you_mean(kind, _PARTS)}")
    return _PARTS[kind]


def is_timestep_aware(kind: PartKind, part: Part) -> bool:
    """Return whether a part may read the timestep: registered parts declare it, any other factory might."""
    name = part.get("name") if isinstance(part, Mapping) else part
    if name is None:
        return False
    return not isinstance(name, str) or ":" in name or (kind, name) in _TIMESTEP_AWARE


def build_part(kind: PartKind, part: Part, spec: LayerSpec) -> nn.Module | None:
    """Build one stage of a layer."""
    if part is None:
        return None
    options: dict[str, Any] = {}
    if isinstance(part, Mapping):
        options = dict(part)
        if "name" not in options:
            raise BinarizeError(f"a {kind} part given as a mapping needs a 'name'; got {dict(part)!r}.")
        part = options.pop("name")
    factory = find_factory(kind, part) if isinstance(part, str) else part
    if isinstance(factory, nn.Module) or not callable(factory):
        raise BinarizeError(
            f"a {kind} part must be a name, a mapping, a factory or None; got {part!r}. Each layer builds its own, so "
            "wrap a module in a factory: lambda spec: nn.ReLU()."
        )
    _check_options(kind, part, factory, options)
    try:
        module = factory(spec, **options)
    except TypeError as error:
        raise BinarizeError(f"{kind} part {part!r} cannot be built with options {options!r}: {error}.") from error
    if not isinstance(module, nn.Module):
        raise BinarizeError(f"{kind} part {part!r} must return an nn.Module; got {type(module).__name__}.")
    return module


def _check_options(kind: str, part: Any, factory: Factory, options: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature; the call itself will tell
        return
    allowed = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][1:]
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return
    for key in options:
        if key not in allowed:
            raise BinarizeError(
                f"{kind} part {part!r}: unknown option {key!r}; options: {', '.join(allowed) or 'none'}."
                + did_you_mean(key, allowed)
            )


def find_factory(kind: PartKind, name: str) -> Factory:
    """Return a factory by its registered name or as ``"module:name"``."""
    if ":" not in name:
        return _registry(kind)[name]
    (module_name, _, attribute), from_file = name.partition(":"), is_named_by_a_file()
    target: Any = None
    try:
        module = sys.modules.get(module_name) if from_file else importlib.import_module(module_name)
        target = attrgetter(attribute)(module)
    except (ImportError, AttributeError) as error:
        if not from_file:
            raise BinarizeError(f"{kind} part {name!r} cannot be imported: {error}.") from error
    if not from_file or (isinstance(target, type) and issubclass(target, nn.Module)):
        return cast(Factory, target)
    check_trusted(f"the {kind} part {name!r}")
    raise BinarizeError(
        f"the model's file names the {kind} part {name!r}, and a file may not have modules imported or functions "
        f"called. Import {module_name} first if that is a class of modules of yours; else give the part a name of its "
        f"own with @binarize.register_part({kind!r}, 'its-name'), convert with that name, and save the model again."
    )


def part_to_config(kind: str, part: Part) -> Any:
    """Return a part as JSON and YAML can hold it."""
    if part is None or isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        config = {**part, "name": part_to_config(kind, part.get("name"))}
        try:
            return json.loads(json.dumps(config))
        except TypeError as error:
            raise BinarizeError(f"the {kind} part {part!r} cannot be saved: {error}.") from error
    module, name = getattr(part, "__module__", None), getattr(part, "__qualname__", None)
    if not module or not name or "<" in name or module == "__main__":
        raise BinarizeError(
            f"the {kind} part {part!r} cannot be saved, since no import path leads to it; register it with "
            f"@binarize.register_part({kind!r}, 'its-name') or define it at the top of an importable module."
        )
    return f"{module}:{name}"
