"""Packing from the command line and in pipelines, and what the other commands make of packed models."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import contents, edit_json, fails, official_names, succeeds

import binarize
from binarize.conversion import packing as _pack
from binarize.errors import BinarizeError
from binarize.imaging import degrade
from binarize.kernels import backends
from binarize.models import SRUNet, SuperResolutionPipeline

NETWORK: dict[str, Any] = {"base_channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 4}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "binary"
    unet = binarize.convert(SRUNet(**NETWORK), "bidiffsr", overrides={"middle.0.*": "binarydm"})
    SuperResolutionPipeline(unet, scale=2).save_pretrained(folder)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(tmp_path / "small.png")
    return tmp_path / "small.png"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_packed_pipeline_gives_the_pictures_of_the_binary_one(model: Path, small: Path, tmp_path: Path) -> None:
    packed, half = tmp_path / "deep" / "packed", tmp_path / "half"
    said = succeeds("pack", model, packed)
    size = (packed / "unet" / WEIGHTS).stat().st_size
    assert f"wrote {packed}, the network in {size / 1e6:.2f} MB" in said
    assert size < 0.6 * (model / "unet" / WEIGHTS).stat().st_size
    options = ("--steps", "2", "--device", "cpu")
    succeeds("upscale", small, tmp_path / "float.png", "--model", model, "--no-pack", *options)
    succeeds("upscale", small, tmp_path / "bits.png", "--model", model, *options)
    succeeds("upscale", small, tmp_path / "file.png", "--model", packed, *options)
    unpacked, bits, file = (pixels(tmp_path / f"{name}.png") for name in ("float", "bits", "file"))
    assert np.array_equal(bits, file)
    # Rounding flips single signs, which an untrained network of 8 channels passes on to the picture.
    assert np.abs(bits - unpacked).mean() < 2

    succeeds("pack", packed, half, "--dtype", "float16")  # what is packed can be stored anew
    assert (half / "unet" / WEIGHTS).stat().st_size < 0.8 * size
    succeeds("upscale", small, tmp_path / "half.png", "--model", half, *options)
    succeeds("upscale", small, tmp_path / "bf16.png", "--model", packed, *options, "--dtype", "bfloat16")
    succeeds("upscale", small, tmp_path / "back.png", "--model", packed, *options, "--no-pack")
    assert np.array_equal(pixels(tmp_path / "back.png"), unpacked)


def test_a_network_and_a_single_file_are_models_too(model: Path, small: Path, tmp_path: Path) -> None:
    said = succeeds("pack", model / "unet", tmp_path / "packed")
    assert "--scale N" in said
    assert sorted(contents(tmp_path / "packed")) == ["config.json", WEIGHTS]
    for given in (tmp_path / "packed", tmp_path / "packed" / WEIGHTS):
        succeeds("upscale", small, tmp_path / f"{given.name}.png", "--model", given, "--scale", "3", "--steps", "1")
    assert np.array_equal(pixels(tmp_path / "packed.png"), pixels(tmp_path / f"{WEIGHTS}.png"))
    succeeds("pack", tmp_path / "packed", tmp_path / "pipeline", "--scale", "3")
    assert SuperResolutionPipeline.from_pretrained(tmp_path / "pipeline").scale == 3
    succeeds("pack", tmp_path / "packed" / WEIGHTS, tmp_path / "again")
    assert contents(tmp_path / "again")[WEIGHTS] == contents(tmp_path / "packed")[WEIGHTS]


def test_a_released_checkpoint_is_packed(tmp_path: Path) -> None:
    checkpoint, config = official_names()
    succeeds("import-official", checkpoint, tmp_path / "imported", "--scale", "4", *config)
    succeeds("pack", tmp_path / "imported", tmp_path / "packed")
    unet = SuperResolutionPipeline.from_pretrained(tmp_path / "packed").unet
    assert binarize.is_packed(unet)


def test_evaluate_takes_packed_models(model: Path, pictures: Path, tmp_path: Path) -> None:
    succeeds("pack", model, tmp_path / "packed")
    options = ("--data", pictures, "--lpips", "none", "--steps", "1", "--limit", "1")
    rows = []
    for given, more in ((tmp_path / "packed", ()), (model, ()), (model, ("--no-pack",))):
        out = tmp_path / f"{given.name}{len(more)}"
        succeeds("evaluate", given, *options, *more, "--output", out)
        rows.append(json.loads((out / "evaluation.json").read_text())["mean"])
        del rows[-1]["seconds"]
    assert rows[0] == rows[1]
    assert rows[0]["model"]["PSNR"] == pytest.approx(rows[2]["model"]["PSNR"], abs=0.5)


def test_summary_of_a_packed_model_is_that_of_the_binary_one(model: Path, tmp_path: Path) -> None:
    succeeds("pack", model, tmp_path / "packed")
    for options in ((), ("--layers",), ("--format", "json")):
        assert succeeds("summary", tmp_path / "packed", *options) == succeeds("summary", model, *options)
    said = succeeds("summary", tmp_path / "packed" / "unet" / WEIGHTS)
    assert float(re.search(r"packed +([\d.]+) MB", said)[1]) > 0  # type: ignore[index]


def test_pack_never_destroys_what_it_reads_or_what_is_no_model(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert "is no model's folder" in fails("pack", model, run)
    assert "is no model's folder" in fails("pack", model, run / "notes.txt")
    succeeds("pack", model, tmp_path / "packed")
    before = contents(tmp_path)
    assert "already holds a model" in fails("pack", model, tmp_path / "packed")
    for target in (tmp_path / "packed", tmp_path):
        message = fails("pack", tmp_path / "packed", target, "--force")
        assert "holds what is to be packed, which would be lost" in message
    assert contents(tmp_path) == before
    (tmp_path / "packed" / ".git").mkdir()
    assert "holds more than a model, such as .git" in fails("pack", model, tmp_path / "packed", "--force")
    (tmp_path / "packed" / ".git").rmdir()
    succeeds("pack", model, tmp_path / "packed", "--force", "--dtype", "bfloat16")
    assert contents(tmp_path) != before


def test_pack_refuses_what_has_no_bits(model: Path, small: Path, tmp_path: Path) -> None:
    SRUNet(**NETWORK).save_pretrained(tmp_path / "plain")
    assert "is not converted" in fails("pack", tmp_path / "plain", tmp_path / "out")
    assert "is not a model" in fails("pack", small, tmp_path / "out")
    assert "no such file or folder" in fails("pack", tmp_path / "missing", tmp_path / "out")
    assert "enlarges 2 times" in fails("pack", model, tmp_path / "out", "--scale", "4")
    plain = tmp_path / "plain" / WEIGHTS
    assert "holds no packed model" in fails("pack", plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "cannot be read as a safetensors file"),
        (lambda f: (f / WEIGHTS).unlink(), "cannot be read"),
        (lambda f: edit_json(f / "config.json", conversion={"packed": 9}), ""),
    ],
)
def test_a_broken_packed_model_is_one_line(model: Path, small: Path, tmp_path: Path, damage: Any, words: str) -> None:
    succeeds("pack", model, tmp_path / "packed")
    damage(tmp_path / "packed" / "unet")
    if words:
        assert words in fails("upscale", small, tmp_path / "large.png", "--model", tmp_path / "packed")
        assert not (tmp_path / "large.png").exists()
    else:  # the weights file has its own configuration, which counts
        succeeds("upscale", small, tmp_path / "large.png", "--model", tmp_path / "packed", "--steps", "1")


# Pipelines


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
    again = SuperResolutionPipeline.from_pretrained(tmp_path / "packed", pack=False)
    assert binarize.is_packed(again.unet)


def test_a_callers_network_stays_as_it_is(model: Path) -> None:
    live = SRUNet.from_pretrained(model / "unet")
    assert not binarize.is_packed(live)
    weights = {name: id(p) for name, p in live.named_parameters()}
    pipes = [SuperResolutionPipeline(live, scale=2), SuperResolutionPipeline.from_pretrained(model, unet=live)]
    for pipe in pipes:
        pipe(np.zeros((4, 4, 3), np.uint8), num_inference_steps=1)
        assert pipe.unet is live
    assert {name: id(p) for name, p in live.named_parameters()} == weights


def test_a_network_packed_while_loading_is_unpacked_on_another_device(model: Path, tmp_path: Path) -> None:
    pipe = SuperResolutionPipeline.from_pretrained(model)
    pipe.to(torch.float64)
    assert binarize.is_packed(pipe.unet)
    pipe.to("meta")
    assert not binarize.is_packed(pipe.unet)
    assert pipe.unet.device.type == "meta"


def test_latents_that_were_lost_while_loading_are_not_saved_in_silence(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = SuperResolutionPipeline.from_pretrained(model)
    binarize.unpack(pipe.unet)
    pipe._packed_in_memory, pipe._latents_lost = False, True  # as after a move to a GPU
    pipe.save_pretrained(tmp_path / "copy")
    assert "gets the signs of its weights alone" in caplog.text


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_networks_without_kernels_keep_their_latents(model: Path, backend: Any) -> None:
    with backends.use(backend):
        packed = binarize.is_packed(SuperResolutionPipeline.from_pretrained(model).unet)
        double = binarize.convert(SRUNet(**NETWORK).double(), "bidiffsr")
        assert not _pack.pack_if_possible(double)
    assert packed == (backend == "numba")


def test_what_cannot_be_packed_stays_a_network_of_floats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = SRUNet(**NETWORK)
    assert not _pack.pack_if_possible(plain)
    first_stage = binarize.convert(SRUNet(**NETWORK), {"name": "reactnet", "two_stage": 0.5})
    with caplog.at_level(logging.INFO, "binarize"):
        assert not _pack.pack_if_possible(first_stage)
    assert "weights are still full precision" in caplog.text
    assert _pack.pack_if_possible(binarize.pack(binarize.convert(SRUNet(**NETWORK), "bbcu")))
    with torch.device("meta"):
        assert not _pack.pack_if_possible(binarize.convert(SRUNet(**NETWORK), "bbcu"))
    with pytest.raises(BinarizeError, match="still full precision"):
        binarize.pack(first_stage)
