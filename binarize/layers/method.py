"""What a binarization method is: a frozen dataclass whose fields are the recipe's keys."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from binarize.errors import BinarizeError, did_you_mean
from binarize.kernels.signs import SignZero
from binarize.layers.parts import PART_KINDS, Part, PartKind, is_timestep_aware, part_to_config
from binarize.registry import Registry

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Method:
    """A binarization method: which parts make up its binary layers.

    Every published method is a subclass that sets other defaults and adds its own options. Any part can be replaced
    alone: ``reactnet(weight="libra")`` is ReActNet with IR-Net's weights. This class itself is the method "custom":
    signs with STE-clip and scaled sign weights, nothing around them, to compose from.

    Attributes:
        activation: Activation binarizer.
        weight: Weight binarizer.
        pre: What comes before the activation's sign, such as a shift or a BatchNorm.
        scale: What multiplies the product beside the weights' own scale.
        norm: Normalisation after the product.
        post: Activation function after it.
        shortcut: What is added around the layer: True for "pool" (the identity where shapes agree), a part, or None.
        post_after_shortcut: Whether ``post`` comes after the addition of the shortcut.
        groups: K, timestep groups of timestep-aware parts.
        sign_zero: What sign(0) is: "plus" for +1, which fits one bit, or "zero".
        keep_bias: Keep the full-precision bias of a layer that has one; otherwise it is dropped and reported.
        fold_bias: Add the bias to the first shift of the RPReLU instead, which is exact.
        clamps_latent: Clamp the latent weights to [-1, 1] after each optimizer step; None leaves it to the method.
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
    post_after_shortcut: bool = False
    groups: int = 1
    sign_zero: SignZero = "plus"
    keep_bias: bool = False
    fold_bias: bool = False
    clamps_latent: bool | None = None

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Check the names of the options before Python does, to say which there are."""
        _check_options(cls, options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # YAML and JSON have no tuples
                object.__setattr__(self, field.name, tuple(value))
            kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
            if kind == "bool" and not isinstance(value, bool):
                raise BinarizeError(f"{self.name}: {field.name} must be true or false; got {value!r}.")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if (kind == "float" and not number) or (kind == "float | None" and not (number or value is None)):
                raise BinarizeError(f"{self.name}: {field.name} must be a number; got {value!r}.")
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise BinarizeError(f"{self.name}: groups must be a whole number of at least 1; got {self.groups!r}.")
        self.check_choice("sign_zero", "plus", "zero")
        if self.keep_bias and self.fold_bias:
            raise BinarizeError(f"{self.name}: keep_bias and fold_bias exclude each other; set one of them.")

    def part(self, kind: PartKind) -> Part:
        """Return the part that serves one stage, options of the method applied."""
        if kind == "shortcut":
            return "pool" if self.shortcut is True else None if self.shortcut is False else self.shortcut
        part: Part = getattr(self, kind)
        return part

    def check_choice(self, option: str, *allowed: str) -> None:
        """Raise BinarizeError unless an option has one of the allowed values; for ``__post_init__`` of methods."""
        value = getattr(self, option)
        if value not in allowed:
            names = [repr(name) for name in allowed]
            raise BinarizeError(
                f"{self.name}: {option} must be {', '.join(names[:-1])} or {names[-1]}; got {value!r}."
                + did_you_mean(str(value), allowed)
            )

    @property
    def clamps(self) -> bool:
        """Whether latent weights are clamped to [-1, 1] after each optimizer step."""
        return bool(self.clamps_latent)

    @property
    def needs_timestep(self) -> bool:
        """Whether layers of this method must know the timestep."""
        return self.groups > 1 and any(is_timestep_aware(kind, self.part(kind)) for kind in PART_KINDS)

    def replace(self, **options: Any) -> Method:
        """Return the method with some options changed.

        Raises:
            BinarizeError: If an option is unknown.
        """
        return dataclasses.replace(self, **options)

    def to_config(self) -> dict[str, Any]:
        """Return ``{"name": ..., **options that differ from the defaults}``, fit for JSON and YAML.

        Raises:
            BinarizeError: If a part cannot be named, such as a lambda.
        """
        config: dict[str, Any] = {"name": self.name}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is field.default or value == field.default:
                continue
            if callable(value) or isinstance(value, Mapping):
                value = part_to_config(field.name, value)
            config[field.name] = list(value) if isinstance(value, tuple) else value
        return config


METHODS: Registry[type[Method]] = Registry("method")
METHODS.register(Method.name)(Method)
M = TypeVar("M", bound=type[Method])


def register_method(name: str, *, replace: bool = False) -> Callable[[M], M]:
    """Return a class decorator that registers a `Method` subclass (a frozen dataclass) under ``name``.

    Args:
        name: How `binarize.convert` and recipes refer to it.
        replace: Allow an existing name to be taken over.

    Raises:
        BinarizeError: If the name is taken, or the class is not a frozen dataclass derived from `Method`.
    """

    def add(cls: M) -> M:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise BinarizeError(f"method {name!r} must be a class derived from binarize.methods.Method; got {cls!r}.")
        if "__dataclass_fields__" not in cls.__dict__ or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise BinarizeError(
                f"method {name!r} must be a frozen dataclass; put @dataclass(frozen=True, kw_only=True) "
                "below @register_method."
            )
        METHODS.register(name, replace=replace)(cls)
        cls.name = name
        return cls

    return add


def list_methods() -> list[str]:
    """Return the names of all registered methods, sorted."""
    return list(METHODS)


def get_method(method: str | Method | Mapping[str, Any], **options: Any) -> Method:
    """Return a method by name, instance or mapping.

    Args:
        method: A registered name, a `Method`, or ``{"name": ..., **options}`` as in a recipe.
        **options: Options to set on top.

    Raises:
        BinarizeError: If the name or an option is unknown.
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
    cls = METHODS[method]
    return cls(**options)


def _check_options(cls: type[Method], options: Mapping[str, Any]) -> None:
    own = inspect.get_annotations(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    allowed = sorted(fields, key=lambda name: (name not in own, name in PART_KINDS))  # stable: what is special first
    for key in options:
        if key not in allowed:
            raise BinarizeError(
                f"{cls.name}: unknown option {key!r}; options: {', '.join(allowed)}.{did_you_mean(key, allowed)}"
            )
