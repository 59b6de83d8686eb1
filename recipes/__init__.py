"""Recipes: YAML files that describe a training run, and the functions that list, check and build them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from binarize.deprecation import renamed
from binarize.importing import exports

if TYPE_CHECKING:
    from binarize.recipes.building import (
        build,
        build_model,
        build_pipeline,
        build_scheduler,
        remove_stages,
        validate,
    )
    from binarize.recipes.code import import_plugins
    from binarize.recipes.degradation import Degradation, DegradationStep
    from binarize.recipes.generation_recipe import (
        GenerationDistillation,
        GenerationRecipe,
        NetworkSection,
        SamplerSection,
    )
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
        PerceptualSection,
        ProgressiveSection,
        PublishedSection,
        SchedulerSection,
    )
    from binarize.recipes.stages import last_stage_end
    from binarize.recipes.super_resolution_recipe import Recipe

__all__ = [
    "Degradation", "DegradationStep", "DistillationSection", "Figures", "GenerationDistillation", "GenerationRecipe",
    "MethodSection", "ModelSection", "NetworkSection", "NoiseSchedule", "PerceptualSection", "ProgressiveSection",
    "PublishedSection", "Recipe", "SamplerSection", "SchedulerSection", "TrainingRecipe", "build", "build_model",
    "build_pipeline", "build_scheduler", "copy_recipe", "import_plugins", "last_stage_end", "list_recipes",
    "load_degradation", "load_recipe", "recipe_class", "recipe_path", "remove_stages", "validate",
]  # fmt: skip

_IN_STUDIES = ("CellSection", "EvaluationSection", "Study", "list_studies", "load_study", "study_path")
_MOVED = {name: f"binarize.studies.schema:{name}" for name in _IN_STUDIES}
_OLD = {"settled": "remove_stages", "stages_end": "last_stage_end", **_MOVED}
# Building a network imports PyTorch, and checking a recipe needs none.
_NAMES = {
    "building": ("build", "build_model", "build_pipeline", "build_scheduler", "remove_stages", "validate"),
    "code": ("import_plugins",),
    "degradation": ("Degradation", "DegradationStep"),
    "generation_recipe": ("GenerationDistillation", "GenerationRecipe", "NetworkSection", "SamplerSection"),
    "load": ("copy_recipe", "list_recipes", "load_degradation", "load_recipe", "recipe_class", "recipe_path"),
    "schema": ("TrainingRecipe",),
    "sections": (
        "DistillationSection", "Figures", "MethodSection", "ModelSection", "NoiseSchedule",
        "PerceptualSection", "ProgressiveSection", "PublishedSection", "SchedulerSection",
    ),
    "stages": ("last_stage_end",),
    "super_resolution_recipe": ("Recipe",),
}  # fmt: skip
__getattr__ = renamed(__name__, _OLD, exports(__name__, _NAMES))
