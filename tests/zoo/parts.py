"""Embeddings of a time or noise level, and initializations, that several networks of the zoo share."""

import math

import torch
from torch import Tensor, nn


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Return ``(B, width)`` sines and cosines of the values ``(B,)``."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, device=values.device) / (width // 2))
    angles = values.float().reshape(-1, 1) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierFeatures(nn.Module):
    """Random frequencies, as in score_sde and k-diffusion, of values ``(B,)``; returns ``(B, width)``."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2) * scale)

    def forward(self, values: Tensor) -> Tensor:
        angles = 2 * math.pi * values.reshape(-1, 1) * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def zeroed(layer: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero, as many networks do with the last layer of a branch."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def norm(channels: int) -> nn.GroupNorm:
    """Return group normalization with 32 groups, or 4 for networks as narrow as the zoo's."""
    return nn.GroupNorm(32 if channels % 32 == 0 else 4, channels)
