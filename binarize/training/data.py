"""Random patches of picture pairs for training, where every item is a function of the seed and its index alone."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from binarize.errors import BinarizeError
from binarize.imaging import ImagePairs, degrade, upscale_bicubic
from binarize.imaging.pairs import raise_all

# Both filters look at two low-resolution pixels on each side.
_REACH = 2
_ORDER, _PATCH = 0, 1


class PairedPatches(Dataset[dict[str, Any]]):
    """Random crops of high- and low-resolution pictures, flipped and turned.

    Item ``i`` depends on ``(seed, i)`` and the folder's content only, whichever process, worker or order asks for it: a
    run resumes exactly by going on with the next index. Indices ``k * n`` to ``(k + 1) * n - 1``, n being the number of
    pictures, go once through all of them, in an order of their own for each k.

    The low-resolution patch and the condition are crops of the whole picture's low-resolution version and of its
    enlargement, bit for bit: the filters see the patch's real surroundings. A network therefore meets the same
    condition in training as when it enlarges a picture; enlarging the patch alone would mirror its borders instead.

    Each item is a dict:

    - ``"hr"``: float32 (3, P, P) in [0, 1], P being ``patch_size``;
    - ``"lr"``: float32 (3, P / scale, P / scale) in [0, 1], 8-bit levels;
    - ``"condition"``: float32 (3, P, P) in [0, 1], the enlargement of the low-resolution picture;
    - ``"index"``: int, the index asked for;
    - ``"name"``: str, the picture's file name without its suffix.

    Pictures are decoded at construction, in the order of their names, until ``cache_bytes`` are full, and stay in
    memory as 8-bit pixels; the rest are decoded each time. Workers that are forked share that memory.

    Args:
        hr_dir: Folder of high-resolution pictures.
        lr_dir: Folder of low-resolution ones; by default they are made by :func:`~binarize.imaging.degrade`.
            :class:`~binarize.imaging.ImagePairs` says how files are matched.
        scale: Whole factor between the two.
        patch_size: Side of the high-resolution patch in pixels, a multiple of ``scale``.
        augment: Whether to draw one of the eight flips and quarter turns for each item.
        seed: 0 to 2**64 - 1.
        candidates: Positions drawn for each item, of which the one with most texture is taken: the largest mean
            difference between neighbouring pixels of the high-resolution patch. Smooth patches teach little. 1, which
            draws evenly, gives the same patches as it does without this option.
        length: What ``len()`` gives; by default the number of pictures. Indices up to it are valid.
        cache_bytes: Memory for decoded pictures.

    Raises:
        BinarizeError: If an option is out of range, or naming at once every picture that is broken, smaller than the
            patch, without partner or of another size than its partner. Truncated pixels behind a sound header are found
            here in the pictures that the cache holds, and when they are read in the others.
    """

    def __init__(
        self,
        hr_dir: str | os.PathLike[str],
        lr_dir: str | os.PathLike[str] | None = None,
        *,
        scale: int,
        patch_size: int,
        augment: bool = True,
        seed: int = 0,
        candidates: int = 1,
        length: int | None = None,
        cache_bytes: int = 1 << 30,
    ) -> None:
        if scale < 1 or patch_size < scale or patch_size % scale:
            raise BinarizeError(
                f"patch_size counts high-resolution pixels: a positive multiple of the scale {scale}, got {patch_size}"
            )
        if not 0 <= seed < 2**64:
            raise BinarizeError(f"seed must be within 0..2**64 - 1, got {seed}")
        if candidates < 1:
            raise BinarizeError(f"candidates must be at least 1, got {candidates}")
        if length is not None and length < 1:
            raise BinarizeError(f"length must be at least 1, got {length}")
        self.pairs = ImagePairs(hr_dir, lr_dir, scale=scale, min_side=patch_size)
        self.scale = scale
        self.patch_size = patch_size
        self.augment = augment
        self.seed = seed
        self.candidates = candidates
        self.length = len(self.pairs) if length is None else length
        self._cache = _fill_cache(self.pairs, cache_bytes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside 0..{self.length - 1}")
        which = self._picture_of(index)
        draw = _draws(self.seed, _PATCH, index, 1 + 2 * self.candidates)
        height, width = (side // self.scale for side in self.pairs.files[which].size)
        side = self.patch_size // self.scale
        hr, lr = self._cache[which] if which < len(self._cache) else self.pairs.read(which)
        places = [
            (_below(rows, height - side + 1), _below(columns, width - side + 1))
            for rows, columns in zip((draw[0], *draw[3::2]), (draw[1], *draw[4::2]), strict=True)
        ]
        top, left = places[0]
        if len(places) > 1:
            top, left = max(places, key=lambda place: _texture(hr, self.scale, place, side))
        patches = _cut(hr, lr, self.scale, top, left, side)
        turn = _below(draw[2], 8) if self.augment else 0
        high, low, condition = (_turned(patch, turn) for patch in patches)
        name = self.pairs.files[which].hr.stem
        return {"hr": high, "lr": low, "condition": condition, "index": index, "name": name}

    def _picture_of(self, index: int) -> int:
        epoch, position = divmod(index, len(self.pairs))
        # Ties have probability n**2 / 2**65; the stable sort settles them the same way everywhere.
        order = np.argsort(_draws(self.seed, _ORDER, epoch, len(self.pairs)), kind="stable")
        return int(order[position])


def _fill_cache(pairs: ImagePairs, budget: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    # Filled once and never exchanged: in a random order over more pictures than fit, replacing the oldest would throw
    # each picture out just before its turn.
    cache: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    problems: list[str] = []
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


def _draws(seed: int, stream: int, counter: int, count: int) -> np.ndarray:
    """Return ``count`` uint64 from a counter-based generator; NumPy keeps a bit generator's raw stream for good."""
    key = np.array([seed, stream], dtype=np.uint64)
    # The generator steps the first word of its counter; ours is the second.
    start = np.array([0, counter, 0, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=start).random_raw(count)


def _below(draw: np.uint64, bound: int) -> int:
    """Map a uniform 64-bit integer to 0..bound - 1."""
    return int(draw) * bound >> 64


def _cut(
    hr: torch.Tensor, lr: torch.Tensor | None, scale: int, top: int, left: int, side: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut a patch at the low-resolution position ``top``, ``left``; returns hr, lr and condition in [0, 1]."""
    height, width = hr.shape[-2] // scale, hr.shape[-1] // scale
    # What the enlargement needs around the patch, cut off where the picture ends, where both filters mirror.
    rows = _around(top, side, _REACH, height)
    columns = _around(left, side, _REACH, width)
    if lr is None:
        more_rows = _around(top, side, 2 * _REACH, height)
        more_columns = _around(left, side, 2 * _REACH, width)
        context = degrade(_crop(hr, _scaled(more_rows, scale), _scaled(more_columns, scale)), scale)
        context = _crop(context, _shifted(rows, more_rows.start), _shifted(columns, more_columns.start))
    else:
        context = _crop(lr, rows, columns)
    context = context.float() / 255
    inner = (slice(top - rows.start, top - rows.start + side), slice(left - columns.start, left - columns.start + side))
    low = _crop(context, *inner)
    condition = _crop(upscale_bicubic(context[None], scale)[0], *(_scaled(part, scale) for part in inner))
    patch = slice(top, top + side), slice(left, left + side)
    high = _crop(hr, *(_scaled(part, scale) for part in patch)).float() / 255
    return high, low, condition


def _texture(hr: torch.Tensor, scale: int, place: tuple[int, int], side: int) -> float:
    """Return the mean absolute difference between vertical and horizontal neighbours in a patch."""
    patch = _crop(hr, *(_scaled(slice(start, start + side), scale) for start in place)).to(torch.int16)
    return sum(float(patch.diff(dim=axis).abs().float().mean()) for axis in (-2, -1))


def _around(start: int, side: int, reach: int, size: int) -> slice:
    return slice(max(start - reach, 0), min(start + side + reach, size))


def _scaled(part: slice, scale: int) -> slice:
    return slice(part.start * scale, part.stop * scale)


def _shifted(part: slice, origin: int) -> slice:
    return slice(part.start - origin, part.stop - origin)


def _crop(planes: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    return planes[..., rows, columns]


def _turned(patch: torch.Tensor, turn: int) -> torch.Tensor:
    """Apply one of the eight symmetries of the square: ``turn % 4`` quarter turns, then a flip from 4 on."""
    patch = patch.rot90(turn % 4, (-2, -1))
    return (patch.flip(-1) if turn >= 4 else patch).contiguous()
