"""Pipelines that pack their network while they load."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_case import NETWORK

import binarize
from binarize.conversion import packing
from binarize.errors import BinarizeError
from binarize.imaging import degrade
from binarize.kernels import backends
from binarize.models import SRUNet, SuperResolutionPipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "binary"
    unet = binarize.convert(SRUNet(**NETWORK), "bidiffsr", overrides={"middle.0.*": "binarydm"})
    SuperResolutionPipeline(unet, scale=2).save_pretrained(folder)
    return folder


def test_from_pretrained_packs_a_binary_network(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = SuperResolutionPipeline.from_pretrained(model)
    assert binarize.is_packed(pipe.unet)
    latent = SuperResolutionPipeline.from_pretrained(model, pack=False)
    assert not binarize.is_packed(latent.unet)
    image = degrade(np.full((8, 8, 3), 99, np.uint8), 2)
    large = [
        np.asarray(p(image, num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0], dtype=float)
        for p in (pipe, latent)
    ]
    assert np.abs(large[0] - large[1]).mean() < 2
    with caplog.at_level(logging.WARNING, "binarize"):
        latent.save_pretrained(tmp_path / "latent")
        assert not caplog.messages
        pipe.save_pretrained(tmp_path / "packed")
    assert "load with pack=False" in caplog.text
    assert binarize.is_packed(SuperResolutionPipeline.from_pretrained(tmp_path / "packed", pack=False).unet)


def test_a_network_that_is_passed_in_is_not_changed(model: Path) -> None:
    live = SRUNet.from_pretrained(model / "unet")
    assert not binarize.is_packed(live)
    weights = {name: id(p) for name, p in live.named_parameters()}
    for pipe in [SuperResolutionPipeline(live, scale=2), SuperResolutionPipeline.from_pretrained(model, unet=live)]:
        pipe(np.zeros((4, 4, 3), np.uint8), num_inference_steps=1)
        assert pipe.unet is live
    assert {name: id(p) for name, p in live.named_parameters()} == weights


def test_a_packed_network_is_unpacked_on_another_device(model: Path, tmp_path: Path, caplog: Any) -> None:
    pipe = SuperResolutionPipeline.from_pretrained(model)
    pipe.to(torch.float64)
    assert binarize.is_packed(pipe.unet)
    pipe.to("meta")
    assert not binarize.is_packed(pipe.unet)
    assert pipe.unet.device.type == "meta"
    pipe.unet = SRUNet.from_pretrained(model / "unet")  # a meta tensor cannot be saved
    pipe.save_pretrained(tmp_path)
    assert "contains only the signs of its weights" in caplog.text


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_networks_without_kernels_keep_their_latents(model: Path, backend: Any) -> None:
    with backends.use(backend):
        packed = binarize.is_packed(SuperResolutionPipeline.from_pretrained(model).unet)
        assert not packing.pack_if_possible(binarize.convert(SRUNet(**NETWORK).double(), "bidiffsr"))
    assert packed == (backend == "numba")


def test_a_network_that_cannot_be_packed_is_not_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not packing.pack_if_possible(SRUNet(**NETWORK))
    first_stage = binarize.convert(SRUNet(**NETWORK), {"name": "reactnet", "two_stage": 0.5})
    with caplog.at_level(logging.INFO, "binarize"):
        assert not packing.pack_if_possible(first_stage)
    assert "weights are still full precision" in caplog.text
    assert packing.pack_if_possible(binarize.pack(binarize.convert(SRUNet(**NETWORK), "bbcu")))
    with torch.device("meta"):
        assert not packing.pack_if_possible(binarize.convert(SRUNet(**NETWORK), "bbcu"))
    with pytest.raises(BinarizeError, match="still full precision"):
        binarize.pack(first_stage)
