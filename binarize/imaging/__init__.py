"""Pictures: reading and writing them safely, and MATLAB's resizing. Nothing here knows about networks."""

from __future__ import annotations

from binarize.imaging.files import (
    PICTURE_SUFFIXES,
    list_pictures,
    picture_size,
    read_picture,
    save_picture,
    write_atomic,
)
from binarize.imaging.pairs import ImagePair, ImagePairs
from binarize.imaging.picture import Picture, to_picture
from binarize.imaging.resize import degrade, enlarge

__all__ = [
    "PICTURE_SUFFIXES",
    "ImagePair",
    "ImagePairs",
    "Picture",
    "degrade",
    "enlarge",
    "list_pictures",
    "picture_size",
    "read_picture",
    "save_picture",
    "to_picture",
    "write_atomic",
]
