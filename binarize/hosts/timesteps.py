"""diffusers' classes whose timestep is not a step of the schedule."""

import math

from torch import nn

from binarize.conditioning import Timestep

_VIDEO = "UNetSpatioTemporalConditionModel"
_TIMESTEPS = {
    _VIDEO: Timestep("timestep", "log_sigma", (math.log(0.002) / 4, math.log(700.0) / 4)),  # Stable Video Diffusion
    "FluxTransformer2DModel": Timestep("timestep", "unit"),
    "StableCascadeUNet": Timestep("timestep_ratio", "unit"),
}


def known_timestep(model: nn.Module) -> Timestep | None:
    """Return what the timestep of a diffusers model is, if its class is known to take none of the schedule."""
    names = (c.__name__ for c in type(model).__mro__ if c.__module__.startswith("diffusers."))
    return next((_TIMESTEPS[name] for name in names if name in _TIMESTEPS), None)
