"""Evaluate super-resolution by PSNR, SSIM and LPIPS, and generation by FID, KID and nearest neighbors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from binarize.deprecation import renamed
from binarize.importing import exports

if TYPE_CHECKING:
    from binarize.evaluation.perceptual import Lpips, LpipsUnavailable
    from binarize.evaluation.quality import luma, psnr, ssim
    from binarize.evaluation.report import EvaluationReport, ImageScores, Scores
    from binarize.evaluation.runner import evaluate

__all__ = ["EvaluationReport", "ImageScores", "Lpips", "LpipsUnavailable", "Scores", "evaluate", "luma", "psnr", "ssim"]

_NAMES = {
    "perceptual": ("Lpips", "LpipsUnavailable"),
    "quality": ("luma", "psnr", "ssim"),
    "report": ("EvaluationReport", "ImageScores", "Scores"),
    "runner": ("evaluate",),
}
__getattr__ = renamed(__name__, {"PictureScores": "ImageScores"}, exports(__name__, _NAMES))
