"""What the pipeline refuses, each with one sentence that says what is allowed and how to put it right."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from binarize.errors import BinarizeError, did_you_mean
from binarize.imaging import DecodedImage

OUTPUT_TYPES = ("pil", "np", "pt")


class OtherTimestepsError(BinarizeError):
    """A scheduler has another number of training timesteps than the network.

    Attributes:
        trained: Those of the network.
        scheduled: Those of the scheduler; None if it does not say.
    """

    def __init__(self, message: str, trained: int, scheduled: int | None) -> None:
        super().__init__(message)
        self.trained, self.scheduled = trained, scheduled


def check_scale(scale: Any) -> int:
    """Return the scale as Python's integer; refuse one that is missing or no whole number of at least 1."""
    if not _at_least_one(scale):
        raise BinarizeError(
            f"scale={scale!r}: a pipeline needs the whole number, 1 or more, by which its network upscales; "
            "pass the one it was trained for, such as scale=4."
        )
    return int(scale)


def check_residual_scale(residual_scale: Any) -> None:
    """Refuse anything but a positive number or None."""
    if residual_scale is not None and (not isinstance(residual_scale, (int, float)) or not residual_scale > 0):
        raise BinarizeError(
            f"residual_scale={residual_scale!r}: it is the standard deviation that residuals were divided by, a "
            "positive number, or None for a network that was trained on images."
        )


def check_residual_strength(strength: Any, residual_scale: float | None) -> None:
    """Refuse anything but a positive number, and anything but 1 for networks of images."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not strength > 0:
        raise BinarizeError(
            f"residual_strength={strength!r}: it is what predicted residuals are multiplied by, a positive number; 1 "
            "leaves them as they are."
        )
    if strength != 1 and residual_scale is None:
        raise BinarizeError(
            f"residual_strength={strength!r} without a residual_scale: the network gives images, which are not "
            "multiplied; leave it at 1."
        )


def check_scheduler(unet: nn.Module, scheduler: Any) -> None:
    """Refuse a scheduler of another kind, or of another number of training timesteps than the network says it has."""
    if not all(hasattr(scheduler, name) for name in ("scale_model_input", "init_noise_sigma", "step")):
        raise BinarizeError(
            f"{type(scheduler).__name__} is no scheduler for noise prediction over discrete timesteps; allowed: those "
            "of diffusers with step, scale_model_input and init_noise_sigma, such as DDIMScheduler, "
            "DPMSolverMultistepScheduler or EulerDiscreteScheduler."
        )
    trained = getattr(getattr(unet, "config", None), "num_train_timesteps", None)
    scheduled = getattr(scheduler.config, "num_train_timesteps", None)
    if trained is not None and trained != scheduled:
        raise OtherTimestepsError(
            f"the network was trained with {trained} timesteps, but {type(scheduler).__name__} has "
            f"num_train_timesteps={scheduled}; make the scheduler with num_train_timesteps={trained} and the betas of "
            f"the training, for instance by {type(scheduler).__name__}.from_config(pipe.scheduler.config).",
            trained,
            scheduled,
        )


def check_numbers(scheduler: Any, num_inference_steps: Any, batch_size: Any, eta: float) -> None:
    """Refuse steps and batch sizes out of range, and an eta that the scheduler would ignore."""
    most = scheduler.config.num_train_timesteps
    if not _at_least_one(num_inference_steps) or num_inference_steps > most:
        raise BinarizeError(
            f"num_inference_steps={num_inference_steps!r}; allowed: a whole number from 1 to the scheduler's "
            f"{most} training timesteps."
        )
    if not _at_least_one(batch_size):
        raise BinarizeError(f"batch_size={batch_size!r}; allowed: a whole number of at least 1.")
    if eta != 0 and "eta" not in step_parameters(scheduler):
        raise BinarizeError(
            f"eta={eta!r}: {type(scheduler).__name__} takes no eta; leave it at 0, or use DDIMScheduler."
        )
    if not 0 <= eta <= 1:
        raise BinarizeError(f"eta={eta!r}; allowed: from 0, deterministic, to 1, as much noise as DDPM.")


def check_output_type(output_type: object) -> None:
    """Refuse an output type other than "pil", "np" and "pt"."""
    if output_type not in OUTPUT_TYPES:
        options = ", ".join(repr(option) for option in OUTPUT_TYPES)
        raise BinarizeError(
            f"unknown output_type {output_type!r}; options: {options}.{did_you_mean(str(output_type), OUTPUT_TYPES)}"
        )


def check_callback_inputs(names: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse tensors that a callback cannot be given."""
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise BinarizeError(f"callback_on_step_end_tensor_inputs has {unknown}; allowed: {list(allowed)}.")


def one_each(generator: Any, sources: Sequence[DecodedImage]) -> list[Any]:
    """Return a generator, or None, for each image."""
    several = isinstance(generator, (list, tuple))
    each = list(generator) if several else [generator] * len(sources)
    wrong = [one for one in each if not isinstance(one, torch.Generator) and (several or one is not None)]
    if wrong:
        raise BinarizeError(
            f"generator holds {wrong[0]!r}; allowed: None, a torch.Generator, or a list with one for each image. "
            "For a seed, pass torch.Generator().manual_seed(SEED)."
        )
    if len(each) != len(sources):
        raise BinarizeError(
            f"{len(each)} generators for {len(sources)} images; pass one for each, or a single one for all."
        )
    return each


def split_latents(
    latents: Tensor | Sequence[Tensor] | None, sources: Sequence[DecodedImage], scale: int
) -> list[Tensor | None]:
    """Return the given noise image by image, (1, 3, H, W) each, or None for each."""
    if latents is None:
        return [None] * len(sources)
    given = list(latents)
    if not all(isinstance(noise, Tensor) for noise in given):
        raise BinarizeError(f"latents hold a {type(given[0]).__name__}; allowed: a tensor, or a list of tensors.")
    wanted = [(3, *(scale * side for side in source.rgb.shape[-2:])) for source in sources]
    shapes = [tuple(noise.shape) for noise in given]
    if shapes != wanted:
        raise BinarizeError(
            f"latents have the shapes {shapes}; needed: {wanted}, one for each image, {scale} times its size. "
            "Pass a batch (B, 3, H, W), or a list where sizes differ."
        )
    return [noise[None] for noise in given]


def step_parameters(scheduler: Any) -> frozenset[str]:
    """Return the names of what the scheduler's ``step`` takes."""
    return frozenset(inspect.signature(scheduler.step).parameters)


def _at_least_one(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 1
