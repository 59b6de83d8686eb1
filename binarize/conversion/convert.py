"""`binarize.convert`: check, rewire the structure, swap the layers, attach the timestep context; and the way back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from binarize.conditioning import TimestepLike
from binarize.conversion.attention import allow_fusion, refuse_fusion
from binarize.conversion.record import RECORD, Conversion, conversion, is_converted, record_config
from binarize.conversion.report import ConversionReport, ReportRow
from binarize.conversion.rules_0_1 import selected_by_0_1
from binarize.conversion.selection import (
    Decision,
    Found,
    Selection,
    Selector,
    find_layers,
    select,
    unknown_class,
    unknown_parameters,
)  # fmt: skip
from binarize.conversion.timesteps import timestep_context, told_timestep
from binarize.errors import BinarizeError
from binarize.hosts import Edit, Host, find_host
from binarize.layers import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryConv3d,
    BinaryLayer,
    BinaryLinear,
    CPDown,
    CPUp,
    CSFusion,
    Scheduled,
)
from binarize.methods import Method, get_method
from binarize.modules import WRAPPERS, call_arguments, meta_copy, refuse_lazy, replace_modules, unwrap
from binarize.timestep import TimestepContext, detach_contexts

MethodLike = str | Method | Mapping[str, Any]
ModelT = TypeVar("ModelT", bound=nn.Module)

STRUCTURES = ("auto", "keep", "cp_cs", "contract")
_BINARY: dict[type[nn.Module], type[BinaryLayer]] = {
    nn.Conv1d: BinaryConv1d, nn.Conv2d: BinaryConv2d, nn.Conv3d: BinaryConv3d, nn.Linear: BinaryLinear
}  # fmt: skip


def convert(
    model: ModelT,
    method: MethodLike,
    *,
    structure: str = "auto",
    keep: Sequence[Selector] | Selector | None = None,
    overrides: Mapping[str, Any] | None = None,
    linear: bool | Sequence[str] = False,
    num_train_timesteps: int | None = None,
    example_inputs: Any = None,
    timestep: TimestepLike | None = None,
) -> ModelT:
    """Binarize a network in place and return it.

    A call that fails leaves the model as it was. The latent weights are the model's own Parameter objects, except where
    a branch takes a share of them.

    Args:
        model: Any nn.Module; a diffusion U-Net for timestep-aware methods.
        method: A method's name ("bidiffsr"), an instance (``methods.bidiffsr(groups=2)``) or
            ``{"name": ..., **options}``.
        structure: "auto" (CP-Down, CP-Up and CS-Fusion for "bidiffsr" if the host is known, else the host's own),
            "cp_cs" (for any method), "contract" (the same blocks in the form that keeps the shape of every block's
            output; diffusers' U-Nets) or "keep" (convolutions only).
        keep: Glob patterns on module names, or predicates ``f(name, module)``. A matching module and everything below
            it stays full precision. ``*`` matches dots as well.
        overrides: Pattern to another method, to options of the method (``{"groups": 2}``), or to None for full
            precision. Layers that stay full precision by default (attention, first, last, linear) become binary if a
            pattern matches them. If several patterns match, the last one counts.
        linear: Convert linear layers too: True for all but time embeddings, attention and the last, or patterns.
        num_train_timesteps: T of the noise schedule, for hosts whose configuration does not have it; 1000 if not given.
        example_inputs: Inputs of the model's forward: a tensor, a tuple of arguments or a dict of keyword arguments. A
            forward on the meta device, in which values do not matter, finds the layers that read the input, give the
            output or process the timestep. By default the inputs are guessed. SRUNet and diffusers' U-Nets need none.
        timestep: Where a timestep-aware method finds the timestep, and what it is: an argument of the model's
            ``forward`` ("sigma"), a `binarize.Timestep`, or a mapping of its fields. By default the host knows, else
            the names of arguments tell.

    Raises:
        BinarizeError: If the method, an option or a pattern does not fit, a pattern matches nothing, nothing would be
            replaced, or the model is already converted.
    """
    return _convert(
        model,
        method,
        _Given(),
        structure=structure,
        keep=keep,
        overrides=overrides,
        linear=linear,
        num_train_timesteps=num_train_timesteps,
        example_inputs=example_inputs,
        timestep=timestep,
    )


def repeat(model: ModelT, method: MethodLike, binary: Sequence[str] | None, **options: Any) -> ModelT:
    """Repeat a recorded conversion with the layers that were ``binary``, or with those that 0.1 selected if None."""
    return _convert(model, method, _Given(binary=binary, selected_by_0_1=binary is None), **options)


@dataclass(frozen=True)
class _Given:
    """What a conversion knows besides its arguments: the model of which it gets a copy, or a saved model's record."""

    original: nn.Module | None = None
    binary: Sequence[str] | None = None
    selected_by_0_1: bool = False


def _convert(
    model: ModelT,
    method: MethodLike,
    given: _Given,
    *,
    structure: str = "auto",
    keep: Any = None,
    overrides: Any = None,
    linear: Any = False,
    num_train_timesteps: int | None = None,
    example_inputs: Any = None,
    timestep: TimestepLike | None = None,
) -> ModelT:
    method = get_method(method)
    _check_model(model)
    if structure not in STRUCTURES:
        known = ", ".join(map(repr, STRUCTURES))
        raise BinarizeError(f"structure must be one of {known}; got {structure!r}.")
    if num_train_timesteps is not None and (not isinstance(num_train_timesteps, int) or num_train_timesteps < 1):
        raise BinarizeError(f"num_train_timesteps must be a whole number of at least 1; got {num_train_timesteps!r}.")
    if example_inputs is not None:
        call_arguments(example_inputs, "convert")  # checked also for hosts that know the roles of their layers
    host = find_host(model)
    told = told_timestep(model, host, timestep)
    host.example_inputs, host.original, host.told = example_inputs, given.original, told
    structure = _resolve_structure(model, method, host, structure)
    with ExitStack() as undo:
        _restore_config(model, undo)
        notes = host.notes(model, structure)
        edits = [] if structure == "keep" or host.rewired(model) else host.edits(model, structure)
        before = {id(module) for module in model.modules()}
        parameters = _sizes(model)
        for edit in edits:
            undo.callback(model.set_submodule, edit.path, model.get_submodule(edit.path))
            model.set_submodule(edit.path, edit.module)
        if edits:
            host.after_rewire(model)
            notes += _discarded(parameters, _sizes(model))
        selection = Selection.of(model, method, keep, overrides, linear)
        defaults = {**host.embeddings(model), **host.full_precision(model, method)}
        notes += host.role_notes(bool(linear))
        selected_before = selected_by_0_1(model, host, method, selection)
        saved = selected_before if given.selected_by_0_1 else given.binary
        layers = find_layers(model)
        decisions = select(model, layers, method, selection, defaults, saved, given.selected_by_0_1)
        binary_names = [d.names[0] for d in decisions if d.method is not None]
        share = _share(model, layers, method, selection, defaults, decisions)
        timed = any(decision.method is not None and decision.method.needs_timestep for decision in decisions)
        context, steps = timestep_context(model, host, timed, told, num_train_timesteps, notes)
        unknown = [
            ReportRow(name, f"{type(owner).__name__} {_shape(p)}", "kept", unknown_class(owner), p.numel())
            for name, owner, p in unknown_parameters(model, decisions)
        ]
        binary = {id(d.layer): _binary_layer(d, d.method, context) for d in decisions if d.method is not None}
        for name, old in replace_modules(model, binary):
            undo.callback(model.set_submodule, name, old)
        undo.callback(allow_fusion, model)
        refuse_fusion(model)
        if any(isinstance(module, Scheduled) for module in model.modules()):
            notes.append("the method changes during training: call binarize.training_step after each optimizer step")
        rows = (*_structure_rows(edits, before), *(_row(decision, before) for decision in decisions), *unknown)
        report = ConversionReport(method.name, host.name, host.structure(model), rows, tuple(notes), **share)
        chosen = list(selection.keep), selection.overrides, selection.linear
        pinned = None if set(binary_names) == selected_before else binary_names
        record = Conversion(method, structure, *chosen, steps, report, context, pinned=pinned)
        record_config(model, record)  # writes to the host's configuration, which may fail
        if context is not None:
            context.attach(model)
        undo.pop_all()  # the conversion has succeeded
    setattr(model, RECORD, record)
    return model


def plan(model: nn.Module, method: MethodLike, **options: Any) -> ConversionReport:
    """Return the report that `convert` would give for the same arguments, without changing the model."""
    twin, given = meta_copy(model), _Given(original=model)
    with torch.device("meta"):
        _convert(twin, method, given, **options)
    return conversion(twin).report


def revert(model: ModelT) -> ModelT:
    """Replace binary layers by plain ones with the latent weights, in place; the structure stays.

    The weights are the same Parameter objects; a branch's share is added to them, in new ones. Shifts, activations,
    norms and shortcuts of the binary layers are gone. A layer that had a bias gets it back if the method kept it, else
    a bias of zero. A rewired diffusers host keeps blocks that its own class cannot rebuild: keep its state dict, or
    convert it again and use `binarize.save`.
    """
    if conversion(model).packed:
        raise BinarizeError("revert: this model is packed, so its latent weights are gone; revert the unpacked model.")
    binary = [layer for layer in model.modules() if isinstance(layer, BinaryLayer)]
    plain = {id(layer): _float_layer(layer) for layer in binary}
    record_config(model, None)  # writes to the host's configuration, which may fail
    replace_modules(model, plain)
    allow_fusion(model)
    detach_contexts(model)
    delattr(unwrap(model), RECORD)
    return model


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise BinarizeError(f"convert needs an nn.Module; got {type(model).__name__}. For a pipeline, pass its unet.")
    refuse_lazy(model)
    if is_converted(model):
        by = conversion(model).method.name
        raise BinarizeError(f"this {type(model).__name__} is already converted, by method {by!r}; call revert first.")
    for name, module in model.named_modules():
        if isinstance(module, BinaryLayer) or is_converted(module):
            raise BinarizeError(f"{name!r} is already binary; convert the whole network once.")
        if wrapper := _wrapper(module):
            name = name or type(model).__name__
            raise BinarizeError(f"{name!r} is wrapped by {wrapper}; remove or merge that before converting.")


def _wrapper(module: nn.Module) -> str | None:
    """Return the name of what stands between a module and its weights, or None."""
    cls, hooks = type(module), module._forward_pre_hooks.values()
    found = (
        (cls.__name__ in WRAPPERS, f"{cls.__name__}, which must come after the conversion"),
        (parametrize.is_parametrized(module), "torch.nn.utils.parametrize"),
        (any(base.__name__ == "BaseTunerLayer" for base in cls.__mro__), "a PEFT adapter"),
        (cls.__module__.startswith(("torch.ao.nn", "torchao")), cls.__module__),
        (any(hasattr(h, "apply_mask") for h in hooks), "torch.nn.utils.prune"),
        (any(hasattr(h, "name") and hasattr(h, "dim") for h in hooks), "torch.nn.utils.weight_norm or spectral_norm"),
    )
    return next((name for wrapped, name in found if wrapped), None)


def _resolve_structure(model: nn.Module, method: Method, host: Host, structure: str) -> str:
    if host.rewired(model):  # converted before and reverted: the structure of before is gone
        return host.rewired_structure(model)
    if structure == "auto":
        return "cp_cs" if method.default_structure == "cp_cs" and host.has_structure(model) else "keep"
    return structure


def _sizes(model: nn.Module) -> dict[int, int]:
    return {id(parameter): parameter.numel() for parameter in model.parameters()}


def _discarded(before: Mapping[int, int], after: Mapping[int, int]) -> list[str]:
    """Return a note on how many of the host's weights are not in the rewired model."""
    total, lost = sum(before.values()), sum(size for key, size in before.items() if key not in after)
    if not lost:
        return []
    return [
        f"the new blocks replace {100 * lost / total:.0f}% of the host's weights ({lost:,} of {total:,} parameters) by "
        "freshly initialized ones; structure='keep' keeps all of them"
    ]


def _share(
    model: nn.Module, layers: Found, method: Method, selection: Selection, defaults: Mapping[str, str],
    decisions: Sequence[Decision],
) -> dict[str, int]:  # fmt: skip
    """Return the report's numbers of parameters: all, the binary ones, and the binary ones under linear=True."""

    def count(found: Sequence[Decision]) -> int:
        weights = {id(d.form.weight): d.form.weight.numel() for d in found if d.method is not None}
        return sum(weights.values())

    binary = count(decisions)
    widened = decisions
    if selection.linear is False:
        widened = select(model, layers, method, selection.with_linear(), defaults)
    return {"parameters": sum(_sizes(model).values()), "binary_parameters": binary, "with_linear": count(widened)}


def _restore_config(model: Any, undo: ExitStack) -> None:
    if hasattr(model, "register_to_config") and isinstance(getattr(model, "config", None), Mapping):
        before = dict(model.config)
        undo.callback(lambda: dict(model.config) == before or model.register_to_config(**before))


def _binary_layer(decision: Decision, method: Method, context: TimestepContext | None) -> nn.Module:
    plain = decision.form.plain
    kind = next(binary for cls, binary in _BINARY.items() if isinstance(plain, cls))
    with torch.device("meta") if decision.form.weight.is_meta else nullcontext():
        layer = kind.from_float(plain, method, context)
    layer.original = decision.form.original
    return layer


def _float_layer(layer: BinaryLayer) -> nn.Module:
    plain = cast(nn.Module, cast(Any, layer).to_float())
    return plain if layer.original is None else layer.original.restored(plain)


def _structure_rows(edits: Sequence[Edit], before: set[int]) -> Iterator[ReportRow]:
    for edit in edits:
        for name, module in edit.module.named_modules(prefix=edit.path):
            if id(module) not in before and isinstance(module, CPDown | CPUp | CSFusion):
                fusion = f", {module.form} fusion" if isinstance(module, CSFusion) else ""
                yield ReportRow(name, type(module).__name__, "new", f"{edit.note}{fusion}")


def _row(decision: Decision, before: set[int]) -> ReportRow:
    layer, weight = decision.layer, decision.form.weight
    kind = f"{type(layer).__name__} {_shape(weight)}"
    if decision.method is None:
        return ReportRow(decision.names[0], kind, "kept", decision.reason, weight.numel())
    new = "" if id(layer) in before else ", freshly initialized"
    detail = _describe(decision.form.plain, decision.method) + new
    return ReportRow(decision.names[0], kind, "binary", detail, weight.numel())


def _shape(weight: Tensor) -> str:
    return "x".join(map(str, weight.shape))


def _describe(layer: nn.Module, method: Method) -> str:
    notes = [method.name]
    if isinstance(layer, nn.modules.conv._ConvNd):
        same = layer.in_channels == layer.out_channels
        strided = any(s != 1 for s in layer.stride)
        if method.part("shortcut") is not None and (not same or strided):
            how = "projected" if method.part("shortcut") == "projection" else "pooled"
            over = " and ".join(
                text for text, yes in (("channels", not same), (f"{len(layer.stride)}-D average", strided)) if yes
            )
            notes.append(f"shortcut {how} ({over})")
        if layer.groups != 1:
            notes.append(f"groups {layer.groups}")
    if layer.bias is not None:
        notes.append("bias kept" if method.keep_bias else "bias folded" if method.fold_bias else "bias dropped")
    return ", ".join(notes)
