"""What a user may give as a model: folders, files and names on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from cli_case import NETWORK, WEIGHTS, contents, edit_json, fails, make_image, official_checkpoint, raising, succeeds
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from binarize.models import SRUNet, SuperResolutionPipeline, load_official


def test_a_model_on_the_hub_is_downloaded(
    model: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        requests.append((repo, allow_patterns))
        return str(model.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    succeeds("upscale", small, tmp_path / "a.png", "--model", f"someone/models/{model.name}", "--steps", "1")
    assert ("someone/models", [f"{model.name}/*.json", f"{model.name}/*.safetensors"]) in requests
    succeeds("upscale", small, tmp_path / "b.png", "--model", model, "--steps", "1")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "has no folder sub" in fails("upscale", small, tmp_path / "c.png", "--model", "some/one/sub")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError("404", response=Mock()), "no repository some/one on the Hugging Face hub"),
        (HFValidationError("odd"), "no repository some/one"),
        (LocalEntryNotFoundError("offline"), "the Hugging Face hub cannot be reached, and some/one was not downloaded"),
        (OSError("disk\nfull"), "cannot be downloaded from the Hugging Face hub: disk full"),
    ],
)
def test_errors_of_the_hub(small: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", raising(error))
    assert message in fails("upscale", small, small.with_name("large.png"), "--model", "some/one")


@pytest.mark.parametrize(
    "name", ["{here}/missing", "runs/missing", "one", "some/BI-DiffSR_x2.pth", "a/b/x.safetensors"]
)
def test_paths_are_not_looked_up_on_the_hub(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", raising(AssertionError("asked the hub")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    message = fails("upscale", small, tmp_path / "large.png", "--model", name.format(here=tmp_path))
    assert "no such file or folder" in message


def test_a_network_without_a_scale_needs_one(model: Path, small: Path, tmp_path: Path) -> None:
    target, alone = tmp_path / "large.png", shutil.copytree(model / "unet", tmp_path / "alone")
    assert "add --scale" in fails("upscale", small, target, "--model", alone)
    succeeds("upscale", small, target, "--model", alone, "--scale", "3", "--steps", "1")
    with Image.open(target) as large:
        assert large.size == (33, 27)
    assert "upscales by 2" in fails("upscale", small, tmp_path / "other.png", "--model", model, "--scale", "4")


def test_the_network_of_a_pipeline_stands_for_the_pipeline(model: Path, small: Path, tmp_path: Path) -> None:
    for name, given in (("whole", model), ("folder", model / "unet"), ("file", model / "unet" / WEIGHTS)):
        succeeds("upscale", small, tmp_path / f"{name}.png", "--model", given, "--steps", "2")
    whole, *others = ((tmp_path / f"{name}.png").read_bytes() for name in ("whole", "folder", "file"))
    assert others == [whole, whole]
    assert "upscales by 2" in fails("upscale", small, tmp_path / "x.png", "--model", model / "unet", "--scale", "3")


def test_a_network_alone_must_have_the_released_schedule(small: Path, tmp_path: Path) -> None:
    SRUNet(**NETWORK, num_train_timesteps=1000).save_pretrained(tmp_path / "alone")
    message = fails("upscale", small, tmp_path / "large.png", "--model", tmp_path / "alone", "--scale", "2")
    assert "is a network of 1000 timesteps without its noise schedule" in message
    assert "Give the folder of its pipeline" in message


def drop_a_weight(folder: Path) -> None:
    path = folder / "unet" / WEIGHTS
    weights = load_file(path)
    weights.pop("conv_out.bias")
    weights["left_over"] = torch.zeros(1)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such file or folder"),
        (lambda f: (f / "model_index.json").unlink(), "holds no model"),
        (lambda f: (f / "model_index.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "model_index.json").write_text("[]"), "must hold a JSON object; it holds a list"),
        (lambda f: edit_json(f / "model_index.json", _class_name="DDPMPipeline"), "is a DDPMPipeline"),
        (lambda f: shutil.rmtree(f / "unet"), "is missing; the model is incomplete"),
        (lambda f: shutil.rmtree(f / "scheduler"), "cannot be read as a pipeline"),
        (lambda f: edit_json(f / "unet" / "config.json", _class_name="UNet2DModel"), "runs SRUNet"),
        (lambda f: edit_json(f / "unet" / "config.json", base_channels=16), "cannot be read as an SRUNet"),
        (lambda f: edit_json(f / "unet" / "config.json", fusion="sc"), "unknown fusion 'sc'"),
        (drop_a_weight, "1 missing keys, 1 unexpected keys, such as conv_out.bias"),
        (lambda f: (f / "unet" / WEIGHTS).write_bytes(b"cut"), "cannot be read as an SRUNet"),
        (lambda f: (f / "unet" / WEIGHTS).unlink(), "cannot be read as an SRUNet"),
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


def test_other_files_and_checkpoints_are_refused(small: Path, tmp_path: Path) -> None:
    assert "is not a model" in fails("upscale", small, tmp_path / "large.png", "--model", small)
    checkpoint = tmp_path / "run" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.pt").touch()
    message = fails("upscale", small, tmp_path / "large.png", "--model", checkpoint)
    assert "is a training checkpoint" in message
    assert str(tmp_path / "run" / "model") in message


# import-official


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
    target = tmp_path / "imported"
    command = ["import-official", str(checkpoint), str(target), "--scale", "2"]
    assert "does not fit the configuration" in fails(*command)
    assert "Did you mean 'inner_channel'" in fails(*command, "inner_chanel=32")
    assert "is not KEY=VALUE" in fails(*command, "inner_channel")
    assert "is not a value" in fails(*command, "channel_mults=[1,2")
    assert "is not a file" in fails("import-official", tmp_path / "none.pth", target, "--scale", "2")
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:5000])
    assert "not a readable" in fails("import-official", tmp_path / "cut.pth", target, "--scale", "2")
    assert not target.exists()
    make_image(4, 4).save(tmp_path / "small.png")
    upscale = ["upscale", tmp_path / "small.png", tmp_path / "large.png", "--model", checkpoint]
    assert "add --scale" in fails(*upscale)
    assert "does not fit the configuration" in fails(*upscale, "--scale", "2")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    before = contents(tmp_path)
    message = fails("import-official", checkpoint, tmp_path / "thesis", "--scale", "2", "--force", *config)
    assert "is not a model's folder" in message
    assert contents(tmp_path) == before
