"""What every test shares: fixed seeds, few threads, hypothesis settings, optional fixtures and hardware."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

# Small tensors gain nothing from more threads. Of several processes (pytest -n) each has one, and so have the programs
# that it starts: more would fight over the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
else:
    torch.set_num_threads(min(2, torch.get_num_threads()))

# Triton reads this when it is imported: kernels for GPUs are then interpreted, for test_triton.py.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The first call of a compiled or lazily imported function is slow, so a deadline would fail at random.
settings.register_profile("binarize", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("binarize")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- for libraries that draw from numpy's global generator
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of larger fixtures that are not in the repository; tests that ask for it skip where it is absent."""
    folder = Path(os.environ.get("BINARIZE_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the optional fixtures: {folder} is not there; set BINARIZE_SHARED to their folder")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five smooth coloured pictures with edges, from which a network can learn in seconds."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:40, 0:32]
    for number in range(5):
        waves = [np.sin(rows / random.uniform(3, 9) + columns / random.uniform(3, 9)) for _ in range(3)]
        levels = (np.stack(waves, axis=-1) * 90 + 128).astype(np.uint8)
        Image.fromarray(levels).save(folder / f"p{number}.png")
    return folder


@pytest.fixture
def recipe(pictures: Path, tmp_path: Path) -> Any:
    """Return a tiny recipe with overrides, writing into a folder of the test's own."""

    from training_case import TINY

    from binarize.recipes import Recipe, load_recipe

    def make(*overrides: str, out: str = "run") -> Recipe:
        where = (f"train_data_dir={pictures}", f"output_dir={tmp_path / out}")
        return load_recipe("small_x2", [*TINY, *where, *overrides])

    return make


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
