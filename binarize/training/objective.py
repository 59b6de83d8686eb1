"""What the network is asked to predict, and how far from it a prediction is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.models.target import diffused_of

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    from binarize.recipes import Recipe
    from binarize.training.distillation import Distillation

_CHARBONNIER_EPSILON = 1e-3


class Losses(NamedTuple):
    """What one forward pass costs.

    Attributes:
        total: (B,), what is minimised.
        parts: The unweighted terms where there are several, (B,) each.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Objective:
    """The loss of a recipe, as a function of a batch.

    Args:
        recipe: Its loss, target and weighting; ``residual_scale`` must be set where residuals are diffused.
        scheduler: The noise schedule.
        distillation: What a teacher adds, or None.
    """

    def __init__(self, recipe: Recipe, scheduler: DDIMScheduler, distillation: Distillation | None = None) -> None:
        self.recipe, self.scheduler, self.distillation = recipe, scheduler, distillation

    def __call__(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> Losses:
        """Return the losses of the samples of a batch.

        Args:
            model: Predicts from ``model(noisy, timesteps, condition).sample``.
            batch: ``hr``, ``condition`` and ``noise``, (B, 3, H, W), and ``timestep``, (B,), on the model's device.
        """
        recipe, timesteps, condition = self.recipe, batch["timestep"], batch["condition"]
        clean = diffused_of(batch["hr"], condition, recipe.residual_scale)
        noisy = self.scheduler.add_noise(clean, batch["noise"], cast(Any, timesteps))
        target = prediction_target(self.scheduler, clean, batch["noise"], timesteps)
        weights = None
        if recipe.snr_gamma is not None:
            weights = snr_weights(self.scheduler, timesteps, recipe.snr_gamma, recipe.loss)

        def weighted(losses: Tensor) -> Tensor:
            return losses if weights is None else losses * weights.to(losses.dtype)

        if self.distillation is None:
            prediction = model(noisy, timesteps, condition).sample
            return Losses(weighted(sample_losses(recipe.loss, prediction, target)), {})
        section = self.distillation.section
        with self.distillation.listening():
            prediction = model(noisy, timesteps, condition).sample
            taught, features = self.distillation.teach(noisy, timesteps, condition)
        task = weighted(sample_losses(recipe.loss, prediction, target))
        output = weighted(sample_losses(recipe.loss, prediction, taught))
        total = section.task * task + section.output * output
        parts = {"task": task, "output": output}
        if features is not None:
            total = total + section.features * features
            parts["features"] = features
        return Losses(total, {name: part.detach() for name, part in parts.items()})


def prediction_target(scheduler: DDIMScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the network should predict, by the scheduler's ``prediction_type``.

    Args:
        scheduler: The noise schedule, with cumulative products a_t.
        clean: What is diffused, x_0: clean pictures (B, C, H, W) in [0, 1], or residuals of unit variance.
        noise: Unit Gaussian noise of the same shape.
        timesteps: (B,), int64.

    Returns:
        (B, C, H, W): the noise for "epsilon", x_0 for "sample", sqrt(a_t) noise - sqrt(1 - a_t) x_0 for
        "v_prediction".

    Raises:
        BinarizeError: For any other prediction type.
    """
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, cast(Any, timesteps))
    raise BinarizeError(
        f"prediction_type {kind!r} cannot be trained; it must be 'epsilon', 'sample' or 'v_prediction'."
    )


def snr_weights(scheduler: DDIMScheduler, timesteps: Tensor, gamma: float, loss: str) -> Tensor:
    """Return the Min-SNR weight of each sample (Hang et al. 2023, "Min-SNR Weighting Strategy").

    With snr = a_t / (1 - a_t), an error of x_0 counts min(snr, gamma) times its square whatever the network predicts:
    the squared error of "sample" is weighted by that, of "epsilon" by that over snr, of "v_prediction" by that over
    snr + 1. The distances "l1" and "charbonnier" grow with the error instead of its square and take the root of it.

    Args:
        scheduler: The noise schedule.
        timesteps: (B,), int64.
        gamma: 5 in the paper.
        loss: "l1", "l2" or "charbonnier".

    Returns:
        (B,) float64 on the timesteps' device.
    """
    a = scheduler.alphas_cumprod.to(timesteps.device, torch.float64)[timesteps]
    snr = a / (1 - a)
    divisor = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}
    weights = snr.clamp(max=gamma) / divisor[scheduler.config["prediction_type"]]
    return weights if loss == "l2" else weights.sqrt()


def sample_losses(kind: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean distance of each sample.

    With d = prediction - target, "l1" is |d|, "l2" is d^2 and "charbonnier" is sqrt(d^2 + 1e-6), each averaged over
    channels and pixels.

    Args:
        kind: "l1", "l2" or "charbonnier".
        prediction: (B, C, H, W).
        target: (B, C, H, W).

    Returns:
        (B,), in the dtype that the two have in common.

    Raises:
        BinarizeError: For any other kind.
    """
    difference = prediction - target
    if kind == "l1":
        distance = difference.abs()
    elif kind == "l2":
        distance = difference.square()
    elif kind == "charbonnier":
        distance = (difference.square() + _CHARBONNIER_EPSILON**2).sqrt()
    else:
        raise BinarizeError(f"unknown loss {kind!r}; it must be 'l1', 'l2' or 'charbonnier'.")
    return distance.flatten(1).mean(dim=1)
