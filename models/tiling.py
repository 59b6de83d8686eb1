"""Padding to the network's size multiple, and overlapping tiles whose predictions are blended.

With tiles, memory depends on the tile's size, not the image's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.models.checks import is_whole

DEFAULT_OVERLAP = 32
"""Default overlap in pixels, unless a quarter of the tile is less."""
_PADDING_SEED = 0


@dataclass(frozen=True)
class Span:
    """One tile along one axis: its first pixel, and the blending weight of each of its pixels, (length,) float64."""

    start: int
    weights: Tensor

    @property
    def pixels(self) -> slice:
        """The pixels that the tile covers."""
        return slice(self.start, self.start + self.weights.numel())


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a padded image, all of the same size."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the area that the tiles cover."""
        return self.rows[-1].pixels.stop, self.columns[-1].pixels.stop

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def blend(self, predict: Callable[..., Tensor], *images: Tensor, batch_size: int = 1) -> Tensor:
        """Run ``predict`` on each tile and return the weighted sum of the results.

        Args:
            predict: Takes one tensor per element of ``images``, cut to the same tiles and stacked along the batch
                axis, and returns a tensor of the same batch size, height and width.
            images: (B, C, H, W) each, with the height and width of `shape`.
            batch_size: Number of tiles per call of ``predict``.

        Returns:
            (B, C', H, W). With a single tile this is ``predict(*images)`` itself, bit for bit.
        """
        if len(self) == 1:
            return predict(*images)
        batch = len(images[0])
        tiles = list(product(self.rows, self.columns))
        out: Any = None
        for first in range(0, len(tiles), batch_size):
            group = tiles[first : first + batch_size]
            cuts = (torch.cat([image[..., row.pixels, column.pixels] for row, column in group]) for image in images)
            prediction = predict(*cuts)
            out = prediction.new_zeros((batch, prediction.shape[1], *self.shape)) if out is None else out
            for (row, column), piece in zip(group, prediction.split(batch), strict=True):
                out[..., row.pixels, column.pixels] += piece * torch.outer(row.weights, column.weights).to(piece)
        return out


def pad_image(image: Tensor, height: int, width: int) -> Tensor:
    """Extend images at the bottom and the right by reflection, or by repeating the edge if a side is too short."""
    down, right = height - image.shape[-2], width - image.shape[-1]
    if down:  # a reflection leaves out the edge itself, so it has one pixel less than the side
        image = F.pad(image, (0, 0, 0, down), mode="reflect" if down < image.shape[-2] else "replicate")
    if right:
        image = F.pad(image, (0, right, 0, 0), mode="reflect" if right < image.shape[-1] else "replicate")
    return image


def pad_noise(noise: Tensor, height: int, width: int) -> Tensor:
    """Extend noise at the bottom and the right by white noise that is the same in every call.

    A denoiser would treat the structure of reflected or repeated noise as image content. The padding depends on the
    arguments alone, so that a call with ``latents`` is deterministic without a generator.
    """
    batch, channels, inner_height, inner_width = noise.shape
    generator = torch.Generator().manual_seed(_PADDING_SEED)
    for axis, shape in (
        (-1, (1, channels, inner_height, width - inner_width)),
        (-2, (1, channels, height - inner_height, width)),
    ):
        if shape[axis]:
            extra = torch.randn(shape, generator=generator, dtype=torch.float32).to(noise).expand(batch, -1, -1, -1)
            noise = torch.cat([noise, extra], dim=axis)
    return noise


def tile_grid(
    height: int, width: int, *, tile: int | None = None, overlap: int | None = None, multiple: int = 1
) -> TileGrid:
    """Return tiles for an image of ``height`` x ``width`` pixels, padded to a multiple of ``multiple``.

    An axis that is no longer than ``tile`` gets one tile of its whole padded length. Otherwise a tile's side is the
    largest multiple of ``multiple`` up to ``tile`` (at least ``multiple``). Tiles start at multiples of ``multiple``
    and are spread evenly, so that neighbors share at least ``overlap`` pixels, or as many as leave ``multiple`` new
    pixels per tile.

    Args:
        height: Height of the image in pixels, before padding.
        width: Width of the image in pixels, before padding.
        tile: Side of a tile in pixels; ``None`` for one tile over the whole image.
        overlap: Least number of shared pixels; by default 32, or a quarter of the tile if that is less.
        multiple: Divisor of sizes and starts.
    """
    if tile is None:
        if overlap is not None:
            raise BinarizeError(f"overlap={overlap} has no meaning without tiles; pass tile=SIDE as well, or drop it.")
        return TileGrid(_cover(height, height, 0, multiple), _cover(width, width, 0, multiple))
    if not is_whole(tile):
        raise BinarizeError(f"tile={tile!r}: pass a whole number of output pixels, at least 1; pass None for no tiles.")
    if overlap is None:
        overlap = min(DEFAULT_OVERLAP, tile // 4)
    if not is_whole(overlap, least=0) or overlap >= tile:
        raise BinarizeError(
            f"overlap={overlap!r} with tile={tile}: pass a whole number of output pixels from 0 to tile - 1 "
            f"({tile - 1} here); a quarter of the tile is plenty."
        )
    return TileGrid(_cover(height, tile, overlap, multiple), _cover(width, tile, overlap, multiple))


def _cover(length: int, tile: int, overlap: int, multiple: int) -> tuple[Span, ...]:
    """Place tiles along one axis, in units of ``multiple`` pixels, which keeps starts aligned."""
    units = math.ceil(length / multiple)
    if tile >= length:
        return (Span(0, torch.ones(units * multiple, dtype=torch.float64)),)
    size = max(1, tile // multiple)
    stride = max(1, (size * multiple - overlap) // multiple)
    steps = math.ceil((units - size) / stride)
    starts = [i * (units - size) // steps * multiple if steps else 0 for i in range(steps + 1)]
    return _weighted(starts, size * multiple)


def _weighted(starts: Sequence[int], size: int) -> tuple[Span, ...]:
    """Give each tile its window, divided by the sum of all windows at a pixel: a partition of unity."""
    shared = [0, *(before + size - after for before, after in pairwise(starts)), 0]
    windows = [_window(size, *sides) for sides in pairwise(shared)]
    total = torch.zeros(starts[-1] + size, dtype=torch.float64)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + size] += window
    return tuple(Span(s, w / total[s : s + size]) for s, w in zip(starts, windows, strict=True))


def _window(size: int, before: int, after: int) -> Tensor:
    """Return weights that rise over the ``before`` pixels shared with one neighbor and fall over the ``after`` ones.

    The outer quarter of an overlap has weight zero: there, the prediction is least reliable because the network sees
    nothing beyond its tile, and the neighboring tile contains that quarter well inside. sin^2 over the middle half
    makes the weights of two neighbors add up to one.
    """
    center = torch.arange(size, dtype=torch.float64) + 0.5
    window = torch.ones(size, dtype=torch.float64)
    for shared, depth in ((before, center), (after, size - center)):
        if shared:
            ramp = (2 * depth / shared - 0.5).clamp(0, 1)
            window = window * torch.sin(ramp * (math.pi / 2)).square()
    return window
