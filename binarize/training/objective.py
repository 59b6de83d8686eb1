"""What the network is asked to predict, and how far from it a prediction is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

_CHARBONNIER_EPSILON = 1e-3


def prediction_target(scheduler: DDIMScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the network should predict, by the scheduler's ``prediction_type``.

    Args:
        scheduler: The noise schedule, with cumulative products a_t.
        clean: Clean pictures x_0, (B, C, H, W), in [0, 1].
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
