"""What an image file says besides its pixels: EXIF that stays true of the upscaled image, and what reading loses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from PIL import ExifTags, Image

_EXIF, _GPS = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo
_KEPT = {
    ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.Software,
    ExifTags.Base.DateTime, ExifTags.Base.Artist, ExifTags.Base.Copyright, ExifTags.Base.Rating,
    ExifTags.Base.XPTitle, ExifTags.Base.XPComment, ExifTags.Base.XPAuthor, ExifTags.Base.XPKeywords,
    ExifTags.Base.XPSubject, int(_EXIF), int(_GPS),
}  # fmt: skip
"""Tags of the first directory. The others describe the stored pixels, which are new."""
_REPLACED = (
    ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight,
    ExifTags.Base.MakerNote,  # it has offsets within the original file
)  # fmt: skip
_MAX_BYTES = 65_000  # JPEG holds one segment of at most 65,533
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # an MPO holds further views, a TIFF pages


def what_is_lost(image: Image.Image) -> tuple[bool, tuple[str, ...]]:
    """Return whether an opened file, not loaded yet, is an animation, and what else is lost in reading it."""
    several = deep = False
    with sound_pixels():
        deep = not image.mode.startswith("I") and any(map(_has_16_bits, getattr(image, "tile", ())))
    with sound_pixels():
        several = image.format in (*_ANIMATED, "TIFF") and bool(getattr(image, "is_animated", False))
    notes = ["its 16-bit colours are read as 8-bit ones, as Pillow does"] if deep else []
    notes += ["only its first page is read"] if several and image.format == "TIFF" else []
    return several and image.format in _ANIMATED, tuple(notes)


def lasting_exif(image: Image.Image) -> bytes | None:
    """Return EXIF data about the scene, the camera and the author, without what describes the stored pixels."""
    with sound_pixels():
        source, kept = image.getexif(), Image.Exif()
        for tag in sorted(_KEPT & set(source)):
            kept[tag] = source.get_ifd(tag) if tag in (_EXIF, _GPS) else source[tag]
        for tag in _REPLACED:
            kept.get(int(_EXIF), {}).pop(int(tag), None)
        data = kept.tobytes() if len(kept) else b""
        if 0 < len(data) <= _MAX_BYTES:
            return data
    return None


def _has_16_bits(tile: Any) -> bool:
    """Whether Pillow's description of stored pixels, (codec, area, offset, arguments), has 16 bits a channel."""
    codec, *_, arguments = tile
    return ";16" in str(arguments) or (codec.startswith("ppm") and arguments[-1] > 255)


@contextlib.contextmanager
def sound_pixels() -> Iterator[None]:
    """Ignore damaged metadata, for which Pillow raises many kinds of exceptions: the pixels may be sound."""
    try:
        yield
    except MemoryError:
        raise
    except Exception:
        return
