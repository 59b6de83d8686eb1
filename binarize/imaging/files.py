"""Reading image files and folders of them, and writing image files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from binarize.errors import BinarizeError, did_you_mean, one_line
from binarize.files import write_atomic
from binarize.imaging.decoded import DecodedImage, to_image, upright_size

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".ppm", ".pgm", ".gif")

# Suffix -> Pillow's format, the modes it stores without loss of a channel or of depth, and options for writing.
_WRITERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    ".png": ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), {}),
    ".tif": ("TIFF", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"), {"compression": "tiff_lzw"}),
    ".jpg": ("JPEG", ("L", "RGB", "CMYK"), {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", ("L", "LA", "RGB", "RGBA"), {"lossless": True}),
    ".bmp": ("BMP", ("1", "L", "P", "RGB"), {}),
}
_WRITERS |= {".tiff": _WRITERS[".tif"], ".jpeg": _WRITERS[".jpg"]}


def read_image(path: str | os.PathLike[str]) -> DecodedImage:
    """Read an image file of at most ``2 * PIL.Image.MAX_IMAGE_PIXELS`` pixels, with its orientation applied."""
    with _opened(Path(path)) as image:
        return to_image(image)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return height and width of an image file, with its orientation applied, without decoding the pixels."""
    with _opened(Path(path)) as image:
        return upright_size(image)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file; turn any failure in the body into one line that names the file."""
    if not path.exists():
        raise BinarizeError(f"{path}: no such file")
    if path.is_dir():
        raise BinarizeError(f"{path}: is a folder, not an image file")
    try:
        with warnings.catch_warnings():
            # Large panoramas are legitimate; only the size that Pillow itself refuses is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # The pixels may be sound although the metadata is damaged.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            with Image.open(path) as image:
                yield image
    except UnidentifiedImageError:
        raise BinarizeError(f"{path}: is not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise BinarizeError(f"{path}: {one_line(error)} Raise PIL.Image.MAX_IMAGE_PIXELS if you trust it.") from error
    except BinarizeError as error:
        raise BinarizeError(f"{path}: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BinarizeError(f"{path}: cannot be read as an image: {one_line(error)}") from error


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """List the image files directly in a folder by name, without hidden ones; raise an error if there are none."""
    folder = Path(folder)
    if not folder.exists():
        raise BinarizeError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise BinarizeError(f"{folder}: is a file; a folder of images is needed")
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise BinarizeError(f"{folder}: holds no images; looked for {' '.join(IMAGE_SUFFIXES)}")
    return found


def save_image(image: Image.Image | DecodedImage, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write an image atomically in the format of the path's suffix, JPEG at quality 95, WebP lossless.

    The folder must exist, and an existing file is replaced only by `force`. The colour profile in the image's ``info``
    is kept; other tags (EXIF, orientation) are not written. A format that cannot hold the image's transparency or
    depth is refused.
    """
    source = image.to_pil() if isinstance(image, DecodedImage) else image
    check_writable(source.mode, path)
    name, _, options = _WRITERS[Path(path).suffix.lower()]
    options = {**options, "format": name, "icc_profile": source.info.get("icc_profile")}
    return write_atomic(path, lambda temporary: source.save(temporary, **options), force=force)


def check_writable(mode: str, path: str | os.PathLike[str]) -> None:
    """Check that the format of the path's suffix can hold an image of a mode, and that the folder is writable."""
    path, known = Path(path), sorted(_WRITERS)
    if path.suffix.lower() not in known:
        hint = f"use one of {' '.join(known)}.{did_you_mean(path.suffix, known)}"
        raise BinarizeError(f"{path}: cannot write images with the suffix {path.suffix!r}; {hint}")
    name, modes, _ = _WRITERS[path.suffix.lower()]
    if mode not in modes:
        raise BinarizeError(f"{path}: {name} cannot hold an image of mode {mode!r}; use .png or .tif")
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        raise BinarizeError(f"{path}: the folder {path.parent} is not writable")
