"""Saved packed models, shared by the tests of this folder."""

from pathlib import Path

import pytest
import torch
from hosts_zoo import unet2d
from packed_case import SMALL, network

import binarize


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return binarize.save(binarize.pack(network(**SMALL)), tmp_path_factory.mktemp("packed"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(scope="session")
def good_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = binarize.pack(binarize.convert(unet2d((8, 16)), "bidiffsr"))
    return binarize.save(model, tmp_path_factory.mktemp("host"))
