"""What every test shares: fixed seeds, few threads, hypothesis settings, optional fixtures and hardware."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Small tensors gain nothing from more threads, and two test runs at once would fight over the cores.
torch.set_num_threads(min(2, torch.get_num_threads()))

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


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
