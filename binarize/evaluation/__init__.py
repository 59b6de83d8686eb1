"""Measuring super-resolution: PSNR and SSIM on luma, LPIPS, and reports of them."""

from __future__ import annotations

from binarize.evaluation.perceptual import Lpips, LpipsUnavailable
from binarize.evaluation.quality import luma, psnr, ssim
from binarize.evaluation.report import EvaluationReport, PictureScores, Scores
from binarize.evaluation.runner import evaluate

__all__ = [
    "EvaluationReport",
    "Lpips",
    "LpipsUnavailable",
    "PictureScores",
    "Scores",
    "evaluate",
    "luma",
    "psnr",
    "ssim",
]
