"""Recipes: YAML files that describe a training run, and what lists, checks and builds them."""

from __future__ import annotations

from binarize.recipes.build import build_model, build_pipeline, build_scheduler, import_plugins, validate
from binarize.recipes.load import copy_recipe, list_recipes, load_recipe, recipe_path
from binarize.recipes.schema import Recipe
from binarize.recipes.sections import (
    DistillationSection,
    Figures,
    MethodSection,
    ModelSection,
    ProgressiveSection,
    PublishedSection,
    SchedulerSection,
)
from binarize.recipes.stages import settled, stages_end
from binarize.recipes.study import CellSection, EvaluationSection, Study, list_studies, load_study, study_path

__all__ = [
    "CellSection",
    "DistillationSection",
    "EvaluationSection",
    "Figures",
    "MethodSection",
    "ModelSection",
    "ProgressiveSection",
    "PublishedSection",
    "Recipe",
    "SchedulerSection",
    "Study",
    "build_model",
    "build_pipeline",
    "build_scheduler",
    "copy_recipe",
    "import_plugins",
    "list_recipes",
    "list_studies",
    "load_recipe",
    "load_study",
    "recipe_path",
    "settled",
    "stages_end",
    "study_path",
    "validate",
]
