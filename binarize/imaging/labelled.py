"""Folders of images with a sub-folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.imaging.files import IMAGE_SUFFIXES, image_size, list_images, read_image
from binarize.imaging.pairs import raise_all

_MODES = {1: "L", 3: "RGB"}


class LabelledFolder:
    """The images of a folder as 8-bit pixels, in the order of their names, with the labels of their classes.

    The shorter side of an image is resized to ``resolution`` by Pillow's Lanczos filter, and with ``center_crop`` only
    the middle is kept. Transparency is ignored. All images are decoded at construction.

    Attributes:
        files: The path in the folder, with slashes -> the label, 0 without classes, and the file.
        pixels: uint8 (channels, H, W) of each image.

    Args:
        folder: The images, in any of its sub-folders; with classes, in the sub-folders of these names.
        resolution: Shorter side of the images in pixels.
        channels: 1 for greyscale or 3 for RGB.
        classes: Names of sub-folders in the order of their labels, or None.
        center_crop: Keep the middle square.

    Raises:
        BinarizeError: If there are no images, a class has none, or listing all that cannot be read or are too small.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resolution: int,
        channels: int,
        classes: Sequence[str] | None = None,
        center_crop: bool = True,
    ) -> None:
        if channels not in _MODES:
            raise BinarizeError(f"images have 1 or 3 channels, but the network has {channels}")
        self.files = find_labelled(folder, classes)
        self.names, self.labels = list(self.files), [label for label, _ in self.files.values()]
        self.pixels: list[Tensor] = []
        problems: list[str] = []
        for _, path in self.files.values():
            try:
                self.pixels.append(_resized(path, resolution, _MODES[channels], center_crop))
            except BinarizeError as error:
                problems.append(str(error))
        raise_all(folder, problems)

    def __len__(self) -> int:
        return len(self.pixels)


def find_labelled(folder: Path, classes: Sequence[str] | None) -> dict[str, tuple[int, Path]]:
    """Return the path in a folder -> the label and the file of its images, as `LabelledFolder` finds them."""
    if not folder.is_dir():
        raise BinarizeError(f"there is no folder {str(folder)!r}; name a folder of images")
    if classes is None:
        inside = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        names = sorted(path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts))
        if not names:
            raise BinarizeError(f"{folder}: holds no images; looked for {' '.join(IMAGE_SUFFIXES)}")
        return {name: (0, folder / name) for name in names}
    missing = [name for name in classes if not (folder / name).is_dir()]
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        raise BinarizeError(f"{folder}: has no sub-folder for the class {missing[0]!r}; it has {found}")
    return {
        f"{name}/{path.name}": (label, path)
        for label, name in enumerate(classes)
        for path in list_images(folder / name)
    }


def _resized(path: Path, resolution: int, mode: str, center_crop: bool) -> Tensor:
    """Return an image with the shorter side ``resolution``, or with ``center_crop`` its middle: uint8 (C, H, W)."""
    height, width = image_size(path)
    if min(height, width) < resolution:
        raise BinarizeError(f"{path}: is {width}x{height} pixels, at least {resolution}x{resolution} are needed")
    image = Image.fromarray(read_image(path).pixels().permute(1, 2, 0).numpy()).convert(mode)
    if min(height, width) > resolution:
        ratio = resolution / min(height, width)
        image = image.resize((round(width * ratio), round(height * ratio)), Image.Resampling.LANCZOS)
    if center_crop:
        left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
        image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()
