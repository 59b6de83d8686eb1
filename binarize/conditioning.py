"""What a network is conditioned on, and how that value becomes a position between clean data and noise.

A position is 0 for clean data, the first step of training, and 1 for noise, the last one. The timestep group is
``clamp(floor(position * K), 0, K - 1)``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from binarize.errors import BinarizeError, did_you_mean

Reader = Callable[[tuple[Any, ...], dict[str, Any]], Any]
Placer = Callable[[Tensor], Tensor]

# Values outside the range by less than this share of it are not worth a warning: samplers overshoot.
_MARGIN = 0.05


@dataclass(frozen=True)
class _Kind:
    meaning: str
    clean: float
    noise: float
    linear_in: str | None = None  # the function of `math` and `torch` of the value in which positions are linear
    directed: bool = True  # whether noise is always on the same side of clean data

    def orders(self, values: Sequence[float]) -> bool:
        """Return whether values go from clean to noise."""
        try:
            placed = [self.transform_number(value) for value in values]
        except ValueError:  # not in the domain of the function
            return False
        rises = self.noise > self.clean if self.directed else placed[-1] > placed[0]
        ordered = all((a <= b) if rises else (a >= b) for a, b in pairwise(placed))
        return ordered and placed[0] != placed[-1] and all(map(math.isfinite, placed))

    def transform(self, values: Tensor) -> Tensor:
        return values if self.linear_in is None else getattr(torch, self.linear_in)(values)

    def transform_number(self, value: float) -> float:
        return value if self.linear_in is None else getattr(math, self.linear_in)(value)


KINDS: dict[str, _Kind] = {
    "unit": _Kind("a share of the time of diffusion", 0.0, 1.0, directed=False),
    "noise_level": _Kind("sqrt(alpha_bar)", 1.0, 0.0),
    "alpha_bar": _Kind("alpha_bar", 1.0, 0.0, "sqrt"),
    "sigma": _Kind("the standard deviation of the noise", 0.002, 80.0, "log"),
    "log_sigma": _Kind("ln(sigma) times a constant", math.log(0.002) / 4, math.log(80.0) / 4),
    "log_snr": _Kind("ln(SNR)", 15.0, -15.0),
}
STEPS = "steps"


@dataclass(frozen=True)
class Timestep:
    """Where a network's timestep is, and what its value means.

    Positions are linear in the value, for "sigma" in its logarithm and for "alpha_bar" in its square root, between the
    two ends of ``range``. Values outside belong to the first or last group, with a warning.

    Args:
        argument: The name of an argument of the model's ``forward``, or a function ``f(args, kwargs)`` of the call's
            arguments that returns the values, ``(B,)`` or scalar. None looks for a module ``time_proj`` and for an
            argument with a usual name.
        kind: "steps" of ``num_train_timesteps`` (0 to T - 1), "unit" (0 to 1), "noise_level" (sqrt(alpha_bar), as in
            SR3), "alpha_bar", "sigma" (as in EDM), "log_sigma" (ln(sigma), possibly times a constant), "log_snr", or a
            function from values, ``(B,)``, to positions from 0 (clean) to 1 (noise). None takes what the argument's
            name implies.
        range: The values ``(clean, noise)`` at positions 0 and 1. Defaults: (0, 1) for "unit", (1, 0) for
            "noise_level" and "alpha_bar", (0.002, 80) for "sigma", ln(sigma) / 4 of these for "log_sigma", (15, -15)
            for "log_snr".
        schedule: Instead of a range, the values of all training steps from clean to noise, such as
            ``scheduler.alphas_cumprod.sqrt()`` for "noise_level". Each value then belongs to the nearest step.

    Raises:
        BinarizeError: If a field is not one of these, or a range or schedule does not fit the kind.
    """

    argument: str | Reader | None = None
    kind: str | Placer | None = None
    range: tuple[float, float] | None = None
    schedule: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not (self.argument is None or callable(self.argument) or isinstance(self.argument, str)):
            raise BinarizeError(f"Timestep: argument must be a name or a function; got {self.argument!r}.")
        known = [STEPS, *KINDS]
        if not (self.kind is None or callable(self.kind) or self.kind in known):
            hint = did_you_mean(self.kind, known) if isinstance(self.kind, str) else ""
            raise BinarizeError(
                f"Timestep: kind must be one of {', '.join(known)} or a function from values to positions; got "
                f"{self.kind!r}.{hint}"
            )
        for name in ("range", "schedule"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, self._checked(name, getattr(self, name)))
        if self.range is not None and self.schedule is not None:
            raise BinarizeError("Timestep: give a range or a schedule, not both.")

    def _checked(self, name: str, given: Any) -> tuple[float, ...]:
        kind = KINDS.get(self.kind) if isinstance(self.kind, str) else None
        if kind is None:
            raise BinarizeError(f"Timestep: a {name} needs one of the kinds {', '.join(KINDS)}; got {self.kind!r}.")
        try:
            values = tuple(map(float, given))
        except (TypeError, ValueError):
            raise BinarizeError(f"Timestep: {name} must consist of numbers; got {given!r}.") from None
        if not (len(values) == 2 or (name == "schedule" and len(values) > 2)) or not kind.orders(values):
            shown = repr(values) if len(values) < 5 else f"{len(values)} values from {values[0]} to {values[-1]}"
            count = "two" if name == "range" else "two or more"
            raise BinarizeError(
                f"Timestep: the {name} of a {self.kind} must be {count} finite values from clean to noise, such as "
                f"from {kind.clean:.4g} to {kind.noise:.4g}; got {shown}."
            )
        return values

    @property
    def needs_steps(self) -> bool:
        """Whether positions depend on the number of training timesteps."""
        return self.kind == STEPS

    def ends(self) -> tuple[float, float]:
        """Return the values at positions 0 and 1."""
        kind = KINDS[str(self.kind)]
        if self.schedule is not None:
            return self.schedule[0], self.schedule[-1]
        return (kind.clean, kind.noise) if self.range is None else self.range

    def position(self, values: Tensor) -> Tensor:
        """Return the positions ``(B,)`` of values ``(B,)``, not clamped. The kind is not "steps"."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if callable(self.kind):
            return self.kind(values).reshape(-1)
        kind = KINDS[str(self.kind)]
        clean, noise = map(kind.transform_number, self.ends())
        return (kind.transform(values) - clean) / (noise - clean)

    def group(self, values: Tensor, groups: int, num_train_timesteps: int) -> Tensor:
        """Return the timestep groups, ``(B,)`` int64 below K = ``groups``, without synchronization with the device."""
        values = values.reshape(-1)
        if self.needs_steps:
            return timestep_group(values, groups, num_train_timesteps)
        if self.schedule is not None:
            return _nearest_step_group(values, self.schedule, groups)
        return torch.floor(self.position(values).clamp(0, 1) * groups).long().clamp(0, groups - 1)

    def fault(self, values: Tensor, num_train_timesteps: int, whole: bool) -> str | None:
        """Return what is wrong with values ``(B,)`` on a CPU, or None.

        Steps between 0 and 1 are a fault, since they look like noise levels; with ``whole``, so are all fractions.
        """
        listed: list[float] = values.reshape(-1).tolist()
        if self.needs_steps:
            last = num_train_timesteps
            wrong = [v for v in listed if not 0 <= v < last or (v % 1 and (whole or v < 1))]
            return f"{wrong[0]:.6g}, but steps are whole numbers from 0 to {last - 1}" if wrong else None
        margin = 1e-6 if callable(self.kind) else _MARGIN
        places = self.position(values.reshape(-1)).tolist()
        outside = [(v, p) for v, p in zip(listed, places, strict=True) if not -margin <= p <= 1 + margin]
        if not outside:
            return None
        value, place = outside[0]
        if callable(self.kind):
            return f"{value:.6g}, whose position {place:.6g} is not between 0 and 1"
        clean, noise = self.ends()
        return f"{value:.6g}, which is outside the range from {clean:.6g} (clean) to {noise:.6g} (noise)"

    def to_config(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON can hold them; functions as "module:name"."""
        set_fields = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return {
            name: _path_of(name, value) if callable(value) else list(value) if isinstance(value, tuple) else value
            for name, value in set_fields.items()
        }

    def __str__(self) -> str:
        """Return the call that makes it, with functions as paths and a schedule by its length."""
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if callable(value):
                value = getattr(value, "__qualname__", type(value).__qualname__)
            elif field.name == "schedule" and value is not None:
                value = f"<{len(value)} values>"
            else:
                value = None if value is None else repr(value)
            if value is not None:
                shown.append(f"{field.name}={value}")
        return f"binarize.Timestep({', '.join(shown)})"


TimestepLike = Timestep | str | Mapping[str, Any]
BY_STEPS = Timestep(kind=STEPS)
"""Steps, from `time_proj` or an argument with a usual name: what models of version 0.1 read."""


def as_timestep(given: TimestepLike, find: Callable[[str, str], Any]) -> Timestep:
    """Return a `Timestep` from one, from an argument's name or from the mapping of `Timestep.to_config`.

    ``find(field, path)`` returns the function that a "module:name" in the mapping stands for.
    """
    if isinstance(given, Timestep):
        return given
    if isinstance(given, str):
        return Timestep(given)
    if not isinstance(given, Mapping):
        raise BinarizeError(
            f"timestep must be the name of an argument, a binarize.Timestep or a mapping of its fields; got {given!r}."
        )
    known = [field.name for field in fields(Timestep)]
    for key in given:
        if key not in known:
            raise BinarizeError(f"timestep: unknown key {key!r}; keys: {', '.join(known)}.{did_you_mean(key, known)}")
    values = dict(given)
    for name in ("argument", "kind"):
        value = values.get(name)
        if isinstance(value, str) and ":" in value:
            values[name] = find(name, value)
    return Timestep(**values)


def timestep_group(timesteps: Tensor, groups: int, num_train_timesteps: int) -> Tensor:
    """Return the group of each timestep, ``clamp(floor(t * K / T), 0, K - 1)`` (BI-DiffSR, section 3.4).

    Args:
        timesteps: ``(B,)`` or scalar, integer or floating point, in steps of the training schedule.
        groups: K, the number of groups.
        num_train_timesteps: T.

    Returns:
        ``(B,)`` or ``(1,)`` int64, without synchronization with the device.
    """
    t = timesteps.reshape(-1)
    if t.is_floating_point():
        group = torch.floor(t.to(torch.float32) * groups / num_train_timesteps).long()
    else:
        group = torch.div(t.long() * groups, num_train_timesteps, rounding_mode="floor")
    return group.clamp(0, groups - 1)


def _nearest_step_group(values: Tensor, schedule: Sequence[float], groups: int) -> Tensor:
    """Return the group of the step whose value is nearest: the number of groups that begin at or before it."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    steps, rising = len(schedule), schedule[-1] > schedule[0]
    group = torch.zeros_like(values, dtype=torch.long)
    for first in (-(-k * steps // groups) for k in range(1, groups)):  # of group k
        if first < steps:
            edge = (schedule[first - 1] + schedule[first]) / 2
            group = group + ((values > edge) if rising else (values < edge))
    return group


def _path_of(name: str, function: Any) -> str:
    module, path = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not path or "<" in path or module == "__main__":
        raise BinarizeError(
            f"the timestep's {name} {function!r} cannot be saved, since no import path leads to it; define it at the "
            "top of an importable module, or use an argument's name and one of the kinds."
        )
    return f"{module}:{path}"
