"""`doctor`: run a model on a picture of which the original is known, change one thing at a time, name what helps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from binarize.conversion.packing import is_packed, pack_if_possible, unpack
from binarize.diagnosis.changes import SCHEDULE, STEPS, Change, changes
from binarize.diagnosis.files import misfits
from binarize.diagnosis.report import HEALTHY, MISFIT, UNTRAINED, WEAK, DoctorReport, Finding, Trial
from binarize.diagnosis.sampling import (
    Case,
    Conventions,
    diffuse,
    make_case,
    pixels_of,
    sign_of_zero,
    signs_of_zero,
)
from binarize.errors import BinarizeError
from binarize.evaluation.quality import psnr
from binarize.imaging import upscale_bicubic
from binarize.models import SuperResolutionPipeline
from binarize.models.checks import OtherTimestepsError
from binarize.models.target import image_of

TRIAL_STEPS = 10
"""Denoising steps of a trial; all of a slow model's steps for each would take too long."""
_CLEAR, _ALIKE = 0.5, 1.0  # dB: what counts as an improvement, and what is no difference between two of them
_JUMP, _NEAR = 3.0, 3.0  # dB: an improvement that tells even if the result stays that little short of bicubic
_RELATED = 0.3  # correlation with the true residual from which a network is taken to predict residuals
_SAME_SCALE = 3.0  # factor within which a residual scale that fits is taken for the one that is set


def doctor(
    model: str | PathLike[str] | SuperResolutionPipeline,
    *,
    scale: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    try_all: bool = False,
    advance: Callable[[str], object] = lambda what: None,
) -> DoctorReport:
    """Enlarge a photograph that comes with the package, compare with bicubic, and find out what is wrong.

    The model is run as `binarize upscale` runs it, packed on a CPU. Where it is worse than bicubic, the likely mistakes
    are tried one at a time: prediction type, noise schedule, value range, order of condition and noisy picture,
    residual target, clipping, timestep spacing, number of steps, and the sign of zero. The one with which the result
    becomes clearly better is the likely cause.

    Args:
        model: A pipeline, or whatever the command line takes for a model: a folder, a file, or a name on the hub.
        scale: How many times it enlarges, for models that do not say it.
        steps: Denoising steps; by default the model's own. Trials take 10 at most, except those of more steps.
        seed: Decides the noise.
        device: Where to compute. A pipeline that is given stays on its own device.
        try_all: Try the changes even if the model is better than bicubic.
        advance: Called with what is tried next.

    Raises:
        BinarizeError: If the model is not there or cannot be read for another reason than a configuration that does
            not fit its weights; or an option is out of range.
    """
    name = type(model).__name__ if isinstance(model, SuperResolutionPipeline) else str(model)
    try:
        pipeline = model if isinstance(model, SuperResolutionPipeline) else _load(Path(model), scale, device)
    except _Misfit as error:
        fix = "use the config.json that was saved with these weights, or the weights that belong to it."
        return DoctorReport(name, Finding(MISFIT, f"the configuration does not fit the weights: {error}", fix))
    except OtherTimestepsError as error:
        words = f"the noise schedule has {error.scheduled} timesteps, and the network was trained with {error.trained}."
        fix = (
            f'put "num_train_timesteps": {error.trained} and the betas of the training into '
            "scheduler/scheduler_config.json."
        )
        return DoctorReport(name, Finding(SCHEDULE, words, fix))
    floats = pipeline.unet
    running, packed = _as_upscale_runs_it(floats)
    asked = pipeline.num_inference_steps if steps is None else steps
    case = make_case(pipeline.scale, pipeline.size_multiple, seed)
    bicubic = psnr(upscale_bicubic(case.low, pipeline.scale), case.original, border=pipeline.scale)
    advance("the model as it is")
    before = _as_it_is(pipeline, running, case, asked, seed)
    healthy = before > bicubic
    trials: list[Trial] = []
    if not healthy or try_all:
        own = type(pipeline.scheduler).from_config(pipeline.scheduler.config)  # the pipeline's keeps its place
        strength = pipeline.config["residual_strength"]
        now = Conventions(own, min(asked, TRIAL_STEPS), pipeline.residual_scale, strength)
        signs = set() if is_packed(floats) else signs_of_zero(floats)
        for change in changes(now, asked, signs, packed):
            advance(change.what)
            trials.append(_try(change, floats if change.sign_zero else running, case, pipeline.scale))
    finding = _verdict(before, bicubic, trials, floats, min(asked, TRIAL_STEPS))
    return DoctorReport(name, finding, pipeline.scale, asked, before, bicubic, tuple(trials))


class _Misfit(Exception):
    """Configuration and weights do not belong together."""


def _load(path: Path, scale: int | None, device: torch.device | str) -> SuperResolutionPipeline:
    from binarize.models.loading import load_pipeline, locate

    path = locate(path)
    found = misfits(path / "unet" if (path / "unet").is_dir() else path) if path.is_dir() else None
    if found is not None:
        raise _Misfit(found)
    try:
        pipeline = load_pipeline(path, scale=scale)
    except BinarizeError as error:
        if "does not fit the configuration" in str(error):
            raise _Misfit(str(error)) from error
        raise
    if torch.device(device).type != "cpu":
        if is_packed(pipeline.unet):
            unpack(pipeline.unet)
        pipeline.to(device)
    return pipeline


def _as_upscale_runs_it(floats: nn.Module) -> tuple[nn.Module, bool]:
    """Return the network, packed where it can be, and whether it is; what was given stays as it is."""
    if is_packed(floats):
        return floats, True
    copied = copy.deepcopy(floats)
    return (copied, True) if pack_if_possible(copied) else (floats, False)


def _as_it_is(pipeline: SuperResolutionPipeline, unet: nn.Module, case: Case, steps: int, seed: int) -> float:
    """Return the model's PSNR by the pipeline itself, so that nothing here can differ from what a user gets."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    twin = SuperResolutionPipeline(unet, scheduler, scale=pipeline.scale, residual_scale=pipeline.residual_factor)
    twin.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    picture = twin(case.low, num_inference_steps=steps, generator=generator, output_type="pt", return_dict=False)[0]
    return psnr(pixels_of(picture, signed=False), case.original, border=pipeline.scale)


def _try(change: Change, unet: nn.Module, case: Case, scale: int) -> Trial:
    fix, how = change.fix, change.how
    with nullcontext() if change.sign_zero is None else sign_of_zero(unet, change.sign_zero):
        x, condition = diffuse(unet, how, case)
    residual_scale = how.residual_scale
    if change.fits_residual:
        found = _residual_scale(x * how.residual_strength, condition, case)
        if found is None or (residual_scale is not None and 1 / _SAME_SCALE < found / residual_scale < _SAME_SCALE):
            return Trial(change.cause, change.what, "", how.steps, None)
        residual_scale, fix = found, fix.format(found=found)
    factor = None if residual_scale is None else residual_scale * how.residual_strength
    picture = pixels_of(image_of(x, condition, factor), how.signed)
    score = psnr(picture, case.original, border=scale) if torch.isfinite(x).all() else None
    return Trial(change.cause, change.what, fix, how.steps, score)


def _residual_scale(x: Tensor, condition: Tensor, case: Case) -> float | None:
    """Return by what x must be multiplied to come nearest to the true residual; None if it has little to do with it."""
    residual = (case.original[None].to(x) / 255 - condition).double()
    x = x.double()
    product, power = (residual * x).sum(), x.square().sum()
    related = product / (power * residual.square().sum()).sqrt()
    return float(product / power) if related > _RELATED else None


def _verdict(before: float, bicubic: float, trials: Sequence[Trial], unet: nn.Module, trial_steps: int) -> Finding:
    if before > bicubic:
        words = f"{before - bicubic:.2f} dB better than bicubic enlargement on the embedded picture."
        return Finding(HEALTHY, words)
    # Trials of fewer steps than the model takes are measured against the same few without a change.
    fewer = [t.psnr for t in trials if t.cause == STEPS and t.steps == trial_steps and t.psnr is not None]
    few = max([before, *fewer])
    gains = [
        (trial, trial.psnr, trial.psnr - (before if trial.cause == STEPS else few))
        for trial in trials
        if trial.psnr is not None
    ]
    better = [(trial, score) for trial, score, gain in gains if gain >= _CLEAR and score > bicubic]
    if better:
        best = max(score for _, score in better)
        cause, score = next((trial, score) for trial, score in better if score >= best - _ALIKE)
        words = f"with {cause.change} it is {score - before:.2f} dB better, {score - bicubic:+.2f} dB to bicubic."
        return Finding(cause.cause, words, cause.fix)
    near = [(trial, score) for trial, score, gain in gains if gain >= _JUMP and score > bicubic - _NEAR]
    if near:
        cause, score = max(near, key=lambda one: one[1])
        words = (
            f"with {cause.change} it is {score - before:.2f} dB better, if still {bicubic - score:.2f} dB short of "
            "bicubic: beyond that, the network is trained too little."
        )
        return Finding(cause.cause, words, cause.fix)
    return _of_the_network(before, bicubic, unet)


def _of_the_network(before: float, bicubic: float, unet: nn.Module) -> Finding:
    """Say what it is if no change helps."""
    norms: list[Any] = [module for module in unet.modules() if isinstance(module, nn.GroupNorm) and module.affine]
    initial = [bool((norm.weight == 1).all()) and bool((norm.bias == 0).all()) for norm in norms]
    if norms and all(initial):
        words = f"no change helps, and all {len(norms)} norms have the weights 1 and 0 that a new network starts with."
        return Finding(UNTRAINED, words, "train it, or load the trained weights before saving or sampling.")
    if bicubic - before <= _NEAR:
        words = (
            f"no change helps: the network is {bicubic - before:.2f} dB short of bicubic. It is trained too little, or "
            "for looks rather than for PSNR, which fine invented texture lowers."
        )
        return Finding(WEAK, words, "train longer; to judge looks, measure LPIPS with `binarize evaluate`.")
    words = (
        "no change helps: hardly trained, weights of another network, or a convention that is not tried here. "
        "The network's answer has little to do with the picture."
    )
    return Finding(UNTRAINED, words, "look whether the training's loss fell, and whether these are its last weights.")
