"""The likely mistakes, each one change of what the model says of itself. Of two that help alike, the first counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from binarize.diagnosis.sampling import Conventions

PREDICTION, SCHEDULE, RANGE, ORDER = "prediction type", "noise schedule", "value range", "condition order"
RESIDUAL, CLIPPING, SPACING, STEPS, SIGN = (
    "residual target", "clipping", "timestep spacing", "number of steps", "sign of zero",
)  # fmt: skip

_SCHEDULES: tuple[tuple[str, int, float, float, str], ...] = (
    ("BI-DiffSR's and SR3's", 2000, 1e-6, 1e-2, "linear"),
    ("DDPM's", 1000, 1e-4, 2e-2, "linear"),
    ("DDPM's over 2000 steps", 2000, 1e-4, 2e-2, "linear"),
    ("BI-DiffSR's over 1000 steps", 1000, 1e-6, 1e-2, "linear"),
    ("Stable Diffusion's", 1000, 8.5e-4, 1.2e-2, "scaled_linear"),
    ("the cosine one", 1000, 1e-4, 2e-2, "squaredcos_cap_v2"),
)
_UNCLIPPED = 10.0  # residuals have unit variance and long tails, so this cuts nothing off


@dataclass(frozen=True)
class Change:
    """One thing to try.

    Attributes:
        cause: What would be wrong if it helps.
        what: What is changed, short.
        fix: How to change it for good.
        how: The conventions to sample with.
        sign_zero: What the signs of the unpacked network give for 0; None runs the network as it is.
        fits_residual: Take x_0 for residuals and find out what they were divided by.
    """

    cause: str
    what: str
    fix: str
    how: Conventions
    sign_zero: str | None = None
    fits_residual: bool = False


def changes(now: Conventions, asked_steps: int, signs: set[str], packed: bool) -> Iterator[Change]:
    """Give what to try.

    Args:
        now: The conventions of the model as it is; its steps are those of the trials.
        asked_steps: The steps that the model itself takes, which may be more than is cheap.
        signs: What the signs of the unpacked network give for 0.
        packed: Whether the model, as it is, runs packed.
    """
    for kind in ("epsilon", "v_prediction", "sample"):
        if kind != now.scheduler.config.get("prediction_type", kind):
            yield _scheduled(PREDICTION, f"prediction_type {kind}", now, prediction_type=kind)
    yield from _schedules(now)
    yield Change(
        RANGE,
        "pictures in [-1, 1]",
        "the network was trained on pictures from -1 to 1, the pipeline gives it 0 to 1. Train with [0, 1]; to use it "
        "as it is, sample with `2 * condition - 1` and take `(x + 1) / 2` of the result.",
        replace(now, signed=True),
    )
    yield Change(
        ORDER,
        "noisy picture before the condition",
        "the network was trained with the noisy picture in its first input channels, SRUNet puts the condition there. "
        "Exchange them in the first convolution of the unpacked network, once, and save; where detail_factor is not "
        "set: `w = unet.conv_in.weight; w.data = torch.cat([w[:, 3:6], w[:, :3]], dim=1)`.",
        replace(now, sample_first=True),
    )
    yield from _residuals(now)
    yield from _clippings(now)
    for spacing in ("trailing", "linspace", "leading"):
        if spacing != now.scheduler.config.get("timestep_spacing", spacing):
            yield _scheduled(SPACING, f"timestep_spacing {spacing}", now, timestep_spacing=spacing)
    most = now.scheduler.config.num_train_timesteps
    for steps in dict.fromkeys((now.steps, 1, 4, 10, 50)):
        if steps != asked_steps and steps <= most:
            fix = f"set num_inference_steps to {steps} in model_index.json, or give --steps {steps} to the command."
            yield Change(STEPS, f"{steps} denoising step{'s' if steps > 1 else ''}", fix, replace(now, steps=steps))
    yield from _signs(now, signs, packed)


def _scheduled(cause: str, what: str, now: Conventions, extra: str = "", **changed: Any) -> Change:
    config = now.scheduler.config
    changed = {key: value for key, value in changed.items() if config.get(key) != value}
    keys = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in changed.items())
    code = ", ".join(f"{key}={value!r}" for key, value in changed.items())
    kind = type(now.scheduler)
    fix = (
        f"put {keys} into scheduler/scheduler_config.json{extra}; in Python, pipe.scheduler = "
        f"{kind.__name__}.from_config(pipe.scheduler.config, {code})."
    )
    return Change(cause, what, fix, replace(now, scheduler=kind.from_config(config, **changed)))


def _schedules(now: Conventions) -> Iterator[Change]:
    config = now.scheduler.config
    if any(key not in config for key in ("beta_start", "beta_end", "beta_schedule")):
        return
    for name, timesteps, start, end, shape in _SCHEDULES:
        wanted: dict[str, Any] = {"num_train_timesteps": timesteps, "beta_schedule": shape}
        if shape != "squaredcos_cap_v2":  # which has no use for them
            wanted |= {"beta_start": start, "beta_end": end}
        if all(config[key] == value for key, value in wanted.items()) and config.get("trained_betas") is None:
            continue
        if now.steps > timesteps:
            continue
        if config.get("trained_betas") is not None:
            wanted["trained_betas"] = None
        also = "" if timesteps == config["num_train_timesteps"] else f' and "num_train_timesteps": {timesteps} '
        extra = also and (
            f",{also}into unet/config.json (there, in its conversion, too; a packed network keeps its own copy, so "
            "change the unpacked one and pack it again)"
        )
        betas = shape if shape == "squaredcos_cap_v2" else f"{start:g} to {end:g} {shape}"
        yield _scheduled(SCHEDULE, f"betas {betas}, {timesteps} timesteps: {name}", now, extra, **wanted)


def _residuals(now: Conventions) -> Iterator[Change]:
    where = "in model_index.json, or SuperResolutionPipeline(..., residual_scale=...)"
    wide, clip = now, ""
    if now.scheduler.config.get("clip_sample") and now.scheduler.config.get("clip_sample_range", 1.0) < _UNCLIPPED / 2:
        wide = _scheduled(RESIDUAL, "", now, clip_sample_range=_UNCLIPPED).how
        clip = f', and "clip_sample_range": {_UNCLIPPED:g} in scheduler/scheduler_config.json'
    if now.residual_scale is not None:
        strength = "" if now.residual_strength == 1 else " and residual_strength to 1"
        fix = f"the network gives pictures, not residuals: set residual_scale to null{strength} {where}."
        yield Change(RESIDUAL, "residual_scale null", fix, replace(now, residual_scale=None))
    fix = (
        "the network gives residuals: set residual_scale to about {found:.3g} "
        f"{where}{clip}; the exact number is in the recipe.yaml of the training's run."
    )
    yield Change(RESIDUAL, "residuals, of a scale that fits", fix, wide, fits_residual=True)


def _clippings(now: Conventions) -> Iterator[Change]:
    config = now.scheduler.config
    if "clip_sample" not in config:
        return
    if config["clip_sample"]:
        yield _scheduled(CLIPPING, "clip_sample off", now, clip_sample=False)
    else:
        yield _scheduled(CLIPPING, "clip_sample on, to 1", now, clip_sample=True, clip_sample_range=1.0)


def _signs(now: Conventions, signs: set[str], packed: bool) -> Iterator[Change]:
    if packed and "zero" in signs:
        fix = (
            "the network needs sign(0) = 0, which its bits cannot hold: run it unpacked, with --no-pack or "
            "from_pretrained(..., pack=False)."
        )
        yield Change(SIGN, "not packed, sign(0) = 0", fix, now, sign_zero="zero")
    for zero, other in (("zero", "plus"), ("plus", "zero")):
        if other in signs and zero not in signs and not (packed and zero == "plus"):
            value = 0 if zero == "zero" else 1
            fix = (
                f'the network was trained with sign(0) = {value}: put "sign_zero": "{zero}" into the method of the '
                "conversion in unet/config.json, or load_official(..., sign_zero=" + f'"{zero}")'
            )
            fix += ", and run it unpacked: --no-pack." if zero == "zero" else "."
            yield Change(SIGN, f"sign(0) = {value}", fix, now, sign_zero=zero)
