"""What a user may give as a model: folders, files and names on the hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_case import NETWORK, WEIGHTS, contents, edit_json, fails, make_image, official_checkpoint, succeeds
from PIL import Image
from safetensors.torch import load_file, save_file

from binarize.models import SRUNet, SuperResolutionPipeline, load_official


def test_a_network_without_a_scale_needs_one(model: Path, small: Path, tmp_path: Path) -> None:
    target, alone = tmp_path / "large.png", shutil.copytree(model / "unet", tmp_path / "alone")
    assert "add --scale" in fails("upscale", small, target, "--model", alone)
    succeeds("upscale", small, target, "--model", alone, "--scale", "3", "--steps", "1")
    with Image.open(target) as large:
        assert large.size == (33, 27)
    assert "upscales by 2" in fails("upscale", small, tmp_path / "other.png", "--model", model, "--scale", "4")
    SRUNet(**NETWORK, num_train_timesteps=1000).save_pretrained(tmp_path / "short")
    message = fails("upscale", small, tmp_path / "new.png", "--model", tmp_path / "short", "--scale", "2")
    assert "is a network of 1000 timesteps without its noise schedule" in message
    assert "Give the folder of its pipeline" in message


def test_the_network_of_a_pipeline_stands_for_the_pipeline(model: Path, small: Path, tmp_path: Path) -> None:
    images = set()
    for given in (model, model / "unet", model / "unet" / WEIGHTS):
        succeeds("upscale", small, "-o", tmp_path / "a.png", "--model", given, "--steps", "2", "--force")
        images.add((tmp_path / "a.png").read_bytes())
    assert len(images) == 1
    assert "upscales by 2" in fails("upscale", small, tmp_path / "x.png", "--model", model / "unet", "--scale", "3")


def drop_a_weight(folder: Path) -> None:
    path = folder / "unet" / WEIGHTS
    weights = load_file(path)
    weights.pop("conv_out.bias")
    weights["left_over"] = torch.zeros(1)
    save_file(weights, path, metadata={"format": "pt"})


def make_a_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "state.pt").touch()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such file or folder"),
        (lambda f: (f / "model_index.json").unlink(), "holds no model"),
        (lambda f: (f / "model_index.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "model_index.json").write_text("[]"), "must be a JSON object; got list"),
        (lambda f: edit_json(f / "model_index.json", _class_name="DDPMPipeline"), "is a DDPMPipeline"),
        (lambda f: shutil.rmtree(f / "unet"), "is missing; the model is incomplete"),
        (lambda f: shutil.rmtree(f / "scheduler"), "is missing; the model is incomplete"),
        (lambda f: edit_json(f / "unet" / "config.json", _class_name="UNet2DModel"), "runs SRUNet"),
        (lambda f: edit_json(f / "unet" / "config.json", base_channels=16), "cannot be read as an SRUNet"),
        (lambda f: edit_json(f / "unet" / "config.json", fusion="sc"), "unknown fusion 'sc'"),
        (drop_a_weight, "1 missing keys, 1 unexpected keys, such as conv_out.bias"),
        (lambda f: (f / "unet" / WEIGHTS).write_bytes(b"cut"), "cannot be read as a safetensors file"),
        (lambda f: (f / "unet" / WEIGHTS).unlink(), "is missing; the model is incomplete"),
        (make_a_checkpoint, "is a training checkpoint"),
    ],
)  # fmt: skip
def test_damaged_models(model: Path, small: Path, tmp_path: Path, damage: Any, message: str) -> None:
    folder = shutil.copytree(model, tmp_path / "broken")
    damage(folder)
    before = contents(tmp_path)
    error = fails("upscale", small, tmp_path / "large.png", "--model", folder)
    assert message in error
    assert str(folder) in error
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_import_official_gives_a_model(small: Path, tmp_path: Path) -> None:
    checkpoint, config = official_checkpoint()
    target = tmp_path / "deep" / "imported"
    succeeds("import-official", checkpoint, target, "--scale", "4", *config)
    pipe = SuperResolutionPipeline.from_pretrained(target, pack=False)
    assert pipe.scale == 4
    expected = load_official(checkpoint, **{k: yaml.safe_load(v) for k, v in (c.split("=", 1) for c in config)})
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, pipe.unet.state_dict()[name])
    assert pipe.unet.config["conversion"]["method"]["sign_zero"] == "zero"
    succeeds("upscale", small, tmp_path / "large.png", "--model", target, "--steps", "1")
    assert "already holds a model" in fails("import-official", checkpoint, target, "--scale", "2", *config)
    succeeds("import-official", checkpoint, target, "--scale", "2", "--sign-zero", "plus", "--force", *config)
    assert json.loads((target / "model_index.json").read_text())["scale"] == 2


def test_import_official_refuses_a_configuration_that_does_not_fit(tmp_path: Path) -> None:
    checkpoint, config = official_checkpoint()
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:5000])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    make_image(4, 4).save(tmp_path / "small.png")
    before = contents(tmp_path)
    for source, name, options, message in (
        (checkpoint, "new", [], "does not fit the configuration"),
        (checkpoint, "new", ["inner_chanel=32"], "Did you mean 'inner_channel'"),
        (checkpoint, "new", ["inner_channel"], "is not KEY=VALUE"),
        (checkpoint, "new", ["channel_mults=[1,2"], "is not valid YAML"),
        (tmp_path / "none.pth", "new", [], "is not a file"),
        (tmp_path / "cut.pth", "new", [], "not a readable"),
        (checkpoint, "thesis", ["--force", *config], "is not a model's folder"),
    ):
        assert message in fails("import-official", source, tmp_path / name, "--scale", "2", *options)
    upscale = ["upscale", tmp_path / "small.png", tmp_path / "large.png", "--model"]
    assert "add --scale" in fails(*upscale, checkpoint)
    assert "does not fit the configuration" in fails(*upscale, checkpoint, "--scale", "2")
    assert "is not a model" in fails(*upscale, tmp_path / "small.png")
    assert contents(tmp_path) == before
