"""Which layers a conversion replaces: keep, overrides and linear become one ordered list of decisions."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.layers.adapters import Layer, find_layer
from binarize.methods import Method, get_method
from binarize.modules import matches, prefixes

Selector = str | Callable[[str, nn.Module], bool]
Found = list[tuple[list[str], nn.Module, Layer]]

_CONVOLUTION = nn.modules.conv._ConvNd
_ATTENTION_INPUT = re.compile(r"(to_)?(q|k|v|kv|qkv)|query|key|value")
_ATTENTION_OUTPUT = re.compile(r"proj(_out)?|(to_)?out")
_WITHOUT_ROW = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Decision:
    """The method of one layer, which can have several names, or None and the reason for full precision."""

    names: tuple[str, ...]
    layer: nn.Module
    form: Layer
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


def select(
    model: nn.Module,
    layers: Found,
    method: Method,
    selection: Selection,
    defaults: Mapping[str, str],
    pinned: Collection[str] | None = None,
    by_0_1: bool = False,
) -> list[Decision]:
    """Return a decision for every layer of a model, given its `find_layers`.

    ``defaults`` maps modules that stay full precision by default, with all layers below them, to the reason.
    ``pinned`` are the names of the layers that become binary whatever the rules for that are: those of a saved model.
    With ``by_0_1``, version 0.1 saved it, which also replaced layers whose behavior had been changed.
    """
    _check_patterns(selection, [(names, form.plain) for names, _, form in layers])
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown := defaults.keys() - known:
        raise BinarizeError(f"the host keeps modules that {type(model).__name__} does not have: {sorted(unknown)}.")
    if pinned is not None and (missing := set(pinned) - known):
        raise BinarizeError(
            f"the conversion names layers that {type(model).__name__} does not have: {sorted(missing)}."
        )
    defaults = {**_added_defaults(model, layers, defaults), **defaults}
    decisions = []
    for names, layer, form in layers:
        if by_0_1 and form.legacy and any(name in (pinned or ()) for name in names):
            form = replace(form, obstacle=None)
        chosen, reason = decide(names, form.plain, method, selection, defaults, form.obstacle)
        if pinned is not None:
            if form.obstacle and any(name in pinned for name in names):
                raise BinarizeError(f"{names[0]!r} is binary in the saved model, but here: {form.obstacle}.")
            chosen, reason = _pin(names, chosen, reason, method, selection, pinned)
        decisions.append(Decision(tuple(names), layer, form, chosen, reason))
    if all(decision.method is None for decision in decisions):
        foreign = {unknown_class(owner) for _, owner, _ in unknown_parameters(model, decisions)}
        reasons = "; ".join(sorted({decision.reason for decision in decisions} | foreign))
        raise BinarizeError(
            f"{method.name} would replace nothing in this {type(model).__name__}: "
            f"{reasons or 'it has no convolution or linear layer'}. "
            "Loosen keep, or pass linear=True for networks of linear layers."
        )
    return decisions


def find_layers(model: nn.Module) -> Found:
    """Return the names, the module and the plain form of every layer, in the model's order."""
    found: dict[int, tuple[list[str], nn.Module, Layer | None]] = {}
    inside: list[str] = []  # an adapted layer is replaced with everything in it
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or any(name.startswith(prefix) for prefix in inside):
            continue
        if id(module) not in found:
            found[id(module)] = [], module, find_layer(module)
        names, _, form = found[id(module)]
        names.append(name)
        if form is not None and form.adapted:
            inside.append(f"{name}.")
    return [(names, module, form) for names, module, form in found.values() if form is not None]


def _added_defaults(model: nn.Module, layers: Found, defaults: Mapping[str, str]) -> dict[str, str]:
    """Return what a host leaves out: ends of other classes, if no forward has found any, and attention by its names."""
    convolutions = [(names, form) for names, _, form in layers if isinstance(form.plain, _CONVOLUTION)]
    what = "convolution" if convolutions else "layer"
    ends = convolutions or [(names, form) for names, _, form in layers]
    added = {}
    if ends and not {f"first {what}", f"last {what}"} & set(defaults.values()):
        for place, (names, form) in (("first", ends[0]), ("last", ends[-1])):
            if form.adapted:
                added[names[0]] = f"{place} {what}"
    for names, _, form in layers:
        if not form.legacy and any(_is_attention(model, name) for name in names):
            added.setdefault(names[0], "attention projection")
    return added


def _is_attention(model: nn.Module, name: str) -> bool:
    """Return whether a layer is a projection of attention by its name and those beside it."""
    above, _, last = name.rpartition(".")
    asks = any(_ATTENTION_INPUT.fullmatch(child) for child, _ in model.get_submodule(above).named_children())
    return bool(_ATTENTION_INPUT.fullmatch(last)) or (asks and bool(_ATTENTION_OUTPUT.fullmatch(last)))


def unknown_parameters(model: nn.Module, decisions: Sequence[Decision]) -> list[tuple[str, nn.Module, Tensor]]:
    """Return name, owner and value of the weights that belong to no layer, norm or table.

    They have two dimensions or more, the first larger than 1: positional embeddings and tokens are ``(1, ...)``.
    """
    known = {id(p) for d in decisions for p in (*d.layer.parameters(), *d.form.plain.parameters())}
    found = []
    for name, module in model.named_modules():
        for key, parameter in () if isinstance(module, _WITHOUT_ROW) else module.named_parameters(recurse=False):
            if (
                id(parameter) not in known
                and parameter.dim() > 1
                and len(parameter) > 1
                and parameter.is_floating_point()
            ):
                known.add(id(parameter))
                found.append((f"{name}.{key}" if name else key, module, parameter))
    return found


def unknown_class(owner: nn.Module) -> str:
    """Return the reason for keeping parameters of a class that has no binary form."""
    return f"parameters in {type(owner).__name__}, a class the toolkit does not know (see binarize.register_layer)"


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
