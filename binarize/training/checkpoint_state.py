"""What a checkpoint must hold to be resumed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from binarize.recipes.errors import explain
from binarize.recipes.yaml_text import parse_mapping
from binarize.training.checkpoint import RECIPE, STATE, load_checkpoint, unreadable


class CheckpointState(BaseModel):
    """What a checkpoint's ``state.pt`` must hold to be resumed from."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    step: NonNegativeInt
    samples_per_step: PositiveInt
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    lr_scheduler: dict[str, Any]
    ema: dict[str, Any] | None
    scaler: dict[str, Any] | None
    validated: NonNegativeInt
    best: tuple[NonNegativeInt, float] | None
    images: dict[str, str] | None = None
    """Name -> digest of the training images; None in checkpoints of version 0.1."""


def read_state(folder: Path) -> tuple[CheckpointState, dict[str, Any]]:
    """Return a checkpoint's validated state and its recipe's keys."""
    state, text = load_checkpoint(folder)
    try:
        recipe = parse_mapping(text, str(folder / RECIPE))
        return CheckpointState.model_validate(state), recipe
    except ValidationError as error:
        raise unreadable(folder, explain(error, STATE, "state", CheckpointState).replace("\n", "")) from None
