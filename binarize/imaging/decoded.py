"""Pictures as tensors, with what their file said beside the pixels: greyscale, depth, transparency, colour profile."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps

from binarize.errors import BinarizeError

_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_COLOUR = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV")
# What Pillow's EXIF reader raises on damaged tags.
_METADATA_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error)
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """A decoded picture; made by :func:`read_image` and :func:`to_image`.

    Attributes:
        rgb: float32 (3, H, W) in [0, 1]; greyscale is repeated over the channels.
        alpha: float32 (1, H, W) in [0, 1] where the source has transparency, else None.
        mode: Pillow's name of the source's mode: "RGB", "RGBA", "L", "LA", "1", "I;16", "P", "CMYK", ...
        icc_profile: The colour profile that the pixels of ``rgb`` are in, as bytes, where the source names one.
    """

    rgb: torch.Tensor
    alpha: torch.Tensor | None
    mode: str
    icc_profile: bytes | None = None

    @property
    def is_grey(self) -> bool:
        """Whether the source was greyscale, and so the written picture is."""
        return self.mode in _GREY

    def pixels(self) -> torch.Tensor:
        """Return ``rgb`` as uint8 (3, H, W), rounded to the nearest level; transparency is left aside."""
        return (self.rgb * 255 + 0.5).floor_().clamp_(0, 255).to(torch.uint8)

    def with_pixels(self, rgb: torch.Tensor, alpha: torch.Tensor | None) -> DecodedImage:
        """Return a picture of the same mode and profile with other pixels, of any size.

        Args:
            rgb: Floating point (3, H, W) in [0, 1].
            alpha: Floating point (1, H, W) in [0, 1], or None.

        Raises:
            BinarizeError: If a shape is another.
        """
        if rgb.ndim != 3 or rgb.shape[0] != 3:
            raise BinarizeError(f"DecodedImage.with_pixels: rgb must be (3, H, W), got {tuple(rgb.shape)}")
        if alpha is not None and alpha.shape != (1, *rgb.shape[1:]):
            expected = (1, *rgb.shape[1:])
            raise BinarizeError(f"DecodedImage.with_pixels: alpha must be {expected}, got {tuple(alpha.shape)}")
        return replace(
            self,
            rgb=rgb.detach().to("cpu", torch.float32),
            alpha=None if alpha is None else alpha.detach().to("cpu", torch.float32),
        )

    def to_pil(self) -> Image.Image:
        """Return the picture as Pillow's: L, LA, RGB or RGBA of 8 bits, or 16-bit grey where the source was that.

        Greyscale sources give greyscale (the BT.601 luma of ``rgb``). Values are rounded to the nearest level. Palettes
        and CMYK become RGB, since new pixels hold colours that the palette or the inks do not name. Pillow has no
        16-bit grey with transparency: with ``alpha`` it becomes 8-bit.
        """
        if self.is_grey:
            weights = torch.tensor(_LUMA, dtype=torch.float64).view(3, 1, 1)
            grey = (self.rgb.double() * weights).sum(0)
            if self.mode in _DEEP and self.alpha is None:
                return self._profiled(Image.fromarray(_levels(grey, 65535).astype(np.uint16)))
            planes = [_levels(grey, 255)]
        else:
            planes = list(_levels(self.rgb, 255))
        if self.alpha is not None:
            planes.append(_levels(self.alpha[0], 255))
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[len(planes)]
        bands = [Image.fromarray(plane.astype(np.uint8)) for plane in planes]
        return self._profiled(bands[0] if len(bands) == 1 else Image.merge(mode, bands))

    def _profiled(self, image: Image.Image) -> Image.Image:
        if self.icc_profile is not None:
            image.info["icc_profile"] = self.icc_profile
        return image


def to_image(image: Image.Image) -> DecodedImage:
    """Decode a Pillow image: orientation applied, palette, inks and transparency resolved, depth remembered.

    CMYK with a colour profile is converted by it to sRGB. 16-bit colour arrives from Pillow as 8-bit. Of an animation
    the current frame is taken.

    Raises:
        BinarizeError: If the mode has no agreed black and white level (floating point, 32-bit integers beyond 16 bits,
            LAB), or the file behind the image turns out to be truncated.
    """
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise BinarizeError(f"cannot decode the picture: {error}") from error
    mode = image.mode
    if mode not in _GREY + _COLOUR:
        raise BinarizeError(
            f"pictures of mode {mode!r} are not supported; convert to 8-bit RGB, or to 8- or 16-bit greyscale, first"
        )
    upright = _upright(image)
    profile = image.info.get("icc_profile")
    if mode in _DEEP:
        return _deep(upright, profile)
    transparent = mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if mode == "CMYK":
        colour, profile = _inks(upright, profile), None
    else:
        colour = upright.convert("RGBA" if transparent else "RGB")
    values = torch.from_numpy(np.array(colour, dtype=np.float32)).permute(2, 0, 1) / 255
    alpha = values[3:].contiguous() if transparent and mode != "CMYK" else None
    return DecodedImage(values[:3].contiguous(), alpha, mode, _fitting(profile, mode))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width with the EXIF orientation applied."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except _METADATA_ERRORS:
        turned = False
    return (image.width, image.height) if turned else (image.height, image.width)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _METADATA_ERRORS:
        return image  # damaged metadata beside sound pixels says nothing about the orientation


def _deep(image: Image.Image, profile: bytes | None) -> DecodedImage:
    levels = np.array(image, dtype=np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise BinarizeError(
            f"a 32-bit integer picture must stay within 0..65535, got {levels.min()}..{levels.max()}; rescale it first"
        )
    grey = torch.from_numpy((levels / 65535).astype(np.float32))
    return DecodedImage(grey.expand(3, *grey.shape).clone(), None, image.mode, _fitting(profile, image.mode))


def _inks(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert CMYK to RGB, by its profile to sRGB where it has a usable one."""
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError):
            converted = None  # a damaged or unrelated profile says nothing about the inks
        if converted is not None:
            return converted
    return image.convert("RGB")


def _fitting(profile: bytes | None, mode: str) -> bytes | None:
    """Return the profile if its colour space is that of the pixels we write; it would mislead a viewer otherwise."""
    # ICC.1 header: bytes 16..19 name the colour space of the data.
    space = b"GRAY" if mode in _GREY else b"RGB "
    return profile if profile and profile[16:20] == space else None


def _levels(values: torch.Tensor, top: int) -> np.ndarray:
    return (values.double().clamp(0, 1) * top + 0.5).floor().numpy()
