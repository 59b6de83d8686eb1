"""Ablation studies: runs of one recipe that differ in a few keys, compared in one table."""

from __future__ import annotations

from binarize.studies.schema import CellSection, GenerationStudy, Study, list_studies, load_study, study_path
from binarize.studies.sections import EvaluationSection, GenerationEvaluation

__all__ = [
    "CellSection", "EvaluationSection", "GenerationEvaluation", "GenerationStudy", "Study", "list_studies",
    "load_study", "study_path",
]  # fmt: skip
