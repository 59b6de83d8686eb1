"""Training: data, the training loop, exact resuming, and the files that a run writes.

The loop imports diffusers and Accelerate, which take seconds: modules are imported when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from binarize.importing import exports
from binarize.kernels.malloc import keep_large_blocks_apart

if TYPE_CHECKING:
    from binarize.training.checkpoint import Checkpoints, load_checkpoint
    from binarize.training.data import PairedPatches
    from binarize.training.distillation import distill
    from binarize.training.errors import DivergedError, TrainingInterrupted
    from binarize.training.log import LogEntry
    from binarize.training.loop import TrainResult, train

__all__ = [
    "Checkpoints", "DivergedError", "LogEntry", "PairedPatches", "TrainResult", "TrainingInterrupted",
    "distill", "keep_large_blocks_apart", "load_checkpoint", "train",
]  # fmt: skip

_NAMES = {
    "checkpoint": ("Checkpoints", "load_checkpoint"),
    "data": ("PairedPatches",),
    "distillation": ("distill",),
    "errors": ("DivergedError", "TrainingInterrupted"),
    "log": ("LogEntry",),
    "loop": ("TrainResult", "train"),
}
__getattr__ = exports(__name__, _NAMES)
