"""`binarize upscale`: results equal those of the pipeline, and nothing is lost or left behind."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_case import contents, edit_json, fails, make_image, pixels, raising, run, succeeds
from PIL import Image

from binarize import progress
from binarize.cli.upscale import process_start, tile_for
from binarize.models import SuperResolutionPipeline
from binarize.models.upscaler import Upscaler


def test_the_result_is_that_of_the_pipeline(model: Path, small: Path, tmp_path: Path) -> None:
    output = succeeds("upscale", small, tmp_path / "large.png", "--model", model, "--steps", "3", "--seed", "5")
    assert "large.png: 22x18" in output
    pipe = SuperResolutionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(Image.open(small), num_inference_steps=3, generator=torch.Generator().manual_seed(5)).images[0]
    assert np.array_equal(pixels(tmp_path / "large.png"), np.asarray(expected))


HEAVY = {"torch._dynamo", "scipy.stats", "diffusers.models.transformers", "diffusers.pipelines.pipeline_utils"}
LIST_MODULES = """
import sys
from binarize.cli import main
try:
    main()
finally:
    print("imported:", *sys.modules)
"""


def test_start_up_imports_no_more_than_upscaling_needs(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIST_MODULES, "upscale", str(small), "-o", str(tmp_path / "large.png")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    modules = set(output.partition("imported:")[2].split())
    assert {"torch", "diffusers", "binarize.models.upscaler"} <= modules
    assert not modules & HEAVY  # they take half of the time to start


def test_a_scheduler_that_is_not_of_diffusers_is_refused(model: Path, small: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    edit_json(tmp_path / "model" / "model_index.json", scheduler=["mine", "Scheduler"])
    error = fails("upscale", small, tmp_path / "large.png", "--model", tmp_path / "model")
    assert "model_index.json: scheduler is ['mine', 'Scheduler']; allowed: a scheduler of this diffusers" in error


def test_start_up_counts_from_the_start_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    assert time.time() - process_start() < 0.1  # this program is pytest
    for program in ("/usr/bin/binarize", "/packages/binarize/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program])
        age = time.time() - process_start()
        assert age < 86400
        assert sys.platform != "linux" or age > 0.5  # no import of torch is that fast


def test_a_folder_gives_the_results_of_its_files(model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for source, target in ((photos, tmp_path / "new"), (photos / "p1.png", tmp_path / "one")):
        succeeds("upscale", source, target, "--model", model, "--steps", "1")
    new, one = contents(tmp_path / "new"), contents(tmp_path / "one")
    assert ([*new], one) == (["p0.png", "p1.png"], {"p1.png": new["p1.png"]})
    assert pixels(tmp_path / "one" / "p1.png").shape == (66, 70, 3)


def test_tiles_schedulers_and_dtypes_change_the_result(model: Path, small: Path, tmp_path: Path) -> None:
    results = []
    variants = ("", "--scheduler dpm++", "--tile 8 --overlap 2", "--dtype bfloat16", "--scheduler ddim")
    for options in variants:
        command = ["upscale", small, "-o", tmp_path / "large.png", "--model", model, "--steps", "2", "--force"]
        succeeds(*command, *options.split())
        results.append((tmp_path / "large.png").read_bytes())
    assert len(set(results)) == len(variants) - 1
    assert results[-1] == results[0]


def test_transparency_is_kept_and_the_format_is_checked_first(model, tmp_path, monkeypatch):
    glass = make_image(6, 6).convert("RGBA")
    glass.putalpha(100)
    glass.save(tmp_path / "glass.png")
    succeeds("upscale", tmp_path / "glass.png", tmp_path / "large.webp", "--model", model, "--steps", "1")
    with Image.open(tmp_path / "large.webp") as large:
        assert large.mode == "RGBA"
    monkeypatch.setattr(Upscaler, "__call__", raising(AssertionError("sampled before checking")))
    before = contents(tmp_path)
    for name, words in (("large.jpg", "cannot hold an image of mode 'RGBA'"), ("large.pgn", "Did you mean '.png'")):
        message = fails("upscale", tmp_path / "glass.png", tmp_path / name, "--model", model)
        assert words in message
        assert message.startswith(f"error: {tmp_path / name}: ")
    assert contents(tmp_path) == before


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder of broken, missing and ambiguous sources."""
    for folder in ("empty", "cut", "twins"):
        (tmp_path / folder).mkdir()
    for name in ("notes.txt", "fake.png"):
        (tmp_path / name).write_text("words")
    for name in ("cut/a.png", "twins/a.png", "twins/a.bmp", "good.png", "old.png"):
        make_image(20, 20).save(tmp_path / name)
    for name in ("cut.png", "cut/b.png"):
        (tmp_path / name).write_bytes((tmp_path / "cut" / "a.png").read_bytes()[:-200])
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("missing.png out.png", "no such file"),
        ("notes.txt out.png", "is not an image"),
        ("fake.png out.png", "is not an image"),
        ("cut.png out.png", "cannot"),
        ("empty out.png", "holds no images"),
        ("twins out", "would both become"),
        ("good.png no/large.png", "does not exist"),
        ("twins good.png", "is a file"),
        ("twins twins --force", "is one of the source images"),
        ("good.png good.png --force", "is one of the source images"),
        ("good.png -o old.png", "old.png: already exists"),
        ("good.png out.png --device cuda", "finds no such device here"),
    ],
)
def test_bad_sources_targets_and_devices_are_refused(model, sources, monkeypatch, arguments, message):
    monkeypatch.chdir(sources)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if arguments.startswith("twins twins"):
        Path("twins/a.bmp").unlink()
    before = contents(sources)
    assert message in fails("upscale", *arguments.split(), "--model", model)
    assert contents(sources) == before


@pytest.mark.parametrize(
    ("error", "options", "status", "message"),
    [
        (KeyboardInterrupt(), [], 130, "error: interrupted\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), [], 1, "memory of cpu; try --tile 256"),
        (RuntimeError("can't allocate memory: 9 bytes"), ["--tile", "64"], 1, "try a --tile below 64"),
        (RuntimeError("something else"), [], 1, "unexpected RuntimeError: something else"),
    ],
)
def test_an_error_while_sampling_leaves_nothing_behind(model, small, monkeypatch, error, options, status, message):
    monkeypatch.setattr(Upscaler, "__call__", raising(error))
    before = contents(small.parent)
    result = run("upscale", small, small.with_name("large.png"), "--model", model, *options)
    assert result.exit_code == status
    assert message in result.stderr
    assert contents(small.parent) == before


def test_the_default_target_is_beside_the_source(model: Path, photos: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(photos, tmp_path / "images")
    (folder / "p0.png").rename(folder / "a.b.PNG")
    before = contents(folder)
    succeeds("upscale", folder / "a.b.PNG", "--model", model, "--steps", "1")
    assert "a.b_x2.png: already exists" in fails("upscale", folder / "a.b.PNG", "--model", model)
    succeeds("upscale", folder / "a.b.PNG", "--model", model, "--steps", "1", "--force")
    (folder / "a.b_x2.png").unlink()
    alone = shutil.copytree(model / "unet", tmp_path / "alone")
    succeeds("upscale", folder, "--model", alone, "--scale", "3", "--steps", "1")
    assert sorted(contents(tmp_path / "images_x3")) == ["a.b.png", "p1.png"]
    assert contents(folder) == before


def test_the_default_steps_are_those_of_the_model(model: Path, small: Path, tmp_path: Path) -> None:
    own = shutil.copytree(model, tmp_path / "own")
    edit_json(own / "model_index.json", num_inference_steps=3)
    output = succeeds("upscale", small, tmp_path / "a.png", "--model", own)
    assert re.search(r"^start-up \d+\.\d s, sampling \d+\.\d s \(3 steps per image, on ", output, flags=re.MULTILINE)
    succeeds("upscale", small, tmp_path / "b.png", "--model", model, "--steps", "3")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "(1 step per image" in succeeds("upscale", small, tmp_path / "c.png", "--model", own, "--steps", "1")


def test_large_results_are_tiled_by_default() -> None:
    given = (((256, 150), None), ((150, 257), None), ((4, 4), 96), ((2000, 2000), 0))
    assert [tile_for(size, 2, option) for size, option in given] == [None, 256, 96, None]


@pytest.mark.parametrize(("options", "tiles"), [([], 1), (["--tile", "16"], 3 * 2)])
def test_the_bar_counts_the_passes_of_the_network(model, tmp_path, monkeypatch, options, tiles):
    bars: list[Any] = []
    kind = progress.ProgressBar
    monkeypatch.setattr(progress, "ProgressBar", lambda **given: bars.append(kind(**given)) or bars[0])
    make_image(20, 9).save(tmp_path / "small.png")
    result = run("upscale", tmp_path / "small.png", "--model", model, "--steps", "2", *options)
    assert re.fullmatch(r"(small.png: +\d+%\| .*\n)+", result.stderr)
    assert bars[0].n == bars[0].total == 2 * tiles
