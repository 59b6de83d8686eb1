"""Training images for generation. Each item is a function of the seed and its index alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from binarize.errors import BinarizeError
from binarize.imaging import IMAGE_SUFFIXES, image_size, list_images, read_image
from binarize.imaging.pairs import raise_all
from binarize.randomness import generator
from binarize.training.draws import PATCH_STREAM, below, draws, shuffled

_MODES = {1: "L", 3: "RGB"}


class LabelledImages(Dataset[dict[str, Any]]):
    """The images of a folder, resized, cropped and flipped, with the labels of their classes.

    As in `PairedPatches`, each run of n indices uses each of the n images once, in a new random order.

    Each item is a dict with ``"image"``, float32 (C, R, R) in [-1, 1]; ``"name"``, the path in the folder; and with
    classes ``"class_label"``, int64, the position of the class, or the number of classes for no class.

    The shorter side of an image is resized to R by Pillow's Lanczos filter; transparency is ignored. All images are
    decoded at construction and kept as 8-bit pixels.

    Args:
        folder: The images, in any of its sub-folders; with classes, in the sub-folders of these names.
        resolution: R, the side of the items in pixels.
        channels: C, 1 for greyscale or 3 for RGB.
        classes: Names of sub-folders in the order of their labels, or None.
        class_dropout: Probability that an item has no class.
        center_crop: Crop in the middle; otherwise at a random place.
        random_flip: Flip each item horizontally with probability 1/2.
        seed: 0 to 2**64 - 1.

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
        class_dropout: float = 0.0,
        center_crop: bool = True,
        random_flip: bool = False,
        seed: int = 0,
    ) -> None:
        if channels not in _MODES:
            raise BinarizeError(f"images have 1 or 3 channels, but the network has {channels}")
        self.resolution, self.center_crop, self.random_flip = resolution, center_crop, random_flip
        self.class_dropout, self.seed = class_dropout, seed
        self.num_classes = None if classes is None else len(classes)
        self.files = find_images(folder, classes)
        self.labels = [label for label, _ in self.files.values()]
        self.names = list(self.files)
        problems: list[str] = []
        self.pixels: list[Tensor] = []
        for _, path in self.files.values():
            try:
                self.pixels.append(_resized(path, resolution, _MODES[channels], center_crop))
            except BinarizeError as error:
                problems.append(str(error))
        raise_all(folder, problems)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        which = shuffled(self.seed, index, len(self))
        flip, top, left = draws(self.seed, PATCH_STREAM, index, 3)
        pixels = self.pixels[which]
        height, width = pixels.shape[-2:]
        rows, columns = below(top, height - self.resolution + 1), below(left, width - self.resolution + 1)
        patch = pixels[:, rows : rows + self.resolution, columns : columns + self.resolution]
        patch = patch.flip(-1) if self.random_flip and below(flip, 2) else patch
        item = {"image": patch.float() / 127.5 - 1, "name": self.names[which]}
        if self.num_classes is None:
            return item
        none = self.class_dropout > generator(self.seed, "class", index).random()
        return {**item, "class_label": self.num_classes if none else self.labels[which]}


def find_images(folder: Path, classes: Sequence[str] | None) -> dict[str, tuple[int, Path]]:
    """Return the path inside the folder of each image, with slashes -> its label, 0 without classes, and its path."""
    if not folder.is_dir():
        raise BinarizeError(f"train_data_dir: there is no folder {str(folder)!r}.")
    if classes is None:
        inside = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        names = sorted(path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts))
        if not names:
            raise BinarizeError(f"train_data_dir: {folder} holds no images; looked for {' '.join(IMAGE_SUFFIXES)}.")
        return {name: (0, folder / name) for name in names}
    missing = [name for name in classes if not (folder / name).is_dir()]
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        raise BinarizeError(f"classes: {folder} has no sub-folder {missing[0]!r}; it has {found}.")
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
