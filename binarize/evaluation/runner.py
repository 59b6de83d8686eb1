"""Measure an upscaling method on a folder of images, beside bicubic upscaling."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from binarize.errors import BinarizeError
from binarize.evaluation.perceptual import Lpips, LpipsUnavailable
from binarize.evaluation.quality import SSIM_MIN_SIDE, psnr, scikit_image_ssim, shave, ssim
from binarize.evaluation.report import EvaluationReport, ImageScores, Scores
from binarize.imaging import ImagePair, ImagePairs, to_image, upscale_bicubic
from binarize.imaging.pairs import raise_all
from binarize.progress import ProgressBar

if TYPE_CHECKING:
    from binarize.recipes import Degradation

Folder = str | os.PathLike[str]
_DEGRADATION_SEED = 0


def evaluate(
    upscale: Callable[[Image.Image], Any],
    data: Folder | tuple[Folder, Folder],
    *,
    scale: int,
    degradation: Degradation | None = None,
    lpips: str | None = "alex",
    lpips_backbone: str | os.PathLike[str] | None = None,
    border: int | None = None,
    limit: int | None = None,
    progress: bool = True,
    baseline: bool = True,
    name: str = "model",
    device: torch.device | str = "cpu",
) -> EvaluationReport:
    """Upscale every image of a folder and compare the results with the originals.

    PSNR and SSIM are computed on Y of BT.601 in studio range, as MATLAB's ``rgb2ycbcr`` computes it before rounding,
    and LPIPS on RGB. The baseline "bicubic" is `binarize.imaging.upscale_bicubic` of the 8-bit low-resolution image,
    equal to MATLAB's ``imresize``, which rounds to 8 bits after each axis. On Set5 it gives the published
    33.67 / 0.9303 at x2 and 28.43 / 0.8111 at x4; PyTorch's ``bicubic`` differs (a = -0.75).

    Args:
        upscale: Maps a low-resolution PIL image in mode RGB to the upscaled image: a PIL image, a uint8 array
            (H, W, 3), or a uint8 tensor (3, H, W) or (1, 3, H, W).
        data: A folder of high-resolution images, or one of high and one of low resolution; see `imaging.ImagePairs`.
        scale: The scale factor.
        degradation: How the low-resolution images are made; by default as MATLAB's ``imresize`` does. Random steps
            are the same in every evaluation. See `binarize.recipes.load_degradation`.
        lpips: Backbone of LPIPS, ``alex``, ``vgg`` or ``squeeze``, or None. If it is not available, the report's notes
            say how to get it.
        lpips_backbone: The backbone's file, for machines without network; see :class:`~binarize.evaluation.Lpips`.
        border: Pixels cut off each side; by default ``scale``.
        limit: Evaluate only this many images.
        progress: Show a progress bar.
        baseline: Also measure bicubic upscaling.
        name: The name of ``upscale`` in the report.
        device: Where to compute LPIPS.

    Raises:
        BinarizeError: Naming all images that cannot be used, before anything is upscaled, or for a wrong option or
            result of ``upscale``.
    """
    border = scale if border is None else border
    for option, value, minimum in (("border", border, 0), ("limit", limit, 1)):
        if value is not None and value < minimum:
            raise BinarizeError(f"evaluate: {option} must be at least {minimum}, got {value}")
    scikit_image_ssim()
    distance: Lpips | None = None
    notes: tuple[str, ...] = ()
    if lpips is not None:
        try:
            distance = Lpips(lpips, backbone=lpips_backbone, device=device)
        except LpipsUnavailable as reason:
            notes = (f"LPIPS is left out. {reason}",)
    high, low = data if isinstance(data, tuple) else (data, None)
    degrader = None if degradation is None else degradation.seeded(_DEGRADATION_SEED)
    if degradation is not None and degrader is not None:
        if low is not None:
            raise BinarizeError("evaluate: degradation has no effect on given low-resolution images; give one of them")
        notes = (*notes, f"Low-resolution images are made by {degradation.to_text()}")
    pairs = ImagePairs(high, low, scale=scale, degrader=degrader)
    pairs = pairs.first(len(pairs) if limit is None else limit)
    smallest = 2 * border + (SSIM_MIN_SIDE if distance is None else max(SSIM_MIN_SIDE, distance.min_side))
    needed = f"the metrics need {smallest}x{smallest} with a border of {border}"
    small = [files for files in pairs.files if min(files.size) < smallest]
    problems = [f"{files.hr}: is {files.size[1]}x{files.size[0]} pixels; {needed}" for files in small]
    raise_all(pairs.files[0].hr.parent, problems)
    pairs.check()
    rows = []
    for pair in ProgressBar(pairs, desc=f"evaluate x{scale}", unit="image", disable=not progress):
        source = Image.fromarray(pair.lr.permute(1, 2, 0).numpy())
        start = time.perf_counter()
        result = _pixels(upscale(source), pair)
        seconds = time.perf_counter() - start
        bicubic = _scores(upscale_bicubic(pair.lr, scale), pair.hr, border, distance) if baseline else None
        rows.append(ImageScores(pair.name, _scores(result, pair.hr, border, distance), bicubic, seconds))
    return EvaluationReport(tuple(rows), scale, border, None if distance is None else distance.net, name, notes)


def _scores(result: torch.Tensor, hr: torch.Tensor, border: int, distance: Lpips | None) -> Scores:
    perceptual = None if distance is None else distance(shave(result, border), shave(hr, border))
    return Scores(psnr(result, hr, border=border), ssim(result, hr, border=border), perceptual)


def _pixels(result: object, pair: ImagePair) -> torch.Tensor:
    """Return the result of ``upscale`` as uint8 (3, H, W)."""
    if isinstance(result, Image.Image):
        pixels = to_image(result).pixels()
    elif isinstance(result, np.ndarray) and result.dtype == np.uint8 and result.ndim == 3:
        pixels = torch.from_numpy(np.ascontiguousarray(result.transpose(2, 0, 1)))
    elif isinstance(result, torch.Tensor) and result.dtype == torch.uint8:
        pixels = (result[0] if result.ndim == 4 and len(result) == 1 else result).cpu()
    else:
        kind = f"{type(result).__name__} of {getattr(result, 'dtype', 'no dtype')}"
        raise BinarizeError(f"evaluate: upscale must return a PIL image, a uint8 array or a uint8 tensor, got {kind}")
    found, expected = tuple(pixels.shape), tuple(pair.hr.shape)
    if found != expected:
        raise BinarizeError(f"evaluate: upscale returned {found} for {pair.name!r}, expected {expected}")
    return pixels
