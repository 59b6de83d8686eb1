"""`binarize train` and `binarize evaluate`."""

import json
import re
from pathlib import Path

import pytest
from cli_case import contents, fails, make_image, run, succeeds
from PIL import Image
from training_case import TINY

from binarize.imaging import degrade, read_image


@pytest.mark.slow
def test_from_a_recipe_to_an_upscaled_image(photos: Path, small: Path, tmp_path: Path) -> None:
    run_folder, results = tmp_path / "run", tmp_path / "results"
    train = ["train", "demo", *TINY, "max_train_steps=3", f"train_data_dir={photos}", f"output_dir={run_folder}"]
    assert f"model: {run_folder / 'model'}" in succeeds(*train)
    assert "already holds a run" in fails(*train)
    assert "step 3 was already reached" in succeeds(*train, "--resume", "latest")
    assert "mean the same" in fails(*train, "--resume", "latest", "resume_from_checkpoint=latest")
    assert "force removes it" in fails(*train, "--resume", "latest", "--force")

    evaluate = ["evaluate", str(run_folder), "--data", str(photos), "--lpips", "none", "--steps", "1"]
    table = succeeds(*evaluate, "--output", str(results))
    assert re.search(r"\| \*\*mean\*\* \| \*\*\d+\.\d\d\*\* \| \*\*0\.\d{4}\*\*", table)
    assert sorted(contents(results)) == [f"evaluation.{kind}" for kind in ("csv", "json", "md")]
    assert "already exists" in fails(*evaluate, "--output", str(results))
    assert "| p1 |" not in succeeds(*evaluate, "--output", str(results), "--force", "--limit", "1")

    succeeds("upscale", small, tmp_path / "large.png", "--model", run_folder, "--steps", "2")
    with Image.open(tmp_path / "large.png") as large:
        assert large.size == (22, 18)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing", "unknown recipe 'nothing'"),
        ("demo learning_rat=1", "Did you mean 'learning_rate'?"),
        ("demo learning_rate", "is not key=value"),
        ("demo method=bidifsr resolution=16 train_data_dir={photos}", "Did you mean 'bidiffsr'?"),
        ("demo method.group=3 resolution=16 train_data_dir={photos}", "Did you mean 'groups'?"),
        ("demo", "train_data_dir: missing"),
        ("demo train_data_dir=nowhere", "there is no folder"),
        ("demo train_data_dir={photos} resolution=64", "at least 64x64 are needed"),
    ],
)
def test_recipes_that_cannot_run(photos: Path, tmp_path: Path, arguments: str, message: str) -> None:
    given = [*arguments.format(photos=photos).split(), f"output_dir={tmp_path / 'run'}"]
    assert message in fails("train", *given, lines=9)
    assert not (tmp_path / "run").exists()


def test_evaluate_reads_low_resolution_files(model: Path, photos: Path, tmp_path: Path) -> None:
    lr = tmp_path / "lr"
    lr.mkdir()
    for path in photos.iterdir():
        Image.fromarray(degrade(read_image(path).pixels(), 2).permute(1, 2, 0).numpy()).save(lr / path.name)
    command = ["evaluate", str(model), "--data", str(photos), "--lpips", "none", "--steps", "1"]
    assert succeeds(*command, "--lr", str(lr)) == succeeds(*command)
    degraded = succeeds(*command, "--degradation", "[{reduce: box}, {jpeg: 50}]")
    assert "made by [{reduce: " in degraded
    assert run(*command, "--lr", str(lr), "--degradation", "photo").exit_code == 2
    wrong = fails(*command, "--degradation", "jpeg", lines=2)
    assert "degradation: got 'jpeg'; must be one of bicubic, photo" in wrong
    make_image(7, 9).save(lr / "p1.png")
    message = fails(*command, "--lr", str(lr), "--output", str(tmp_path / "results"))
    assert "p1.png is 9x7; at scale 2 the latter must be 17x16" in message
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data {tmp}/none", "no such folder"),
        ("--data {tmp}", "holds no images"),
        ("--data {photos} --output {photos}/p0.png", "is a file; --output takes a folder"),
        ("--data {photos} --lpips-backbone {tmp}/none.pth", "no such LPIPS backbone file"),
        ("--data {photos} --scale 4", "upscales by 2"),
    ],
)
def test_data_and_options_that_cannot_be_evaluated(model, photos, tmp_path, arguments, message):
    assert message in fails("evaluate", model, *arguments.format(tmp=tmp_path, photos=photos).split())


def test_evaluate_takes_packed_models(model: Path, packed: Path, photos: Path, tmp_path: Path) -> None:
    means = []
    for number, given in enumerate(([packed], [model], [model, "--no-pack"])):
        out = tmp_path / str(number)
        options = ["--lpips", "none", "--steps", "1", "--limit", "1"]
        succeeds("evaluate", *given, "--data", photos, *options, "--output", out)
        means.append(json.loads((out / "evaluation.json").read_text())["mean"]["model"])
    assert means[0] == means[1]
    assert means[0]["PSNR"] == pytest.approx(means[2]["PSNR"], abs=0.5)
    assert len(contents(tmp_path)) == 3 * 4
