"""What a scheduler must be able to do for a network of noise prediction over discrete timesteps."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Hashable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from binarize.errors import BinarizeError, one_line
from binarize.json_files import check_keys, read_json

MAX_TIMESTEPS = 100_000
_STEPS, _TOLERANCE = (10, 4, 1), 0.2  # a schedule may end with a little noise: in Stable Diffusion's, of deviation 0.03
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError)
"""What diffusers raises for settings that it did not expect."""


def read_scheduler(folder: Path) -> Any:
    """Return the scheduler in a pipeline's folder; None if there is none, or if diffusers has no such class.

    Raises:
        BinarizeError: If a file cannot be read, or its settings make no scheduler or one that fits no memory.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    entry = read_json(folder / "model_index.json").get("scheduler")
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[0] == "diffusers" else None
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        return None
    if not path.is_file():
        raise BinarizeError(f"{path}: is missing; the model is incomplete. Copy or save it again.")
    config = read_json(path)
    timesteps = config.get("num_train_timesteps", 1)
    if not isinstance(timesteps, int) or not 1 <= timesteps <= MAX_TIMESTEPS:
        allowed = f"a whole number from 1 to {MAX_TIMESTEPS}"
        raise BinarizeError(f"{path}: num_train_timesteps is {timesteps!r:.60}; allowed: {allowed}.")
    if not _has_own_keys(kind, config):
        others = {key for compatible in cast(Any, kind)._get_compatibles() for key in parameters(compatible)}
        check_keys(config, str(path), parameters(kind), others)
    try:
        return _build(kind, config)
    except FAILURES as error:
        raise BinarizeError(f"{path}: makes no {name}: {one_line(error, 150)}.") from error


def _has_own_keys(kind: Any, config: Mapping[str, Any]) -> bool:
    return {key for key in config if key[0] != "_"} <= parameters(kind)


def _build(kind: Any, config: Mapping[str, Any]) -> Any:
    if _has_own_keys(kind, config):  # `from_config` imports all schedulers, and SciPy, to know their keys
        return kind(**{key: value for key, value in config.items() if key[0] != "_"})
    return kind.from_config(config)


def parameters(kind: Any) -> set[str]:
    """Return the names of the arguments of a class."""
    return {*inspect.signature(kind).parameters} - {"self", "args", "kwargs"}


def check_samples(scheduler: Any) -> None:
    """Raise BinarizeError unless a scheduler turns noise into an image that a perfect network knows.

    The network gets sqrt(a_t) x_0 + sqrt(1 - a_t) noise for a timestep t in 0..T - 1, with the schedule's cumulative
    products a_t, and predicts what the scheduler's ``prediction_type`` says. That excludes schedulers over noise
    levels, of flows, and of inversion, whatever they are called.
    """
    kind = type(scheduler).__name__
    fix = "Use one of diffusers' such as DDIMScheduler, EulerDiscreteScheduler or DPMSolverMultistepScheduler"
    try:
        problem = _problem(
            cast(Hashable, type(scheduler)), json.dumps(dict(scheduler.config), sort_keys=True, default=_plain)
        )
    except FAILURES as error:
        problem = one_line(error, 150)
    if problem is not None:
        raise BinarizeError(
            f"{kind} is no scheduler for noise prediction over discrete timesteps, or its settings are wrong: "
            f"{problem}. {fix}, with the settings of the training."
        )


def set_timesteps(scheduler: Any, steps: int, device: torch.device | str | None = None) -> None:
    """Set the sampling timesteps, and check that the network's schedule has them."""
    try:
        scheduler.set_timesteps(steps, device=device)
    except FAILURES as error:
        reason = one_line(error, 150)
        raise BinarizeError(
            f"num_inference_steps={steps}: {type(scheduler).__name__} cannot take so many: {reason}."
        ) from error
    _check_range(scheduler, steps)


def _check_range(scheduler: Any, steps: int) -> None:
    first, last = float(scheduler.timesteps.min()), float(scheduler.timesteps.max())
    count = scheduler.config["num_train_timesteps"]
    if not 0 <= first <= last <= count - 1:
        outside, fix = (
            last if last > count - 1 else first,
            "use fewer steps, or another timestep_spacing or steps_offset",
        )
        raise BinarizeError(f"num_inference_steps={steps}: timestep {outside:g} is outside 0..{count - 1}; {fix}.")


@lru_cache(maxsize=64)
def _problem(kind: Any, settings: str) -> str | None:
    """Return what is wrong with a scheduler of this class and configuration."""
    with torch.device("cpu"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = _build(kind, json.loads(settings))
        if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
            return "it has no amount of noise for each timestep (alphas_cumprod)"
        a = scheduler.alphas_cumprod.double()
        if len(a) != scheduler.config["num_train_timesteps"] or not bool(((a >= 0) & (a <= 1)).all()):
            return "its betas are not one for each timestep, from 0 to 1"
        _take_steps(scheduler, len(a))
        source = torch.Generator().manual_seed(0)
        config = scheduler.config
        # The image lies within the clipping, unless that leaves no more than a few grey levels.
        inside = min(1.0, max(0.02, config.get("clip_sample_range", 1.0))) if config.get("clip_sample") else 1.0
        clean = inside * (0.1 + 0.8 * torch.rand(1, 3, 2, 2, generator=source, dtype=torch.float32))
        x = torch.randn(clean.shape, generator=source, dtype=torch.float32) * scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": source} if takes_generator else {}
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        for timestep in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, timestep)
            prediction = _perfect(prediction_type, seen.double(), clean.double(), _at(a, float(timestep)))
            x = scheduler.step(prediction.float(), timestep, x, **options).prev_sample
        error = float((x - clean).abs().max())
    return None if error < _TOLERANCE * inside else f"a perfect prediction ends {error:.2g} away from its image"


def _take_steps(scheduler: Any, most: int) -> None:
    for steps in _STEPS[:-1]:  # some take fewer than ten, and PNDM takes more than one
        if steps <= most:
            try:
                scheduler.set_timesteps(steps)
            except FAILURES:
                continue
            return _check_range(scheduler, steps)
    return set_timesteps(scheduler, _STEPS[-1])


def _at(a: Tensor, timestep: float) -> Tensor:
    """Return a_t; between two timesteps, the noise level is interpolated in logarithms."""
    below = int(timestep)
    if below == timestep:
        return a[below]
    levels = ((1 - a[below : below + 2]) / a[below : below + 2]).log()
    return 1 / (1 + torch.lerp(levels[0], levels[1], timestep - below).exp())


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _perfect(kind: str, seen: Tensor, clean: Tensor, a: Tensor) -> Tensor:
    noise = (seen - a.sqrt() * clean) / (1 - a).sqrt()
    return {"epsilon": noise, "sample": clean, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean}[kind]
