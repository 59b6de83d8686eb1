"""Build the network, the noise schedule and the pipeline that a recipe describes."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from binarize.conversion.convert import convert
from binarize.conversion.export import binary_layers
from binarize.errors import BinarizeError, listing
from binarize.layers import undelayed
from binarize.layers.parts import check_trusted
from binarize.recipes.load import load_recipe
from binarize.recipes.schema import Recipe
from binarize.recipes.stages import last_stage_end, staged_overrides

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    from binarize.models import SRUNet, SuperResolutionPipeline


def import_plugins(plugins: Sequence[str]) -> None:
    """Import a recipe's plugins (dotted names or .py files), once per process, so that their methods exist."""
    for plugin in plugins:
        if (_module_name(plugin) if plugin.endswith(".py") else plugin) in sys.modules:
            continue
        check_trusted(f"the plugin {plugin!r}")
        try:
            (_import_file if plugin.endswith(".py") else importlib.import_module)(plugin)
        except BinarizeError:
            raise
        except Exception as error:  # a user's file can raise anything
            hint = "" if plugin.endswith(".py") else " Name a file of your own by its path, ending in .py."
            raise BinarizeError(f"plugins: cannot import {plugin!r}: {type(error).__name__}: {error}.{hint}") from error


def _import_file(plugin: str) -> None:
    path = Path(plugin).resolve()
    if not path.is_file():
        raise BinarizeError(f"plugins: there is no file {plugin!r}; paths are relative to the recipe's folder.")
    name = _module_name(plugin)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _module_name(plugin: str) -> str:
    path = Path(plugin).resolve()
    return f"binarize_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def build(recipe: str | os.PathLike[str] | Recipe, *overrides: str) -> SRUNet:
    """Return the converted, untrained network of a recipe: ``binarize.build("bidiffsr_x4")``.

    The recipe is an installed recipe's name, the path of a YAML file, or a loaded `binarize.recipes.Recipe`; overrides
    are ``"key=value"`` strings that change it, such as ``"method.groups=2"``.
    """
    if isinstance(recipe, Recipe) and overrides:
        raise BinarizeError(f"build: a loaded recipe takes no overrides; got {overrides}. Give them to load_recipe.")
    return build_model(recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides))


def build_model(recipe: Recipe, network: SRUNet | None = None) -> SRUNet:
    """Return a recipe's converted, untrained network on torch's current default device.

    Initial weights come from torch's global random state; `binarize.training.train` seeds it with the recipe's seed.
    A full-precision ``network`` is converted in place instead of a new one.
    """
    from binarize.models import SRUNet

    import_plugins(recipe.plugins)
    model = SRUNet(**recipe.model.config(recipe.scheduler.num_train_timesteps)) if network is None else network
    if recipe.method is None:
        return model
    overrides = recipe.overrides
    if last_stage_end(recipe) is not None:
        methods = {name: layer.method for name, layer in binary_layers(_network_without_stages(recipe))}
        overrides = {**(overrides or {}), **staged_overrides(recipe, methods)}
    keep = None if recipe.keep is None else list(recipe.keep)
    linear = recipe.linear if isinstance(recipe.linear, bool) else list(recipe.linear)
    options: dict[str, Any] = {"structure": recipe.structure, "overrides": overrides}
    return convert(model, recipe.method.spec, keep=keep, linear=linear, **options)


def remove_stages(recipe: Recipe, model: SRUNet) -> SRUNet:
    """Return a network whose stages are over as its method's network without stages, with the same tensors."""
    plain = _network_without_stages(recipe)
    plain.load_state_dict(undelayed(model, plain), assign=True)
    return plain.train(model.training)


def _network_without_stages(recipe: Recipe) -> SRUNet:
    with torch.device("meta"):
        return build_model(recipe.model_copy(update={"two_stage": None, "progressive": None}))


def build_pipeline(recipe: Recipe, unet: SRUNet) -> SuperResolutionPipeline:
    """Return the pipeline that samples from a recipe's network.

    If residuals are diffused, ``residual_scale`` must be set, as it is in the ``recipe.yaml`` of a run.
    """
    from binarize.models import SuperResolutionPipeline

    if recipe.target == "residual" and recipe.residual_scale is None:
        raise BinarizeError("residual_scale: not set, and the pipeline needs it; copy it from the run's recipe.yaml.")
    # A schedule with fewer timesteps than sampling steps must not make saving fail at the end of a long training.
    steps = min(recipe.num_inference_steps, recipe.scheduler.num_train_timesteps)
    names = ("scale", "residual_scale", "residual_strength")
    options: dict[str, Any] = {name: getattr(recipe, name) for name in names}
    return SuperResolutionPipeline(unet, build_scheduler(recipe), num_inference_steps=steps, **options)


def build_scheduler(recipe: Recipe) -> DDIMScheduler:
    """Return the noise schedule of a recipe, for training and sampling."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(**recipe.scheduler.model_dump())


def _is_folder(path: Path) -> bool:
    return (path.parent if "{}" in path.name else path).is_dir()  # the last part can be a pattern of names


def validate(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe after all checks that need no data and no memory for weights.

    In addition to the checks of `load_recipe`, this imports the plugins, builds the converted network on the meta
    device (which finds unknown methods and options, globs that match no module, and structures that cannot be built),
    and checks that the data folders exist.
    """
    recipe = load_recipe(name_or_path, overrides)
    with torch.device("meta"):
        build_model(recipe)
    keys = ("train_data_dir", "train_lr_data_dir", "validation_data_dir", "validation_lr_data_dir")
    folders = {key: folder for key in keys if (folder := getattr(recipe, key)) is not None}
    missing = [f"{key}: there is no folder {str(path)!r}." for key, path in folders.items() if not _is_folder(path)]
    if missing:
        raise BinarizeError(listing(f"recipe {str(name_or_path)!r} names folders that do not exist:", missing))
    return recipe
