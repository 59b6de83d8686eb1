"""Which layers a conversion replaces: keep, overrides and linear become one ordered list of decisions."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from binarize.errors import BinarizeError
from binarize.methods import Method, get_method
from binarize.modules import matches, prefixes

Selector = str | Callable[[str, nn.Module], bool]

_TIME_PATH = re.compile(r"(^|\.)(time|timestep|t_emb|emb_|embed|class_emb|label_emb|add_emb|noise|temb)")
_CONVOLUTION = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class Decision:
    """The method of one layer, which can have several names, or None and the reason for full precision."""

    names: tuple[str, ...]
    layer: nn.Module
    method: Method | None
    reason: str = ""


@dataclass(frozen=True)
class Selection:
    """The checked arguments of `binarize.convert`; ``keep`` maps a pattern to the reason that the report gives."""

    keep: dict[str, str]
    overrides: dict[str, Method | None]
    linear: bool | list[str]

    @classmethod
    def of(cls, model: nn.Module, method: Method, keep: Any, overrides: Any, linear: Any) -> Selection:
        """Check the arguments."""
        if keep is not None and not (isinstance(keep, Sequence) or callable(keep)):
            raise BinarizeError(f"keep must be a sequence of glob patterns; got {keep!r}.")
        if not isinstance(linear, bool | Sequence):
            raise BinarizeError(f"linear must be True, False or glob patterns; got {linear!r}.")
        if overrides is not None and not isinstance(overrides, Mapping):
            raise BinarizeError(f"overrides must map glob patterns to methods, options or None; got {overrides!r}.")
        selectors = [] if keep is None else [keep] if isinstance(keep, str) or callable(keep) else list(keep)
        kept: dict[str, str] = {}
        for selector in selectors:
            if isinstance(selector, str):
                kept[selector] = f"keep={selector!r}"
            elif callable(selector):
                kept.update(dict.fromkeys(_picked(model, selector), "keep predicate"))
            else:
                raise BinarizeError(f"keep takes glob patterns and predicates f(name, module); got {selector!r}.")
        chosen = {pattern: _override(pattern, value, method) for pattern, value in (overrides or {}).items()}
        patterns = linear if isinstance(linear, bool) else [linear] if isinstance(linear, str) else list(linear)
        return cls(kept, chosen, patterns)


def _picked(model: nn.Module, predicate: Callable[[str, nn.Module], bool]) -> list[str]:
    picked = [n for n, module in model.named_modules(remove_duplicate=False) if n and predicate(n, module)]
    if not picked:
        raise BinarizeError(f"the predicate {predicate!r} in keep matches no module.")
    return [glob.escape(name) for name in picked]


def _override(pattern: str, value: Any, method: Method) -> Method | None:
    if value is None:
        return None
    if isinstance(value, Mapping) and "name" not in value:
        return get_method(method, **value)
    if isinstance(value, str | Method | Mapping):
        return get_method(value)
    raise BinarizeError(f"overrides[{pattern!r}] must be a method, a mapping of options or None; got {value!r}.")


def select(model: nn.Module, method: Method, selection: Selection, defaults: Mapping[str, str]) -> list[Decision]:
    """Return a decision for every convolution and linear layer, in the model's order.

    ``defaults`` maps modules that stay full precision by default, with all layers below them, to the reason.
    """
    layers: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and isinstance(module, _CONVOLUTION | nn.Linear):
            layers.setdefault(id(module), (module, []))[1].append(name)
    _check_patterns(selection, list(layers.values()))
    unknown = defaults.keys() - {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown:
        raise BinarizeError(f"the host keeps modules that {type(model).__name__} does not have: {sorted(unknown)}.")
    decisions = [
        Decision(tuple(names), layer, *_decide(names, layer, method, selection, defaults))
        for layer, names in layers.values()
    ]
    if all(decision.method is None for decision in decisions):
        reasons = "; ".join(sorted({decision.reason for decision in decisions}))
        raise BinarizeError(
            f"{method.name} would replace nothing in this {type(model).__name__}: "
            f"{reasons or 'it has no convolution or linear layer'}. "
            "Loosen keep, or pass linear=True for networks of linear layers."
        )
    return decisions


def _check_patterns(selection: Selection, layers: list[tuple[nn.Module, list[str]]]) -> None:
    linear = [] if isinstance(selection.linear, bool) else selection.linear
    keep = [pattern for pattern, reason in selection.keep.items() if reason != "keep predicate"]
    for pattern in [*keep, *selection.overrides, *linear]:
        kind: type = nn.Linear if pattern in linear else nn.Module
        if not any(isinstance(layer, kind) and _any_matches(pattern, names) for layer, names in layers):
            what = "linear layer" if pattern in linear else "convolution or linear layer"
            examples = [name for _, names in layers for name in names][:3]
            raise BinarizeError(
                f"the pattern {pattern!r} matches no {what}; names look like {', '.join(examples)}. "
                "`binarize.plan(model, method)` lists them all."
            )


def _any_matches(pattern: str, names: Sequence[str]) -> bool:
    return any(matches(pattern, name) for name in names)


def _decide(
    names: Sequence[str], layer: nn.Module, method: Method, selection: Selection, defaults: Mapping[str, str]
) -> tuple[Method | None, str]:
    for pattern, reason in selection.keep.items():
        if _any_matches(pattern, names):
            return None, reason
    override = next((pattern for pattern in reversed(selection.overrides) if _any_matches(pattern, names)), None)
    if override is not None and selection.overrides[override] is None:
        return None, f"overrides[{override!r}] is None"
    if unsupported := _unsupported(layer):
        return None, unsupported
    if override is not None:
        return selection.overrides[override], ""
    linear, is_linear = selection.linear, isinstance(layer, nn.Linear)
    if is_linear and not isinstance(linear, bool) and any(_any_matches(pattern, names) for pattern in linear):
        return method, ""
    reason = next((defaults[prefix] for name in names for prefix in prefixes(name) if prefix in defaults), "")
    if is_linear and not reason and any(_TIME_PATH.search(name) for name in names):
        reason = "time or class embedding"
    elif is_linear and not reason and linear is not True:
        reason = "linear layer (convert with linear=True or patterns)"
    return None if reason else method, reason


def _unsupported(layer: nn.Module) -> str | None:
    """Return why a layer has no binary form, or None if it has one."""
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this layer's weight without calling the layer"
    for cls, kind in ((nn.Conv2d, "convolution"), (nn.Linear, "linear layer")):
        if isinstance(layer, cls):
            if type(layer).forward is not cls.forward:
                return f"{type(layer).__name__} has a forward of its own, which a binary {kind} would drop"
            return None
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution: no binary form is published"
    return f"{type(layer).__name__}: only 2-D convolutions and linear layers have a binary form"
