"""Exceptions that end a training run early."""

from __future__ import annotations

import signal
from pathlib import Path

from binarize.errors import BinarizeError


class DivergedError(BinarizeError):
    """The loss or the gradient became NaN or infinite; the weights were not updated with it."""


class TrainingInterrupted(Exception):
    """A signal, SIGINT or SIGTERM, stopped the run after a checkpoint was saved."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}; saved {checkpoint}. Continue with resume_from_checkpoint=latest.")
        self.signum, self.checkpoint = signum, checkpoint

    @property
    def exit_code(self) -> int:
        """The exit status by the shell's convention: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum
