"""What happens to photographs before people upscale them: blur, resizing, noise and compression.

Each function takes and returns a float32 image (C, H, W) in [0, 1]. The steps follow BSRGAN (Zhang et al., "Designing a
Practical Degradation Model for Deep Blind Image Super-Resolution", ICCV 2021) and Real-ESRGAN (Wang et al., "Training
Real-World Blind Super-Resolution with Pure Synthetic Data", ICCV Workshops 2021).
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from binarize.errors import BinarizeError, one_line
from binarize.imaging.resize import mirror

FILTERS = {name: Image.Resampling[name.upper()] for name in ("box", "bilinear", "bicubic", "lanczos")}
"""Pillow's filters, which widen when they reduce."""
MAX_REACH = 10
"""Kernels have at most 21x21 taps, as in Real-ESRGAN, unless a wider blur needs more."""
_LUMA = (0.299, 0.587, 0.114)


def blur_kernel(sigmas: tuple[float, float], angle: float = 0.0, *, beta: float = 1.0, plateau: bool = False) -> Tensor:
    """Return a kernel (k, k) that sums to 1: ``exp(-q**beta / 2)``, or for a plateau ``1 / (1 + q**beta)``.

    q is the squared distance from the centre, with the axes turned by `angle` and divided by `sigmas`, in pixels. A
    beta of 1 gives a Gaussian; others are the generalized Gaussian and plateau kernels of Liu et al. ("Estimating
    Generalized Gaussian Blur Kernels for Out-of-Focus Image Deblurring", 2020), as in Real-ESRGAN. The kernel reaches
    four times the larger sigma, or `MAX_REACH` pixels if that is less, but at least three times the larger sigma.
    """
    widest = max(sigmas)
    reach = max(1, min(MAX_REACH, math.ceil(4 * widest)), math.ceil(3 * widest))
    rows, columns = _grid(reach)
    first = (math.cos(angle) * columns + math.sin(angle) * rows) / sigmas[0]
    second = (math.cos(angle) * rows - math.sin(angle) * columns) / sigmas[1]
    power = (first.square() + second.square()) ** beta
    kernel = 1 / (1 + power) if plateau else torch.exp(-power / 2)
    return kernel / kernel.sum()


def sinc_kernel(cutoff: float) -> Tensor:
    """Return an ideal low-pass filter (21, 21) that cuts at `cutoff` radians per pixel: it rings at edges.

    It is ``cutoff * J1(cutoff * r) / (2 pi r)`` at distance r, divided by its sum, as in Real-ESRGAN.
    """
    rows, columns = _grid(MAX_REACH)
    radius = (rows.square() + columns.square()).sqrt()
    radius[MAX_REACH, MAX_REACH] = 1
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[MAX_REACH, MAX_REACH] = cutoff**2 / (4 * math.pi)  # the limit at r = 0
    return kernel / kernel.sum()


def convolve(image: Tensor, kernel: Tensor) -> Tensor:
    """Filter each channel, with mirrored borders."""
    reach = kernel.shape[-1] // 2
    padded = mirror(mirror(image, reach, -2), reach, -1)
    return F.conv2d(padded[:, None], kernel[None, None].to(image))[:, 0]


def resize(image: Tensor, size: tuple[int, int], name: str) -> Tensor:
    """Resize to (H, W) with one of `FILTERS`."""
    planes = [Image.fromarray(plane).resize(size[::-1], FILTERS[name]) for plane in image.numpy()]
    return torch.from_numpy(np.stack([np.array(plane) for plane in planes]))


def gaussian_noise(image: Tensor, sigma: float, rng: np.random.Generator, *, grey: bool = False) -> Tensor:
    """Add noise of standard deviation `sigma`, in levels of 255, the same for all channels if `grey`."""
    noise = rng.standard_normal((1 if grey else len(image), *image.shape[1:]), dtype="float32")
    return image + torch.from_numpy(noise) * (sigma / 255)


def poisson_noise(image: Tensor, photons: float, rng: np.random.Generator, *, grey: bool = False) -> Tensor:
    """Replace values by those of a sensor that counts on average `photons` photons for white."""
    light = image.clamp(0, 1)
    light = (light * torch.tensor(_LUMA).view(-1, 1, 1)).sum(0, keepdim=True) if grey else light
    counted = torch.from_numpy(rng.poisson(light.double().numpy() * photons)) / photons
    return image + (counted - light.double()).float()


def compress(image: Tensor, form: str, **options: Any) -> Tensor:
    """Write as `form`, "JPEG" or "WEBP", with Pillow's `options`, and read the result."""
    pixels = (image * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    try:
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, form, **options)
        with Image.open(file, formats=[form]) as compressed:
            levels = np.array(compressed.convert("RGB"), dtype=np.float32)
    except (OSError, ValueError, KeyError) as error:  # too large for the format, or a Pillow without it
        height, width = pixels.shape[:2]
        raise BinarizeError(f"cannot compress {width}x{height} pixels as {form}: {one_line(error)}") from error
    return torch.from_numpy(levels).permute(2, 0, 1).contiguous() / 255


def _grid(reach: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(-reach, reach + 1, dtype=torch.float64)
    return axis[:, None].expand(len(axis), -1), axis[None, :].expand(len(axis), -1)
