"""Random patches of image pairs for training. Each item is a function of the seed and its index alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from binarize.errors import BinarizeError
from binarize.imaging import ImagePairs, degrade, upscale_bicubic
from binarize.imaging.pairs import Degrader, raise_all
from binarize.training.draws import GRID_STREAM, PATCH_STREAM, below, draws, shuffled

RESIDUAL_PATCHES = 512
"""Number of patches that `residual_std` measures."""
_FILTER_RADIUS = 2  # of both resampling filters, in low-resolution pixels
_MARGIN = 8  # low-resolution pixels around a patch that is degraded; more of its filters' tails are mirrored
_GRID = 16  # pixels: the blocks of JPEG and WebP with reduced chroma


class _Reduction(NamedTuple):
    """How a part of an image is reduced, and the low-resolution pixels that it needs before and after the patch."""

    reduce: Callable[[torch.Tensor], torch.Tensor]
    before: tuple[int, int]
    after: int


class PairedPatches(Dataset[dict[str, Any]]):
    """Random crops of high- and low-resolution images, flipped and rotated.

    Item ``i`` is a function of ``(seed, i)`` and the images alone, so a run resumes exactly by continuing with the next
    index. With n images, indices ``k * n`` to ``(k + 1) * n - 1`` use each image once, in a new random order.

    The low-resolution patch and the condition are crops of the whole low-resolution image and of its upscaled version,
    bit for bit. A network therefore gets the same condition in training as in sampling; upscaling the patch alone would
    mirror its borders instead.

    Each item is a dict with ``"hr"``, float32 (3, P, P) in [0, 1]; ``"lr"``, (3, P / scale, P / scale), 8-bit levels;
    ``"condition"``, (3, P, P), the upscaled low-resolution image; ``"index"``; and ``"name"``, without suffix.

    Images are decoded at construction until ``cache_bytes`` are used, and kept as 8-bit pixels; the others are decoded
    on each access. Forked workers share this memory.

    Args:
        hr_dir: Folder of high-resolution images.
        lr_dir: Folder of low-resolution images; by default they are made by :func:`~binarize.imaging.degrade`.
            :class:`~binarize.imaging.ImagePairs` documents how files are matched.
        degrader: Makes the low-resolution patch of item ``i`` instead, as ``degrader(hr, scale, i)`` of a part of the
            image around it. The phase of the grid of compressed blocks is random.
        scale: Integer scale factor.
        patch_size: P, the side of the high-resolution patch in pixels, a multiple of ``scale``.
        augment: Apply a random flip and rotation (one of eight) to each item.
        seed: 0 to 2**64 - 1.
        candidates: Number of positions drawn per item. The position with the most texture is used: the largest mean
            absolute difference between neighbouring pixels. With 1, positions are uniform.
        length: The value of ``len()``; by default the number of images. Indices below it are valid.
        cache_bytes: Memory for decoded images.

    Raises:
        BinarizeError: If an option is out of range, or listing all unusable images. Truncated files with a valid header
            are found here only if the cache holds them, otherwise when they are read.
    """

    def __init__(
        self,
        hr_dir: str | os.PathLike[str],
        lr_dir: str | os.PathLike[str] | None = None,
        *,
        scale: int,
        patch_size: int,
        degrader: Degrader | None = None,
        augment: bool = True,
        seed: int = 0,
        candidates: int = 1,
        length: int | None = None,
        cache_bytes: int = 1 << 30,
    ) -> None:
        if scale < 1 or patch_size < scale or patch_size % scale:
            raise BinarizeError(f"patch_size must be a positive multiple of the scale {scale}, got {patch_size}")
        if not 0 <= seed < 2**64:
            raise BinarizeError(f"seed must be within 0..2**64 - 1, got {seed}")
        for name, value in (("candidates", candidates), ("length", length)):
            if value is not None and value < 1:
                raise BinarizeError(f"{name} must be at least 1, got {value}")
        if degrader is not None and lr_dir is not None:
            raise BinarizeError("degrader has no effect on the images of lr_dir; give one of them")
        self.pairs = ImagePairs(hr_dir, lr_dir, scale=scale, min_side=patch_size, degrader=degrader)
        self.scale, self.patch_size, self.seed = scale, patch_size, seed
        self.augment, self.candidates = augment, candidates
        self.length = len(self.pairs) if length is None else length
        self._cache = _fill_cache(self.pairs, cache_bytes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside 0..{self.length - 1}")
        which = self._image_index(index)
        draw = draws(self.seed, PATCH_STREAM, index, 1 + 2 * self.candidates)
        height, width = (side // self.scale for side in self.pairs.files[which].size)
        side = self.patch_size // self.scale
        hr, lr = self._cache[which] if which < len(self._cache) else self.pairs.read(which)
        places = [
            (below(rows, height - side + 1), below(columns, width - side + 1))
            for rows, columns in zip((draw[0], *draw[3::2]), (draw[1], *draw[4::2]), strict=True)
        ]
        top, left = places[0]
        if len(places) > 1:
            top, left = max(places, key=lambda place: _texture(hr, self.scale, place, side))
        patches = _cut(hr, lr, self.scale, top, left, side, self._reduction(index))
        turn = below(draw[2], 8) if self.augment else 0
        high, low, condition = (_turned(patch, turn) for patch in patches)
        name = self.pairs.files[which].hr.stem
        return {"hr": high, "lr": low, "condition": condition, "index": index, "name": name}

    def _reduction(self, index: int) -> _Reduction:
        degrader = self.pairs.degrader
        if degrader is None:
            return _Reduction(partial(degrade, scale=self.scale), (_FILTER_RADIUS, _FILTER_RADIUS), _FILTER_RADIUS)
        rows, columns = (_MARGIN + below(draw, _GRID) for draw in draws(self.seed, GRID_STREAM, index, 2))
        return _Reduction(lambda part: degrader(part, self.scale, index), (rows, columns), _MARGIN)

    def _image_index(self, index: int) -> int:
        return shuffled(self.seed, index, len(self.pairs))


def residual_std(patches: PairedPatches, count: int = RESIDUAL_PATCHES) -> float:
    """Return the root mean square of (high-resolution - upscaled image) over the first ``count`` patches.

    Residuals divided by it have unit variance, as the noise has. It is a function of the seed and the data.
    """
    residuals = (item["hr"].double() - item["condition"].double() for item in map(patches.__getitem__, range(count)))
    std = math.sqrt(sum(float(residual.square().mean()) for residual in residuals) / count)
    if std == 0:
        raise BinarizeError("target: residual: the training images equal their upscaled versions; use sharper images")
    return std


def _fill_cache(pairs: ImagePairs, budget: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    # The cache is filled once. With random access to more images than fit, evicting the oldest would evict each image
    # shortly before its next use.
    cache, problems = [], []
    for index, files in enumerate(pairs.files):
        height, width = files.size
        pixels = height * width + (0 if files.lr is None else height * width // pairs.scale**2)
        budget -= 3 * pixels
        if budget < 0:
            break
        try:
            cache.append(pairs.read(index))
        except BinarizeError as error:
            problems.append(str(error))
    raise_all(pairs.files[0].hr.parent, problems)
    return cache


def _cut(
    hr: torch.Tensor, lr: torch.Tensor | None, scale: int, top: int, left: int, side: int, reduction: _Reduction
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hr, lr and condition in [0, 1] of the patch at low-resolution position ``top``, ``left``."""
    height, width = hr.shape[-2] // scale, hr.shape[-1] // scale
    # The patch with the pixels that upscaling reads around it. Both filters mirror at the borders of the image.
    rows, columns = _around(top, side, _FILTER_RADIUS, height), _around(left, side, _FILTER_RADIUS, width)
    if lr is None:
        (above, before), after = reduction.before, reduction.after
        outer_rows = slice(max(rows.start - above, 0), min(rows.stop + after, height))
        outer_columns = slice(max(columns.start - before, 0), min(columns.stop + after, width))
        context = reduction.reduce(hr[..., _scaled(outer_rows, scale), _scaled(outer_columns, scale)])
        context = context[..., _shifted(rows, outer_rows.start), _shifted(columns, outer_columns.start)]
    else:
        context = lr[..., rows, columns]
    context = context.float() / 255
    patch = slice(top, top + side), slice(left, left + side)
    inner = _shifted(patch[0], rows.start), _shifted(patch[1], columns.start)
    condition = upscale_bicubic(context[None], scale)[0, :, _scaled(inner[0], scale), _scaled(inner[1], scale)]
    high = hr[..., _scaled(patch[0], scale), _scaled(patch[1], scale)].float() / 255
    return high, context[..., inner[0], inner[1]], condition


def _texture(hr: torch.Tensor, scale: int, place: tuple[int, int], side: int) -> float:
    """Return the mean absolute difference between vertical and horizontal neighbours in a patch."""
    rows, columns = (_scaled(slice(start, start + side), scale) for start in place)
    patch = hr[..., rows, columns].to(torch.int16)
    return sum(float(patch.diff(dim=axis).abs().float().mean()) for axis in (-2, -1))


def _around(start: int, side: int, reach: int, size: int) -> slice:
    return slice(max(start - reach, 0), min(start + side + reach, size))


def _scaled(part: slice, scale: int) -> slice:
    return slice(part.start * scale, part.stop * scale)


def _shifted(part: slice, origin: int) -> slice:
    return slice(part.start - origin, part.stop - origin)


def _turned(patch: torch.Tensor, turn: int) -> torch.Tensor:
    """Apply one of the eight symmetries of the square: ``turn % 4`` quarter turns, then a flip from 4 on."""
    patch = patch.rot90(turn % 4, (-2, -1))
    return (patch.flip(-1) if turn >= 4 else patch).contiguous()
