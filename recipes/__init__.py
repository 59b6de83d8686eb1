"""Recipes: YAML files that describe a training run, and the functions that list, check and build them."""

from __future__ import annotations

from binarize.deprecation import renamed
from binarize.recipes.build import (
    build,
    build_model,
    build_pipeline,
    build_scheduler,
    remove_stages,
    validate,
)
from binarize.recipes.code import import_plugins
from binarize.recipes.degradation import Degradation, DegradationStep
from binarize.recipes.generation_recipe import GenerationDistillation, GenerationRecipe, NetworkSection, SamplerSection
from binarize.recipes.load import (
    copy_recipe,
    list_recipes,
    load_degradation,
    load_recipe,
    recipe_class,
    recipe_path,
)
from binarize.recipes.schema import TrainingRecipe
from binarize.recipes.sections import (
    DistillationSection,
    Figures,
    MethodSection,
    ModelSection,
    NoiseSchedule,
    ProgressiveSection,
    PublishedSection,
    SchedulerSection,
)
from binarize.recipes.stages import last_stage_end
from binarize.recipes.super_resolution_recipe import Recipe

__all__ = [
    "Degradation", "DegradationStep", "DistillationSection", "Figures", "GenerationDistillation", "GenerationRecipe",
    "MethodSection", "ModelSection", "NetworkSection", "NoiseSchedule", "ProgressiveSection", "PublishedSection",
    "Recipe", "SamplerSection", "SchedulerSection", "TrainingRecipe", "build", "build_model", "build_pipeline",
    "build_scheduler", "copy_recipe", "import_plugins", "last_stage_end", "list_recipes", "load_degradation",
    "load_recipe", "recipe_class", "recipe_path", "remove_stages", "validate",
]  # fmt: skip

_IN_STUDIES = ("CellSection", "EvaluationSection", "Study", "list_studies", "load_study", "study_path")
_MOVED = {name: f"binarize.studies.schema:{name}" for name in _IN_STUDIES}
__getattr__ = renamed(__name__, {"settled": "remove_stages", "stages_end": "last_stage_end", **_MOVED})
