"""Which layers a conversion replaces: keep, overrides and linear become one ordered list of decisions."""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from binarize.errors import BinarizeError
from binarize.methods import Method, get_method
from binarize.modules import matches, prefixes

Selector = str | Callable[[str, nn.Module], bool]

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

    def with_linear(self) -> Selection:
        """Return the selection with linear=True."""
        return replace(self, linear=True)

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
    picked = [(n, module) for n, module in model.named_modules(remove_duplicate=False) if n and predicate(n, module)]
    if not picked:
        raise BinarizeError(f"the predicate {predicate!r} in keep matches no module.")
    # A file holds these names in place of the predicate, and every pattern must match a layer.
    has_layer = (any(isinstance(m, _CONVOLUTION | nn.Linear) for m in module.modules()) for _, module in picked)
    return [glob.escape(name) for (name, _), has in zip(picked, has_layer, strict=True) if has]


def _override(pattern: str, value: Any, method: Method) -> Method | None:
    if value is None:
        return None
    if isinstance(value, Mapping) and "name" not in value:
        return get_method(method, **value)
    if isinstance(value, str | Method | Mapping):
        return get_method(value)
    raise BinarizeError(f"overrides[{pattern!r}] must be a method, a mapping of options or None; got {value!r}.")


def examined(model: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Return the names and the module of everything that a conversion decides on, in the model's order."""
    layers: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and isinstance(module, _CONVOLUTION | nn.Linear):
            layers.setdefault(id(module), ([], module))[0].append(name)
    return list(layers.values())


def select(
    model: nn.Module,
    method: Method,
    selection: Selection,
    defaults: Mapping[str, str],
    pinned: Collection[str] | None = None,
) -> list[Decision]:
    """Return a decision for every layer that is examined.

    ``defaults`` maps modules that stay full precision by default, with all layers below them, to the reason.
    ``pinned`` are the names of the layers that become binary whatever the rules for that are: those of a saved model.
    """
    layers = examined(model)
    _check_patterns(selection, layers)
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown := defaults.keys() - known:
        raise BinarizeError(f"the host keeps modules that {type(model).__name__} does not have: {sorted(unknown)}.")
    if pinned is not None and (missing := set(pinned) - known):
        raise BinarizeError(
            f"the conversion names layers that {type(model).__name__} does not have: {sorted(missing)}."
        )
    decisions = []
    for names, layer in layers:
        unsupported = _unsupported(layer)
        chosen, reason = decide(names, layer, method, selection, defaults, unsupported)
        if pinned is not None:
            if unsupported and any(name in pinned for name in names):
                raise BinarizeError(f"{names[0]!r} is binary in the saved model, but here: {unsupported}.")
            chosen, reason = _pin(names, chosen, reason, method, selection, pinned)
        decisions.append(Decision(tuple(names), layer, chosen, reason))
    if all(decision.method is None for decision in decisions):
        reasons = "; ".join(sorted({decision.reason for decision in decisions}))
        raise BinarizeError(
            f"{method.name} would replace nothing in this {type(model).__name__}: "
            f"{reasons or 'it has no convolution or linear layer'}. "
            "Loosen keep, or pass linear=True for networks of linear layers."
        )
    return decisions


def _pin(
    names: Sequence[str],
    chosen: Method | None,
    reason: str,
    method: Method,
    selection: Selection,
    pinned: Collection[str],
) -> tuple[Method | None, str]:
    """Return the decision of a saved model, with the reason of today's rules where they agree."""
    if not any(name in pinned for name in names):
        return None, reason if chosen is None else "full precision in the saved model"
    if chosen is not None:
        return chosen, ""
    override = _override_of(names, selection)
    return (method if override is None else selection.overrides[override]), ""


def _check_patterns(selection: Selection, layers: list[tuple[list[str], nn.Module]]) -> None:
    linear = [] if isinstance(selection.linear, bool) else selection.linear
    keep = [pattern for pattern, reason in selection.keep.items() if reason != "keep predicate"]
    for pattern in [*keep, *selection.overrides, *linear]:
        kind: type = nn.Linear if pattern in linear else nn.Module
        if not any(isinstance(layer, kind) and _any_matches(pattern, names) for names, layer in layers):
            what = "linear layer" if pattern in linear else "convolution or linear layer"
            examples = [name for names, _ in layers for name in names][:3]
            raise BinarizeError(
                f"the pattern {pattern!r} matches no {what}; names look like {', '.join(examples)}. "
                "`binarize.plan(model, method)` lists them all."
            )


def _any_matches(pattern: str, names: Sequence[str]) -> bool:
    return any(matches(pattern, name) for name in names)


def _override_of(names: Sequence[str], selection: Selection) -> str | None:
    return next((pattern for pattern in reversed(selection.overrides) if _any_matches(pattern, names)), None)


def decide(
    names: Sequence[str],
    layer: nn.Module,
    method: Method,
    selection: Selection,
    defaults: Mapping[str, str],
    unsupported: str | None,
) -> tuple[Method | None, str]:
    """Return the method of a layer, or None and the reason; ``unsupported`` says why it has no binary form."""
    for pattern, reason in selection.keep.items():
        if _any_matches(pattern, names):
            return None, reason
    override = _override_of(names, selection)
    if override is not None and selection.overrides[override] is None:
        return None, f"overrides[{override!r}] is None"
    if unsupported:
        return None, unsupported
    if override is not None:
        return selection.overrides[override], ""
    linear, is_linear = selection.linear, isinstance(layer, nn.Linear)
    if is_linear and not isinstance(linear, bool) and any(_any_matches(pattern, names) for pattern in linear):
        return method, ""
    reason = next((defaults[prefix] for name in names for prefix in prefixes(name) if prefix in defaults), "")
    if is_linear and not reason and linear is not True:
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
