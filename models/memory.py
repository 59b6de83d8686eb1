"""The memory that sampling needs, estimated before it starts."""

from __future__ import annotations

from typing import Any

from torch import nn

from binarize.imaging.limits import check_memory
from binarize.models.tiling import TileGrid

_CANVAS_BYTES = 100  # per pixel of a result: noise, condition, predictions, their sums and the image; 115 were measured
_FEATURE_MAPS = 8  # as wide as the first level that SRUNet holds at the same time; 9 to 14 were measured


def working_bytes(unet: nn.Module, grid: TileGrid, *, images: int = 1, tiles: int = 1) -> float:
    """Return a lower estimate of the bytes that sampling needs on a CPU.

    `images` are sampled together, and `tiles` are given to the network together.
    """
    config: Any = getattr(unet, "config", {})
    height, width = grid.shape
    tile = grid.rows[0].weights.numel() * grid.columns[0].weights.numel()
    channels = config.get("base_channels", 0) if hasattr(config, "get") else 0
    element = next((parameter.element_size() for parameter in unet.parameters()), 4)
    together = images * min(tiles, len(grid))
    return images * height * width * _CANVAS_BYTES + together * tile * channels * _FEATURE_MAPS * element


def check_sampling_memory(unet: nn.Module, grid: TileGrid, *, images: int = 1, tiles: int = 1) -> None:
    """Raise BinarizeError if sampling needs more memory than is free."""
    height, width = grid.shape
    fix = "use tiles (tile=256, --tile 256) or a smaller image." if len(grid) == 1 else "use a smaller image or tile."
    what = f"upscaling to {width}x{height} pixels"
    check_memory(working_bytes(unet, grid, images=images, tiles=tiles), what, fix)
