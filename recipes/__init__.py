"""Recipes: YAML files that describe a training run, and what lists, checks and builds them."""

from __future__ import annotations

from ._build import build_model, build_scheduler, import_plugins, validate
from ._load import copy_recipe, list_recipes, load_recipe, recipe_path
from ._schema import Recipe
from ._sections import Figures, MethodSection, ModelSection, PublishedSection, SchedulerSection
from ._study import CellSection, EvaluationSection, Study, list_studies, load_study, study_path

__all__ = [
    "CellSection",
    "EvaluationSection",
    "Figures",
    "MethodSection",
    "ModelSection",
    "PublishedSection",
    "Recipe",
    "SchedulerSection",
    "Study",
    "build_model",
    "build_scheduler",
    "copy_recipe",
    "import_plugins",
    "list_recipes",
    "list_studies",
    "load_recipe",
    "load_study",
    "recipe_path",
    "study_path",
    "validate",
]
