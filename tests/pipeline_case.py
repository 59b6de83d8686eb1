"""A tiny network with SRUNet's interface, and helpers that run the pipeline with it."""

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from binarize.models.pipeline import SuperResolutionPipeline


class Local(ModelMixin, ConfigMixin):
    """A stand-in with SRUNet's contract and a receptive field of 5 x 5: two 3x3 convolutions and the timestep."""

    size_multiple = 8

    @register_to_config
    def __init__(self, num_train_timesteps: int = 2000, drop: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 3, 3, padding=1)
        self.dropout = nn.Dropout(drop)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> UNet2DOutput:
        self.seen.append((sample, torch.as_tensor(timestep), condition))
        hidden = torch.tanh(self.first(torch.cat([condition, sample], dim=1)) + torch.as_tensor(timestep) / 2000)
        return UNet2DOutput(sample=self.dropout(self.second(hidden)) + sample / 2)


BETAS = {"num_train_timesteps": 2000, "beta_start": 1e-6, "beta_end": 1e-2, "beta_schedule": "linear"}


def local(seed: int = 0, **options: float) -> Local:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Local(**options).double()


def pipeline(unet: ModelMixin | None = None, scale: int = 2, **options: object) -> SuperResolutionPipeline:
    pipe = SuperResolutionPipeline(local() if unet is None else unet, scale=scale, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width, channels))


def run(pipe: SuperResolutionPipeline, image: object, **options: object) -> Tensor:
    options = {"num_inference_steps": 3, "generator": seeded(), "output_type": "pt", **options}
    return pipe(image, **options).images
