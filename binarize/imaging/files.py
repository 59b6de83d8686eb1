"""Reading image files and folders of them, and writing image files."""

from __future__ import annotations

import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError, features

from binarize.errors import BinarizeError, did_you_mean, one_line
from binarize.files import followed, write_atomic
from binarize.imaging.decoded import DecodedImage, to_image, upright_size
from binarize.imaging.limits import check_memory, check_pixels
from binarize.imaging.metadata import what_is_lost

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".webp", ".avif", ".bmp", ".ppm", ".pgm", ".gif",
)  # fmt: skip

# Pillow tries these decoders, whatever the suffix, and no others: its PostScript decoder starts a program.
_HAS_AVIF = features.check("avif")  # Pillow 11.3 and newer, if it was built with it
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM", "GIF", *(("AVIF",) if _HAS_AVIF else ()))
_MAX_FILE = 2**31
_ALWAYS_READ = 2**25  # pixels: 800 MB while they are decoded
_DECODED_BYTES = 24  # per pixel while an image is decoded: Pillow's pixels twice, and three float32 channels

# Suffix -> Pillow's format, the modes it stores without loss of a channel or of depth, and options for writing.
_WRITERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    ".png": ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), {}),
    ".tif": ("TIFF", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"), {"compression": "tiff_lzw"}),
    ".jpg": ("JPEG", ("L", "RGB", "CMYK"), {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", ("L", "LA", "RGB", "RGBA"), {"lossless": True}),
    ".bmp": ("BMP", ("1", "L", "P", "RGB"), {}),
}
_WRITERS |= {".tiff": _WRITERS[".tif"], ".jpeg": _WRITERS[".jpg"], ".jfif": _WRITERS[".jpg"]}
if _HAS_AVIF:
    _WRITERS[".avif"] = ("AVIF", ("RGB", "RGBA"), {"quality": 90, "subsampling": "4:4:4"})
_LOSSY: dict[str, dict[str, Any]] = {"JPEG": {}, "WEBP": {"lossless": False}, "AVIF": {}}  # options beside quality
logging.getLogger("PIL").addHandler(logging.NullHandler())  # otherwise Python prints what its decoders log
_STDERR = threading.RLock()  # two threads must not redirect it at the same time
# Of libwebp, libjpeg, the PNG specification, and what libavif reads.
_LONGEST_SIDE = {"WEBP": 16383, "JPEG": 65500, "PNG": 2**31 - 1, "AVIF": 32768}
_MOST_BYTES = {"TIFF": 2**32, "BMP": 2**31}  # their offsets have 32 bits
_LARGEST_PROFILE = {"PNG": PngImagePlugin.MAX_TEXT_CHUNK, "JPEG": 255 * 65519}  # Pillow reads, or JPEG holds, no more


def read_image(path: str | os.PathLike[str], *, max_pixels: int | None = None) -> DecodedImage:
    """Read an image file, with its orientation applied.

    An image of more than `max_pixels` pixels, by default 100 per byte of the file and at least 2**25, or that does not
    fit into the free memory, is refused before it is decoded; Pillow itself refuses more than
    ``2 * PIL.Image.MAX_IMAGE_PIXELS``.
    """
    path = Path(path)
    with _opened(path) as image:
        what, pixels = f"its size of {image.width}x{image.height}", image.width * image.height
        check_pixels(path, what, pixels, max_pixels, _ALWAYS_READ, "pass a larger max_pixels if you trust the file.")
        check_memory(pixels * _DECODED_BYTES, f"{path}: decoding it", "use a smaller image.")
        animated, notes = what_is_lost(image)
        return replace(to_image(image), animated=animated, notes=notes)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return height and width of an image file, with its orientation applied, without decoding the pixels."""
    with _opened(Path(path)) as image:
        return upright_size(image)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file; turn any failure in the body into one line that names the file."""
    if path.is_dir():
        raise BinarizeError(f"{path}: is a folder, not an image file")
    if not path.exists():
        raise BinarizeError(f"{path}: {'is a link that leads to no file' if path.is_symlink() else 'no such file'}")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BinarizeError(f"{path}: is a pipe or a device; save the image in a file first")
    if status.st_size > _MAX_FILE:
        raise BinarizeError(f"{path}: has {status.st_size:,} bytes; image files may have up to {_MAX_FILE:,}")
    try:
        with warnings.catch_warnings():
            # Large panoramas are legitimate; only the size that Pillow itself refuses is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # The pixels may be sound although the metadata is damaged.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            with Image.open(path, formats=_FORMATS) as image, _quiet_libtiff(image):
                yield image
    except UnidentifiedImageError:
        raise BinarizeError(f"{path}: is not an image that Pillow can read as {', '.join(_FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise BinarizeError(f"{path}: {one_line(error)} Raise PIL.Image.MAX_IMAGE_PIXELS if you trust it.") from error
    except BinarizeError as error:
        raise BinarizeError(str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}") from error
    except MemoryError as error:
        raise BinarizeError(f"{path}: does not fit into the free memory; use a smaller image") from error
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise BinarizeError(f"{path}: cannot be read as an image: {one_line(error)}") from error


@contextmanager
def _quiet_libtiff(image: Image.Image) -> Iterator[None]:
    """Drop what libtiff prints about damaged files; Pillow's exception says enough."""
    if image.format != "TIFF":
        yield
        return
    with _STDERR:
        kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(null)


def list_images(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[Path]:
    """List the image files of a folder by name, without hidden ones; raise an error if there are none.

    `recursive` adds those of all folders in it; links to folders are not followed. A link to a file that does not exist
    is listed, so that it is not missed in silence.
    """
    folder = Path(folder)
    if not folder.exists():
        raise BinarizeError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise BinarizeError(f"{folder}: is a file; a folder of images is needed")
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES and (path.is_file() or not path.exists()):
                found.append(path)
    found.sort()
    if not found:
        raise BinarizeError(f"{folder}: holds no images; looked for {' '.join(IMAGE_SUFFIXES)}")
    return found


def _raise(error: OSError) -> None:
    raise BinarizeError(f"{error.filename}: cannot be listed: {error.strerror}") from error


def save_image(
    image: Image.Image | DecodedImage,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    quality: int | None = None,
) -> Path:
    """Write an image atomically in the format of the path's suffix.

    Without `quality`, 1 to 100, JPEG has 95, AVIF 90, and WebP is lossless; with it, WebP is lossy, and formats that
    are always lossless are refused. The folder must exist, and an existing file is replaced only by `force`. The colour
    profile and the EXIF data in the image's ``info``, as `DecodedImage.to_pil` sets them, are written. A format that
    cannot hold the image's transparency or depth is refused.
    """
    source = image.to_pil() if isinstance(image, DecodedImage) else image
    profile = source.info.get("icc_profile")
    check_writable(source.mode, path, size=(source.height, source.width), icc_profile=profile, quality=quality)
    name, _, options = _WRITERS[Path(path).suffix.lower()]
    options = {**options, "format": name, "icc_profile": profile}
    if "exif" in source.info:
        options["exif"] = source.info["exif"]
        options.pop("compression", None)  # libtiff, which compresses, cannot write the directories of EXIF data
    if quality is not None:
        options |= {**_LOSSY[name], "quality": quality}
    return write_atomic(path, lambda temporary: source.save(temporary, **options), force=force)


def check_writable(
    mode: str,
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    icc_profile: bytes | None = None,
    quality: int | None = None,
) -> None:
    """Check that the format of the path's suffix can hold an image, and that the path can be written to.

    `mode` is Pillow's, `size` is (H, W); for `quality`, see `save_image`.
    """
    path, known = Path(path), sorted(_WRITERS)
    followed(path)
    if path.suffix.lower() not in known:
        hint = f"use one of {' '.join(known)}.{did_you_mean(path.suffix, known)}"
        raise BinarizeError(f"{path}: cannot write images with the suffix {path.suffix!r}; {hint}")
    name, modes, _ = _WRITERS[path.suffix.lower()]
    if mode not in modes:
        raise BinarizeError(f"{path}: {name} cannot hold an image of mode {mode!r}; use .png or .tif")
    if quality is not None and name not in _LOSSY:
        raise BinarizeError(f"{path}: {name} is lossless and has no quality; use .jpg or .webp, or omit the quality")
    if quality is not None and not 1 <= quality <= 100:
        raise BinarizeError(f"{path}: the quality must be within 1..100, got {quality}")
    if size is not None:
        longest, most = _LONGEST_SIDE.get(name), _MOST_BYTES.get(name)
        if longest is not None and max(size) > longest:
            what = f"{name} holds at most {longest} pixels a side, not {size[1]}x{size[0]}"
            raise BinarizeError(f"{path}: {what}; use .png or .tif")
        if most is not None and size[0] * size[1] * Image.getmodebands(mode) * (1 + (mode == "I;16")) >= most:
            raise BinarizeError(f"{path}: {name} holds less than {most:,} bytes of pixels; use .png")
    largest = _LARGEST_PROFILE.get(name)
    if icc_profile is not None and largest is not None and len(icc_profile) > largest:
        what = f"{name} holds colour profiles of at most {largest:,} bytes, not {len(icc_profile):,}"
        raise BinarizeError(f"{path}: {what}; use .tif or .webp")
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        raise BinarizeError(f"{path}: the folder {path.parent} is not writable")
