"""Training images for generation. Each item is a function of the seed and its index alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from binarize.errors import BinarizeError
from binarize.imaging.labelled import LabelledFolder
from binarize.randomness import generator
from binarize.training.draws import PATCH_STREAM, below, draws, shuffled


class LabelledImages(Dataset[dict[str, Any]]):
    """The images of a folder, resized, cropped and flipped, with the labels of their classes.

    As in `PairedPatches`, each run of n indices uses each of the n images once, in a new random order.

    Each item is a dict with ``"image"``, float32 (C, R, R) in [-1, 1]; ``"name"``, the path in the folder; and with
    classes ``"class_label"``, int64, the position of the class, or the number of classes for no class.

    Args:
        folder: The images, as `binarize.imaging.labelled.LabelledFolder` finds, resizes and checks them.
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
        options: dict[str, Any] = {"classes": classes, "center_crop": center_crop}
        try:
            self.images = LabelledFolder(folder, resolution=resolution, channels=channels, **options)
        except BinarizeError as error:
            raise BinarizeError(f"train_data_dir: {error}") from error
        self.resolution, self.random_flip = resolution, random_flip
        self.class_dropout, self.seed = class_dropout, seed
        self.num_classes = None if classes is None else len(classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        which = shuffled(self.seed, index, len(self))
        flip, top, left = draws(self.seed, PATCH_STREAM, index, 3)
        pixels = self.images.pixels[which]
        height, width = pixels.shape[-2:]
        rows, columns = below(top, height - self.resolution + 1), below(left, width - self.resolution + 1)
        patch = pixels[:, rows : rows + self.resolution, columns : columns + self.resolution]
        patch = patch.flip(-1) if self.random_flip and below(flip, 2) else patch
        item = {"image": patch.float() / 127.5 - 1, "name": self.images.names[which]}
        if self.num_classes is None:
            return item
        none = self.class_dropout > generator(self.seed, "class", index).random()
        return {**item, "class_label": self.num_classes if none else self.images.labels[which]}
