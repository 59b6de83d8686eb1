"""Folders of high-resolution pictures, with or without their low-resolution ones, as checked pairs."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch

from binarize.errors import BinarizeError
from binarize.imaging.files import IMAGE_SUFFIXES, image_size, list_images, read_image
from binarize.imaging.resize import degrade

_SHOWN = 20


@dataclass(frozen=True, eq=False)
class ImagePair:
    """A picture at both resolutions.

    Attributes:
        name: The high-resolution file's name without its suffix.
        hr: uint8 (3, H, W), H and W cropped to multiples of the scale.
        lr: uint8 (3, H / scale, W / scale).
    """

    name: str
    hr: torch.Tensor
    lr: torch.Tensor


@dataclass(frozen=True)
class PairFiles:
    """The files of a pair; ``lr`` is None where it is to be made from ``hr``. ``size`` is the cropped (H, W)."""

    hr: Path
    lr: Path | None
    size: tuple[int, int]


class ImagePairs(Sequence[ImagePair]):
    """The pairs of a folder in the order of their names, each read when it is asked for.

    Without ``lr_dir`` the low-resolution pictures are made by :func:`~binarize.imaging.degrade`. With it, files are
    matched by name: ``baby.png`` goes with ``baby.*``, ``babyx2.*`` or ``baby_x2.*`` at scale 2, as DIV2K and Set5 name
    theirs. Where ``lr_dir`` holds no pictures but a folder ``X2`` does, that is taken.

    Args:
        hr_dir: Folder of high-resolution pictures, in any format and mode that :func:`read_image` reads.
            Transparency is ignored, greyscale repeated over the three channels.
        lr_dir: Folder of the low-resolution ones.
        scale: Whole factor between them.
        min_side: Smallest side that a high-resolution picture may have, in pixels; by default ``scale``.

    Raises:
        BinarizeError: If a folder is missing or empty, or naming at once all pictures whose header cannot be read, that
            are too small, have no partner, or a partner of another size. Only headers are read here; see :meth:`check`.
    """

    def __init__(
        self,
        hr_dir: str | os.PathLike[str],
        lr_dir: str | os.PathLike[str] | None = None,
        *,
        scale: int,
        min_side: int | None = None,
    ) -> None:
        self.scale = scale
        high = list_images(hr_dir)
        problems: list[str] = []
        partners = dict.fromkeys(high, None) if lr_dir is None else _match(high, Path(lr_dir), scale, problems)
        files: list[PairFiles] = []
        for hr, lr in partners.items():
            try:
                files.append(PairFiles(hr, lr, _checked_size(hr, lr, scale, max(scale, min_side or 1))))
            except BinarizeError as error:
                problems.append(str(error))
        raise_all(hr_dir, problems)
        self.files: tuple[PairFiles, ...] = tuple(files)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> ImagePair: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImagePair]: ...

    def __getitem__(self, index: int | slice) -> ImagePair | list[ImagePair]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        hr, lr = self.read(index)
        return ImagePair(self.files[index].hr.stem, hr, degrade(hr, self.scale) if lr is None else lr)

    def first(self, count: int) -> ImagePairs:
        """Return the first ``count`` pairs, or all where there are fewer."""
        chosen = copy.copy(self)
        chosen.files = self.files[:count]
        return chosen

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decode a pair's files: the cropped uint8 ``hr``, and ``lr`` where it has a file of its own."""
        files = self.files[index]
        height, width = files.size
        hr = read_image(files.hr).pixels()[:, :height, :width].contiguous()
        return hr, None if files.lr is None else read_image(files.lr).pixels()

    def check(self) -> None:
        """Decode every file once.

        Raises:
            BinarizeError: Naming all files that are truncated or otherwise broken behind a sound header.
        """
        problems = []
        for index in range(len(self)):
            try:
                self.read(index)
            except BinarizeError as error:
                problems.append(str(error))
        raise_all(self.files[0].hr.parent, problems)


def raise_all(folder: str | os.PathLike[str], problems: Sequence[str]) -> None:
    """Raise one error that names every problem (the first twenty in words), if there is one.

    Raises:
        BinarizeError: If ``problems`` is not empty.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise BinarizeError(problems[0])
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise BinarizeError(f"{folder}: {len(problems)} pictures cannot be used: {'; '.join(problems[:_SHOWN])}{more}")


def _match(high: Iterable[Path], lr_dir: Path, scale: int, problems: list[str]) -> dict[Path, Path | None]:
    nested = lr_dir / f"X{scale}"
    if nested.is_dir() and not any(path.suffix.lower() in IMAGE_SUFFIXES for path in lr_dir.iterdir()):
        lr_dir = nested
    unclaimed: dict[str, list[Path]] = {}
    for path in list_images(lr_dir):
        unclaimed.setdefault(path.stem.lower(), []).append(path)
    partners: dict[Path, Path | None] = {}
    for hr in high:
        stem = hr.stem.lower()
        names = (stem, f"{stem}x{scale}", f"{stem}_x{scale}")
        found = [path for name in names for path in unclaimed.pop(name, [])]
        if len(found) == 1:
            partners[hr] = found[0]
        elif found:
            problems.append(f"{hr}: several low-resolution partners: {', '.join(path.name for path in found)}")
        else:
            problems.append(f"{hr}: no low-resolution partner in {lr_dir}; looked for {', '.join(names)}")
    problems.extend(f"{path}: no high-resolution partner" for paths in unclaimed.values() for path in paths)
    return partners


def _checked_size(hr: Path, lr: Path | None, scale: int, min_side: int) -> tuple[int, int]:
    height, width = image_size(hr)
    size = (height // scale * scale, width // scale * scale)
    if min(size) < min_side:
        raise BinarizeError(f"{hr}: is {width}x{height} pixels, at least {min_side}x{min_side} are needed")
    if lr is not None:
        small_height, small_width = image_size(lr)
        if (small_height * scale, small_width * scale) != size:
            raise BinarizeError(
                f"{hr} is {width}x{height} and {lr} is {small_width}x{small_height}; at scale {scale} the latter must "
                f"be {width // scale}x{height // scale}"
            )
    return size
