"""Checks of the pipeline's arguments."""

import inspect
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from binarize.conversion.record import conversion, is_converted
from binarize.errors import BinarizeError, did_you_mean
from binarize.imaging import DecodedImage
from binarize.models.sampling import check_samples

MAX_SCALE = 64
OUTPUT_TYPES = ("pil", "np", "pt")


class OtherTimestepsError(BinarizeError):
    """The scheduler's number of training timesteps, which can be None, is not the network's."""

    def __init__(self, message: str, trained: int, scheduled: int | None) -> None:
        super().__init__(message)
        self.trained, self.scheduled = trained, scheduled


class NotFiniteError(BinarizeError):
    """A network or its noise schedule does not give numbers that make an image."""


_LARGEST = 1e6  # unit noise and images in [0, 1], predicted or scaled by a scheduler, stay far below
_LARGEST_WEIGHT = 1e12
_DAMAGED = "The likely cause is a damaged file; export, download or copy the model again."


def check_prediction(largest: float, name: str | None, dtype: torch.dtype) -> None:
    """Raise NotFiniteError if the largest magnitude of a network's predictions and of their sum is not plausible."""
    if not largest <= _LARGEST:  # also if it is NaN
        what = f"the network or its noise schedule gives values up to {largest:g}, which are no image"
        half = " Or float16 overflowed: use bfloat16 or float32." if dtype == torch.float16 else ""
        raise NotFiniteError(f"{name or 'the model'}: {what}. {_DAMAGED}{half}")


def check_weights(network: nn.Module, name: str) -> None:
    """Raise NotFiniteError for the first tensor with values that are not finite, or beyond 1e12."""
    for key, tensor in (*network.named_parameters(), *network.named_buffers()):  # not bits, which are converted
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta":
            low, high = (float(value) for value in torch.aminmax(tensor.detach()))
            if not max(-low, high) <= _LARGEST_WEIGHT:
                raise NotFiniteError(f"{name}: the tensor {key} has values from {low:g} to {high:g}. {_DAMAGED}")


def is_whole(number: object, least: int = 1) -> bool:
    """Return True for an integer (of Python or numpy, not a bool) of at least ``least``."""
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= least


def _is_positive(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and number > 0


def check_overshoot(overshoot: Any) -> None:
    """Raise BinarizeError unless the share of the local range by which results may leave it is a number of 0 to 1."""
    if overshoot is not None and not (overshoot == 0 or (_is_positive(overshoot) and overshoot <= 1)):
        what = "pass the share of the local range by which results may leave it, 0 to 1, or None for no limit."
        raise BinarizeError(f"overshoot={overshoot!r}: {what}")


def check_scales(scale: Any, residual_scale: Any, residual_strength: Any) -> None:
    """Raise BinarizeError unless the scale is an integer from 1 to 64 and the residual's numbers fit together."""
    if not is_whole(scale) or int(scale) > MAX_SCALE:
        raise BinarizeError(
            f"scale={scale!r:.40}: a pipeline needs the whole number, from 1 to {MAX_SCALE}, by which it upscales, as "
            "in scale=4."
        )
    if residual_scale is not None and not _is_positive(residual_scale):
        raise BinarizeError(
            f"residual_scale={residual_scale!r}: pass the standard deviation that residuals were divided by in "
            "training, a positive number, or None for a network that predicts images."
        )
    if not _is_positive(residual_strength):
        raise BinarizeError(f"residual_strength={residual_strength!r}: pass a positive number; 1 changes nothing.")
    if residual_strength != 1 and residual_scale is None:
        fix = "leave it at 1 for a network that predicts images"
        raise BinarizeError(f"residual_strength={residual_strength!r} without a residual_scale: {fix}.")


def check_scheduler(unet: nn.Module, scheduler: Any) -> None:
    """Raise BinarizeError if the scheduler does not sample from noise over the network's discrete timesteps."""
    if not isinstance(unet, nn.Module):
        raise BinarizeError(f"unet={unet!r:.80}: pass a network, such as SRUNet() or binarize.load(folder).")
    kind = type(scheduler).__name__
    if not all(hasattr(scheduler, name) for name in ("scale_model_input", "init_noise_sigma", "step")):
        raise BinarizeError(
            f"{kind} is no scheduler for noise prediction over discrete timesteps; use one of diffusers' with step, "
            "scale_model_input and init_noise_sigma, such as DDIMScheduler or DPMSolverMultistepScheduler."
        )
    trained = getattr(getattr(unet, "config", None), "num_train_timesteps", None)
    if trained is None and is_converted(unet):
        trained = conversion(unet).num_train_timesteps
    scheduled = getattr(scheduler.config, "num_train_timesteps", None)
    if trained is not None and trained != scheduled:
        message = (
            f"the network was trained with {trained} timesteps, but {kind} has num_train_timesteps={scheduled}; make "
            f"the scheduler with num_train_timesteps={trained} and the betas of the training, for instance by "
            f"{kind}.from_config(pipe.scheduler.config)."
        )
        raise OtherTimestepsError(message, trained, scheduled)
    check_samples(scheduler)


def check_numbers(scheduler: Any, num_inference_steps: Any, batch_size: Any, eta: float) -> None:
    """Raise BinarizeError if a number is out of range, or the scheduler would ignore eta."""
    most, kind = scheduler.config.num_train_timesteps, type(scheduler).__name__
    steps, size = num_inference_steps, batch_size
    steps_allowed = f"a whole number from 1 to the scheduler's {most} training timesteps"
    for valid, message in (
        (is_whole(steps) and steps <= most, f"num_inference_steps={steps!r}; allowed: {steps_allowed}."),
        (is_whole(size), f"batch_size={size!r}; allowed: a whole number of at least 1."),
        (isinstance(eta, int | float), f"eta={eta!r:.40}; allowed: a number from 0 to 1."),
        (eta == 0 or "eta" in step_parameters(scheduler), f"eta={eta!r}: {kind} takes no eta; leave it at 0."),
        (
            isinstance(eta, int | float) and 0 <= eta <= 1,
            f"eta={eta!r}; allowed: from 0, deterministic, to 1, as much noise as DDPM.",
        ),
    ):
        if not valid:
            raise BinarizeError(message)


def check_output(output_type: object, callback: Any, callback_inputs: Any, allowed_inputs: Sequence[str]) -> None:
    """Raise BinarizeError if an output type is unknown, or a callback is none or asks for what it cannot have."""
    if output_type not in OUTPUT_TYPES:
        options = ", ".join(map(repr, OUTPUT_TYPES))
        hint = did_you_mean(str(output_type), OUTPUT_TYPES)
        raise BinarizeError(f"unknown output_type {output_type!r}; options: {options}.{hint}")
    if callback is not None and not callable(callback):
        raise BinarizeError(f"callback_on_step_end is {callback!r:.80}; pass a function, or None.")
    if not isinstance(callback_inputs, list | tuple):
        what = f"is {callback_inputs!r:.80}; pass a list, such as {list(allowed_inputs)}"
        raise BinarizeError(f"callback_on_step_end_tensor_inputs {what}.")
    if unknown := [name for name in callback_inputs if name not in allowed_inputs]:
        raise BinarizeError(f"callback_on_step_end_tensor_inputs has {unknown}; allowed: {list(allowed_inputs)}.")


def generator_per_image(generator: Any, sources: Sequence[object]) -> list[Any]:
    """Return a generator, or None, for each image."""
    several = isinstance(generator, list | tuple)
    generators = list(generator) if several else [generator] * len(sources)
    wrong = [g for g in generators if not isinstance(g, torch.Generator) and (several or g is not None)]
    if wrong:
        raise BinarizeError(
            f"generator holds {wrong[0]!r}; allowed: None, a torch.Generator, or a list with one for each image. "
            "For a seed, pass torch.Generator().manual_seed(SEED)."
        )
    if len(generators) != len(sources):
        raise BinarizeError(
            f"{len(generators)} generators for {len(sources)} images; pass one for each, or a single one for all."
        )
    return generators


def latents_per_image(
    latents: Tensor | Sequence[Tensor] | None, sources: Sequence[DecodedImage], scale: int
) -> list[Tensor | None]:
    """Return the given noise (1, 3, H, W), or None, for each image."""
    if latents is None:
        return [None] * len(sources)
    given: list[Any] = list(latents) if isinstance(latents, Tensor | list | tuple) else [latents]
    if not all(isinstance(noise, Tensor) for noise in given):
        raise BinarizeError(f"latents hold a {type(given[0]).__name__}; allowed: a tensor, or a list of tensors.")
    needed = [(3, *(scale * side for side in source.rgb.shape[-2:])) for source in sources]
    shapes = [tuple(noise.shape) for noise in given]
    if shapes != needed:
        raise BinarizeError(
            f"latents have the shapes {shapes}; needed: {needed}, one for each image, {scale} times its size. "
            "Pass a batch (B, 3, H, W), or a list if sizes differ."
        )
    return [noise[None] for noise in given]


def callback_latents(returned: Any, x: Tensor) -> Tensor:
    """Return the latents that a callback replaces x_t with, or x_t if it returns none."""
    if returned is None:
        return x
    found = returned.get("latents", x) if isinstance(returned, dict) else None
    if not isinstance(found, Tensor) or found.shape != x.shape:
        shape = f" with latents of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        allowed = f"None, or a dictionary whose latents are a tensor of shape {tuple(x.shape)}"
        raise BinarizeError(f"callback_on_step_end returned a {type(returned).__name__}{shape}; allowed: {allowed}.")
    return found


def step_parameters(scheduler: Any) -> frozenset[str]:
    """Return the names of the arguments of the scheduler's ``step``."""
    return frozenset(inspect.signature(scheduler.step).parameters)
