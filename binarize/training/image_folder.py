"""Training images for generation. Each item is a function of the seed and its index alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from binarize.errors import BinarizeError
from binarize.imaging.labelled import LabelledFolder
from binarize.models.latents import encode
from binarize.progress import ProgressBar
from binarize.randomness import generator
from binarize.training.draws import PATCH_STREAM, below, draws, shuffled

_ENCODED = 16  # images at a time


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
        which, flipped, top, left = self.choice(index)
        pixels = self.images.pixels[which]
        height, width = pixels.shape[-2:]
        rows, columns = below(top, height - self.resolution + 1), below(left, width - self.resolution + 1)
        patch = pixels[:, rows : rows + self.resolution, columns : columns + self.resolution]
        return self.item(index, which, _unit(patch.flip(-1) if flipped else patch))

    def choice(self, index: int) -> tuple[int, bool, np.uint64, np.uint64]:
        """Return which image an item is, whether it is flipped, and two draws for its place."""
        flip, top, left = draws(self.seed, PATCH_STREAM, index, 3)
        return shuffled(self.seed, index, len(self)), bool(self.random_flip and below(flip, 2)), top, left

    def item(self, index: int, which: int, image: Tensor) -> dict[str, Any]:
        """Return an item of an image's pixels or latents."""
        item = {"image": image, "name": self.images.names[which]}
        if self.num_classes is None:
            return item
        none = self.class_dropout > generator(self.seed, "class", index).random()
        return {**item, "class_label": self.num_classes if none else self.images.labels[which]}


class Latents(Dataset[dict[str, Any]]):
    """The latents of `LabelledImages`, which are centrally cropped: each image is encoded once.

    An item is as that of the images, but its ``"image"`` is drawn from the Gaussian distribution of the latents, and
    scaled to about unit variance, float32 (C, R / factor, R / factor).
    """

    def __init__(self, images: LabelledImages, vae: AutoencoderKL, *, progress: bool = False) -> None:
        self.images = images
        starts = range(0, len(images), _ENCODED)
        parts = []
        with torch.no_grad():
            for start in ProgressBar(starts, total=len(starts), desc="encode", unit="batch", disable=not progress):
                pixels = _unit(torch.stack(images.images.pixels[start : start + _ENCODED]))
                both = [pixels, pixels.flip(-1)] if images.random_flip else [pixels]
                parts.append([torch.stack(encode(vae, each)) for each in both])
        self.gaussians = [torch.cat(sides, dim=1) for sides in zip(*parts, strict=True)]
        """Mean and standard deviation of all images, and of all flipped ones: (2, N, C, h, w)."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        which, flipped, _, _ = self.images.choice(index)
        mean, std = self.gaussians[int(flipped)][:, which]
        noise = generator(self.images.seed, "latent", index).standard_normal(tuple(mean.shape), dtype="float32")
        return self.images.item(index, which, mean + std * torch.from_numpy(noise))


def _unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1
