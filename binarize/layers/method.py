"""What a binarization method is: a frozen dataclass whose fields are its parts and options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

from binarize.errors import BinarizeError, did_you_mean
from binarize.kernels.signs import SignZero
from binarize.layers.parts import PART_KINDS, Part, PartKind, is_timestep_aware, part_to_config
from binarize.registry import IMPORT_FIRST, Registry

if TYPE_CHECKING:
    from typing_extensions import Self

Changes = Mapping[str, Any]
_OPTION, _ANY = "binarize.option", object()


def option(default: Any, changes: Changes | Callable[[Any], Changes], *, when: Any = _ANY) -> Any:
    """Return a dataclass field for an option of a method that changes its parts.

    ``changes`` maps a field to its new value; it may be a function of the method. The key ``"weight.libra"`` applies
    only if the user has left or set ``weight`` to the plain name "libra"; ``"weight"`` always applies. A mapping
    without a "name" sets options of the part, anything else replaces it. Options apply in the order of their fields.
    With ``when``, changes apply for that value of the option; by default, for every value but None. Examples::

        tar: bool = option(True, {"pre.tar": "shift"}, when=False)
        t_min: float = option(0.1, lambda method: {"weight.libra": {"t_min": method.t_min}})
    """
    return dataclasses.field(default=default, metadata={_OPTION: (changes, when)})


@dataclass(frozen=True, kw_only=True)
class Method:
    """A binarization method: the parts of its binary layers.

    Every published method is a subclass with its own defaults and options. Any part can be replaced alone:
    ``reactnet(weight="libra")`` is ReActNet with IR-Net's weights. This class itself is the method "custom": signs with
    STE-clip and scaled sign weights, without other parts, to build on.

    Attributes:
        activation: Activation binarizer.
        weight: Weight binarizer.
        pre: Applied before the activation's sign, such as a shift or a BatchNorm.
        scale: Multiplies the product, in addition to the weights' own scale.
        norm: Normalization after the product.
        post: Activation function after it.
        shortcut: Added around the layer: True for "pool" (the identity if the shapes agree), a part, or None.
        branch: Full-precision branch beside the binary product, added last.
        post_after_shortcut: Apply ``post`` after the shortcut is added.
        groups: K, the number of timestep groups of timestep-aware parts.
        sign_zero: Value of sign(0): "plus" for +1, which fits one bit, or "zero".
        keep_bias: Keep the full-precision bias of a layer that has one; otherwise it is dropped and reported.
        fold_bias: Add the bias to the first shift of the RPReLU instead, which is exact.
        clamps_latent: Clamp the latent weights to [-1, 1] after each optimizer step; None uses the method's default.
        fp_decoder_levels: Decoder levels (0 the finest) of a U-Net whose fusions and ResBlocks stay full precision;
            None uses the host's default.
    """

    name: ClassVar[str] = "custom"
    default_structure: ClassVar[str] = "keep"

    activation: Part = "ste"
    weight: Part = "scaled_sign"
    pre: Part = None
    scale: Part = None
    norm: Part = None
    post: Part = None
    shortcut: Part | bool = None
    branch: Part = None
    post_after_shortcut: bool = False
    groups: int = 1
    sign_zero: SignZero = "plus"
    keep_bias: bool = False
    fold_bias: bool = False
    clamps_latent: bool | None = None

    fp_decoder_levels: tuple[int, ...] | None = ()

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Check the names of the options; Python's own error would not list them."""
        _check_options(cls, options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = _hints(type(self))  # type: ignore[arg-type]
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints.get(field.name)
            if isinstance(value, list):  # YAML and JSON have no tuples
                object.__setattr__(self, field.name, tuple(value))
            if hint is bool and not isinstance(value, bool):
                raise BinarizeError(f"{self.name}: {field.name} must be true or false; got {value!r}.")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if (hint is float and not number) or (hint == (float | None) and not (number or value is None)):
                raise BinarizeError(f"{self.name}: {field.name} must be a number; got {value!r}.")
            if typing.get_origin(hint) is Literal:
                self.check_choice(field.name, *typing.get_args(hint))
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise BinarizeError(f"{self.name}: groups must be a whole number of at least 1; got {self.groups!r}.")
        levels = () if self.fp_decoder_levels is None else self.fp_decoder_levels
        if not isinstance(levels, tuple) or not all(type(level) is int and level >= 0 for level in levels):
            raise BinarizeError(f"{self.name}: fp_decoder_levels are level indices, 0 the finest; got {levels!r}.")
        if self.keep_bias and self.fold_bias:
            raise BinarizeError(f"{self.name}: keep_bias and fold_bias exclude each other; set one of them.")

    @functools.cached_property
    def _resolved(self) -> dict[str, Any]:
        """Parts and ``clamps_latent`` with the changes of all options applied."""
        resolved = {name: getattr(self, name) for name in (*PART_KINDS, "clamps_latent")}
        for field in dataclasses.fields(self):
            changes, when = field.metadata.get(_OPTION, ({}, _ANY))
            value = getattr(self, field.name)
            if value is None if when is _ANY else value != when:
                continue
            for target, new in (changes(self) if callable(changes) else changes).items():
                key, _, name = target.partition(".")
                old = resolved[key] if isinstance(resolved[key], Mapping) else {"name": resolved[key]}
                if name and not (getattr(self, key) == old["name"] == name):
                    continue
                resolved[key] = {**old, **new} if isinstance(new, Mapping) and "name" not in new else new
        if isinstance(resolved["shortcut"], bool):
            resolved["shortcut"] = "pool" if resolved["shortcut"] else None
        return resolved

    def part(self, kind: PartKind) -> Part:
        """Return the part of one stage, with the method's options applied."""
        return cast(Part, self._resolved[kind])

    def check_choice(self, name: str, *allowed: str) -> None:
        """Raise BinarizeError unless an option has one of the allowed values."""
        value = getattr(self, name)
        if value not in allowed:
            names = [repr(choice) for choice in allowed]
            raise BinarizeError(
                f"{self.name}: {name} must be {', '.join(names[:-1])} or {names[-1]}; got {value!r}."
                + did_you_mean(str(value), allowed)
            )

    @property
    def clamps(self) -> bool:
        """True if latent weights are clamped to [-1, 1] after each optimizer step."""
        return bool(self._resolved["clamps_latent"])

    @property
    def needs_timestep(self) -> bool:
        """True if layers of this method read the timestep."""
        return self.groups > 1 and any(is_timestep_aware(kind, self.part(kind)) for kind in PART_KINDS)

    def replace(self, **options: Any) -> Method:
        """Return the method with some options changed."""
        return dataclasses.replace(self, **options)

    def to_config(self) -> dict[str, Any]:
        """Return ``{"name": ..., **options that differ from the defaults}`` as plain JSON types."""
        config: dict[str, Any] = {"name": self.name}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is field.default or value == field.default:
                continue
            if callable(value) or isinstance(value, Mapping):
                value = part_to_config(field.name, value)
            config[field.name] = list(value) if isinstance(value, tuple) else value
        return config


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the types of a method's options; those of bases alone if a subclass has names that do not resolve."""
    for base in cls.__mro__:
        try:
            return typing.get_type_hints(base)
        except NameError:
            continue
    return {}


METHODS: Registry[type[Method]] = Registry(
    "method",
    built_in="binarize.methods",
    fix=IMPORT_FIRST,
)
M = TypeVar("M", bound=type[Method])


def register_method(name: str, *, replace: bool = False) -> Callable[[M], M]:
    """Return a class decorator that registers a `Method` subclass (a frozen dataclass) under ``name``.

    The name is for `binarize.convert` and recipes. It may be registered already only with ``replace``.
    """

    def add(cls: M) -> M:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise BinarizeError(f"method {name!r} must be a class derived from binarize.methods.Method; got {cls!r}.")
        if "__dataclass_fields__" not in cls.__dict__ or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            decorator = "@dataclass(frozen=True, kw_only=True)"
            raise BinarizeError(f"method {name!r} must be a frozen dataclass; put {decorator} below @register_method.")
        METHODS.register(name, replace=replace)(cls)
        cls.name = name
        return cls

    return add


def list_methods() -> list[str]:
    """Return the names of all registered methods, sorted."""
    return list(METHODS)


def get_method(method: str | Method | Mapping[str, Any], **options: Any) -> Method:
    """Return a method by registered name, as it is, or from ``{"name": ..., **options}`` as in a recipe.

    ``options`` override the method's own.
    """
    if isinstance(method, Method):
        return method.replace(**options) if options else method
    if isinstance(method, Mapping):
        merged = {**method, **options}
        if "name" not in merged:
            raise BinarizeError(f"a method given as a mapping needs a 'name'; got {dict(method)!r}.")
        name = merged.pop("name")
        return get_method(name, **merged)
    if not isinstance(method, str):
        raise BinarizeError(f"method must be a name, a Method or a mapping with a 'name'; got {method!r}.")
    return METHODS[method](**options)


def _check_options(cls: type[Method], options: Mapping[str, Any]) -> None:
    own = inspect.get_annotations(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    allowed = sorted(fields, key=lambda name: (name not in own, name in PART_KINDS))  # the method's own options first
    for key in options:
        if key not in allowed:
            raise BinarizeError(
                f"{cls.name}: unknown option {key!r}; options: {', '.join(allowed)}.{did_you_mean(key, allowed)}"
            )
