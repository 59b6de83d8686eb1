"""Folders of high-resolution images, with or without low-resolution ones, as checked pairs."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

from binarize.errors import BinarizeError
from binarize.imaging.files import IMAGE_SUFFIXES, image_size, list_images, read_image

if TYPE_CHECKING:
    import torch

Folder = str | os.PathLike[str]
Degrader = Callable[["torch.Tensor", int, int], "torch.Tensor"]
"""``make(hr, scale, index)``: uint8 (3, H, W) -> (3, H // scale, W // scale); a pure function of its arguments."""
_SHOWN = 20


@dataclass(frozen=True, eq=False)
class ImagePair:
    """An image at both resolutions: uint8 (3, H, W), cropped to a multiple of the scale, and (3, H / scale, ...)."""

    name: str
    hr: torch.Tensor
    lr: torch.Tensor


class PairFiles(NamedTuple):
    """The files of a pair; ``lr`` is None if it is made from ``hr``. ``size`` is the cropped (H, W)."""

    hr: Path
    lr: Path | None
    size: tuple[int, int]


class ImagePairs(Sequence[ImagePair]):
    """The pairs of a folder in the order of their names, each read on access.

    Without `lr_dir`, low-resolution images are made by `degrader`, by default `degrade`. With it, files are matched by
    name: ``baby.png`` matches ``baby.*``, ``babyx2.*`` or ``baby_x2.*`` at scale 2, as in DIV2K and Set5, in this
    order. The last part of `lr_dir` can be a pattern instead, such as ``LR/{}_bicLRx2``, with the name in place of the
    braces. If `lr_dir` holds no images but a folder ``X2``, that folder is used.

    Images may have any format and mode that `read_image` reads. Transparency is ignored; greyscale is repeated over the
    channels. `min_side` is the smallest side of a high-resolution image in pixels, by default `scale`.

    Raises:
        BinarizeError: One error for all images that have an unreadable header, are too small, have no partner, or one
            of the wrong size. Only headers are read here; see `check`.
    """

    def __init__(
        self,
        hr_dir: Folder,
        lr_dir: Folder | None = None,
        *,
        scale: int,
        min_side: int | None = None,
        degrader: Degrader | None = None,
    ) -> None:
        if not isinstance(scale, int) or scale < 1:
            raise BinarizeError(f"scale={scale!r:.40}: pairs of images need a whole number of at least 1.")
        self.scale, self.degrader, high = scale, degrader, list_images(hr_dir)
        problems: list[str] = []
        partners = dict.fromkeys(high, None) if lr_dir is None else _match(high, Path(lr_dir), scale, problems)
        files: list[PairFiles] = []
        for hr, lr in partners.items():
            try:
                files.append(PairFiles(hr, lr, _cropped_size(hr, lr, scale, max(scale, min_side or 1))))
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
        from binarize.imaging.resize import degrade

        hr, lr = self.read(index)
        if lr is None:
            at = range(len(self))[index]
            lr = degrade(hr, self.scale) if self.degrader is None else self.degrader(hr, self.scale, at)
        return ImagePair(self.files[index].hr.stem, hr, lr)

    def first(self, count: int) -> ImagePairs:
        """Return the first `count` pairs, or all if there are fewer."""
        chosen = copy.copy(self)
        chosen.files = self.files[:count]
        return chosen

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decode a pair's files: the cropped uint8 ``hr``, and ``lr`` if it has its own file."""
        hr, lr, (height, width) = self.files[index]
        pixels = read_image(hr).pixels()[:, :height, :width].contiguous()
        return pixels, None if lr is None else read_image(lr).pixels()

    def check(self) -> None:
        """Decode every file once; one error names all that are truncated or damaged behind their headers."""
        problems = []
        for index in range(len(self)):
            try:
                self.read(index)
            except BinarizeError as error:
                problems.append(str(error))
        raise_all(self.files[0].hr.parent, problems)


def raise_all(folder: Folder, problems: Sequence[str]) -> None:
    """Raise one BinarizeError for all problems, listing at most twenty of them, if there are any."""
    if len(problems) == 1:
        raise BinarizeError(problems[0])
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise BinarizeError(f"{folder}: {len(problems)} images cannot be used: {'; '.join(problems[:_SHOWN])}{more}")


def _match(high: Sequence[Path], lr_dir: Path, scale: int, problems: list[str]) -> dict[Path, Path | None]:
    pattern = lr_dir.name if "{}" in lr_dir.name else None
    lr_dir = lr_dir if pattern is None else lr_dir.parent
    nested = lr_dir / f"X{scale}"
    if nested.is_dir() and not any(path.suffix.lower() in IMAGE_SUFFIXES for path in lr_dir.iterdir()):
        lr_dir = nested
    unmatched: dict[str, list[Path]] = {}
    for path in list_images(lr_dir):
        unmatched.setdefault(path.stem.lower(), []).append(path)
    found: dict[Path, list[Path]] = {}
    patterns = ["{}", f"{{}}x{scale}", f"{{}}_x{scale}"] if pattern is None else [pattern]
    for form in patterns:  # an equal name comes before a longer one
        for hr in high:
            if hr not in found and (paths := unmatched.pop(form.replace("{}", hr.stem).lower(), None)):
                found[hr] = paths
    partners: dict[Path, Path | None] = {}
    for hr in high:
        paths = found.get(hr, [])
        if len(paths) == 1:
            partners[hr] = paths[0]
        elif paths:
            problems.append(f"{hr}: several low-resolution partners: {', '.join(path.name for path in paths)}")
        else:
            names = ", ".join(form.replace("{}", hr.stem) for form in patterns)
            problems.append(f"{hr}: no low-resolution partner in {lr_dir}; looked for {names}")
    problems.extend(f"{path}: no high-resolution partner" for paths in unmatched.values() for path in paths)
    return partners


def _cropped_size(hr: Path, lr: Path | None, scale: int, min_side: int) -> tuple[int, int]:
    height, width = image_size(hr)
    size = (height // scale * scale, width // scale * scale)
    if min(size) < min_side:
        raise BinarizeError(f"{hr}: is {width}x{height} pixels, at least {min_side}x{min_side} are needed")
    if lr is not None:
        lr_height, lr_width = image_size(lr)
        if (lr_height * scale, lr_width * scale) != size:
            needed = f"at scale {scale} the latter must be {width // scale}x{height // scale}"
            raise BinarizeError(f"{hr} is {width}x{height} and {lr} is {lr_width}x{lr_height}; {needed}")
    return size
