"""Saving and loading converted models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from binarize._convert import RECORD, convert
from binarize.errors import BinarizeError


def apply_conversion(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Convert ``model`` as a recorded conversion says.

    Raises:
        BinarizeError: If the record comes from a newer version or names something that is not registered.
    """
    options = dict(config)
    if "unsaveable" in options:
        raise BinarizeError(f"this conversion was not saveable: {options['unsaveable']}")
    version = options.pop("format", None)
    if version != 1:
        raise BinarizeError(f"the conversion has format {version!r}; this version of binarize reads format 1.")
    known = {"method", "structure", "keep", "overrides", "linear", "num_train_timesteps"}
    unknown = sorted(set(options) - known)
    if unknown or "method" not in options:
        raise BinarizeError(f"the conversion has unknown or missing keys: {', '.join(unknown) or 'method'}.")
    convert(model, options.pop("method"), **options)


def check_saveable(model: nn.Module) -> None:
    """Raise if the model's conversion has a part that no file can name."""
    record = getattr(model, RECORD, None)
    if record is not None:
        record.to_config()
