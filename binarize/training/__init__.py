"""Training: data, the training loop, exact resuming, and the files that a run writes.

The loop imports diffusers and Accelerate, which take seconds; it is imported on the first use of `train`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from binarize.training.checkpoint import Checkpoints, load_checkpoint
from binarize.training.data import PairedPatches
from binarize.training.distillation import distill
from binarize.training.errors import DivergedError, TrainingInterrupted
from binarize.training.malloc import keep_large_blocks_apart

if TYPE_CHECKING:
    from binarize.training.log import LogEntry
    from binarize.training.loop import TrainResult, train

__all__ = [
    "Checkpoints", "DivergedError", "LogEntry", "PairedPatches", "TrainResult", "TrainingInterrupted",
    "distill", "keep_large_blocks_apart", "load_checkpoint", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("binarize.training.loop"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
