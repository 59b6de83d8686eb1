"""The models that come with the package: how they are found, and that each one there is whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_case import NETWORK, edit_json, fails, run, succeeds
from errors_case import assert_error
from PIL import Image
from pipeline_case import pipeline

import binarize
from binarize.diagnosis import doctor
from binarize.models import GenerationPipeline, SRUNet, SuperResolutionPipeline, default_model
from binarize.models import default as _pretrained
from binarize.models.default import KINDS, default_generator
from binarize.models.upscaler import default_scheduler
from binarize.recipes import build_pipeline, load_recipe


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the package's, with tiny models of x2 (3 steps) and x4 (1 step)."""
    folder = tmp_path / "pretrained"
    for scale, steps in ((2, 3), (4, 1)):
        torch.manual_seed(scale)
        unet = binarize.pack(binarize.convert(SRUNet(**NETWORK), "bidiffsr"))
        SuperResolutionPipeline(unet, scale=scale, num_inference_steps=steps).save_pretrained(folder / f"x{scale}")
    monkeypatch.setattr(_pretrained, "FOLDER", folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_scale_that_is_not_shipped_is_refused_with_those_that_are(models: Path, photo: Path) -> None:
    assert default_model() == default_model(2) == models / "x2"
    assert_error(r"no model for scale 3 .*; scales with one: 2, 4\.", default_model, 3)
    assert "scales with one: 2, 4" in fails("upscale", photo, "--scale", "3")
    (models / "x4" / "model_index.json").unlink()
    assert_error(r"scales with one: 2\.", default_model, 4)
    shutil.rmtree(models / "x2")
    assert_error("this installation has none at all", default_model, 2)


def test_models_for_photographs_come_first_and_kinds_have_names(models: Path, photo: Path, tmp_path: Path) -> None:
    assert "no photo model for scale 2 comes with binarize; this installation has none" in fails(
        "upscale", photo, "--model", "photo"
    )
    shutil.copytree(models / "x2", models / "photo_x2")
    edit_json(models / "photo_x2" / "model_index.json", num_inference_steps=2)
    assert default_model() == default_model(2, "photo") == models / "photo_x2"
    assert (default_model(2, "clean"), default_model(4)) == (models / "x2", models / "x4")
    assert_error(
        r"unknown kind of model 'foto'; kinds: photo, clean\. Did you mean 'photo'\?", default_model, 2, "foto"
    )
    assert_error(r"no photo model for scale 4 .*; scales with one: 2\.", default_model, 4, "photo")
    for options, steps in (([], "2 steps"), (["--model", "photo"], "2 steps"), (["--model", "clean"], "3 steps")):
        assert f"({steps} per image" in succeeds(
            "upscale", photo, "-o", tmp_path / f"{len(options)}{steps}.png", *options
        )


@pytest.mark.parametrize(("options", "scale"), [([], 2), (["--scale", "4"], 4)])
def test_upscale_needs_nothing_but_an_image(models: Path, photo: Path, options: list[str], scale: int) -> None:
    said = succeeds("upscale", photo, *options)
    pipe = SuperResolutionPipeline.from_pretrained(default_model(scale))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(Image.open(photo), generator=torch.Generator().manual_seed(0)).images[0]
    with Image.open(photo.with_name(f"photo_x{scale}.png")) as large:
        assert large.size == (9 * scale, 6 * scale)
        assert np.array_equal(np.asarray(large), np.asarray(expected))
    assert f"({'3 steps' if scale == 2 else '1 step'} per image" in said
    assert "already exists" in fails("upscale", photo, *options)
    succeeds("upscale", photo, *options, "--force")


@pytest.mark.parametrize(("saved", "given", "taken"), [(3, None, 3), (3, 5, 5), (None, 2, 2), (None, None, 50)])
def test_a_call_takes_the_steps_that_the_pipeline_says(saved: int | None, given: int | None, taken: int) -> None:
    pipe = pipeline(scale=1, num_inference_steps=saved)
    pipe(torch.rand(1, 3, 2, 2), num_inference_steps=given)
    assert len(pipe.unet.seen) == taken


def test_the_number_of_steps_is_saved_and_old_pipelines_have_none(tmp_path: Path) -> None:
    SuperResolutionPipeline(SRUNet(**NETWORK), scale=2, num_inference_steps=7).save_pretrained(tmp_path)
    assert SuperResolutionPipeline.from_pretrained(tmp_path).num_inference_steps == 7
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["num_inference_steps"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert SuperResolutionPipeline.from_pretrained(tmp_path).num_inference_steps == 50


@pytest.mark.parametrize("steps", [0, 2001, 1.5])
def test_a_number_of_steps_that_no_call_could_take_is_refused(steps: Any) -> None:
    with pytest.raises(binarize.BinarizeError, match="a whole number from 1 to the scheduler's 2000"):
        SuperResolutionPipeline(SRUNet(**NETWORK), default_scheduler(), scale=2, num_inference_steps=steps)


def test_a_recipe_hands_its_steps_on() -> None:
    for timesteps, steps in ((2000, 6), (4, 4)):
        recipe = load_recipe("small_x2", ["num_inference_steps=6", f"scheduler.num_train_timesteps={timesteps}"])
        assert build_pipeline(recipe, SRUNet(**NETWORK, num_train_timesteps=timesteps)).num_inference_steps == steps


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("scale", [2, 4])
def test_a_shipped_model_is_whole_packed_and_small(scale: int, kind: str | None) -> None:
    folder = default_model(scale, kind)
    assert folder.name == ("x" if kind == "clean" else "photo_x") + str(scale)
    assert f"x{scale}" in (folder / "README.md").read_text(encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert (index["scale"], type(index["num_inference_steps"])) == (scale, int)
    for file in folder.rglob("*.json"):
        assert "_name_or_path" not in json.loads(file.read_text())
    assert binarize.is_packed(SuperResolutionPipeline.from_pretrained(folder).unet)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2e6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [2, 4])
def test_a_shipped_model_is_healthy(scale: int, kind: str) -> None:
    report = doctor(default_model(scale, kind))
    assert report.healthy, report


def test_the_shipped_generator_is_whole_packed_and_small() -> None:
    folder = default_generator()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Noto Emoji, Copyright Google LLC, Apache License 2.0" in card
    assert not Path(json.loads((folder / "model_index.json").read_text()).get("_name_or_path") or "").is_absolute()
    pipe = GenerationPipeline.from_pretrained(folder)
    assert binarize.is_packed(pipe.unet)
    assert len(pipe.classes or ()) == 9
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2e6


@pytest.mark.slow
def test_generate_needs_nothing_but_a_file(tmp_path: Path) -> None:
    def drawn(name: str, *options: str) -> np.ndarray:
        done = run("generate", tmp_path / name, "--class", "animals-nature", "-n", "3", "--steps", "3", *options)
        assert done.exit_code == 0, done.output
        assert "6/6" in done.stderr or "100%" in done.stderr
        with Image.open(tmp_path / name) as image:
            assert (image.size, image.mode) == ((66, 66), "RGB")
            return np.asarray(image)

    first = drawn("first.png", "--batch-size", "2")
    assert np.array_equal(first, drawn("again.png", "--batch-size", "2"))
    assert not np.array_equal(first, drawn("other.png", "--seed", "5"))
    assert "unknown class 'animal'" in fails("generate", tmp_path / "new.png", "--class", "animal")
