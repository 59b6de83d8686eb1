"""The pipeline's sampling with every convention as a parameter, on an embedded image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from binarize.imaging import degrade, read_image, upscale_bicubic
from binarize.timestep import TimestepContext

IMAGE = Path(__file__).with_name("picture.png")
"""128 x 128 pixels of a photograph by NASA, in the public domain."""


@dataclass(frozen=True)
class Conventions:
    """What a network and its sampler must agree on; see `SuperResolutionPipeline` for the residual."""

    scheduler: Any  # of diffusers, with the betas, the prediction type, the clipping and the spacing
    steps: int
    residual_scale: float | None = None
    residual_strength: float = 1.0
    signed: bool = False  # images are in [-1, 1], not in [0, 1]
    sample_first: bool = False  # the noisy image comes before the condition in the input channels


@dataclass(frozen=True)
class Case:
    """The embedded image, and the condition and the noise that the pipeline makes for it."""

    original: Tensor  # uint8 (3, H, W)
    low: Tensor  # uint8 (3, H / scale, W / scale)
    condition: Tensor  # float32 (1, 3, H, W) in [0, 1]
    noise: Tensor  # float32 (1, 3, H, W)


def make_case(scale: int, multiple: int, seed: int) -> Case:
    """Return the embedded image, cropped so that `scale` and the network's `multiple` divide its sides."""
    original = read_image(IMAGE).pixels()
    size, step = original.shape[-1], math.lcm(scale, multiple)
    side = size // step * step if step <= size else size // scale * scale
    original = original[:, :side, :side].contiguous()
    low = degrade(original, scale)
    condition = upscale_bicubic(low[None].float() / 255, scale)
    noise = torch.randn(condition.shape, generator=torch.Generator().manual_seed(seed))
    return Case(original, low, condition, noise)


@torch.no_grad()
def diffuse(unet: nn.Module, how: Conventions, case: Case) -> tuple[Tensor, Tensor]:
    """Sample x_0, and return it with the condition, each (1, 3, H, W) in the network's value range."""
    device, dtype = next(iter(unet.parameters()), case.noise).device, getattr(unet, "dtype", torch.float32)
    condition = (case.condition * 2 - 1 if how.signed else case.condition).to(device)
    scheduler = how.scheduler
    scheduler.set_timesteps(how.steps, device=device)
    x = case.noise.to(device) * scheduler.init_noise_sigma
    hooks = (hook for module in unet.modules() for hook in module._forward_pre_hooks.values())
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    contexts = [owner for owner in owners if isinstance(owner, TimestepContext)]
    with (
        _temporarily(contexts, "num_train_timesteps", scheduler.config.num_train_timesteps),
        _temporarily(unet.modules(), "training", False),
    ):
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(x, timestep)
            first, second = (condition, noisy) if how.sample_first else (noisy, condition)
            prediction = unet(first.to(dtype), timestep, second.to(dtype)).sample.to(x.dtype)
            x = scheduler.step(prediction, timestep, x).prev_sample
    return x, condition


def pixels_of(image: Tensor, signed: bool) -> Tensor:
    """Return an image in the network's value range, (1, 3, H, W), as uint8 (3, H, W)."""
    unit = (image[0] + 1) / 2 if signed else image[0]
    return (unit.clamp(0, 1) * 255 + 0.5).floor().to(torch.uint8).cpu()


def with_sign_of_zero(unet: nn.Module, zero: str | None) -> Any:
    """Return a context in which every sign of a network maps 0 to `zero` ("plus" or "zero"); None changes nothing."""
    return _temporarily(_signs(unet) if zero is not None else (), "sign_zero", zero)


def signs_of_zero(unet: nn.Module) -> set[str]:
    """Return the values of ``sign_zero`` in a network; empty if it has no signs or is packed."""
    return {str(module.sign_zero) for module in _signs(unet)}


def _signs(unet: nn.Module) -> list[Any]:
    return [module for module in unet.modules() if "sign_zero" in vars(module)]


@contextmanager
def _temporarily(objects: Iterable[Any], attribute: str, value: Any) -> Iterator[None]:
    before = [(one, getattr(one, attribute)) for one in objects]
    for one, _ in before:
        setattr(one, attribute, value)
    try:
        yield
    finally:
        for one, old in before:
            setattr(one, attribute, old)
