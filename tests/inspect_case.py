"""Small binary networks and layers to look into."""

from typing import Any

import numpy as np
import torch
from cli_case import NETWORK
from torch import Tensor, nn

import binarize
from binarize.layers import BinaryConv2d
from binarize.models import SRUNet


def network(method: Any = "bidiffsr", **options: Any) -> SRUNet:
    return binarize.convert(SRUNet(**NETWORK, dropout=0.0), method, **options)


def batch(size: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(size, 3, 8, 8), torch.tensor([3, 1500] * (size // 2)), torch.rand(size, 3, 8, 8)


class OneLayer(nn.Module):
    """A single binary layer with a timestep that it does not use."""

    def __init__(self, method: str, **options: Any) -> None:
        super().__init__()
        self.layer = BinaryConv2d(4, 4, 1, method=binarize.get_method(method, **options))

    def forward(self, x: Tensor, timestep: Any = 0) -> Any:
        return self.layer(x)


def signs(model: nn.Module) -> dict[str, np.ndarray]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BinaryConv2d)}
    return {name: layer.weight.detach().numpy() >= 0 for name, layer in layers.items()}
