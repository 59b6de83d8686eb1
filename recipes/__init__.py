"""Recipes: YAML files that describe a training run, and the functions that list, check and build them."""

from __future__ import annotations

from binarize.deprecation import renamed
from binarize.recipes.build import (
    build,
    build_model,
    build_pipeline,
    build_scheduler,
    import_plugins,
    remove_stages,
    validate,
)
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
from binarize.recipes.stages import last_stage_end

__all__ = [
    "DistillationSection", "Figures", "MethodSection", "ModelSection", "ProgressiveSection", "PublishedSection",
    "Recipe", "SchedulerSection", "build", "build_model", "build_pipeline", "build_scheduler", "copy_recipe",
    "import_plugins", "last_stage_end", "list_recipes", "load_recipe", "recipe_path", "remove_stages", "validate",
]  # fmt: skip

_IN_STUDIES = ("CellSection", "EvaluationSection", "Study", "list_studies", "load_study", "study_path")
_MOVED = {name: f"binarize.studies.schema:{name}" for name in _IN_STUDIES}
__getattr__ = renamed(__name__, {"settled": "remove_stages", "stages_end": "last_stage_end", **_MOVED})
