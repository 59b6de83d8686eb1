"""Where a network's timestep is: an argument of its ``forward``, or what its module ``time_proj`` is called with."""

import inspect
from typing import Any, NamedTuple

from torch import nn

from binarize.conditioning import Reader, Timestep
from binarize.errors import BinarizeError

ASSUMED_NAMES = frozenset({"t", "time", "times", "step", "steps", "time_cond"})
"""Names of arguments that are steps in most networks, and a noise level or a share of the time in others."""
IMPLIED_KINDS = {
    **dict.fromkeys(("noise_level", "noise_levels"), "noise_level"),
    **dict.fromkeys(("alpha_bar", "gammas"), "alpha_bar"),
    **dict.fromkeys(("sigma", "sigmas"), "sigma"),
    **dict.fromkeys(("noise_labels", "c_noise"), "log_sigma"),
    **dict.fromkeys(("log_snr", "logsnr"), "log_snr"),
    **dict.fromkeys(("timestep_ratio", "r"), "unit"),
}
"""Names of arguments that are never steps."""

_LONG_KNOWN = (
    *("timestep", "timesteps", "t", "time", "time_step", "time_steps"),
    *("noise_level", "noise_labels", "sigma"),
)
TIMESTEP_NAMES = (*_LONG_KNOWN, *sorted({*ASSUMED_NAMES, *IMPLIED_KINDS} - {*_LONG_KNOWN}))
"""Usual names of the argument of ``forward``; if there are several, those of version 0.1 come first."""


class TimestepSource(NamedTuple):
    """Where a model's timestep is."""

    name: str | None  # of the argument of ``forward``, or of the function that reads the call's arguments
    position: int | None = None  # of that argument, unless it is passed by name only
    default: Any = None  # of that argument
    function: Reader | None = None
    projection: nn.Module | None = None  # is called with the timestep

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
        """Return the timestep in a call of ``forward`` if it is there, and what is wrong if it is None."""
        if self.function is not None:
            return self.function(args, kwargs), f"{self.name} returned None"
        if self.name is None:
            return None, "`time_proj` was not called with one timestep for each sample"
        if self.name in kwargs:
            return kwargs[self.name], f"argument {self.name!r} is None"
        if self.position is not None and self.position < len(args):
            return args[self.position], f"argument {self.name!r} is None"
        return self.default, f"argument {self.name!r} is missing"


def timestep_argument(model: nn.Module) -> tuple[str, int] | None:
    """Return the name and position of the argument of ``model.forward`` that is the timestep, if there is one."""
    names = list(inspect.signature(model.forward).parameters)
    found = sorted((name not in _LONG_KNOWN, position) for position, name in enumerate(names) if name in TIMESTEP_NAMES)
    return None if not found else (names[found[0][1]], found[0][1])


def _projection(model: nn.Module) -> nn.Module | None:
    time_proj = getattr(model, "time_proj", None)
    return time_proj if isinstance(time_proj, nn.Module) else None


def has_timestep(model: nn.Module) -> bool:
    """Return True if a timestep can be found in ``model`` without being told where it is."""
    return _projection(model) is not None or timestep_argument(model) is not None


def find_source(model: nn.Module, timestep: Timestep) -> TimestepSource:
    """Return where a model's timestep is; raise BinarizeError if its ``forward`` has no such argument."""
    if callable(timestep.argument):
        return TimestepSource(getattr(timestep.argument, "__qualname__", "timestep"), function=timestep.argument)
    projection = _projection(model) if timestep.argument is None else None
    found, parameters = timestep_argument(model), inspect.signature(model.forward).parameters
    name = found[0] if timestep.argument is None and found is not None else timestep.argument
    if name is None:
        if projection is None:
            raise BinarizeError(no_timestep_message(model))
        return TimestepSource(None, projection=projection)
    if name not in parameters:
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            raise BinarizeError(
                f"timestep: {type(model).__name__}.forward has no argument {name!r}; its arguments: "
                f"{', '.join(parameters)}. Or give a function of the call: timestep=binarize.Timestep(f, ...)."
            )
        return TimestepSource(name, projection=projection)
    parameter = parameters[name]
    default = None if parameter.default is parameter.empty else parameter.default
    position = None if parameter.kind == parameter.KEYWORD_ONLY else list(parameters).index(name)
    return TimestepSource(name, position, default, projection=projection)


def no_timestep_message(model: nn.Module) -> str:
    """Return the error message for a timestep-aware method on a model that has no timestep."""
    return (
        f"{type(model).__name__} has no timestep: it has no `time_proj` module and its forward has none of the "
        f"arguments {', '.join(TIMESTEP_NAMES)}. Say where it is: binarize.convert(..., timestep=binarize.Timestep("
        "'argument', kind='steps')). Or use a method that is not timestep-aware, or one group for all: "
        'bidiffsr(groups=1), in a recipe {"name": "bidiffsr", "groups": 1}.'
    )
