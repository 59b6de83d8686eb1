"""From a recipe to the objects that it describes."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from binarize.errors import BinarizeError
from binarize.recipes.load import load_recipe
from binarize.recipes.schema import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    from binarize.models import SRUNet, SuperResolutionPipeline


def import_plugins(plugins: Sequence[str]) -> None:
    """Import a recipe's plugins, each once in a process, so that the methods they register exist.

    Args:
        plugins: Dotted module names, or paths of .py files.

    Raises:
        BinarizeError: If one does not exist or fails while it is imported.
    """
    for plugin in plugins:
        try:
            if plugin.endswith(".py"):
                _import_file(Path(plugin))
            else:
                importlib.import_module(plugin)
        except BinarizeError:
            raise
        except Exception as error:  # whatever a user's file raises is the user's to see
            hint = "" if plugin.endswith(".py") else " A file of your own is named by its path, ending in .py."
            raise BinarizeError(f"plugins: cannot import {plugin!r}: {type(error).__name__}: {error}.{hint}") from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise BinarizeError(f"plugins: there is no file {str(path)!r}; a path is relative to the recipe's folder.")
    path = path.resolve()
    name = f"binarize_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BinarizeError(f"plugins: {str(path)!r} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def build_model(recipe: Recipe, network: SRUNet | None = None) -> SRUNet:
    """Return a recipe's network, converted by its method and untrained, on torch's current default device.

    Initial weights come from torch's global random state; `binarize.training.train` seeds it with the recipe's seed.

    Args:
        recipe: What to build.
        network: The network before its conversion, where there is one, such as a trained full-precision twin; it is
            converted in place.

    Raises:
        BinarizeError: If a plugin cannot be imported, the network cannot be built, or the conversion is refused.
    """
    import_plugins(recipe.plugins)
    from binarize.models import SRUNet

    model = SRUNet(**recipe.model.config(recipe.scheduler.num_train_timesteps)) if network is None else network
    if recipe.method is None:
        return model
    overrides = recipe.overrides
    if recipe.two_stage is not None or recipe.progressive is not None:
        from binarize.recipes.stages import staged_overrides

        overrides = {**(overrides or {}), **staged_overrides(recipe)}
    return _converted(recipe, model, overrides)


def _converted(recipe: Recipe, model: SRUNet, overrides: dict[str, Any] | None) -> SRUNet:
    from binarize import convert

    assert recipe.method is not None
    return convert(
        model,
        recipe.method.spec,
        structure=recipe.structure,
        keep=None if recipe.keep is None else list(recipe.keep),
        overrides=overrides,
        linear=recipe.linear if isinstance(recipe.linear, bool) else list(recipe.linear),
    )


def build_pipeline(recipe: Recipe, unet: SRUNet) -> SuperResolutionPipeline:
    """Return the pipeline that samples from a recipe's network.

    Args:
        recipe: Its noise schedule, scale, target and sampling steps. Where residuals are diffused, ``residual_scale``
            must be set, as it is in the ``recipe.yaml`` of a run.
        unet: The network.

    Raises:
        BinarizeError: If ``residual_scale`` is needed and not set.
    """
    from binarize.models import SuperResolutionPipeline

    if recipe.target == "residual" and recipe.residual_scale is None:
        raise BinarizeError(
            "residual_scale: not set, and the pipeline of a network of residuals needs it; it is in the recipe.yaml "
            "that the run has written."
        )
    return SuperResolutionPipeline(
        unet,
        build_scheduler(recipe),
        scale=recipe.scale,
        residual_scale=recipe.residual_scale,
        residual_strength=recipe.residual_strength,
        # A schedule of fewer timesteps than the default number of steps must not fail when a long training is saved.
        num_inference_steps=min(recipe.num_inference_steps, recipe.scheduler.num_train_timesteps),
    )


def build_scheduler(recipe: Recipe) -> DDIMScheduler:
    """Return the noise schedule of a recipe, for training and sampling alike."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(**recipe.scheduler.model_dump())


def validate(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe after checking all that can be checked without data or memory for the weights.

    Beyond `load_recipe`, this imports the plugins and builds the converted network on the meta device, so an unknown
    method or option, a glob that matches no module and a structure that cannot be built are found, and it looks
    whether the folders of data exist.

    Args:
        name_or_path: An installed recipe's name, or the path of a YAML file.
        overrides: ``"key=value"`` texts, as for `load_recipe`.

    Raises:
        BinarizeError: If anything is wrong.
    """
    import torch

    recipe = load_recipe(name_or_path, overrides)
    with torch.device("meta"):
        build_model(recipe)
    missing = [
        f"  {key}: there is no folder {str(folder)!r}."
        for key in ("train_data_dir", "train_lr_data_dir", "validation_data_dir", "validation_lr_data_dir")
        if (folder := getattr(recipe, key)) is not None and not folder.is_dir()
    ]
    if missing:
        raise BinarizeError("\n".join([f"recipe {str(name_or_path)!r} names folders that do not exist:", *missing]))
    return recipe
