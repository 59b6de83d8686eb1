"""Build the network, the noise schedule and the pipeline that a recipe describes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from binarize.conversion.convert import convert
from binarize.conversion.export import binary_layers
from binarize.errors import BinarizeError, one_line
from binarize.layers import undelayed
from binarize.recipes.code import import_plugins
from binarize.recipes.generation_recipe import GenerationRecipe
from binarize.recipes.load import check_folders, load_recipe
from binarize.recipes.networks import generation_network, generation_pipeline, generation_scheduler, image_channels
from binarize.recipes.schema import TrainingRecipe
from binarize.recipes.stages import last_stage_end, staged_overrides
from binarize.recipes.super_resolution_recipe import Recipe

if TYPE_CHECKING:
    from binarize.models import GenerationPipeline, SuperResolutionPipeline


def build(recipe: str | os.PathLike[str] | TrainingRecipe, *overrides: str) -> nn.Module:
    """Return the converted, untrained network of a recipe: ``binarize.build("bidiffsr_x4")``.

    The recipe is an installed recipe's name, the path of a YAML file, or a loaded recipe; overrides
    are ``"key=value"`` strings that change it, such as ``"method.groups=2"``.
    """
    if isinstance(recipe, TrainingRecipe) and overrides:
        raise BinarizeError(f"build: a loaded recipe takes no overrides; got {overrides}. Give them to load_recipe.")
    return build_model(recipe if isinstance(recipe, TrainingRecipe) else load_recipe(recipe, overrides))


def build_model(recipe: TrainingRecipe, network: nn.Module | None = None) -> nn.Module:
    """Return a recipe's converted, untrained network on torch's current default device.

    Initial weights come from torch's global random state; `binarize.training.train` seeds it with the recipe's seed.
    A full-precision ``network`` is converted in place instead of a new one.
    """
    import_plugins(recipe.plugins)
    try:
        model = _network(recipe) if network is None else network
    except (RuntimeError, OverflowError, TypeError) as error:  # more channels than a tensor, or the memory, can have
        raise BinarizeError(f"model: these settings make no network: {one_line(error, 150)}.") from error
    if recipe.method is None:
        return model
    overrides = recipe.overrides
    if last_stage_end(recipe) is not None:
        methods = {name: layer.method for name, layer in binary_layers(_network_without_stages(recipe))}
        overrides = {**(overrides or {}), **staged_overrides(recipe, methods)}
    keep = None if recipe.keep is None else list(recipe.keep)
    linear = recipe.linear if isinstance(recipe.linear, bool) else list(recipe.linear)
    options: dict[str, Any] = {"structure": recipe.structure, "overrides": overrides}
    options["num_train_timesteps"] = recipe.scheduler.num_train_timesteps
    return convert(model, recipe.method.spec, keep=keep, linear=linear, **options)


def _network(recipe: TrainingRecipe) -> nn.Module:
    if isinstance(recipe, GenerationRecipe):
        return generation_network(recipe)
    from binarize.models import SRUNet

    recipe = cast(Recipe, recipe)
    return SRUNet(**recipe.model.config(recipe.scheduler.num_train_timesteps))


def remove_stages(recipe: TrainingRecipe, model: nn.Module) -> nn.Module:
    """Return a network whose stages are over as its method's network without stages, with the same tensors."""
    plain = _network_without_stages(recipe)
    plain.load_state_dict(undelayed(model, plain), assign=True)
    for name, buffer in list(plain.named_buffers()):
        if buffer.is_meta:  # a buffer that is not part of the state
            owner, _, own = name.rpartition(".")
            setattr(plain.get_submodule(owner), own, model.get_buffer(name))
    return plain.train(model.training)


def _network_without_stages(recipe: TrainingRecipe) -> nn.Module:
    with torch.device("meta"):
        return build_model(recipe.model_copy(update={"two_stage": None, "progressive": None}))


def build_pipeline(
    recipe: TrainingRecipe, unet: nn.Module, vae: nn.Module | None = None
) -> SuperResolutionPipeline | GenerationPipeline:
    """Return the pipeline that samples from a recipe's network; an autoencoder that it names is ``vae`` or is loaded.

    If residuals are diffused, ``residual_scale`` must be set, as it is in the ``recipe.yaml`` of a run.
    """
    if isinstance(recipe, GenerationRecipe):
        return generation_pipeline(recipe, unet, vae)
    from binarize.models import SuperResolutionPipeline

    recipe = cast(Recipe, recipe)
    if recipe.target == "residual" and recipe.residual_scale is None:
        raise BinarizeError("residual_scale: not set, and the pipeline needs it; copy it from the run's recipe.yaml.")
    # A schedule with fewer timesteps than sampling steps must not make saving fail at the end of a long training.
    steps = min(recipe.num_inference_steps, recipe.scheduler.num_train_timesteps)
    names = ("scale", "residual_scale", "residual_strength", "overshoot")
    options: dict[str, Any] = {name: getattr(recipe, name) for name in names}
    return SuperResolutionPipeline(unet, build_scheduler(recipe), num_inference_steps=steps, **options)


def build_scheduler(recipe: TrainingRecipe) -> Any:
    """Return the noise schedule of a recipe, for sampling and, with its ``alphas_cumprod``, for training."""
    if isinstance(recipe, GenerationRecipe):
        return generation_scheduler(recipe)
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(**recipe.scheduler.model_dump())


def validate(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainingRecipe:
    """Return a recipe after all checks that need no data and no memory for weights.

    In addition to the checks of `load_recipe`, this imports the plugins, builds the converted network on the meta
    device (which finds unknown methods and options, globs that match no module, and structures that cannot be built),
    and checks that the data folders exist.
    """
    recipe = load_recipe(name_or_path, overrides)
    build_scheduler(recipe)
    with torch.device("meta"):
        build_model(recipe)
    if isinstance(recipe, GenerationRecipe):
        image_channels(recipe)
    check_folders(recipe, str(name_or_path))
    return recipe
