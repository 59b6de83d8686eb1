"""Build the network, the scheduler and the pipeline of a recipe for generation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from binarize.conversion.record import is_converted, is_diffusers_model
from binarize.errors import BinarizeError, did_you_mean, one_line
from binarize.json_files import read_json
from binarize.layers.parts import check_trusted
from binarize.models.location import NETWORK, locate, network_folder
from binarize.recipes.code import import_code
from binarize.recipes.generation_recipe import GenerationRecipe, NetworkSection

if TYPE_CHECKING:
    from binarize.models import GenerationPipeline
    from binarize.models.latents import LatentGeometry

_LABELS = "num_class_embeds"


def generation_network(recipe: GenerationRecipe) -> nn.Module:
    """Return the network of a recipe before conversion; under ``torch.device("meta")``, without its weights."""
    section = recipe.model
    if section.class_name is not None:
        network = _of_class(recipe, section.class_name, section.options)
    elif section.factory is not None:
        network = _of_factory(section.factory, section.options)
    else:
        network = _saved(section)
    if is_converted(network):
        raise BinarizeError("model: the network is already binary; name it in init_from to train it further.")
    _check_network(recipe, network)
    return network


def generation_scheduler(recipe: GenerationRecipe) -> Any:
    """Return the scheduler of a recipe for generation, which must sample what a network over timesteps predicts."""
    import diffusers

    from binarize.models.sampling import check_samples

    section = recipe.scheduler
    cls = getattr(diffusers, section.class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
        hint = did_you_mean(section.class_name, known)
        raise BinarizeError(f"scheduler.class: diffusers has no scheduler {section.class_name!r}.{hint}")
    scheduler = _called("scheduler", cls, section.options)
    try:
        check_samples(scheduler)
    except BinarizeError as error:
        raise BinarizeError(f"scheduler: {error}") from error
    if recipe.vae is not None:
        _check_unclipped(scheduler)
    return scheduler


def generation_pipeline(recipe: GenerationRecipe, unet: Any, vae: Any = None) -> GenerationPipeline:
    """Return the pipeline that samples from a recipe's network, with the autoencoder, which is loaded if need be."""
    from binarize.models import GenerationPipeline
    from binarize.models.latents import load_autoencoder

    classes = None if recipe.classes is None else list(recipe.classes)
    steps = min(recipe.num_inference_steps, recipe.scheduler.num_train_timesteps)
    options: dict[str, Any] = {"guidance_scale": recipe.guidance_scale, "num_inference_steps": steps}
    if recipe.vae is not None:
        options["vae"] = (load_autoencoder(recipe.vae) if vae is None else vae).to(unet.device)
    return GenerationPipeline(unet, generation_scheduler(recipe), classes=classes, **options)


def image_channels(recipe: GenerationRecipe) -> int:
    """Return the number of channels of a recipe's images, after checking that its network generates them.

    The samples of the network must be the images, or latents of the autoencoder.
    """
    with torch.device("meta"):
        config = getattr(generation_network(recipe), "config", {})
    size, channels = config.get("sample_size"), config.get("in_channels")
    latents, side = _sample_size(recipe)
    if size not in (side, (side,) * 2, [side] * 2):
        is_it = f"is {recipe.resolution}" if latents is None else f"is {recipe.resolution}, {side} in latents"
        fix = "set resolution to it, or change it" if latents is None else "change one of them"
        raise BinarizeError(f"resolution: {is_it}, but the network's sample_size is {size}; {fix}.")
    if not isinstance(channels, int):
        raise BinarizeError("model: the network's configuration has no in_channels; add it to its __init__.")
    if latents is None:
        return channels
    if latents.channels != channels:
        fix = f"set its in_channels and out_channels to {latents.channels}"
        raise BinarizeError(f"model: has {channels} channels, but the latents of vae have {latents.channels}; {fix}.")
    return latents.image_channels


def _sample_size(recipe: GenerationRecipe) -> tuple[LatentGeometry | None, int]:
    """Return the geometry of a recipe's latents, if it has any, and the side of what its network generates."""
    if recipe.vae is None:
        return None, recipe.resolution
    from binarize.models.latents import read_geometry

    latents = read_geometry(recipe.vae)
    if recipe.resolution % latents.factor:
        needed = f"the autoencoder needs a multiple of {latents.factor}"
        raise BinarizeError(f"resolution: is {recipe.resolution}; {needed}.")
    return latents, recipe.resolution // latents.factor


def _check_unclipped(scheduler: Any) -> None:
    """Raise BinarizeError if a scheduler limits predictions to the range of images, which latents leave."""
    for key in ("clip_sample", "thresholding"):
        if scheduler.config.get(key):
            kind = type(scheduler).__name__
            raise BinarizeError(f"scheduler.{key}: is true in {kind} and would clip latents; set it to false.")


def _of_class(recipe: GenerationRecipe, name: str, options: dict[str, Any]) -> nn.Module:
    cls = _diffusers_model("model.class", name)
    parameters = inspect.signature(cls).parameters
    latents, side = _sample_size(recipe)
    defaults: dict[str, Any] = {"sample_size": side, _LABELS: recipe.num_labels}
    if latents is not None:
        defaults |= {"in_channels": latents.channels, "out_channels": latents.channels}
    defaults = {key: value for key, value in defaults.items() if key in parameters and value is not None}
    return _called("model", cls, {**defaults, **options})


def _of_factory(name: str, options: dict[str, Any]) -> nn.Module:
    module, _, attribute = name.rpartition(":")
    what = f"the network {name!r}"
    check_trusted(what)  # also of a module that is imported already
    try:
        function = attrgetter(attribute)(import_code(module, "model.factory", what))
    except AttributeError as error:
        raise BinarizeError(f"model.factory: {name!r}: {error}.") from error
    network = _called("model", function, options)
    if not is_diffusers_model(network):
        kind, base = type(network).__name__, "diffusers' ModelMixin and ConfigMixin"
        raise BinarizeError(
            f"model.factory: {name!r} returns a {kind}; derive it from {base}, so that it can be saved."
        )
    return network


def _saved(section: NetworkSection) -> nn.Module:
    folder = network_folder(locate(Path(str(section.from_pretrained))))
    config = read_json(folder / NETWORK)
    cls = _diffusers_model(str(folder / NETWORK), str(config.get("_class_name")))
    if torch.get_default_device().type == "meta":
        network: nn.Module = cls.from_config(config)
        return network
    try:
        loaded: nn.Module = cls.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # diffusers and safetensors raise many kinds
        raise BinarizeError(f"model.from_pretrained: {folder} cannot be read: {one_line(error)}") from error
    return loaded


def _diffusers_model(key: str, name: str) -> Any:
    import diffusers

    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        hint = did_you_mean(name, [each for each in dir(diffusers) if each.endswith("Model")])
        raise BinarizeError(f"{key}: diffusers has no model {name!r}.{hint} Your own is named by factory.")
    return cls


def _called(key: str, function: Any, options: Mapping[str, Any]) -> Any:
    """Call a class or function with a recipe's keys; YAML's lists become tuples, as diffusers' configurations have."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    name = getattr(function, "__name__", str(function))
    for option in options:
        if not takes_all and option not in parameters:
            raise BinarizeError(f"{key}.{option}: {name} has no such argument.{did_you_mean(option, parameters)}")
    try:
        return function(**{name: _frozen(value) for name, value in options.items()})
    except BinarizeError:
        raise
    except Exception as error:  # a constructor can raise anything
        raise BinarizeError(f"{key}: {name} cannot be built: {one_line(error)}") from error


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _check_network(recipe: GenerationRecipe, network: nn.Module) -> None:
    """Check that a network takes the recipe's labels, and predicts as many channels as it takes."""
    config: Mapping[str, Any] = getattr(network, "config", {})
    labels, found = recipe.num_labels, config.get(_LABELS)
    if labels is not None and found is not None and found < labels:
        needed = f"{labels} labels, one per class{' and one for none' if recipe.class_dropout else ''}"
        raise BinarizeError(f"model: its {_LABELS} is {found}, but the recipe has {needed}.")
    if labels is None and found is not None:
        raise BinarizeError(f"model: its {_LABELS} is {found}, but the recipe has no classes; name them.")
    if labels is not None and "class_labels" not in inspect.signature(network.forward).parameters:
        raise BinarizeError(f"classes: {type(network).__name__} takes no class_labels; set classes to null.")
    channels = config.get("in_channels"), config.get("out_channels")
    if None not in channels and channels[0] != channels[1]:
        what = f"takes {channels[0]} channels and predicts {channels[1]}"
        raise BinarizeError(f"model: {type(network).__name__} {what}; set in_channels and out_channels to the same.")
