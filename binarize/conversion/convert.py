"""The pass: check, rewire the structure, swap the layers, attach the timestep context, report."""

from __future__ import annotations

import copy
import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from binarize.conversion.report import ConversionReport, ReportRow
from binarize.errors import BinarizeError
from binarize.hosts import Edit, Host, find_host
from binarize.hosts.base import TIME_PATH
from binarize.layers import BinaryConv2d, BinaryLinear, CPDown, CPUp, CSFusion
from binarize.methods import Method, get_method
from binarize.timestep import TimestepContext, has_timestep, no_timestep_message

MethodLike = str | Method | Mapping[str, Any]
Selector = str | Callable[[str, nn.Module], bool]
ModelT = TypeVar("ModelT", bound=nn.Module)

RECORD = "_binarize_conversion"
PACKED_FORMAT = 1
DEFAULT_TIMESTEPS = 1000


@dataclass
class Conversion:
    """What `convert` did to a model, kept on the model.

    Attributes:
        method: The method.
        structure: "keep" or "cp_cs".
        keep: Patterns of what the user kept; names where the user gave a predicate.
        overrides: Pattern to method, or None for kept.
        linear: Which linear layers were asked for.
        num_train_timesteps: T, or None where no timestep is needed.
        report: The rows.
        context: The timestep context, or None.
        packed: Whether `binarize.pack` has replaced the latent weights by bits.
    """

    method: Method
    structure: str
    keep: list[str]
    overrides: dict[str, Method | None]
    linear: bool | list[str]
    num_train_timesteps: int | None
    report: ConversionReport
    context: TimestepContext | None = None
    packed: bool = False

    def to_config(self) -> dict[str, Any]:
        """Return the arguments that `convert` needs to do the same again, fit for JSON."""
        config = {
            "format": 1,
            "method": self.method.to_config(),
            "structure": self.structure,
            "keep": list(self.keep),
            "overrides": {k: None if v is None else v.to_config() for k, v in self.overrides.items()},
            "linear": self.linear,
            "num_train_timesteps": self.num_train_timesteps,
        }
        if self.packed:
            config["packed"] = PACKED_FORMAT
        return config


@dataclass
class _Plan:
    """Which layers a conversion replaces, and what it says of the others."""

    replace: dict[str, Method] = field(default_factory=dict)
    rows: list[ReportRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(
    model: ModelT,
    method: MethodLike,
    *,
    structure: str = "auto",
    keep: Sequence[Selector] | Selector | None = None,
    overrides: Mapping[str, Any] | None = None,
    linear: bool | Sequence[str] = False,
    num_train_timesteps: int | None = None,
) -> ModelT:
    """Binarize a network in place and return it.

    Everything is checked first; a call that fails leaves the model as it was. Latent weights are the model's own
    Parameter objects.

    Args:
        model: Any nn.Module; a diffusion U-Net for timestep-aware methods.
        method: A method's name ("bidiffsr"), an instance (``methods.bidiffsr(groups=2)``) or
            ``{"name": ..., **options}``.
        structure: "auto" (CP-Down, CP-Up and CS-Fusion for "bidiffsr" where the host is known, else the host's own),
            "cp_cs" (for any method) or "keep" (convolutions only).
        keep: Glob patterns on module names, or predicates ``f(name, module)``; what matches, and all below it, stays
            full precision. ``*`` matches dots as well.
        overrides: Pattern to another method, to options of the method (``{"groups": 2}``), or to None for full
            precision. Layers that stay full precision by default (attention, first, last, linear) become binary where a
            pattern names them. Of several matching patterns the last one counts.
        linear: Convert linear layers too: True for all but time embeddings, attention and the last, or patterns.
        num_train_timesteps: T of the noise schedule, for hosts whose configuration does not have it; 1000 if not given.

    Returns:
        The same object.

    Raises:
        BinarizeError: If the method, an option or a pattern does not fit, a pattern matches nothing, nothing would be
            replaced, or the model is already converted.
    """
    method = get_method(method)
    checked = _check_arguments(model, method, structure, keep, overrides, linear, num_train_timesteps)
    host = find_host(model)
    wanted = _resolve_structure(model, method, host, structure)
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    config_before = _config_of(model)
    try:
        notes = host.notes(model, wanted)
        edits = host.rewire(model) if wanted == "cp_cs" and not host.rewired(model) else []
        carried = {id(module) for module in model.modules()}
        for edit in edits:
            undo.append(_replace(model, edit.path, edit.module))
        if edits:
            host.after_rewire(model)
        plan = _select(model, method, host, checked, carried)
        plan.notes[:0] = notes
        needs_time = any(chosen.needs_timestep for chosen in plan.replace.values())
        context, steps = _make_context(model, host, needs_time, num_train_timesteps, plan)
        _swap(model, plan, context, undo)
        rows = [*_structure_rows(model, edits, carried), *plan.rows]
        report = ConversionReport(method.name, host.name, host.structure(model), tuple(rows), tuple(plan.notes))
        record = Conversion(
            method, wanted, cast(list[str], checked.keep), checked.overrides, checked.linear, steps, report, context
        )
        if context is not None:
            context.attach(model)
    except BaseException:
        for parent, attribute, old in reversed(undo):
            setattr(parent, attribute, old)
        if config_before is not None and _config_of(model) != config_before:
            cast(Any, model).register_to_config(**config_before)
        raise
    setattr(model, RECORD, record)
    record_config(model, record)
    return model


def plan(model: nn.Module, method: MethodLike, **options: Any) -> ConversionReport:
    """Return the report that `convert` would give, without touching the model.

    Args:
        model: The model, not converted.
        method: As for `convert`.
        **options: As for `convert`.

    Raises:
        BinarizeError: As `convert` would.
    """
    ghost = meta_copy(model)
    with torch.device("meta"):
        convert(ghost, method, **options)
    return report(ghost)


def report(model: nn.Module) -> ConversionReport:
    """Return what the conversion did to each module, and why.

    Raises:
        BinarizeError: If the model is not converted.
    """
    return conversion(model).report


def conversion(model: nn.Module) -> Conversion:
    """Return the record of a model's conversion.

    Raises:
        BinarizeError: If the model is not converted.
    """
    record = getattr(model, RECORD, None)
    if record is None:
        raise BinarizeError(
            f"this {type(model).__name__} is not converted; call binarize.convert(model, method) first."
        )
    found: Conversion = record
    return found


def timesteps(model: nn.Module, timestep: Tensor | float | int) -> AbstractContextManager[None]:
    """Return a context manager in which parts of a converted model can be run alone, at the given timestep.

    Args:
        model: A converted model.
        timestep: Scalar or ``(B,)``.

    Raises:
        BinarizeError: If the model is not converted.
    """
    context = conversion(model).context
    return _nothing() if context is None else context.using(timestep)


def checkpoint_context(
    model: nn.Module,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Return the ``context_fn`` for your own torch.utils.checkpoint calls inside a converted model.

    Recomputation happens in the backward, when the timestep of the forward is gone; this brings it back. Models whose
    checkpointing diffusers switches on need nothing.

    Raises:
        BinarizeError: If the model is not converted.
    """
    context = conversion(model).context
    if context is None:
        return lambda: (_nothing(), _nothing())
    return context.checkpoint_context


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _config_of(model: nn.Module) -> dict[str, Any] | None:
    if hasattr(model, "config") and hasattr(model, "register_to_config"):
        return dict(cast(Any, model).config)
    return None


@dataclass
class _Checked:
    keep: list[Selector]
    overrides: dict[str, Method | None]
    linear: bool | list[str]
    picked: set[str] = field(default_factory=set)

    def resolve_predicates(self, model: nn.Module) -> None:
        """Replace each predicate by the names of the modules that it picks, so that what is below them is kept too."""
        resolved: list[str] = []
        for item in self.keep:
            if isinstance(item, str):
                resolved.append(item)
                continue
            picked = [n for n, m in model.named_modules(remove_duplicate=False) if n and item(n, m)]
            if not picked:
                raise BinarizeError(f"the predicate {item!r} in keep matches no module.")
            self.picked.update(picked)
            resolved += picked
        self.keep = list(resolved)


def _check_arguments(
    model: nn.Module,
    method: Method,
    structure: str,
    keep: Sequence[Selector] | Selector | None,
    overrides: Mapping[str, Any] | None,
    linear: bool | Sequence[str],
    num_train_timesteps: int | None,
) -> _Checked:
    if not isinstance(model, nn.Module):
        raise BinarizeError(f"convert needs an nn.Module; got {type(model).__name__}. For a pipeline, pass its unet.")
    if structure not in ("auto", "keep", "cp_cs"):
        raise BinarizeError(f"structure must be 'auto', 'keep' or 'cp_cs'; got {structure!r}.")
    if num_train_timesteps is not None and (not isinstance(num_train_timesteps, int) or num_train_timesteps < 1):
        raise BinarizeError(f"num_train_timesteps must be a whole number of at least 1; got {num_train_timesteps!r}.")
    for label, value, kinds in (("keep", keep, Sequence), ("linear", linear, bool | Sequence)):
        if value is not None and not (isinstance(value, kinds) or (label == "keep" and callable(value))):
            raise BinarizeError(f"{label} must be a sequence of glob patterns; got {value!r}.")
    if linear is None:
        raise BinarizeError("linear must be True, False or glob patterns; got None.")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise BinarizeError(f"overrides must map glob patterns to methods, options or None; got {overrides!r}.")
    _refuse_lazy(model)
    if hasattr(model, RECORD):
        raise BinarizeError(
            f"this {type(model).__name__} is already converted, by method {conversion(model).method.name!r}; "
            "call binarize.revert(model) first."
        )
    for name, module in model.named_modules():
        if isinstance(module, BinaryConv2d | BinaryLinear) or hasattr(module, RECORD):
            raise BinarizeError(f"{name!r} is already binary; convert the whole network once.")
        wrapped = _wrapper(module)
        if wrapped:
            raise BinarizeError(
                f"{name or type(model).__name__!r} is wrapped by {wrapped}; remove or merge that before converting."
            )
    selectors = [] if keep is None else [keep] if isinstance(keep, str) or callable(keep) else list(keep)
    for item in selectors:
        if not (isinstance(item, str) or callable(item)):
            raise BinarizeError(f"keep takes glob patterns and predicates f(name, module); got {item!r}.")
    resolved: dict[str, Method | None] = {}
    for pattern, value in (overrides or {}).items():
        if value is None or isinstance(value, str | Method) or (isinstance(value, Mapping) and "name" in value):
            resolved[pattern] = None if value is None else get_method(value)
        elif isinstance(value, Mapping):
            resolved[pattern] = get_method(method, **value)
        else:
            raise BinarizeError(
                f"overrides[{pattern!r}] must be a method, a mapping of options or None; got {value!r}."
            )
    asked = linear if isinstance(linear, bool) else [linear] if isinstance(linear, str) else list(linear)
    return _Checked(selectors, resolved, asked)


_OUTER = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def _wrapper(module: nn.Module) -> str | None:
    if type(module).__name__ in _OUTER:
        return f"{type(module).__name__}, which must come after the conversion"
    if parametrize.is_parametrized(module):
        return "torch.nn.utils.parametrize"
    if type(module).__name__ == "BaseTunerLayer" or any(c.__name__ == "BaseTunerLayer" for c in type(module).__mro__):
        return "a PEFT adapter"
    if type(module).__module__.startswith(("torch.ao.nn", "torchao")):
        return type(module).__module__
    if any(hasattr(hook, "name") and hasattr(hook, "dim") for hook in module._forward_pre_hooks.values()):
        return "torch.nn.utils.weight_norm or spectral_norm"
    return None


def _resolve_structure(model: nn.Module, method: Method, host: Host, structure: str) -> str:
    if host.rewired(model):  # converted before and reverted: there is no other structure left to keep
        return "cp_cs"
    if structure == "auto":
        return "cp_cs" if method.default_structure == "cp_cs" and host.has_structure(model) else "keep"
    return structure


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear)


def _match(pattern: str, name: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def _below(name: str, ancestors: Mapping[str, str]) -> str | None:
    parts = name.split(".")
    for i in range(len(parts)):
        reason = ancestors.get(".".join(parts[: i + 1]))
        if reason is not None:
            return reason
    return None


def _select(model: nn.Module, method: Method, host: Host, checked: _Checked, carried: set[int]) -> _Plan:
    plan = _Plan()
    layers = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if name and _is_layer(m)]
    linear = checked.linear if isinstance(checked.linear, list) else []
    checked.resolve_predicates(model)
    keep = [pattern for pattern in cast(list[str], checked.keep) if pattern not in checked.picked]
    for pattern in [*keep, *checked.overrides, *linear]:
        wanted = nn.Linear if pattern in linear else nn.Module
        if not any(_match(pattern, name) and isinstance(module, wanted) for name, module in layers):
            what = "linear layer" if pattern in linear else "convolution or linear layer"
            raise BinarizeError(
                f"the pattern {pattern!r} matches no {what}; names look like "
                f"{', '.join(name for name, _ in layers[:3])}. `binarize.plan(model, method)` lists them all."
            )
    defaults = host.full_precision(model, method)
    names: dict[int, list[str]] = {}
    for name, module in layers:
        names.setdefault(id(module), []).append(name)
    for name, module in layers:
        if name != names[id(module)][0]:
            continue  # another name of a layer that was looked at
        weights = cast(Tensor, module.weight).numel()
        chosen, reason = _decide(names[id(module)], module, method, checked, defaults, linear)
        if chosen is None:
            plan.rows.append(ReportRow(name, _describe(module), "kept", reason, weights))
        else:
            plan.replace[name] = chosen
            detail = _detail(module, chosen) + ("" if id(module) in carried else ", freshly initialised")
            plan.rows.append(ReportRow(name, _describe(module), "binary", detail, weights))
    if not plan.replace:
        raise BinarizeError(
            f"{method.name} would replace nothing in this {type(model).__name__}: "
            + ("; ".join(sorted({row.detail for row in plan.rows})) or "it has no convolution or linear layer")
            + ". Loosen keep, or pass linear=True for networks of linear layers."
        )
    return plan


def _decide(
    names: list[str],
    module: nn.Module,
    method: Method,
    checked: _Checked,
    defaults: Mapping[str, str],
    linear: list[str],
) -> tuple[Method | None, str]:
    """Return the method for one layer, given all its names, or None and the reason why it is kept."""
    for item in cast(list[str], checked.keep):
        if any(_below(n, {item: ""}) is not None if item in checked.picked else _match(item, n) for n in names):
            return None, "keep predicate" if item in checked.picked else f"keep={item!r}"
    unsupported = _unsupported(module)
    override = [pattern for pattern in checked.overrides if any(_match(pattern, n) for n in names)]
    if override:
        value = checked.overrides[override[-1]]
        if value is None:
            return None, f"overrides[{override[-1]!r}] is None"
        return (None, unsupported) if unsupported else (value, "")
    if unsupported:
        return None, unsupported
    if isinstance(module, nn.Linear) and any(_match(pattern, n) for pattern in linear for n in names):
        return method, ""
    default = [reason for reason in (_below(n, defaults) for n in names) if reason is not None]
    if default:
        return None, default[0]
    if isinstance(module, nn.Linear):
        if any(TIME_PATH.search(n) for n in names):
            return None, "time or class embedding"
        if checked.linear is not True:
            return None, "linear layer (convert with linear=True or patterns)"
    return method, ""


def _unsupported(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this layer's weight without calling the layer"
    for cls, kind in ((nn.Conv2d, "convolution"), (nn.Linear, "linear layer")):
        if isinstance(module, cls):
            if type(module).forward is not cls.forward:
                return f"{type(module).__name__} has a forward of its own, which a binary {kind} would drop"
            return None
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution: no binary form is published"
    return f"{type(module).__name__}: only 2-D convolutions and linear layers have a binary form"


def _detail(module: nn.Module, method: Method) -> str:
    notes = [method.name]
    if isinstance(module, nn.Conv2d):
        same = module.in_channels == module.out_channels
        strided = any(s != 1 for s in module.stride)
        if method.part("shortcut") is not None and (not same or strided):
            how = "projected" if method.part("shortcut") == "projection" else "pooled"
            over = " and ".join(text for text, yes in (("channels", not same), ("2-D average", strided)) if yes)
            notes.append(f"shortcut {how} ({over})")
        if module.groups != 1:
            notes.append(f"groups {module.groups}")
    if module.bias is not None:
        notes.append("bias kept" if method.keep_bias else "bias folded" if method.fold_bias else "bias dropped")
    return ", ".join(notes)


def _describe(module: nn.Module) -> str:
    return f"{type(module).__name__} {'x'.join(map(str, cast(Tensor, module.weight).shape))}"


def _make_context(
    model: nn.Module, host: Host, needed: bool, given: int | None, plan: _Plan
) -> tuple[TimestepContext | None, int | None]:
    own = host.num_train_timesteps(model)
    if given is not None and own is not None and given != own:
        raise BinarizeError(
            f"num_train_timesteps={given}, but the model's configuration says {own}; leave the argument out."
        )
    steps = own if own is not None else given
    if not needed:
        return None, steps
    if not has_timestep(model):
        raise BinarizeError(no_timestep_message(model))
    if steps is None:
        steps = DEFAULT_TIMESTEPS
        plan.notes.append(f"num_train_timesteps was not given and the host has none: {steps} assumed")
    return TimestepContext(steps), steps


def _swap(
    model: nn.Module, plan: _Plan, context: TimestepContext | None, undo: list[tuple[nn.Module, str, nn.Module]]
) -> None:
    by_id = {id(model.get_submodule(name)): method for name, method in plan.replace.items()}
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        method = by_id.get(id(module))
        if method is None:
            continue
        if id(module) not in made:
            with _generator_of(module):
                if isinstance(module, nn.Conv2d):
                    made[id(module)] = BinaryConv2d.from_float(module, method, context)
                elif isinstance(module, nn.Linear):
                    made[id(module)] = BinaryLinear.from_float(module, method, context)
        undo.append(_replace(model, name, made[id(module)]))


def _generator_of(module: nn.Module) -> AbstractContextManager[Any]:
    weight = module.weight
    return torch.device("meta") if isinstance(weight, Tensor) and weight.is_meta else _nothing()


def _replace(model: nn.Module, path: str, new: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    parent_path, _, attribute = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    old = getattr(parent, attribute)
    setattr(parent, attribute, new)
    return parent, attribute, old


def _structure_rows(model: nn.Module, edits: list[Edit], carried: set[int]) -> list[ReportRow]:
    rows = []
    for edit in edits:
        for name, module in edit.module.named_modules():
            path = f"{edit.path}.{name}" if name else edit.path
            if id(module) in carried or not isinstance(module, CPDown | CPUp | CSFusion):
                continue
            fusion = f", {module.form} fusion" if isinstance(module, CSFusion) else ""
            rows.append(ReportRow(path, type(module).__name__, "new", f"{edit.note}{fusion}"))
    return rows


def record_config(model: nn.Module, record: Conversion) -> None:
    """Write the conversion into the configuration of a host that has a place for it (SRUNet)."""
    init = getattr(type(model), "__init__", None)
    if hasattr(model, "register_to_config") and init is not None and "conversion" in inspect.signature(init).parameters:
        try:
            config = record.to_config()
        except BinarizeError as error:
            config = {"unsaveable": str(error)}
        cast(Any, model).register_to_config(conversion=config)


def _refuse_lazy(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(map(is_lazy, [*module.parameters(recurse=False), *module.buffers(recurse=False)])):
            raise BinarizeError(f"{name!r} is a {type(module).__name__} without weights; run one forward first.")


def meta_copy(model: ModelT) -> ModelT:
    """Return a structural copy of a model whose parameters and buffers take no memory (device "meta").

    Raises:
        BinarizeError: If a lazy layer has no weights yet.
    """
    _refuse_lazy(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)
