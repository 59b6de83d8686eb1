"""`binarize pack`, and what `upscale` makes of packed models."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_case import NETWORK, WEIGHTS, contents, edit_json, fails, official_checkpoint, pixels, succeeds

import binarize
from binarize.models import SRUNet, SuperResolutionPipeline


def test_a_packed_pipeline_gives_the_images_of_the_binary_one(model, packed, small, tmp_path):
    low = tmp_path / "deep" / "half"
    output = succeeds("pack", packed, low, "--dtype", "float16")  # from packed to packed
    whole, size, half = ((folder / "unet" / WEIGHTS).stat().st_size for folder in (model, packed, low))
    assert half < 0.8 * size < 0.6 * 0.8 * whole
    assert f"wrote {low}, the network in {half / 1e6:.2f} MB" in output

    def upscale(given: Path, *options: str) -> np.ndarray:
        target = tmp_path / "large.png"
        succeeds(
            "upscale", small, "-o", target, "--model", given, "--steps", "2", "--device", "cpu", "--force", *options
        )
        return pixels(target)

    unpacked, bits = upscale(model, "--no-pack"), upscale(model)
    assert np.array_equal(bits, upscale(packed))
    # Rounding flips single signs, which an untrained network of 8 channels passes on to the image.
    assert np.abs(bits - unpacked).mean() < 2
    assert np.array_equal(upscale(packed, "--no-pack"), unpacked)
    upscale(low, "--dtype", "bfloat16")


@pytest.mark.slow
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
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    target = shutil.copytree(packed, tmp_path / "packed")
    before = contents(tmp_path)
    for source, place, options, message in (
        (model, tmp_path / "run", [], "is not a model's folder"),
        (model, tmp_path / "run" / "notes.txt", [], "is not a model's folder"),
        (model, target, [], "already holds a model"),
        (target, target, ["--force"], f"holds the source {target}, which would be lost"),
        (target, tmp_path, ["--force"], f"holds the source {target}, which would be lost"),
        (target, target / "unet", ["--force"], f"holds the source {target}, which would be lost"),
    ):
        assert message in fails("pack", source, place, *options)
    assert contents(tmp_path) == before
    (target / ".git").mkdir()
    assert "holds other files than a model's, such as .git" in fails("pack", model, target, "--force")
    (target / ".git").rmdir()
    succeeds("pack", model, target, "--force", "--dtype", "bfloat16")
    assert contents(tmp_path) != before


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("plain", [], "is not converted"),
        ("small.png", [], "is not a model"),
        ("missing", [], "no such file or folder"),
        ("model", ["--scale", "4"], "upscales by 2"),
        (f"plain/{WEIGHTS}", [], "holds no packed model"),
    ],
)
def test_a_source_without_bits_is_refused(model, small, tmp_path, source, options, message):
    SRUNet(**NETWORK).save_pretrained(tmp_path / "plain")
    (tmp_path / "model").symlink_to(model)
    assert message in fails("pack", tmp_path / source, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_full_precision_layers_in_8_bits(model: Path, packed: Path, tmp_path: Path) -> None:
    for name, source in (("one", model), ("two", packed)):
        succeeds("pack", source, tmp_path / name, "--full-precision", "int8")
    one, two = ((tmp_path / name / "unet" / WEIGHTS).read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(one) < (packed / "unet" / WEIGHTS).stat().st_size
    first, rounded = (SRUNet.from_pretrained(folder / "unet").conv_in for folder in (packed, tmp_path / "one"))
    assert 0 < (first.weight - rounded.weight).abs().max() < first.weight.abs().max() / 250


def test_damaged_packed_models(packed: Path, small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "packed")
    weights, command = folder / "unet" / WEIGHTS, ["upscale", small, tmp_path / "large.png", "--model", folder]
    edit_json(folder / "unet" / "config.json", conversion={"packed": 9})
    assert "differs from the configuration in" in fails(*command)  # the weights file has its own
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "cannot be read as a safetensors file" in fails(*command, "--force")
    weights.unlink()
    assert "is missing; the model is incomplete" in fails(*command, "--force")
