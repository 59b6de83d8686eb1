"""Reading, writing and resizing images, independent of any network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from binarize.deprecation import renamed
from binarize.importing import exports

if TYPE_CHECKING:
    from binarize.files import write_atomic
    from binarize.imaging import degradation as degradation
    from binarize.imaging.decoded import DecodedImage, to_image
    from binarize.imaging.files import IMAGE_SUFFIXES, check_writable, image_size, list_images, read_image, save_image
    from binarize.imaging.pairs import ImagePair, ImagePairs
    from binarize.imaging.resize import degrade, upscale_bicubic

__all__ = [
    "IMAGE_SUFFIXES", "DecodedImage", "ImagePair", "ImagePairs", "check_writable", "degrade", "image_size",
    "list_images", "read_image", "save_image", "to_image", "upscale_bicubic", "write_atomic",
]  # fmt: skip

_RENAMED = {
    "PICTURE_SUFFIXES": "IMAGE_SUFFIXES", "Picture": "DecodedImage", "enlarge": "upscale_bicubic",
    "list_pictures": "list_images", "picture_size": "image_size", "read_picture": "read_image",
    "save_picture": "save_image", "to_picture": "to_image",
}  # fmt: skip
# Modules that handle tensors import PyTorch, and checking files needs none.
_NAMES = {
    "decoded": ("DecodedImage", "to_image"),
    "files": (
        "IMAGE_SUFFIXES", "check_writable", "image_size", "list_images", "read_image", "save_image", "write_atomic",
    ),
    "pairs": ("ImagePair", "ImagePairs"),
    "resize": ("degrade", "upscale_bicubic"),
}  # fmt: skip
__getattr__ = renamed(__name__, _RENAMED, exports(__name__, _NAMES))
