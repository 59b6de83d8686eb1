"""A training run that takes a second, and how two of them are compared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from binarize.training import load_checkpoint, objective

TINY = (
    "model.base_channels=8",
    "model.channel_mults=[1, 2]",
    "model.norm_groups=4",
    "resolution=16",
    "train_batch_size=4",
    "max_train_steps=6",
    "learning_rate=1e-3",
    "lr_scheduler=constant",
    "lr_warmup_steps=0",
    "use_ema=false",
    "checkpointing_steps=3",
    "validation_steps=1000",
    "num_inference_steps=2",
    "logging_steps=1",
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_checkpoint(folder)[0]["model"]
    return state


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def interrupt_at(forward_pass: int, monkeypatch: pytest.MonkeyPatch, signum: int) -> None:
    """Send this process a signal while a forward pass is under way."""
    real = objective.sample_losses
    calls = 0

    def counting(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == forward_pass:
            os.kill(os.getpid(), signum)
        return real(*arguments)

    monkeypatch.setattr(objective, "sample_losses", counting)
