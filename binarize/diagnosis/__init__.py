"""Why a model is worse than bicubic upscaling: try the likely causes one at a time."""

from __future__ import annotations

from binarize.deprecation import renamed
from binarize.diagnosis.diagnose import doctor
from binarize.diagnosis.report import ChangeResult, DoctorReport, Finding

__all__ = ["ChangeResult", "DoctorReport", "Finding", "doctor"]

__getattr__ = renamed(__name__, {"Trial": "ChangeResult"})
