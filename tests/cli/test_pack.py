"""`binarize pack`, and what `upscale` makes of packed models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_case import NETWORK, WEIGHTS, contents, edit_json, fails, official_checkpoint, pixels, succeeds

import binarize
from binarize.models import SRUNet, SuperResolutionPipeline


def test_a_packed_pipeline_gives_the_images_of_the_binary_one(
    model: Path, packed: Path, small: Path, tmp_path: Path
) -> None:
    output = succeeds("pack", packed, tmp_path / "deep" / "half", "--dtype", "float16")  # from packed to packed
    size = (packed / "unet" / WEIGHTS).stat().st_size
    assert size < 0.6 * (model / "unet" / WEIGHTS).stat().st_size
    half = (tmp_path / "deep" / "half" / "unet" / WEIGHTS).stat().st_size
    assert half < 0.8 * size
    assert f"wrote {tmp_path / 'deep' / 'half'}, the network in {half / 1e6:.2f} MB" in output

    def upscale(given: Path, *options: str) -> np.ndarray:
        target = tmp_path / "large.png"
        succeeds("upscale", small, target, "--model", given, "--steps", "2", "--device", "cpu", "--force", *options)
        return pixels(target)

    unpacked, bits = upscale(model, "--no-pack"), upscale(model)
    assert np.array_equal(bits, upscale(packed))
    # Rounding flips single signs, which an untrained network of 8 channels passes on to the image.
    assert np.abs(bits - unpacked).mean() < 2
    assert np.array_equal(upscale(packed, "--no-pack"), unpacked)
    upscale(tmp_path / "deep" / "half", "--dtype", "bfloat16")


def test_a_network_and_its_file_are_models_too(model: Path, small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    assert "--scale N" in succeeds("pack", model / "unet", folder)
    assert sorted(contents(folder)) == ["config.json", WEIGHTS]
    for name, given in (("folder", folder), ("file", folder / WEIGHTS)):
        succeeds("upscale", small, tmp_path / f"{name}.png", "--model", given, "--scale", "3", "--steps", "1")
    assert np.array_equal(pixels(tmp_path / "folder.png"), pixels(tmp_path / "file.png"))
    succeeds("pack", folder, tmp_path / "pipeline", "--scale", "3")
    assert SuperResolutionPipeline.from_pretrained(tmp_path / "pipeline").scale == 3
    succeeds("pack", folder / WEIGHTS, tmp_path / "again")
    assert contents(tmp_path / "again")[WEIGHTS] == contents(folder)[WEIGHTS]


def test_a_released_checkpoint_is_packed(tmp_path: Path) -> None:
    checkpoint, config = official_checkpoint()
    succeeds("import-official", checkpoint, tmp_path / "imported", "--scale", "4", *config)
    succeeds("pack", tmp_path / "imported", tmp_path / "packed")
    assert binarize.is_packed(SuperResolutionPipeline.from_pretrained(tmp_path / "packed").unet)


def test_the_source_and_other_files_are_never_lost(model: Path, packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert "is not a model's folder" in fails("pack", model, run)
    assert "is not a model's folder" in fails("pack", model, run / "notes.txt")
    target = shutil.copytree(packed, tmp_path / "packed")
    before = contents(tmp_path)
    assert "already holds a model" in fails("pack", model, target)
    for place in (target, tmp_path):
        assert f"holds the source {target}, which would be lost" in fails("pack", target, place, "--force")
    assert contents(tmp_path) == before
    (target / ".git").mkdir()
    assert "holds other files than a model's, such as .git" in fails("pack", model, target, "--force")
    (target / ".git").rmdir()
    succeeds("pack", model, target, "--force", "--dtype", "bfloat16")
    assert contents(tmp_path) != before


def test_a_source_without_bits_is_refused(model: Path, small: Path, tmp_path: Path) -> None:
    SRUNet(**NETWORK).save_pretrained(tmp_path / "plain")
    assert "is not converted" in fails("pack", tmp_path / "plain", tmp_path / "out")
    assert "is not a model" in fails("pack", small, tmp_path / "out")
    assert "no such file or folder" in fails("pack", tmp_path / "missing", tmp_path / "out")
    assert "upscales by 2" in fails("pack", model, tmp_path / "out", "--scale", "4")
    assert "holds no packed model" in fails("pack", tmp_path / "plain" / WEIGHTS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "cannot be read as a safetensors file"),
        (lambda f: (f / WEIGHTS).unlink(), "cannot be read"),
        (lambda f: edit_json(f / "config.json", conversion={"packed": 9}), ""),
    ],
)
def test_damaged_packed_models(packed: Path, small: Path, tmp_path: Path, damage: Any, message: str) -> None:
    folder = shutil.copytree(packed, tmp_path / "packed")
    damage(folder / "unet")
    if message:
        assert message in fails("upscale", small, tmp_path / "large.png", "--model", folder)
        assert not (tmp_path / "large.png").exists()
    else:  # the weights file has its own configuration, which takes precedence
        succeeds("upscale", small, tmp_path / "large.png", "--model", folder, "--steps", "1")
