"""What a run starts from: a fresh network or a trained one, its teacher, and the unit of its residuals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from binarize.conversion.packing import is_packed
from binarize.errors import BinarizeError
from binarize.recipes import build_model
from binarize.training.data import PairedPatches
from binarize.training.residual import residual_deviation

if TYPE_CHECKING:
    from binarize.models import SRUNet
    from binarize.recipes import Recipe

# Keys of a noise schedule that decide what a prediction means; the others are for sampling.
_MEANING = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "rescale_betas_zero_snr",
)
# Keys of a network that may differ between a trained one and the one that starts from it.
_FREE = ("dropout", "conversion")


@dataclass(frozen=True)
class Trained:
    """A trained network and what is known of its training.

    Attributes:
        path: Where it was read from.
        network: On the CPU, in evaluation mode.
        scheduler: The noise schedule's configuration, or None where a network was saved alone.
        residual_scale: As in the pipeline; None also where a network was saved alone.
    """

    path: Path
    network: SRUNet
    scheduler: dict[str, Any] | None
    residual_scale: float | None


def read_trained(key: str, path: Path) -> Trained:
    """Read a trained model: a run's folder, a pipeline's, a network's, or a released checkpoint.

    Args:
        key: The recipe's key that names it, for errors.
        path: The folder or file.

    Raises:
        BinarizeError: If it cannot be read.
    """
    from binarize.models.loading import PIPELINE, RUN, load_network, load_pipeline

    try:
        if (path / PIPELINE).is_file() or (path / RUN / PIPELINE).is_file():
            pipeline = load_pipeline(path)
            return Trained(path, pipeline.unet, dict(pipeline.scheduler.config), pipeline.residual_scale)
        return Trained(path, load_network(path), None, None)
    except BinarizeError as error:
        raise BinarizeError(f"{key}: {error}") from error


def with_residual_scale(recipe: Recipe, patches: PairedPatches, trained: list[Trained | None]) -> Recipe:
    """Return the recipe with its residual scale filled in: from the networks it learns from, or from the pictures.

    Args:
        recipe: What is run.
        patches: Its training patches.
        trained: The teacher and what it starts from.
    """
    if recipe.target != "residual" or recipe.residual_scale is not None:
        return recipe
    known = [one.residual_scale for one in trained if one is not None and one.residual_scale is not None]
    scale = known[0] if known else residual_deviation(patches)
    return recipe.model_copy(update={"residual_scale": scale})


def check_speaks_the_same(key: str, recipe: Recipe, trained: Trained) -> None:
    """Refuse a trained model whose predictions mean something else than the recipe's, as far as it is known.

    Raises:
        BinarizeError: Listing what differs.
    """
    if trained.scheduler is None:
        return
    own = {**recipe.scheduler.model_dump(), "residual_scale": recipe.residual_scale}
    theirs = {**trained.scheduler, "residual_scale": trained.residual_scale}
    different = [
        f"  {name}: {theirs.get(name)!r} there, {own[name]!r} here"
        for name in (*_MEANING, "residual_scale")
        if theirs.get(name) != own[name]
    ]
    if different:
        raise BinarizeError(
            "\n".join([f"{key}: {trained.path} was trained to predict something else:", *different])
            + "\nMake the recipe's scheduler and target those of the trained model."
        )


def initial_network(recipe: Recipe, start: Trained | None) -> SRUNet:
    """Return the network that a run begins with, converted as the recipe says.

    A full-precision twin is converted, so that its weights become the latent weights and parts that are initialised
    from weights see the trained ones. A network that is binary already is taken as it is.

    Args:
        recipe: What is run.
        start: What ``init_from`` names, or None for a fresh network.

    Raises:
        BinarizeError: If the two networks differ.
    """
    if start is None:
        return build_model(recipe)
    network = start.network
    wanted = recipe.model.config(recipe.scheduler.num_train_timesteps)
    if network.config["conversion"] is None:
        _check_same("init_from", start.path, dict(network.config), wanted)
        fresh = build_model(recipe.model_copy(update={"method": None, "two_stage": None, "progressive": None}))
        fresh.load_state_dict(network.state_dict())  # the recipe's dropout, and its dtype
        return build_model(recipe, fresh)
    if is_packed(network):
        raise BinarizeError(
            f"init_from: {start.path} is packed, 1 bit for a weight, and cannot be trained on; give the run's folder "
            "or the model that it was packed from."
        )
    model = build_model(recipe)
    _check_same("init_from", start.path, dict(network.config), dict(model.config), free=("dropout",))
    model.load_state_dict(network.state_dict())
    return model


def _check_same(
    key: str, path: Path, theirs: dict[str, Any], wanted: dict[str, Any], free: tuple[str, ...] = _FREE
) -> None:
    names = [name for name in wanted if name not in free and not name.startswith("_")]
    different = [
        f"  {name}: {theirs.get(name)!r} there, {wanted[name]!r} here"
        for name in names
        if _plain(theirs.get(name)) != _plain(wanted[name])
    ]
    if different:
        raise BinarizeError("\n".join([f"{key}: {path} holds another network than the recipe's:", *different]))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
