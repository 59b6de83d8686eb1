"""The network that a run starts from, and its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from binarize.conversion.packing import is_packed, unpack
from binarize.conversion.record import QUANTIZATION, conversion, is_converted, recorded_conversion
from binarize.errors import BinarizeError, listing
from binarize.models.loading import load_generator, load_network, load_pipeline
from binarize.models.location import PIPELINE, RUN
from binarize.recipes import GenerationRecipe, TrainingRecipe, build_model, build_scheduler

# Keys of a noise schedule that define what a prediction means; the others are for sampling only.
_PREDICTION_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr",
    "residual_scale",
)  # fmt: skip
# Keys of a network's configuration that do not define its tensors, and the one for which there is its conversion.
_FREE_KEYS = ("dropout", "sample_size", QUANTIZATION)


@dataclass(frozen=True)
class TrainedModel:
    """A trained network, on the CPU in evaluation mode, with what its pipeline says of its samples."""

    path: Path
    network: nn.Module
    scheduler: dict[str, Any] | None
    residual_scale: float | None
    vae: Any = None


def read_trained(key: str, path: Path, recipe: TrainingRecipe) -> TrainedModel:
    """Read the folder of a run, a pipeline or a network, or a released checkpoint; errors name the recipe's key."""
    try:
        if isinstance(recipe, GenerationRecipe):
            generator = load_generator(path)
            return TrainedModel(path, generator.unet, dict(generator.scheduler.config), None, generator.vae)
        if (path / PIPELINE).is_file() or (path / RUN / PIPELINE).is_file():
            pipeline = load_pipeline(path)
            return TrainedModel(path, pipeline.unet, dict(pipeline.scheduler.config), pipeline.residual_scale)
        return TrainedModel(path, load_network(path), None, None)
    except BinarizeError as error:
        raise BinarizeError(f"{key}: {error}") from error


def check_same_prediction(key: str, recipe: TrainingRecipe, trained: TrainedModel) -> None:
    """Raise an error if a trained model predicts another quantity than the recipe, as far as its files say."""
    if trained.scheduler is None:
        return
    own = {**build_scheduler(recipe).config, "residual_scale": getattr(recipe, "residual_scale", None)}
    found = {**trained.scheduler, "residual_scale": trained.residual_scale}
    expected = {name: own[name] for name in _PREDICTION_KEYS if name in own and name in found}
    message = f"{key}: {trained.path} was trained to predict something else"
    _check_equal(message, found, expected, "Make the recipe's scheduler and target those of the trained model.")


def initial_network(recipe: TrainingRecipe, start: TrainedModel | None) -> nn.Module:
    """Return the network at step 0, converted as the recipe says: a new one, or the one that ``init_from`` names.

    A full-precision network is converted: its weights become the latent weights, and parts are initialised from them.
    A network that is already binary keeps its conversion. A packed one gets latent weights with its signs and random
    magnitudes.
    """
    if start is None:
        return build_model(recipe)
    network = start.network
    different = f"init_from: {start.path} holds another network than the recipe's"
    if not is_converted(network):
        # Built anew, it has the recipe's dropout and the current default dtype.
        full = build_model(recipe.model_copy(update={"method": None, "two_stage": None, "progressive": None}))
        _check_equal(different, _settings(network), _settings(full))
        full.load_state_dict(network.state_dict())
        return build_model(recipe, full)
    model = build_model(recipe)
    _check_equal(different, _settings(network), _settings(model))
    if is_packed(network):
        try:
            unpack(network, latents="random")
        except BinarizeError as error:
            raise BinarizeError(
                f"init_from: {start.path} is packed with method {conversion(network).method.name!r}, whose latent "
                "weights cannot be drawn from signs and scales. Give the model that it was packed from."
            ) from error
    model.load_state_dict(network.state_dict())
    return model


def _settings(network: nn.Module) -> dict[str, Any]:
    """Return what defines a network's tensors: its class, its configuration and its conversion."""
    config = {key: value for key, value in cast(Any, network).config.items() if not key.startswith("_")}
    kept = {key: value for key, value in config.items() if key not in _FREE_KEYS}
    converted = None
    if is_converted(network):
        converted = recorded_conversion(replace(conversion(network), packed=False, full_precision="float"))
    return {"class": type(network).__name__, **kept, "conversion": converted}


def _check_equal(message: str, found: Mapping[str, Any], expected: Mapping[str, Any], fix: str = "") -> None:
    def as_list(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    wrong = [key for key, value in expected.items() if as_list(found.get(key)) != as_list(value)]
    different = [f"{key}: {found.get(key)!r} there, {expected[key]!r} here" for key in wrong]
    if different:
        raise BinarizeError(listing(f"{message}:", different, fix))
