"""The likely mistakes, each as one change of a model's conventions. If two changes help alike, the first one counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from binarize.diagnosis.sampling import Conventions

PREDICTION, SCHEDULE, RANGE, ORDER = "prediction type", "noise schedule", "value range", "condition order"
RESIDUAL, CLIPPING, SPACING = "residual target", "clipping", "timestep spacing"
STEPS, SIGN = "number of steps", "sign of zero"

_SCHEDULES: tuple[tuple[str, int, float, float, str], ...] = (
    ("BI-DiffSR's and SR3's", 2000, 1e-6, 1e-2, "linear"),
    ("DDPM's", 1000, 1e-4, 2e-2, "linear"),
    ("DDPM's over 2000 steps", 2000, 1e-4, 2e-2, "linear"),
    ("BI-DiffSR's over 1000 steps", 1000, 1e-6, 1e-2, "linear"),
    ("Stable Diffusion's", 1000, 8.5e-4, 1.2e-2, "scaled_linear"),
    ("the cosine schedule", 1000, 1e-4, 2e-2, "squaredcos_cap_v2"),
)
_UNCLIPPED = 10.0  # residuals have unit variance and long tails, so this clips nothing


@dataclass(frozen=True)
class Change:
    """One change to try; see `ChangeResult` for its texts."""

    cause: str
    name: str
    fix: str
    how: Conventions
    sign_zero: str | None = None  # of the unpacked network; None runs the network as it is
    fits_residual: bool = False  # interpret x_0 as a residual and estimate its scale


def changes(now: Conventions, model_steps: int, signs: set[str], packed: bool) -> Iterator[Change]:
    """Yield the changes of the conventions `now` to try.

    The model itself takes `model_steps`, possibly more than ``now.steps``, has `signs` of zero in its unpacked network,
    and runs `packed` or not.
    """
    config = now.scheduler.config
    for kind in ("epsilon", "v_prediction", "sample"):
        if kind != config.get("prediction_type", kind):
            yield _scheduler_change(PREDICTION, f"prediction_type {kind}", now, prediction_type=kind)
    yield from _schedules(now)
    yield Change(
        RANGE,
        "images in [-1, 1]",
        "the network was trained on images in [-1, 1], and the pipeline's images are in [0, 1]. Train with [0, 1], or "
        "sample with `2 * condition - 1` and take `(x + 1) / 2` of the result.",
        replace(now, signed=True),
    )
    yield Change(
        ORDER,
        "noisy image before the condition",
        "the network was trained with the noisy image in its first input channels, where SRUNet puts the condition. "
        "Swap them once in the first convolution of the unpacked network, and save it; without detail_factor: "
        "`w = unet.conv_in.weight; w.data = torch.cat([w[:, 3:6], w[:, :3]], dim=1)`.",
        replace(now, sample_first=True),
    )
    yield from _residuals(now)
    if config.get("clip_sample"):
        yield _scheduler_change(CLIPPING, "clip_sample off", now, clip_sample=False)
    elif "clip_sample" in config:
        yield _scheduler_change(CLIPPING, "clip_sample on, to 1", now, clip_sample=True, clip_sample_range=1.0)
    for spacing in ("trailing", "linspace", "leading"):
        if spacing != config.get("timestep_spacing", spacing):
            yield _scheduler_change(SPACING, f"timestep_spacing {spacing}", now, timestep_spacing=spacing)
    for steps in dict.fromkeys((now.steps, 1, 4, 10, 50)):
        if steps != model_steps and steps <= config.num_train_timesteps:
            fix = f"set num_inference_steps to {steps} in model_index.json, or give --steps {steps} to the command."
            yield Change(STEPS, f"{steps} denoising step{'s' if steps > 1 else ''}", fix, replace(now, steps=steps))
    yield from _signs(now, signs, packed)


def _scheduler_change(cause: str, name: str, now: Conventions, extra: str = "", **changed: Any) -> Change:
    config = now.scheduler.config
    changed = {key: value for key, value in changed.items() if config.get(key) != value}
    keys = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in changed.items())
    code = ", ".join(f"{key}={value!r}" for key, value in changed.items())
    kind = type(now.scheduler)
    in_python = f"pipe.scheduler = {kind.__name__}.from_config(pipe.scheduler.config, {code})"
    fix = f"put {keys} into scheduler/scheduler_config.json{extra}; in Python, {in_python}."
    return Change(cause, name, fix, replace(now, scheduler=kind.from_config(config, **changed)))


def _schedules(now: Conventions) -> Iterator[Change]:
    config = now.scheduler.config
    if any(key not in config for key in ("beta_start", "beta_end", "beta_schedule")):
        return
    for name, timesteps, start, end, shape in _SCHEDULES:
        settings: dict[str, Any] = {"num_train_timesteps": timesteps, "beta_schedule": shape}
        betas = shape
        if shape != "squaredcos_cap_v2":  # which ignores them
            settings |= {"beta_start": start, "beta_end": end}
            betas = f"{start:g} to {end:g} {shape}"
        if config.get("trained_betas") is not None:
            settings["trained_betas"] = None
        if now.steps > timesteps or all(config.get(key) == value for key, value in settings.items()):
            continue
        extra = ""
        if timesteps != config["num_train_timesteps"]:
            extra = (
                f', and "num_train_timesteps": {timesteps} into unet/config.json and its conversion (before packing)'
            )
        yield _scheduler_change(SCHEDULE, f"betas {betas}, {timesteps} timesteps: {name}", now, extra, **settings)


def _residuals(now: Conventions) -> Iterator[Change]:
    where = "in model_index.json, or SuperResolutionPipeline(..., residual_scale=...)"
    unclipped, clip = now, ""
    if now.scheduler.config.get("clip_sample") and now.scheduler.config.get("clip_sample_range", 1.0) < _UNCLIPPED / 2:
        unclipped = _scheduler_change(RESIDUAL, "", now, clip_sample_range=_UNCLIPPED).how
        clip = f', and "clip_sample_range": {_UNCLIPPED:g} in scheduler/scheduler_config.json'
    if now.residual_scale is not None:
        strength = "" if now.residual_strength == 1 else " and residual_strength to 1"
        fix = f"the network predicts images, not residuals: set residual_scale to null{strength} {where}."
        yield Change(RESIDUAL, "residual_scale null", fix, replace(now, residual_scale=None))
    fix = (
        "the network predicts residuals: set residual_scale to about {found:.3g} "
        f"{where}{clip}; the exact number is in the recipe.yaml of the training's run."
    )
    yield Change(RESIDUAL, "residuals, of a scale that fits", fix, unclipped, fits_residual=True)


def _signs(now: Conventions, signs: set[str], packed: bool) -> Iterator[Change]:
    if packed and "zero" in signs:
        fix = "the network needs sign(0) = 0, which one bit cannot hold: use --no-pack, or pack=False in Python."
        yield Change(SIGN, "not packed, sign(0) = 0", fix, now, sign_zero="zero")
    for zero, other in (("zero", "plus"), ("plus", "zero")):
        if other in signs and zero not in signs and not (packed and zero == "plus"):
            value = 0 if zero == "zero" else 1
            where = f'the method of the conversion in unet/config.json, or load_official(..., sign_zero="{zero}")'
            fix = f'the network was trained with sign(0) = {value}: put "sign_zero": "{zero}" into {where}'
            fix += ", and run it unpacked: --no-pack." if zero == "zero" else "."
            yield Change(SIGN, f"sign(0) = {value}", fix, now, sign_zero=zero)
