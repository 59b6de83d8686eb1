"""Which timestep the layers of a converted model get: what `convert` is told, what the host knows, else by names."""

import importlib
from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import nn

from binarize.conditioning import BY_STEPS, KINDS, STEPS, Timestep, TimestepLike, as_timestep
from binarize.errors import BinarizeError
from binarize.hosts import Host
from binarize.timestep import TimestepContext
from binarize.timestep_argument import (
    ASSUMED_NAMES,
    IMPLIED_KINDS,
    has_timestep,
    no_timestep_message,
    timestep_argument,
)
from binarize.trust import is_named_by_a_file

DEFAULT_TIMESTEPS = 1000


def timestep_context(
    model: nn.Module, host: Host, timed: bool, told: Timestep | None, num_train_timesteps: int | None,
    notes: list[str],
) -> tuple[TimestepContext | None, int | None]:  # fmt: skip
    """Return the context of a model that is to be converted, None unless ``timed``, and its number of timesteps.

    Remarks on what is assumed are added to ``notes``.
    """
    own = host.num_train_timesteps(model)
    if num_train_timesteps is not None and own is not None and num_train_timesteps != own:
        raise BinarizeError(
            f"num_train_timesteps={num_train_timesteps}, but the model's configuration says {own}; leave it out."
        )
    steps = own if own is not None else num_train_timesteps
    if not timed:
        return None, steps
    timestep, remarks = _resolve(model, told, host.timestep(model))
    notes += remarks
    if steps is None and timestep.needs_steps:
        steps = DEFAULT_TIMESTEPS
        notes.append(f"num_train_timesteps was not given and the host has none: {steps} assumed")
    context = TimestepContext(DEFAULT_TIMESTEPS if steps is None else steps, timestep)
    context.check(model)
    return context, steps


def told_timestep(model: nn.Module, host: Host, given: TimestepLike | None) -> Timestep | None:
    """Return what `binarize.convert` was told about the timestep, or None."""
    if given is None:
        return None
    known = host.timestep(model)
    told = as_timestep(given, lambda field, path: _function(field, path, known))
    return None if told == Timestep() else told


def _resolve(model: nn.Module, told: Timestep | None, known: Timestep | None) -> tuple[Timestep, list[str]]:
    """Return a timestep whose kind is set, and remarks on what was assumed."""
    if told is None and known is not None and known.kind is None:  # the host says where it is, and not what
        told, known = known, None
    if told is not None and told.kind == STEPS and told.range is None:
        return told, []
    found = timestep_argument(model)
    name = None if found is None else found[0]
    if told is not None and told.argument is not None:
        name = told.argument if isinstance(told.argument, str) else None
    elif told is not None and told.kind is not None:
        if name is None:
            raise BinarizeError(f"timestep: {told} does not say where it is. {no_timestep_message(model)}")
        told = replace(told, argument=name)
    elif known is not None:
        return known, _remark(known, "since the host takes noise levels")
    elif not has_timestep(model):
        raise BinarizeError(no_timestep_message(model))
    if told is not None and told.kind is not None:
        return told, []
    if known is not None and name is not None and known.argument == name:
        return known, _remark(known, "since the host takes noise levels")
    if name in IMPLIED_KINDS:
        implied = Timestep(name, IMPLIED_KINDS[name])
        return implied, _remark(implied, "as its name implies")
    steps = BY_STEPS if told is None else replace(told, kind=STEPS)
    if told is None and name not in ASSUMED_NAMES:
        return steps, []
    where = "what the function returns" if name is None else repr(name)
    other = Timestep(name, "noise_level")
    return steps, [f"timestep: {where} is taken for steps from 0 to T - 1; if not, say so, as timestep={other}"]


def _remark(timestep: Timestep, why: str) -> list[str]:
    """Say what a value is taken for, unless it is a step."""
    if timestep.needs_steps or callable(timestep.kind):
        return []
    clean, noise = timestep.ends()
    return [
        f"timestep: {timestep.argument!r} is taken for {KINDS[str(timestep.kind)].meaning} ({timestep.kind}), {why}, "
        f"from {clean:.4g} (clean) to {noise:.4g} (noise); if not, pass timestep=binarize.Timestep(...)"
    ]


def _function(field: str, path: str, known: Timestep | None) -> Any:
    """Return the function that a "module:name" stands for; a file may only name one that the host gives as well."""
    if is_named_by_a_file():
        same = None if known is None else getattr(known, field)
        if callable(same) and f"{same.__module__}:{getattr(same, '__qualname__', None)}" == path:
            return same
        raise BinarizeError(
            f"the model's file names the function {path!r} for its timestep, and a file may not have functions called. "
            f"Register a host (@binarize.register_host) whose `timestep` returns binarize.Timestep({field}=that "
            "function) before you load the model."
        )
    module, _, name = path.partition(":")
    try:
        function = attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise BinarizeError(f"timestep: the {field} {path!r} cannot be imported: {error}.") from error
    return function
