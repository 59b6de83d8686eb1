"""Images as tensors, with what their file stores besides pixels: greyscale, depth, transparency, colour profile."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from binarize.errors import BinarizeError, one_line
from binarize.imaging.metadata import lasting_exif, sound_pixels

if TYPE_CHECKING:
    import torch

_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_GREY = ("1", "L", "LA", "La", *_DEEP)
_COLOUR = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV")
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """A decoded image, made by `read_image` or `to_image`.

    ``alpha``, ``icc_profile``, the colour profile of ``rgb``, and ``exif``, which describes the scene and the camera,
    are None if the source has none. ``animated`` says that the source is the first frame of an animation, and ``notes``
    what else of a file was not read.
    """

    rgb: torch.Tensor  # float32 (3, H, W) in [0, 1]; greyscale is repeated over the channels
    alpha: torch.Tensor | None  # float32 (1, H, W) in [0, 1]
    mode: str  # Pillow's mode of the source: "RGB", "RGBA", "L", "LA", "1", "I;16", "P", "CMYK", ...
    icc_profile: bytes | None = None
    exif: bytes | None = None
    animated: bool = False
    notes: tuple[str, ...] = ()

    @property
    def is_grey(self) -> bool:
        """Whether the source is greyscale; the image is then written as greyscale."""
        return self.mode in _GREY

    @property
    def saved_mode(self) -> str:
        """The mode of `to_pil`: L, LA, RGB, RGBA or I;16."""
        if self.mode in _DEEP and self.alpha is None:
            return "I;16"
        return ("L" if self.is_grey else "RGB") + ("" if self.alpha is None else "A")

    def pixels(self) -> torch.Tensor:
        """Return ``rgb`` as uint8 (3, H, W), rounded to the nearest level, without transparency."""
        return (self.rgb * 255 + 0.5).floor_().clamp_(0, 255).byte()

    def with_pixels(self, rgb: torch.Tensor, alpha: torch.Tensor | None) -> DecodedImage:
        """Return an image of the same mode and profile with other pixels, of any size, in [0, 1] in any float dtype.

        `rgb` is (3, H, W), `alpha` (1, H, W) or None.
        """
        expected = (1, *rgb.shape[1:])
        if rgb.ndim != 3 or rgb.shape[0] != 3:
            raise BinarizeError(f"DecodedImage.with_pixels: rgb must be (3, H, W), got {tuple(rgb.shape)}")
        if alpha is not None and alpha.shape != expected:
            raise BinarizeError(f"DecodedImage.with_pixels: alpha must be {expected}, got {tuple(alpha.shape)}")
        alpha = None if alpha is None else alpha.detach().cpu().float()
        return replace(self, rgb=rgb.detach().cpu().float(), alpha=alpha)

    def to_pil(self) -> Image.Image:
        """Return an 8-bit Pillow image (L, LA, RGB or RGBA), or 16-bit greyscale if the source is that.

        Values are rounded to the nearest level; greyscale is the BT.601 luma of ``rgb``. Palettes and CMYK become RGB,
        because new pixels have colours that the palette or the inks cannot name. Greyscale with ``alpha`` is 8-bit,
        because Pillow has no 16-bit mode for it.
        """
        import torch

        mode, planes = self.saved_mode, [*self.rgb]
        if self.is_grey:
            planes = [(self.rgb.double() * torch.tensor(_LUMA, dtype=torch.float64).view(3, 1, 1)).sum(0)]
        if self.alpha is not None:
            planes.append(self.alpha[0])
        if mode == "I;16":
            image = Image.fromarray(_levels(planes[0], 65535).astype(np.uint16))
        else:
            bands = [Image.fromarray(_levels(plane, 255).astype(np.uint8)) for plane in planes]
            image = bands[0] if len(bands) == 1 else Image.merge(mode, bands)
        for name, data in (("icc_profile", self.icc_profile), ("exif", self.exif)):
            if data is not None:
                image.info[name] = data
        return image


def to_image(image: Image.Image) -> DecodedImage:
    """Decode a Pillow image: apply its orientation, resolve palette, inks and transparency, keep its depth.

    CMYK with a colour profile is converted to sRGB. 16-bit colour arrives from Pillow as 8-bit, and 16-bit greyscale
    with transparency is written as 8-bit. An animation gives its current frame. Floating-point images, integers beyond
    16 bits and LAB have no defined black and white level, and raise a BinarizeError.
    """
    import torch

    if 0 in image.size:
        raise BinarizeError(f"the image has no pixels: it is {image.width}x{image.height}")
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise BinarizeError(f"cannot decode the image: {one_line(error)}") from error
    mode = image.mode
    if mode not in _GREY + _COLOUR:
        fix = "convert to 8-bit RGB, or to 8- or 16-bit greyscale, first"
        raise BinarizeError(f"images of mode {mode!r} are not supported; {fix}")
    upright, profile, exif = image, image.info.get("icc_profile"), lasting_exif(image)
    with sound_pixels():
        upright = ImageOps.exif_transpose(image)
    if mode in _DEEP:
        levels = _deep_levels(upright)
        hidden = image.info.get("transparency")
        alpha = torch.from_numpy(levels != hidden)[None].float() if isinstance(hidden, int) else None
        values = torch.from_numpy(levels.astype(np.float32) / np.float32(65535)).repeat(3, 1, 1)
        return DecodedImage(values, alpha, mode, _matching_profile(profile, mode), exif)
    transparent = mode != "CMYK" and image.has_transparency_data
    if mode == "CMYK":
        colour, profile = _cmyk_to_rgb(upright, profile), None
    else:
        colour = upright.convert("RGBA" if transparent else "RGB")
    bands = [torch.from_numpy(np.array(band)) for band in colour.split()]
    values = torch.stack(bands[:3]).to(torch.float32).div_(255)
    alpha = bands[3][None].to(torch.float32).div_(255) if transparent else None
    return DecodedImage(values, alpha, mode, _matching_profile(profile, mode), exif)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width with the EXIF orientation applied."""
    transposed = False
    with sound_pixels():
        transposed = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (image.width, image.height) if transposed else (image.height, image.width)


def _deep_levels(image: Image.Image) -> np.ndarray:
    levels = np.array(image, dtype=np.int32)
    if levels.min() < 0 or levels.max() > 65535:
        found = f"{levels.min()}..{levels.max()}"
        raise BinarizeError(f"a 32-bit integer image must stay within 0..65535, got {found}; rescale it first")
    return levels


def _cmyk_to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    converted = None
    if isinstance(profile, bytes):
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a damaged or unrelated profile describes no inks
            source, target = io.BytesIO(profile), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    return converted or image.convert("RGB")


def _matching_profile(profile: bytes | None, mode: str) -> bytes | None:
    """Return the profile if its colour space is that of the written pixels; otherwise it would mislead a viewer."""
    space = b"GRAY" if mode in _GREY else b"RGB "  # bytes 16 to 19 of an ICC.1 header
    return profile if isinstance(profile, bytes) and profile[16:20] == space else None


def _levels(values: torch.Tensor, top: int) -> np.ndarray:
    return (values.double().clamp(0, 1) * top + 0.5).floor().numpy()
