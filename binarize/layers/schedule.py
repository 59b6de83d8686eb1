"""Modules whose behavior changes over training, and the call by which a training loop reports its progress."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.layers.pipeline import PartPipeline


class Scheduled(nn.Module):
    """A module whose behavior depends on the training progress in [0, 1], a buffer that is saved with the model."""

    progress: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("progress", torch.zeros((), dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> Scheduled:
        before = self.progress
        super()._apply(fn, recurse)
        if self.progress.itemsize < before.itemsize:  # a half-precision progress would round to 1 before the end
            self.progress = before.to(self.progress.device)
        return self

    def set_progress(self, progress: float) -> None:
        """Store the progress, in [0, 1]."""
        self.progress.fill_(progress)


def training_step(model: nn.Module, progress: float) -> None:
    """Update a converted model for the training progress; call it once after each optimizer step.

    ``progress`` is the finished steps over all steps. It updates IR-Net's error decay estimator, ReCU's tau and delayed
    parts, and clamps latent weights for methods that do so (BNN). Other models stay as they are.
    """
    if not 0.0 <= progress <= 1.0:
        raise BinarizeError(f"progress is the share of finished training steps, in [0, 1]; got {progress!r}.")
    for module in model.modules():
        if isinstance(module, Scheduled):
            module.set_progress(progress)
        if isinstance(module, PartPipeline):
            module.clamp_latent_()


def ede_schedule(progress: Tensor, t_min: float, t_max: float) -> tuple[Tensor, Tensor]:
    """Return IR-Net's t = 10^(log10 Tmin + (log10 Tmax - log10 Tmin) progress) and k = max(1 / t, 1) as scalars."""
    low, high = math.log10(t_min), math.log10(t_max)
    t = torch.pow(torch.full_like(progress, 10.0), low + (high - low) * progress)
    return t, (1 / t).clamp_min(1)


def recu_schedule(progress: Tensor, tau_min: float, tau_max: float) -> Tensor:
    """Return ReCU's tau = tau_min + (tau_max - tau_min) (e^progress - 1) / (e - 1) as a scalar."""
    return tau_min + (tau_max - tau_min) * torch.expm1(progress) / math.expm1(1.0)


def check_ede_range(owner: str, t_min: float, t_max: float) -> None:
    """Raise BinarizeError unless 0 < t_min <= t_max."""
    if not 0 < t_min <= t_max:
        raise BinarizeError(f"{owner}: needs 0 < t_min <= t_max; got {t_min} and {t_max}.")


def check_tau_range(owner: str, tau_min: float, tau_max: float) -> None:
    """Raise BinarizeError unless 0.5 < tau_min <= tau_max < 1; other values of tau do not give a clamp."""
    if not 0.5 < tau_min <= tau_max < 1:
        raise BinarizeError(f"{owner}: needs 0.5 < tau_min <= tau_max < 1; got {tau_min} and {tau_max}.")
