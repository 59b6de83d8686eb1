"""Evaluate super-resolution by PSNR, SSIM and LPIPS, and generation by FID, KID and nearest neighbors."""

from __future__ import annotations

from binarize.deprecation import renamed
from binarize.evaluation.perceptual import Lpips, LpipsUnavailable
from binarize.evaluation.quality import luma, psnr, ssim
from binarize.evaluation.report import EvaluationReport, ImageScores, Scores
from binarize.evaluation.runner import evaluate

__all__ = ["EvaluationReport", "ImageScores", "Lpips", "LpipsUnavailable", "Scores", "evaluate", "luma", "psnr", "ssim"]

__getattr__ = renamed(__name__, {"PictureScores": "ImageScores"})
