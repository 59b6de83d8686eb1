"""A training run that takes a second, and helpers to compare and interrupt runs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from binarize.training import load_checkpoint, objective, super_resolution

TINY = (
    "model.base_channels=8", "model.channel_mults=[1, 2]", "model.norm_groups=4", "resolution=16", "train_batch_size=4",
    "max_train_steps=6", "learning_rate=1e-3", "lr_scheduler=constant", "lr_warmup_steps=0", "use_ema=false",
    "checkpointing_steps=3", "validation_steps=1000", "num_inference_steps=2", "logging_steps=1",
)  # fmt: skip
SMALLEST = ("model.channel_mults=[1]", "model.res_blocks=1", "train_batch_size=2")
RESUME = "resume_from_checkpoint=latest"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder)[0]["model"]


def assert_same(one: Path, other: Path) -> None:
    """Check that two checkpoints have the same weights, bit for bit."""
    assert not differences(weights(one), weights(other))


def assert_close(one: Path, other: Path, *, atol: float = 1e-9, rtol: float = 0) -> None:
    """Check that two checkpoints have the same weights within a tolerance."""
    torch.testing.assert_close(weights(one), weights(other), atol=atol, rtol=rtol)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return the paths at which two nested states differ by any bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [path for key in one for path in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [path for number, pair in pairs for path in differences(*pair, f"{where}.{number}")]
    return [] if one == other else [where]


def at_call(number: int, owner: Any, name: str, action: Callable[[Any], Any], patch: pytest.MonkeyPatch) -> None:
    """Replace a function so that its n-th call returns ``action(result)``."""
    real = getattr(owner, name)
    calls = 0

    def counting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = real(*arguments)
        return action(result) if calls == number else result

    patch.setattr(owner, name, counting)


def interrupt_at(forward_pass: int, patch: pytest.MonkeyPatch, signum: int) -> None:
    """Send this process a signal during a forward pass."""

    def interrupt(losses: Any) -> Any:
        os.kill(os.getpid(), signum)
        return losses

    at_call(forward_pass, objective, "sample_losses", interrupt, patch)


def set_scores(scores: list[float], patch: pytest.MonkeyPatch) -> None:
    """Make validations report the given PSNRs, one after another."""
    remaining: Iterator[float] = iter(scores)
    patch.setattr(super_resolution, "psnr", lambda *arguments, **options: next(remaining))
