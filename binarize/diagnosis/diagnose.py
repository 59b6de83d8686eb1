"""`doctor`: compare a model with bicubic upscaling, change one setting at a time, and name the one that helps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from binarize.conversion.packing import is_packed, pack_if_possible, unpack
from binarize.diagnosis import sampling
from binarize.diagnosis.changes import SCHEDULE, STEPS, Change, changes
from binarize.diagnosis.files import find_mismatch
from binarize.diagnosis.report import HEALTHY, MISMATCH, UNTRAINED, WEAK, ChangeResult, DoctorReport, Finding
from binarize.diagnosis.sampling import Case, Conventions
from binarize.errors import BinarizeError
from binarize.evaluation.quality import psnr
from binarize.imaging import upscale_bicubic
from binarize.models.checks import OtherTimestepsError
from binarize.models.loading import load_pipeline
from binarize.models.location import locate
from binarize.models.pipeline import SuperResolutionPipeline
from binarize.models.target import image_of

MAX_STEPS = 10
"""Denoising steps of a changed model at most; a slow model's own steps would take too long."""
_CLEAR, _EQUAL = 0.5, 1.0  # dB: the least improvement, and the difference at which two of them count as equal
_LARGE, _NEAR = 3.0, 3.0  # dB: an improvement that counts even if the result is this far below bicubic
_CORRELATED = 0.3  # correlation with the true residual from which a network is taken to predict residuals
_SAME_SCALE = 3.0  # factor within which an estimated residual scale confirms the one that is set


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
    """Upscale an image that comes with the package, compare with bicubic upscaling, and find out what is wrong.

    The model runs as in `binarize upscale`, packed on a CPU. If it is worse than bicubic, the likely mistakes are tried
    one at a time. The one whose correction clearly improves the result is the likely cause.

    `model` is a pipeline, which stays on its own device, or a model as on the command line. Changes are tried with at
    most 10 denoising steps, unless they change them, and on a model that is better than bicubic only with `try_all`.
    `advance` is called with the name of each change before it is tried.
    """
    if not isinstance(model, str | PathLike | SuperResolutionPipeline):
        fix = "SuperResolutionPipeline(network, scale=...) makes one of a network"
        raise BinarizeError(f"doctor: takes a pipeline or a model's folder; got {type(model).__name__}. {fix}.")
    if not 0 <= seed < 2**63:
        raise BinarizeError(f"doctor: seed={seed}; allowed: 0 to 2**63 - 1.")
    name = type(model).__name__ if isinstance(model, SuperResolutionPipeline) else str(model)
    pipeline = model if isinstance(model, SuperResolutionPipeline) else _load(Path(model), scale, device)
    if isinstance(pipeline, Finding):
        return DoctorReport(name, pipeline)
    unpacked = pipeline.unet
    running, packed = _pack_as_upscale_does(unpacked)
    model_steps = pipeline.num_inference_steps if steps is None else steps
    few = min(model_steps, MAX_STEPS)
    case = sampling.make_case(pipeline.scale, pipeline.size_multiple, seed)
    bicubic = psnr(upscale_bicubic(case.low, pipeline.scale), case.original, border=pipeline.scale)
    advance("unchanged")
    before = _run_unchanged(pipeline, running, case, model_steps, seed)
    results: list[ChangeResult] = []
    if before <= bicubic or try_all:
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)  # the pipeline's keeps its state
        now = Conventions(scheduler, few, pipeline.residual_scale, pipeline.config["residual_strength"])
        signs = set() if is_packed(unpacked) else sampling.signs_of_zero(unpacked)
        for change in changes(now, model_steps, signs, packed):
            advance(change.name)
            results.append(_try(change, unpacked if change.sign_zero else running, case, pipeline.scale))
    finding = _verdict(before, bicubic, results, few) or _judge_network(before, bicubic, unpacked)
    return DoctorReport(name, finding, pipeline.scale, model_steps, before, bicubic, tuple(results))


def _load(path: Path, scale: int | None, device: torch.device | str) -> SuperResolutionPipeline | Finding:
    """Load a model; return a finding if its configuration does not fit its weights or its schedule."""
    path = locate(path)
    mismatch = find_mismatch(path / "unet" if (path / "unet").is_dir() else path) if path.is_dir() else None
    try:
        pipeline = None if mismatch is not None else load_pipeline(path, scale=scale)
    except OtherTimestepsError as error:
        found = f"the noise schedule has {error.scheduled} timesteps, and the network was trained with {error.trained}."
        keys = f'"num_train_timesteps": {error.trained} and the betas of the training'
        return Finding(SCHEDULE, found, f"put {keys} into scheduler/scheduler_config.json.")
    except BinarizeError as error:
        if "does not fit the configuration" not in str(error):
            raise
        pipeline, mismatch = None, str(error)
    if pipeline is None:
        fix = "use the config.json that was saved with these weights, or the weights that belong to it."
        return Finding(MISMATCH, f"the configuration does not fit the weights: {mismatch}", fix)
    if torch.device(device).type != "cpu":
        if is_packed(pipeline.unet):
            unpack(pipeline.unet)
        pipeline.to(device)
    return pipeline


def _pack_as_upscale_does(unet: nn.Module) -> tuple[nn.Module, bool]:
    """Return the network, as a packed copy if possible, and whether it is packed."""
    if is_packed(unet):
        return unet, True
    copied = copy.deepcopy(unet)
    return (copied, True) if pack_if_possible(copied) else (unet, False)


def _run_unchanged(pipeline: SuperResolutionPipeline, unet: nn.Module, case: Case, steps: int, seed: int) -> float:
    """Return the PSNR of the model, sampled by the pipeline itself."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    twin = SuperResolutionPipeline(unet, scheduler, scale=pipeline.scale, residual_scale=pipeline.residual_factor)
    twin.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    image = twin(case.low, num_inference_steps=steps, generator=generator, output_type="pt", return_dict=False)[0]
    return psnr(sampling.pixels_of(image, signed=False), case.original, border=pipeline.scale)


def _try(change: Change, unet: nn.Module, case: Case, scale: int) -> ChangeResult:
    fix, how = change.fix, change.how
    with sampling.with_sign_of_zero(unet, change.sign_zero):
        x, condition = sampling.diffuse(unet, how, case)
    residual_scale = how.residual_scale
    if change.fits_residual:
        found = _estimate_residual_scale(x * how.residual_strength, condition, case)
        if found is None or (residual_scale is not None and 1 / _SAME_SCALE < found / residual_scale < _SAME_SCALE):
            return ChangeResult(change.cause, change.name, "", how.steps, None)
        residual_scale, fix = found, fix.format(found=found)
    factor = None if residual_scale is None else residual_scale * how.residual_strength
    image = sampling.pixels_of(image_of(x, condition, factor), how.signed)
    score = psnr(image, case.original, border=scale) if torch.isfinite(x).all() else None
    return ChangeResult(change.cause, change.name, fix, how.steps, score)


def _estimate_residual_scale(x: Tensor, condition: Tensor, case: Case) -> float | None:
    """Return the factor that brings x nearest to the true residual, or None if the two are hardly correlated."""
    residual = (case.original[None].to(x) / 255 - condition).double()
    x = x.double()
    product, power = (residual * x).sum(), x.square().sum()
    correlation = product / (power * residual.square().sum()).sqrt()
    return float(product / power) if correlation > _CORRELATED else None


def _verdict(before: float, bicubic: float, results: Sequence[ChangeResult], few: int) -> Finding | None:
    """Return the finding of a healthy model or of a change that helps."""
    if before > bicubic:
        return Finding(HEALTHY, f"{before - bicubic:.2f} dB better than bicubic upscaling on the embedded image.")
    scored = [(result, result.psnr) for result in results if result.psnr is not None]
    # Compare changes with the unchanged model at the same number of steps, if it takes more than they do.
    with_few = max([before, *(score for one, score in scored if one.cause == STEPS and one.steps == few)])
    gains = [(one, score, score - (before if one.cause == STEPS else with_few)) for one, score in scored]
    better = [(one, score) for one, score, gain in gains if gain >= _CLEAR and score > bicubic]
    if better:
        best = max(score for _, score in better)
        result, score = next((one, score) for one, score in better if score >= best - _EQUAL)
        gain = f"with {result.change} it is {score - before:.2f} dB better, {score - bicubic:+.2f} dB to bicubic."
        return Finding(result.cause, gain, result.fix)
    near = [(one, score) for one, score, gain in gains if gain >= _LARGE and score > bicubic - _NEAR]
    if near:
        result, score = max(near, key=lambda pair: pair[1])
        below = f"but still {bicubic - score:.2f} dB below bicubic: the network also needs more training."
        return Finding(result.cause, f"with {result.change} it is {score - before:.2f} dB better, {below}", result.fix)
    return None


def _judge_network(before: float, bicubic: float, unet: nn.Module) -> Finding:
    """Return the finding if no change helps."""
    norms: list[Any] = [module for module in unet.modules() if isinstance(module, nn.GroupNorm) and module.affine]
    if norms and all(bool((norm.weight == 1).all()) and bool((norm.bias == 0).all()) for norm in norms):
        explanation = f"no change helps, and all {len(norms)} norms have the weights 1 and 0 of a new network."
        return Finding(UNTRAINED, explanation, "train it, or load the trained weights before saving or sampling.")
    if bicubic - before <= _NEAR:
        loss = f"no change helps: the network is {bicubic - before:.2f} dB below bicubic"
        explanation = f"{loss}. It is trained too little, or for perceptual quality, which lowers PSNR."
        return Finding(WEAK, explanation, "train longer; for perceptual quality, measure LPIPS: `binarize evaluate`.")
    explanation = "no change helps: the network is hardly trained, has other weights, or follows an untried convention."
    return Finding(UNTRAINED, explanation, "check that the training's loss fell, and that these are its last weights.")
