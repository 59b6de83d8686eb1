"""Runs that several tests read. A test that changes a run copies it first."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_case import RESUME, TINY

from binarize.recipes import load_recipe
from binarize.training import TrainResult, train

Trained = Callable[..., TrainResult]


@pytest.fixture(scope="session")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return the tiny recipe's run with overrides; each is trained once per session and dtype."""
    results: dict[tuple[object, ...], TrainResult] = {}

    def get(*overrides: str) -> TrainResult:
        key = (torch.get_default_dtype(), *overrides)
        if key not in results:
            where = (f"train_data_dir={pictures}", f"output_dir={tmp_path_factory.mktemp('runs') / 'run'}")
            results[key] = train(load_recipe("small_x2", [*TINY, *where, *overrides]), progress=False)
        return results[key]

    return get


@pytest.fixture
def cut(trained: Trained, tmp_path: Path) -> Callable[..., Path]:
    """Return the folder ``cut`` with a copy of a run's checkpoint, as a killed run leaves it."""

    def copy(step: int, *overrides: str) -> Path:
        name = f"checkpoint-{step}"
        shutil.copytree(trained(*overrides).output_dir / name, tmp_path / "cut" / name)
        return tmp_path / "cut"

    return copy


@pytest.fixture
def resume(cut: Callable[..., Path], recipe: Any) -> Trained:
    """Return the run that continues a run's checkpoint with the same overrides."""

    def run(step: int, *overrides: str) -> TrainResult:
        cut(step, *overrides)
        return train(recipe(*overrides, RESUME, out="cut"), progress=False)

    return run


@pytest.fixture(scope="session")
def twin(trained: Trained) -> Path:
    """The folder of a full-precision run."""
    return trained("method=null", "max_train_steps=4").output_dir


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """Return a file with the backbone of LPIPS, SqueezeNet with random weights."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "squeeze.pth")
    return tmp_path / "squeeze.pth"
