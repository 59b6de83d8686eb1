"""PSNR and SSIM on luma, as the super-resolution literature computes them in MATLAB."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from binarize.errors import BinarizeError

# rgb2ycbcr's first row, for 8-bit RGB: 16 is black, 235 is white (ITU-R BT.601, studio range).
_LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)
SSIM_MIN_SIDE = 11


def luma(pixels: torch.Tensor) -> torch.Tensor:
    """Return Y of BT.601 in studio range, 16 to 235, as float64 (H, W), from uint8 (3, H, W).

    MATLAB's ``rgb2ycbcr`` rounds Y for 8-bit input; published results use the unrounded values.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        raise BinarizeError(f"expected uint8 pixels (3, H, W), got {pixels.dtype} {tuple(pixels.shape)}")
    red, green, blue = pixels.contiguous().double()  # one memory layout, for one order of summation
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 16


def psnr(result: torch.Tensor, reference: torch.Tensor, *, border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB on Y of two uint8 (3, H, W), with a peak of 255; infinite for equal images.

    ``border`` pixels are cut off each side first; the literature uses the scale factor.
    """
    ours, theirs = _inside(result, reference, border, 1)
    error = (ours - theirs).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(result: torch.Tensor, reference: torch.Tensor, *, border: int = 0) -> float:
    """Structural similarity on Y of two uint8 (3, H, W) (Wang et al. 2004), as the authors' MATLAB code computes it.

    It uses an 11x11 Gaussian window of sigma 1.5, population covariance, and the mean over the windows that lie
    completely inside the image. ``border`` pixels are cut off each side first.
    """
    structural_similarity = scikit_image_ssim()
    ours, theirs = _inside(result, reference, border, SSIM_MIN_SIDE)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return float(structural_similarity(ours.cpu().numpy(), theirs.cpu().numpy(), **options))


def shave(pixels: torch.Tensor, border: int) -> torch.Tensor:
    """Cut ``border`` pixels off each side of (..., H, W)."""
    height, width = pixels.shape[-2:]
    return pixels[..., border : height - border, border : width - border]


def scikit_image_ssim() -> Callable[..., float]:
    """Return the function of scikit-image, an optional dependency, or raise an error if it is not installed."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise BinarizeError("SSIM needs scikit-image: pip install 'binarize-diffusion[eval]'") from error
    return structural_similarity


def _inside(
    result: torch.Tensor, reference: torch.Tensor, border: int, min_side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if result.shape != reference.shape:
        raise BinarizeError(f"the images differ in shape: {tuple(result.shape)} and {tuple(reference.shape)}")
    ours, theirs = shave(luma(result), border), shave(luma(reference), border)
    if border < 0 or min(ours.shape) < min_side:
        size, needed = f"{result.shape[-1]}x{result.shape[-2]}", f"{min_side}x{min_side}"
        raise BinarizeError(f"an image of {size} pixels has fewer than {needed} inside a border of {border}")
    return ours, theirs
