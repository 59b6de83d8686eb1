"""`binarize upscale`: results equal those of the pipeline, and nothing is lost or left behind."""

from __future__ import annotations

import re
import shutil
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


def test_the_result_is_that_of_the_pipeline(model: Path, small: Path, tmp_path: Path) -> None:
    output = succeeds("upscale", small, tmp_path / "large.png", "--model", model, "--steps", "3", "--seed", "5")
    assert "large.png: 22x18" in output
    pipe = SuperResolutionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    expected = pipe(Image.open(small), num_inference_steps=3, generator=generator).images[0]
    assert np.array_equal(pixels(tmp_path / "large.png"), np.asarray(expected))


def test_start_up_counts_from_the_start_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    assert time.time() - process_start() < 0.1  # this program is pytest
    for program in ("/usr/bin/binarize", "/packages/binarize/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program])
        age = time.time() - process_start()
        assert age < 86400
        assert sys.platform != "linux" or age > 0.5  # no import of torch is that fast


def test_a_folder_gives_the_results_of_its_files(model: Path, photos: Path, tmp_path: Path) -> None:
    options = ["--model", str(model), "--steps", "1"]
    succeeds("upscale", photos, tmp_path / "new", *options)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["p0.png", "p1.png"]
    (tmp_path / "one").mkdir()
    succeeds("upscale", photos / "p1.png", tmp_path / "one", *options)
    assert (tmp_path / "one" / "p1.png").read_bytes() == (tmp_path / "new" / "p1.png").read_bytes()
    assert pixels(tmp_path / "one" / "p1.png").shape == (66, 70, 3)


def test_tiles_schedulers_and_dtypes_change_the_result(model: Path, small: Path, tmp_path: Path) -> None:
    common = ["upscale", str(small), str(tmp_path / "large.png"), "--model", str(model), "--steps", "2", "--force"]
    results = []
    for options in ([], ["--scheduler", "dpm++"], ["--tile", "8", "--overlap", "2"], ["--dtype", "bfloat16"]):
        succeeds(*common, *options)
        results.append((tmp_path / "large.png").read_bytes())
    assert len(set(results)) == len(results)
    succeeds(*common, "--scheduler", "ddim")
    assert (tmp_path / "large.png").read_bytes() == results[0]


def test_transparency_is_kept_and_the_format_is_checked_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glass = make_image(6, 6).convert("RGBA")
    glass.putalpha(100)
    glass.save(tmp_path / "glass.png")
    succeeds("upscale", tmp_path / "glass.png", tmp_path / "large.webp", "--model", model, "--steps", "1")
    with Image.open(tmp_path / "large.webp") as large:
        assert large.mode == "RGBA"
    monkeypatch.setattr(SuperResolutionPipeline, "__call__", raising(AssertionError("sampled before checking")))
    before = contents(tmp_path)
    for name, words in (("large.jpg", "cannot hold an image of mode 'RGBA'"), ("large.pgn", "Did you mean '.png'")):
        message = fails("upscale", tmp_path / "glass.png", tmp_path / name, "--model", model)
        assert words in message
        assert message.startswith(f"error: {tmp_path / name}: ")
    assert contents(tmp_path) == before


def test_existing_files_need_force(model: Path, small: Path, tmp_path: Path) -> None:
    target = tmp_path / "large.png"
    target.write_bytes(b"precious")
    assert "large.png: already exists" in fails("upscale", small, target, "--model", model)
    assert target.read_bytes() == b"precious"
    succeeds("upscale", small, target, "--model", model, "--steps", "1", "--force")
    assert target.read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", "no such file"),
        ("notes.txt", "is not an image"),
        ("fake.png", "is not an image"),
        ("cut.png", "cannot"),
        ("empty", "holds no images"),
        ("cut", "cannot"),
        ("twins", "would both become"),
    ],
)
def test_bad_sources_are_refused(model: Path, tmp_path: Path, source: str, message: str) -> None:
    for folder in ("empty", "cut", "twins"):
        (tmp_path / folder).mkdir()
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "fake.png").write_text("words")
    make_image(20, 20).save(tmp_path / "cut" / "a.png")
    cut = (tmp_path / "cut" / "a.png").read_bytes()[:-200]
    (tmp_path / "cut.png").write_bytes(cut)
    (tmp_path / "cut" / "b.png").write_bytes(cut)
    for suffix in ("png", "bmp"):
        make_image(4, 4).save(tmp_path / "twins" / f"a.{suffix}")
    before = contents(tmp_path)
    assert message in fails("upscale", tmp_path / source, tmp_path / "out.png", "--model", model)
    assert contents(tmp_path) == before


def test_bad_targets_are_refused(model: Path, small: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    assert "does not exist" in fails("upscale", small, tmp_path / "no" / "large.png", "--model", model)
    assert "is a file" in fails("upscale", tmp_path, small, "--model", model)
    assert "is one of the source images" in fails("upscale", tmp_path, tmp_path, "--model", model, "--force")
    assert "is one of the source images" in fails("upscale", small, small, "--model", model, "--force")
    assert contents(tmp_path) == before


def test_ctrl_c_leaves_nothing_behind(model: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SuperResolutionPipeline, "__call__", raising(KeyboardInterrupt()))
    before = contents(small.parent)
    result = run("upscale", small, small.with_name("large.png"), "--model", model)
    assert (result.exit_code, result.stderr) == (130, "error: interrupted\n")
    assert contents(small.parent) == before


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), [], "memory of cpu; try --tile 256"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9999 bytes"),
            ["--tile", "64"],
            "try a --tile below 64",
        ),
        (RuntimeError("something else"), [], None),
    ],
)
def test_an_error_for_lack_of_memory_names_the_fix(
    model: Path, small: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, options: list[str], message: str | None
) -> None:
    monkeypatch.setattr(SuperResolutionPipeline, "__call__", raising(error))
    result = run("upscale", small, small.with_name("large.png"), "--model", model, *options)
    if message is None:
        assert isinstance(result.exception, RuntimeError)
    else:
        assert message in result.stderr
    assert not small.with_name("large.png").exists()


def test_a_missing_device_is_refused(model: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = fails("upscale", small, small.with_name("large.png"), "--model", model, "--device", "cuda")
    assert "finds no such device here" in message


def test_the_default_target_is_beside_the_source(model: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(photos, folder)
    (folder / "p0.png").rename(folder / "a.b.PNG")
    before = contents(folder)
    succeeds("upscale", folder / "a.b.PNG", "--model", model, "--steps", "1")
    assert (folder / "a.b_x2.png").is_file()
    assert "a.b_x2.png: already exists" in fails("upscale", folder / "a.b.PNG", "--model", model)
    (folder / "a.b_x2.png").unlink()
    alone = shutil.copytree(model / "unet", tmp_path / "alone")
    succeeds("upscale", folder, "--model", alone, "--scale", "3", "--steps", "1")
    assert sorted(path.name for path in (tmp_path / "images_x3").iterdir()) == ["a.b.png", "p1.png"]
    assert contents(folder) == before


def test_the_default_steps_are_those_of_the_model(model: Path, small: Path, tmp_path: Path) -> None:
    own = shutil.copytree(model, tmp_path / "own")
    edit_json(own / "model_index.json", num_inference_steps=3)
    output = succeeds("upscale", small, tmp_path / "a.png", "--model", own)
    assert re.search(r"^start-up \d+\.\d s, sampling \d+\.\d s \(3 steps per image, on ", output, flags=re.MULTILINE)
    succeeds("upscale", small, tmp_path / "b.png", "--model", model, "--steps", "3")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "(1 step per image" in succeeds("upscale", small, tmp_path / "c.png", "--model", own, "--steps", "1")


@pytest.mark.parametrize(
    ("size", "option", "tile"),
    [((256, 150), None, None), ((150, 257), None, 256), ((4, 4), 96, 96), ((2000, 2000), 0, None)],
)
def test_large_results_are_tiled_by_default(size: tuple[int, int], option: int | None, tile: int | None) -> None:
    assert tile_for(size, 2, option) == tile


@pytest.mark.parametrize("tile", [None, 16])
def test_the_bar_counts_the_passes_of_the_network(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int | None
) -> None:
    bars: list[Any] = []

    class Watched(progress.ProgressBar):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(progress, "ProgressBar", Watched)
    make_image(20, 9).save(tmp_path / "small.png")
    options = [] if tile is None else ["--tile", str(tile)]
    result = run("upscale", tmp_path / "small.png", "--model", model, "--steps", "2", *options)
    assert re.fullmatch(r"(small.png: +\d+%\| .*\n)+", result.stderr)
    assert bars[0].n == bars[0].total == 2 * (1 if tile is None else 3 * 2)  # steps, and rows and columns of tiles
