"""Ablation studies: runs of one recipe that differ in a few keys, compared in one table."""

from __future__ import annotations

from binarize.studies.schema import CellSection, EvaluationSection, Study, list_studies, load_study, study_path

__all__ = ["CellSection", "EvaluationSection", "Study", "list_studies", "load_study", "study_path"]
