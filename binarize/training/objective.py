"""The training loss: the prediction target, the distance from it, and the weighting of timesteps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.models.target import image_of
from binarize.recipes import Recipe, TrainingRecipe
from binarize.training.inputs import Network, inputs_of

if TYPE_CHECKING:
    from binarize.training.distillation import Distillation
    from binarize.training.perceptual import PerceptualLoss

_CHARBONNIER_EPSILON = 1e-3
_PSNR_EPSILON = 1e-2  # 1% of the variance of noise and of residuals; bounds the gradient of samples without error


class Losses(NamedTuple):
    """The losses of one forward pass, (B,) each: the total, and the terms of `Objective.parts`."""

    total: Tensor
    parts: dict[str, Tensor]


class Objective:
    """The loss of a recipe as a function of a batch; ``residual_scale`` must be set if residuals are diffused.

    The noise is that of DDPM, whatever the scheduler: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise. Schedulers over noise
    levels, such as Euler's, give a network the same x_t in sampling, by ``scale_model_input``.

    Attributes:
        parts: Names of the terms, without their weights in the total, if there are several.
    """

    def __init__(
        self, recipe: TrainingRecipe, scheduler: Any, distillation: Distillation | None = None,
        perceptual: PerceptualLoss | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.distillation, self.perceptual = recipe, distillation, perceptual
        self.scheduler, self.inputs = diffusion_of(scheduler), inputs_of(recipe)
        self.parts = () if distillation is None else distillation.parts
        if perceptual is not None:
            self.parts = (*(self.parts or ("task",)), "perceptual")

    def __call__(self, model: Network, batch: dict[str, Tensor]) -> Losses:
        """Return the losses of a batch, whose entries are on the model's device, for a model as `Inputs` calls it.

        The batch has the tensors of the recipe's `Inputs`, ``noise``, (B, C, H, W), and ``timestep``, (B,).
        """
        recipe, timesteps = self.recipe, batch["timestep"]
        clean = self.inputs.clean(batch)
        noisy = self.scheduler.add_noise(clean, batch["noise"], timesteps)
        target = prediction_target(self.scheduler, clean, batch["noise"], timesteps)
        weights = None
        if recipe.snr_gamma is not None:
            weights = snr_weights(self.scheduler, timesteps, recipe.snr_gamma, recipe.loss)

        def distance(prediction: Tensor, target: Tensor) -> Tensor:
            losses = sample_losses(recipe.loss, prediction, target)
            return losses if weights is None else losses * weights.to(losses.dtype)

        def predict(network: Network) -> Tensor:
            prediction = self.inputs.predict(network, noisy, timesteps, batch)
            if prediction.shape != target.shape:
                shapes = f"{tuple(prediction.shape)} for a target of {tuple(target.shape)}"
                raise BinarizeError(f"the network's prediction has the shape {shapes}; they must be equal.")
            return prediction

        if self.distillation is None:
            prediction = predict(model)
            total = distance(prediction, target)
            parts = {"task": total}
        else:
            prediction, total, parts = self.distillation.losses(predict, target, model, distance)
        if self.perceptual is not None:
            predicted = image_of(prediction, batch["condition"], cast(Recipe, recipe).residual_scale)
            parts["perceptual"] = self.perceptual(predicted, batch["hr"])
            total = total + self.perceptual.weight * parts["perceptual"]
        return Losses(total, {name: parts[name].detach() for name in self.parts})


def diffusion_of(scheduler: Any) -> Any:
    """Return a scheduler with the same betas and prediction type whose ``add_noise`` is that of DDPM."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if isinstance(scheduler, DDIMScheduler):
        return scheduler
    kind = scheduler.config["prediction_type"]
    return DDIMScheduler(len(scheduler.betas), trained_betas=scheduler.betas.tolist(), prediction_type=kind)


def prediction_target(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return the training target for the scheduler's ``prediction_type``, (B, C, H, W).

    It is the noise for "epsilon", the clean x_0 for "sample", and sqrt(a_t) noise - sqrt(1 - a_t) x_0 for
    "v_prediction", with the cumulative products a_t of the schedule.
    """
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    raise BinarizeError(f"unknown prediction_type {kind!r}; it must be 'epsilon', 'sample' or 'v_prediction'.")


def snr_weights(scheduler: Any, timesteps: Tensor, gamma: float, loss: str) -> Tensor:
    """Return the Min-SNR weight of each sample (Hang et al. 2023, "Min-SNR Weighting Strategy"), (B,) float64.

    With snr = a_t / (1 - a_t), the squared error of x_0 is weighted by min(snr, gamma), whatever the network predicts:
    the squared error of "sample" by that, of "epsilon" by that over snr, of "v_prediction" by that over snr + 1. The
    losses "l1" and "charbonnier" are linear in the error and use the weight's square root. gamma is 5 in the paper.
    "psnr", whose gradient does not depend on the scale of the error, has no such weight and is not accepted by recipes.
    """
    a = scheduler.alphas_cumprod.to(timesteps.device, torch.float64)[timesteps]
    snr = a / (1 - a)
    divisor = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}
    weights = snr.clamp(max=gamma) / divisor[scheduler.config["prediction_type"]]
    return weights if loss == "l2" else weights.sqrt()


def sample_losses(kind: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Return the loss of each sample, (B,), from two (B, C, H, W).

    With d = prediction - target and the mean over channels and pixels, "l1" is mean(|d|), "l2" is mean(d^2),
    "charbonnier" is mean(sqrt(d^2 + 1e-6)), and "psnr" is log(mean(d^2) + 0.01), which falls as the PSNR rises (Chen
    et al. 2021, "HINet").
    """
    difference = prediction - target
    if kind == "l1":
        return _mean(difference.abs())
    if kind == "l2":
        return _mean(difference.square())
    if kind == "charbonnier":
        return _mean((difference.square() + _CHARBONNIER_EPSILON**2).sqrt())
    if kind == "psnr":
        return (_mean(difference.square()) + _PSNR_EPSILON).log()
    raise BinarizeError(f"unknown loss {kind!r}; it must be 'l1', 'l2', 'charbonnier' or 'psnr'.")


def _mean(distance: Tensor) -> Tensor:
    return distance.flatten(1).mean(dim=1)
