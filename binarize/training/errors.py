"""Exceptions that end a training run early."""

from __future__ import annotations

import signal
from pathlib import Path

from binarize.errors import BinarizeError


class DivergedError(BinarizeError):
    """The loss or the gradient became NaN or infinite; the weights were not updated with it."""


class TrainingInterrupted(Exception):
    """A signal stopped the run after a checkpoint was saved.

    Args:
        signum: The signal, SIGINT or SIGTERM.
        checkpoint: The folder of the saved checkpoint.
    """

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; saved {checkpoint}. Continue with "
            "resume_from_checkpoint=latest."
        )
        self.signum = signum
        self.checkpoint = checkpoint

    @property
    def exit_code(self) -> int:
        """The exit status by the shell's convention: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum
