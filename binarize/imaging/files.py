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

# Suffix -> Pillow's format, the modes it stores without loss of a channel or of depth, and how it is written.
_WRITERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    ".png": ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), {}),
    ".tif": ("TIFF", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"), {"compression": "tiff_lzw"}),
    ".jpg": ("JPEG", ("L", "RGB", "CMYK"), {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", ("L", "LA", "RGB", "RGBA"), {"lossless": True}),
    ".bmp": ("BMP", ("1", "L", "P", "RGB"), {}),
}
_WRITERS[".tiff"] = _WRITERS[".tif"]
_WRITERS[".jpeg"] = _WRITERS[".jpg"]


def read_image(path: str | os.PathLike[str]) -> DecodedImage:
    """Read a picture file, whole, upright and with what :class:`DecodedImage` remembers of it.

    Raises:
        BinarizeError: If the file is missing, a folder, no picture, truncated, of an unsupported mode, or beyond
            Pillow's limit against decompression bombs (``2 * PIL.Image.MAX_IMAGE_PIXELS`` pixels). Always one line
            that names the file.
    """
    with _opened(Path(path)) as image:
        return to_image(image)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return height and width of a picture file as shown, its EXIF orientation applied, without decoding the pixels.

    Raises:
        BinarizeError: As :func:`read_image`, for what the header alone can tell.
    """
    with _opened(Path(path)) as image:
        return upright_size(image)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture file; whatever goes wrong inside becomes one line that names it."""
    if not path.exists():
        raise BinarizeError(f"{path}: no such file")
    if path.is_dir():
        raise BinarizeError(f"{path}: is a folder, not a picture file")
    try:
        with warnings.catch_warnings():
            # Large panoramas are legitimate; only the size that Pillow refuses outright is refused.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # Damaged metadata beside sound pixels is no reason to stop.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            with Image.open(path) as image:
                yield image
    except UnidentifiedImageError:
        raise BinarizeError(f"{path}: is not a picture that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise BinarizeError(f"{path}: {one_line(error)} Raise PIL.Image.MAX_IMAGE_PIXELS if you trust it.") from error
    except BinarizeError as error:
        raise BinarizeError(f"{path}: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BinarizeError(f"{path}: cannot be read as a picture: {one_line(error)}") from error


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """List the picture files directly in a folder by name, hidden ones left out.

    Raises:
        BinarizeError: If the folder is missing, is a file, or holds no picture.
    """
    folder = Path(folder)
    if not folder.exists():
        raise BinarizeError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise BinarizeError(f"{folder}: is a file; a folder of pictures is needed")
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise BinarizeError(f"{folder}: holds no pictures; looked for {' '.join(IMAGE_SUFFIXES)}")
    return found


def save_image(image: Image.Image | DecodedImage, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a picture, atomically, in the format that the suffix names; JPEG at quality 95, WebP lossless.

    The colour profile in the image's ``info`` is kept, every other tag (EXIF, orientation) is left out.

    Args:
        image: A Pillow image or a :class:`DecodedImage`.
        path: Where to; its folder must exist.
        force: Replace a file that is already there.

    Returns:
        The path.

    Raises:
        BinarizeError: If the suffix is unknown, the format cannot hold the picture's transparency or depth, the folder
            is missing, the file exists and ``force`` is not given, or writing fails.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        known = sorted(_WRITERS)
        raise BinarizeError(
            f"{path}: cannot write pictures with the suffix {path.suffix!r}; use one of {' '.join(known)}."
            f"{did_you_mean(path.suffix, known)}"
        )
    image = image.to_pil() if isinstance(image, DecodedImage) else image
    name, modes, options = writer
    if image.mode not in modes:
        raise BinarizeError(f"{path}: {name} cannot hold a picture of mode {image.mode!r}; use .png or .tif")

    def write(temporary: Path) -> None:
        image.save(temporary, format=name, icc_profile=image.info.get("icc_profile"), **options)

    return write_atomic(path, write, force=force)
