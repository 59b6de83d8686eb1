"""Images and a finished study that several tests read."""

from pathlib import Path

import pytest
from studies_case import Finished, make

from binarize.studies.ablation import ablate


@pytest.fixture(scope="session")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    study = make(pictures, tmp_path_factory.mktemp("study"), seeds=[0, 7])
    return study, ablate(study, progress=False)
