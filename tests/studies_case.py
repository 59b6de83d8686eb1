"""A study of two networks that take a second each."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from binarize.studies.results import AblationResult

Finished = tuple[dict[str, Any], AblationResult]
TINY: dict[str, Any] = {
    "model": {"base_channels": 8, "channel_mults": [1], "norm_groups": 4}, "resolution": 16, "train_batch_size": 2,
    "max_train_steps": 4, "learning_rate": 1e-3, "lr_warmup_steps": 0, "checkpointing_steps": 2,
    "validation_steps": 1000, "logging_steps": 1,
}  # fmt: skip
SHRINK = [
    "max_train_steps=1",
    "model.channel_mults=[1]",
    "model.base_channels=8",
    "resolution=16",
    "train_batch_size=1",
]


def make(pictures: Path, out: Path, **changes: Any) -> dict[str, Any]:
    study = {
        "base": "small_x2",
        "overrides": {**TINY, "train_data_dir": str(pictures)},
        "grid": {"method": ["bnn", {"name": "bidiffsr", "groups": 2}]},
        "evaluation": {"data_dir": str(pictures), "num_inference_steps": 2, "limit": 2, "lpips": None},
        "output_dir": str(out),
    }
    return {**study, **changes}


def write_study(study: dict[str, Any], folder: Path) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return path


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.parent.name != folder.name}


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    again = AssertionError("a finished run was trained again")
    monkeypatch.setattr("binarize.training.loop.train", mock.Mock(side_effect=again))
