"""The averaged weights and the saved pipeline of a validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import nn

from binarize.errors import BinarizeError, one_line
from binarize.files import replace_folder


@contextmanager
def averaged_weights(model: nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Give the model the averaged weights inside this context, if there is an average."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


def export(pipeline: Any, folder: Path) -> None:
    """Save a pipeline to a folder, replacing an earlier one as a whole, or leaving it unchanged if writing fails."""
    try:
        replace_folder(folder, pipeline.save_pretrained)
    except (OSError, SafetensorError) as error:
        raise BinarizeError(f"cannot write the model to {folder}: {one_line(error)}.") from error
