"""The learned steps of k-bit activations at step 0."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import default_collate

from binarize.errors import BinarizeError
from binarize.layers.multibit import calibrate_by, learned_steps
from binarize.modules import evaluating
from binarize.recipes import TrainingRecipe, build_scheduler
from binarize.training.objective import Objective
from binarize.training.samples import NoisySamples, to_device

_MAX_SAMPLES = 32


def calibrate_steps(
    recipe: TrainingRecipe, network: nn.Module, samples: NoisySamples, count: int, device: torch.device
) -> str:
    """Set the steps of all k-bit activations from the first of ``count`` samples, as `binarize.calibrate` does.

    The network is moved to the device. Processes that call this for the same samples get the same steps.

    Returns:
        What was done, as a line for the user; an empty string if the network has no such activations.

    Raises:
        BinarizeError: If an activation's input is zero or not finite.
    """
    activations = learned_steps(network)
    if not activations:
        return ""
    network.to(device)
    objective, dtype = Objective(recipe, build_scheduler(recipe)), next(network.parameters()).dtype
    batch = default_collate([samples[index] for index in range(min(count, _MAX_SAMPLES))])
    tensors = to_device(batch, objective.inputs.tensors, device, dtype)
    try:
        with evaluating(network):
            reached = calibrate_by(network, lambda: objective(network, tensors))
    except BinarizeError as error:
        raise BinarizeError(f"the steps of the k-bit activations cannot be initialized. {error}") from error
    done = f"the steps of {len(reached)} k-bit activations are initialized from {len(batch['name'])} images"
    missing = [name for name in activations if name not in reached]
    return f"{done}; the network does not reach {', '.join(missing)}" if missing else done
