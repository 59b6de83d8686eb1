"""The sampler as numbers, for programs without diffusers."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.models.sampling import set_timesteps


@dataclass(frozen=True)
class SamplerStep:
    """One step from x_t to the next x.

    With ``output = network(x, timestep, ...)`` and ``x0 = clip(clean[0] * x + clean[1] * output)``, the next x is
    ``next[0] * x + next[1] * output + next[2] * x0``.
    """

    timestep: int
    clean: tuple[float, float]
    next: tuple[float, float, float]


@dataclass(frozen=True)
class Sampler:
    """A deterministic sampler: x starts as Gaussian noise, and the last x is what the network was trained to predict.

    ``x0`` is limited to ``[-clip_range, clip_range]``, or not at all if it is None.
    """

    clip_range: float | None
    steps: tuple[SamplerStep, ...]

    def to_config(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self)

    def step(self, step: SamplerStep, x: Tensor, output: Tensor) -> Tensor:
        """Return the next x."""
        clean = _sum(step.clean, (x, output))
        if self.clip_range is not None:
            clean = clean.clamp(-self.clip_range, self.clip_range)
        return _sum(step.next, (x, output, clean))


def _sum(factors: tuple[float, ...], tensors: tuple[Tensor, ...]) -> Tensor:
    terms = [t if f == 1 else t * f for f, t in zip(factors, tensors, strict=True) if f]
    return torch.stack(terms).sum(0) if len(terms) > 2 else terms[0] if len(terms) == 1 else terms[0] + terms[1]


def sampler_of(scheduler: Any, steps: int) -> Sampler:
    """Return the numbers of DDIM's steps without noise (Song et al. 2021, equation 12).

    Raises:
        BinarizeError: If the scheduler is another one, or one of its settings changes the formula.
    """
    if type(scheduler) is not DDIMScheduler:
        raise BinarizeError(
            f"export: the steps of {type(scheduler).__name__} cannot be written into a file; use DDIM: "
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)."
        )
    scheduler = copy.deepcopy(scheduler)
    set_timesteps(scheduler, steps)
    config, levels = scheduler.config, scheduler.alphas_cumprod.double().tolist()
    made = []
    for timestep in scheduler.timesteps.tolist():
        before = timestep - config["num_train_timesteps"] // steps
        a, a_next = levels[timestep], levels[before] if before >= 0 else float(scheduler.final_alpha_cumprod)
        clean, noise = _formula(config["prediction_type"], a)
        direction = sqrt(1 - a_next)
        made.append(SamplerStep(timestep, clean, (direction * noise[0], direction * noise[1], sqrt(a_next))))
    sampler = Sampler(config["clip_sample_range"] if config["clip_sample"] else None, tuple(made))
    _check(scheduler, sampler)
    return sampler


def _formula(prediction_type: str, a: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the factors of x and of the network's output in x0, and those in the noise."""
    signal, noise = sqrt(a), sqrt(1 - a)
    if prediction_type == "sample":
        return (0.0, 1.0), (1 / noise, -signal / noise)
    if prediction_type == "v_prediction":
        return (signal, -noise), (noise, signal)
    if signal == 0:  # zero terminal SNR
        raise BinarizeError("export: epsilon prediction cannot start from pure noise (rescale_betas_zero_snr).")
    return (1 / signal, -noise / signal), (0.0, 1.0)


def _check(scheduler: DDIMScheduler, sampler: Sampler) -> None:
    """Raise BinarizeError unless the scheduler's own steps give the same numbers."""
    source = torch.Generator().manual_seed(0)
    x, *outputs = torch.randn(1 + len(sampler.steps), 1, 3, 8, 8, generator=source, dtype=torch.float64)
    outputs = [output * 2 * (sampler.clip_range or 1) for output in outputs]
    for step, output in zip(sampler.steps, outputs, strict=True):
        expected: Any = scheduler.step(output, step.timestep, x)
        x = sampler.step(step, x, output)
        if not torch.allclose(x, expected.prev_sample, rtol=1e-4, atol=1e-4 * float(output.abs().max())):
            raise BinarizeError(
                "export: the settings of this DDIMScheduler, such as thresholding, cannot be written into a file; make "
                "one with its betas and its prediction type alone."
            )
