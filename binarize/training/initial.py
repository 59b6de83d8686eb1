"""The network that a run starts from, its teacher, and the scale of its residuals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from binarize.conversion.packing import is_packed
from binarize.errors import BinarizeError, listing
from binarize.models.loading import PIPELINE, RUN, load_network, load_pipeline
from binarize.recipes import Recipe, build_model
from binarize.training.data import PairedPatches, residual_std

if TYPE_CHECKING:
    from binarize.models import SRUNet

# Keys of a noise schedule that define what a prediction means; the others are for sampling only.
_PREDICTION_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr",
    "residual_scale",
)  # fmt: skip


@dataclass(frozen=True)
class TrainedModel:
    """A trained network, on the CPU in evaluation mode, with its pipeline's noise schedule and residual scale."""

    path: Path
    network: SRUNet
    scheduler: dict[str, Any] | None
    residual_scale: float | None


def read_trained(key: str, path: Path) -> TrainedModel:
    """Read the folder of a run, a pipeline or a network, or a released checkpoint; errors name the recipe's key."""
    try:
        if (path / PIPELINE).is_file() or (path / RUN / PIPELINE).is_file():
            pipeline = load_pipeline(path)
            return TrainedModel(path, pipeline.unet, dict(pipeline.scheduler.config), pipeline.residual_scale)
        return TrainedModel(path, load_network(path), None, None)
    except BinarizeError as error:
        raise BinarizeError(f"{key}: {error}") from error


def with_residual_scale(recipe: Recipe, patches: PairedPatches, trained: Iterable[TrainedModel | None]) -> Recipe:
    """Return the recipe with its residual scale: that of the trained models, or measured on the training patches."""
    if recipe.target != "residual" or recipe.residual_scale is not None:
        return recipe
    known = [model.residual_scale for model in trained if model is not None and model.residual_scale is not None]
    return recipe.model_copy(update={"residual_scale": known[0] if known else residual_std(patches)})


def check_same_prediction(key: str, recipe: Recipe, trained: TrainedModel) -> None:
    """Raise an error if a trained model predicts another quantity than the recipe, as far as its files say."""
    if trained.scheduler is None:
        return
    own = {**recipe.scheduler.model_dump(), "residual_scale": recipe.residual_scale}
    expected = {name: own[name] for name in _PREDICTION_KEYS}
    found = {**trained.scheduler, "residual_scale": trained.residual_scale}
    message = f"{key}: {trained.path} was trained to predict something else"
    _check_equal(message, found, expected, "Make the recipe's scheduler and target those of the trained model.")


def initial_network(recipe: Recipe, start: TrainedModel | None) -> SRUNet:
    """Return the network at step 0, converted as the recipe says: a new one, or the one that ``init_from`` names.

    A full-precision network is converted: its weights become the latent weights, and parts are initialised from them.
    A network that is already binary keeps its conversion.
    """
    if start is None:
        return build_model(recipe)
    network = start.network
    different = f"init_from: {start.path} holds another network than the recipe's"
    if network.config["conversion"] is None:
        expected = recipe.model.config(recipe.scheduler.num_train_timesteps)
        _check_equal(different, network.config, {key: expected[key] for key in expected if key != "dropout"})
        full = build_model(recipe.model_copy(update={"method": None, "two_stage": None, "progressive": None}))
        full.load_state_dict(network.state_dict())  # keeps the recipe's dropout and the current default dtype
        return build_model(recipe, full)
    if is_packed(network):
        raise BinarizeError(f"init_from: {start.path} is packed; give the model that it was packed from.")
    model = build_model(recipe)
    expected = {key: value for key, value in model.config.items() if key != "dropout" and not key.startswith("_")}
    _check_equal(different, network.config, expected)
    model.load_state_dict(network.state_dict())
    return model


def _check_equal(message: str, found: Mapping[str, Any], expected: Mapping[str, Any], fix: str = "") -> None:
    def as_list(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    wrong = [key for key, value in expected.items() if as_list(found.get(key)) != as_list(value)]
    different = [f"{key}: {found.get(key)!r} there, {expected[key]!r} here" for key in wrong]
    if different:
        raise BinarizeError(listing(f"{message}:", different, fix))
