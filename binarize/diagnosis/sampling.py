"""The pipeline's sampling with every convention a parameter, on a picture of which the original is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from binarize.imaging import degrade, read_image, upscale_bicubic
from binarize.timestep import TimestepContext

PICTURE = Path(__file__).with_name("picture.png")
"""128 x 128 pixels of a photograph by NASA, in the public domain."""


@dataclass(frozen=True)
class Conventions:
    """What a network and those who sample from it must agree about.

    Attributes:
        scheduler: One of diffusers', with the betas, the prediction type, the clipping and the spacing.
        steps: Denoising steps.
        residual_scale: As the pipeline's.
        residual_strength: As the pipeline's.
        signed: Pictures live in [-1, 1] rather than [0, 1].
        sample_first: The noisy picture comes before the condition in the network's input channels.
    """

    scheduler: Any
    steps: int
    residual_scale: float | None = None
    residual_strength: float = 1.0
    signed: bool = False
    sample_first: bool = False


@dataclass(frozen=True)
class Case:
    """The embedded picture.

    Attributes:
        original: uint8 (3, H, W).
        low: uint8 (3, H / scale, W / scale).
        condition: float32 (1, 3, H, W), the enlarged ``low`` as the pipeline makes it, in [0, 1].
        noise: float32 (1, 3, H, W), unit Gaussian, what the pipeline draws from ``seed``.
    """

    original: Tensor
    low: Tensor
    condition: Tensor
    noise: Tensor


def make_case(scale: int, multiple: int, seed: int) -> Case:
    """Return the embedded picture, cut so that ``scale`` and the network's ``multiple`` divide its sides."""
    original = read_image(PICTURE).pixels()
    step = int(torch.lcm(torch.tensor(scale), torch.tensor(multiple)))
    side = original.shape[-1] // step * step if step <= original.shape[-1] else original.shape[-1] // scale * scale
    original = original[:, :side, :side].contiguous()
    low = degrade(original, scale)
    condition = upscale_bicubic(low[None].float() / 255, scale)
    noise = torch.randn(condition.shape, generator=torch.Generator().manual_seed(seed))
    return Case(original, low, condition, noise)


@torch.no_grad()
def diffuse(unet: nn.Module, how: Conventions, case: Case) -> tuple[Tensor, Tensor]:
    """Return x_0 as the network makes it, and the condition that it saw; (1, 3, H, W) each, in the network's range."""
    device, dtype = next(iter(unet.parameters()), case.noise).device, getattr(unet, "dtype", torch.float32)
    condition = (case.condition * 2 - 1 if how.signed else case.condition).to(device)
    scheduler = how.scheduler
    scheduler.set_timesteps(how.steps, device=device)
    x = case.noise.to(device) * scheduler.init_noise_sigma
    with _trained_with(unet, scheduler.config.num_train_timesteps), _evaluating(unet):
        for timestep in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, timestep)
            first, second = (condition, seen) if how.sample_first else (seen, condition)
            prediction = unet(first.to(dtype), timestep, second.to(dtype)).sample.to(x.dtype)
            x = scheduler.step(prediction, timestep, x).prev_sample
    return x, condition


def pixels_of(picture: Tensor, signed: bool) -> Tensor:
    """Return a picture in the network's range, (1, 3, H, W), as uint8 (3, H, W)."""
    unit = (picture[0] + 1) / 2 if signed else picture[0]
    return (unit.clamp(0, 1) * 255 + 0.5).floor().to(torch.uint8).cpu()


@contextmanager
def _evaluating(unet: nn.Module) -> Iterator[None]:
    training = [module for module in unet.modules() if module.training]
    unet.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _trained_with(unet: nn.Module, timesteps: int) -> Iterator[None]:
    """Let timestep-aware layers count their groups over another number of training timesteps."""
    hooks = [hook for module in unet.modules() for hook in module._forward_pre_hooks.values()]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    contexts = {id(owner): owner for owner in owners if isinstance(owner, TimestepContext)}.values()
    before = [context.num_train_timesteps for context in contexts]
    for context in contexts:
        context.num_train_timesteps = timesteps
    try:
        yield
    finally:
        for context, number in zip(contexts, before, strict=True):
            context.num_train_timesteps = number


@contextmanager
def sign_of_zero(unet: nn.Module, zero: str) -> Iterator[None]:
    """Let every sign in a network give ``zero`` ("plus" or "zero") for 0."""
    signs: list[Any] = [module for module in unet.modules() if "sign_zero" in vars(module)]
    before = [module.sign_zero for module in signs]
    for module in signs:
        module.sign_zero = zero
    try:
        yield
    finally:
        for module, value in zip(signs, before, strict=True):
            module.sign_zero = value


def signs_of_zero(unet: nn.Module) -> set[str]:
    """Return what the signs of a network give for 0; nothing where it has no signs, or packed ones."""
    return {str(module.sign_zero) for module in unet.modules() if "sign_zero" in vars(module)}
