"""Images and a finished study that several tests read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from studies_case import make

from binarize.studies.ablation import ablate
from binarize.studies.results import AblationResult

Finished = tuple[dict[str, Any], AblationResult]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:32, 0:32]
    for number in range(2):
        waves = [np.sin(rows / random.uniform(3, 9) + columns / random.uniform(3, 9)) for _ in range(3)]
        Image.fromarray((np.stack(waves, axis=-1) * 90 + 128).astype(np.uint8)).save(folder / f"p{number}.png")
    return folder


@pytest.fixture(scope="session")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    study = make(pictures, tmp_path_factory.mktemp("study"), seeds=[0, 7])
    return study, ablate(study, progress=False)
