"""Fixtures of the tests that run the command line: images and models."""

from pathlib import Path

import pytest
import torch
from cli_case import NETWORK, make_image, succeeds

import binarize
from binarize.models import SRUNet, SuperResolutionPipeline


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, p0.png of 48x40 and p1.png of 35x33 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    for index, (height, width) in enumerate([(40, 48), (33, 35)]):
        make_image(height, width, index).save(folder / f"p{index}.png")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained binary pipeline of scale 2, with one- and two-basis weights."""
    folder = tmp_path_factory.mktemp("models") / "x2"
    torch.manual_seed(0)
    unet = binarize.convert(SRUNet(**NETWORK), "bidiffsr", overrides={"middle.0.*": "binarydm"})
    SuperResolutionPipeline(unet, scale=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed(model: Path) -> Path:
    """The model, packed."""
    succeeds("pack", model, model.with_name("packed"))
    return model.with_name("packed")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """An image of 11x9 pixels in a folder of the test's own."""
    make_image(9, 11).save(tmp_path / "small.png")
    return tmp_path / "small.png"
