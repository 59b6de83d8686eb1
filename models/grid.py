"""A grid of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from binarize.errors import BinarizeError

_GAP = 2


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Return images of one size and mode in rows of ``columns``, with white gaps of two pixels.

    By default, there are as many columns as the square root of the number of images, rounded up.
    """
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if not images or columns < 1:
        raise BinarizeError(f"a grid needs images and columns; got {len(images)} and {columns}.")
    width, height = images[0].width + _GAP, images[0].height + _GAP
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    grid = Image.new(images[0].mode, (columns * width - _GAP, rows * height - _GAP), "white")
    for number, image in enumerate(images):
        grid.paste(image, (number % columns * width, number // columns * height))
    return grid
