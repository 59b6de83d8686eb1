"""Settings and fixtures of all tests (seeds, threads, hypothesis, optional data and hardware), and durations."""

import atexit
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

# Seconds that the tests may take in all on the two processes of a machine with two cores, by pytest's -m.
DURATION_BUDGETS = {
    "not long and not zoo and not web": 2 * 300,
    "not slow and not long and not zoo and not web": 2 * 90,
}

# Files whose tests train networks, run the snippets of the documentation or Triton's interpreter: all of them are slow.
SLOW_FILES = ("test_ablation", "test_changes", "test_cuda", "test_doctor", "test_objectives", "test_options")
SLOW_FILES += ("test_readme", "test_stages", "test_textbook")
ZOO_FILES = ("test_exported_models", "test_families", "test_zoo")

# Small tensors gain nothing from more threads. Each process of `pytest -n`, and each program that it starts, has one
# thread, because more would compete for the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
else:
    torch.set_num_threads(min(2, torch.get_num_threads()))

# TorchInductor does not compile anew when ATEN_CPU_CAPABILITY changes, and code for other vectors gives wrong numbers.
# Each run of the tests therefore has its own cache, which its processes share.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="binarize_inductor_")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

# Without a GPU, tests/kernels/test_cuda.py runs the kernels in Triton's interpreter. Triton reads this on import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No time limits: the first call of a compiled or lazily imported function is slow.
checks = {"suppress_health_check": [HealthCheck.too_slow], "deadline": None}
settings.register_profile("binarize", **checks, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("binarize")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- some libraries use numpy's global generator
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of optional test data that is not in the repository. Skip the test if it is absent."""
    folder = Path(os.environ.get("BINARIZE_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the optional test data: {folder} does not exist; set BINARIZE_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of five smooth colour images, from which a network learns within seconds."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:40, 0:32]
    for number in range(5):
        waves = [np.sin(rows / random.uniform(3, 9) + columns / random.uniform(3, 9)) for _ in range(3)]
        Image.fromarray((np.stack(waves, axis=-1) * 90 + 128).astype(np.uint8)).save(folder / f"p{number}.png")
    return folder


@pytest.fixture
def recipe(pictures: Path, tmp_path: Path) -> Any:
    """Return a function that makes a tiny recipe with overrides. Its output folder belongs to the test."""
    from training_case import TINY

    from binarize.recipes import Recipe, load_recipe

    def make(*overrides: str, out: str = "run") -> Recipe:
        where = (f"train_data_dir={pictures}", f"output_dir={tmp_path / out}")
        return load_recipe("small_x2", [*TINY, *where, *overrides])

    return make


@pytest.fixture
def registries() -> Iterator[None]:
    """Let a test register methods, parts and hosts, and remove them afterwards."""
    from binarize.hosts.base import HOSTS
    from binarize.layers.method import METHODS
    from binarize.layers.parts import _PARTS, _TIMESTEP_AWARE

    registries: list[Any] = [HOSTS, METHODS, *_PARTS.values()]
    before, aware = [dict(registry._items) for registry in registries], set(_TIMESTEP_AWARE)
    yield
    for registry, items in zip(registries, before, strict=True):
        registry._items.clear()
        registry._items.update(items)
    _TIMESTEP_AWARE.clear()
    _TIMESTEP_AWARE.update(aware)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW_FILES:
            item.add_marker("slow")
        if item.path.stem in ZOO_FILES:
            item.add_marker("zoo")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the ten slowest tests, and the duration of all tests beside its budget. A run over budget does not fail."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] += report.duration  # of its setup, call or teardown
    total = sum(seconds.values())
    if total < 30:
        return
    whole_suite = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    budget = DURATION_BUDGETS.get(config.getoption("markexpr")) if whole_suite else None
    of_budget = f" of a budget of {budget} s" if budget is not None else ""
    terminalreporter.section(f"durations: {total:.0f} s{of_budget}")
    for test, duration in seconds.most_common(10):
        terminalreporter.line(f"{duration:6.1f} s  {test}")
