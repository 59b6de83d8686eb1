"""What is wrong with a model that enlarges worse than bicubic does: try the likely causes, name the one that it is."""

from __future__ import annotations

from binarize.diagnosis.doctor import doctor
from binarize.diagnosis.report import DoctorReport, Finding, Trial

__all__ = ["DoctorReport", "Finding", "Trial", "doctor"]
