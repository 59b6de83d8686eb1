"""Small images in every listed format, and seeded mutations of their files."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, features

# Name -> suffix, mode, options for Pillow.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "png": ("png", "RGB", {}),
    "png-alpha": ("png", "RGBA", {}),
    "png-palette": ("png", "P", {"transparency": 3}),
    "png-grey": ("png", "LA", {}),
    "png-deep": ("png", "I;16", {"transparency": 300}),
    "png-bits": ("png", "1", {"bits": 1}),
    "png-animation": ("png", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (19, 13), 9)]}),
    "jpeg": ("jpg", "RGB", {"quality": 90}),
    "jpeg-progressive": ("jpeg", "RGB", {"progressive": True}),
    "jpeg-grey": ("jpg", "L", {}),
    "jpeg-inks": ("jpg", "CMYK", {}),
    "tiff": ("tif", "RGB", {}),
    "tiff-lzw": ("tiff", "RGBA", {"compression": "tiff_lzw"}),
    "tiff-jpeg": ("tif", "RGB", {"compression": "jpeg"}),
    "tiff-deflate": ("tif", "L", {"compression": "tiff_adobe_deflate"}),
    "tiff-fax": ("tif", "1", {"compression": "group4"}),
    "tiff-deep": ("tif", "I;16", {}),
    "webp": ("webp", "RGB", {}),
    "webp-lossless": ("webp", "RGBA", {"lossless": True}),
    "webp-animation": ("webp", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (19, 13), 9)]}),
    "bmp": ("bmp", "RGB", {}),
    "bmp-palette": ("bmp", "P", {}),
    "ppm": ("ppm", "RGB", {}),
    "pgm": ("pgm", "L", {}),
    "gif": ("gif", "P", {"transparency": 2}),
    "gif-animation": ("gif", "P", {"save_all": True, "append_images": [Image.new("P", (19, 13), 9)]}),
}
if features.check("avif"):
    VARIANTS["avif"] = ("avif", "RGB", {})
_ODD = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def source(mode: str, size: tuple[int, int] = (19, 13)) -> Image.Image:
    """An image of smooth and noisy parts."""
    random = np.random.default_rng(3)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, size[::-1]).astype(np.uint16))
    noise = Image.fromarray(random.integers(0, 256, (*size[::-1], 4), dtype=np.uint8))
    return noise.convert("RGB").convert(mode) if mode != "RGBA" else noise


def encoded(variant: str) -> bytes:
    """The bytes of a whole file."""
    suffix, mode, options = VARIANTS[variant]
    buffer = io.BytesIO()
    kind = Image.registered_extensions()[f".{suffix}"]
    exif = Image.Exif()
    exif[0x0112] = 6
    extra = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
    source(mode).save(buffer, kind, **extra, **options)
    return buffer.getvalue()


def mutations(variant: str, count: int, seed: int = 0) -> Iterator[bytes]:
    """Files in which bits, bytes, fields of a header or whole parts were changed."""
    whole = encoded(variant)
    random = np.random.default_rng([seed, *variant.encode()])
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(int(random.integers(1, 4))):
            mutate(data, random)
        yield _with_checksums(bytes(data)) if variant.startswith("png") and random.random() < 0.7 else bytes(data)


def mutate(data: bytearray, random: np.random.Generator) -> None:
    """Change a bit, a byte, a number or a part of a file, most often near its beginning."""
    # Headers matter more than pixels, and TIFF has its header at the end.
    ends = (len(data), min(len(data), 64), min(len(data), 200))
    at = int(random.integers(0, ends[int(random.integers(3))]))
    if data[:2] in (b"II", b"MM") and random.random() < 0.7:
        at = int(random.integers(max(0, len(data) - 250), len(data)))
    kind = int(random.integers(6))
    if kind == 0:
        data[at] ^= 1 << int(random.integers(8))
    elif kind == 1:
        data[at] = int(random.integers(256))
    elif kind in (2, 3):
        width, order = (2, 4)[kind - 2], "<>"[int(random.integers(2))]
        value = _ODD[int(random.integers(len(_ODD)))] % 256**width
        data[at : at + width] = struct.pack(f"{order}{'H' if width == 2 else 'I'}", value)
    elif kind == 4:
        del data[at : at + int(random.integers(1, 40))]
    else:
        data[at:at] = data[at // 2 : at // 2 + int(random.integers(1, 40))]
    if not data:
        data.append(0)


def _with_checksums(data: bytes) -> bytes:
    """A PNG file whose chunks have the right checksums, so that decoders look at what they hold."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        if len(body) != length + 4:
            break
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out) + data[at:]
