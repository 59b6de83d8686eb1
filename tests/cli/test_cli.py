"""The command line: what every command does, and that whatever is wrong is one line, a status and no debris."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import tqdm
import yaml
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import binarize
from binarize.cli import app
from binarize.cli.upscale import tile_for
from binarize.imaging import degrade, read_image
from binarize.models import SRUNet, SuperResolutionPipeline, load_official
from binarize.training import TrainingInterrupted

FIXTURES = Path(__file__).parents[1] / "fixtures"
NETWORK = {"base_channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 4}
TINY = [
    "model.base_channels=8",
    "model.channel_mults=[1,2]",
    "model.norm_groups=4",
    "resolution=16",
    "train_batch_size=2",
    "max_train_steps=3",
    "lr_warmup_steps=1",
    "num_inference_steps=2",
]
COMMANDS = [
    ["upscale"],
    ["train"],
    ["evaluate"],
    ["summary"],
    ["methods"],
    ["import-official"],
    ["pack"],
    ["doctor"],
    ["demo"],
    ["recipes", "ls"],
    ["recipes", "show"],
    ["recipes", "cp"],
    ["recipes", "validate"],
]


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def succeeds(*args: str | Path) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def fails(*args: str | Path) -> str:
    """Run a command that must fail in words; return the words."""
    result = run(*args)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index, (height, width) in enumerate([(40, 48), (33, 35)]):
        picture(height, width, index).save(folder / f"p{index}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "x2"
    torch.manual_seed(0)
    unet = binarize.convert(SRUNet(**NETWORK), "bidiffsr")
    SuperResolutionPipeline(unet, scale=2).save_pretrained(folder)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    picture(9, 11).save(tmp_path / "small.png")
    return tmp_path / "small.png"


def damaged(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    return target


# The program as a whole


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(command: list[str]) -> None:
    text = succeeds(*command, "--help")
    assert f"binarize {' '.join(command)}" in text.split("Usage:")[1].split("\n", 1)[1]


def test_version() -> None:
    assert succeeds("--version") == f"binarize {binarize.__version__}\n"


def test_an_unknown_command_names_the_nearest() -> None:
    result = run("upscal")
    assert result.exit_code == 2
    assert "upscale" in result.stderr


def test_debug_adds_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "summary", tmp_path / "none.pth")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def raising(error: BaseException) -> Any:
    def raise_it(*args: object, **kwargs: object) -> NoReturn:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (OSError(28, "No space left on device", "some/file"), 1, "error: some/file: No space left on device"),
        (OSError("a plain one"), 1, "error: a plain one"),
        (
            TrainingInterrupted(signal.SIGINT, Path("run/checkpoint-7")),
            130,
            "stopped by SIGINT; saved run/checkpoint-7",
        ),
        (TrainingInterrupted(signal.SIGTERM, Path("run/checkpoint-7")), 143, "stopped by SIGTERM"),
    ],
)
def test_how_a_command_may_end(monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, words: str) -> None:
    monkeypatch.setattr("binarize.training.loop.train", raising(error))
    result = run("train", "demo")
    assert result.exit_code == status
    assert result.stderr.startswith(words)
    assert result.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("binarize.training.loop.train", raising(ZeroDivisionError("a bug")))
    assert isinstance(run("train", "demo").exception, ZeroDivisionError)


def test_the_real_program_prints_one_line_for_a_truncated_picture(model: Path, small: Path, tmp_path: Path) -> None:
    small.write_bytes(small.read_bytes()[:-40])
    before = contents(tmp_path)
    command = [sys.executable, "-m", "binarize.cli", "upscale", small, tmp_path / "large.png", "--model", model]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {small}: ")
    assert done.stdout == ""
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_ctrl_c_in_a_real_training_saves_a_checkpoint(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tiny = [text for text in TINY if not text.startswith("max_train_steps")]
    settings = [*tiny, "max_train_steps=1000000", f"train_data_dir={photos}", f"output_dir={folder}"]
    command = [sys.executable, "-m", "binarize.cli", "train", "demo", *settings, "checkpointing_steps=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 120
        while not list(folder.glob("checkpoint-*")):
            assert time.monotonic() < deadline, "the training did not start"
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in errors
    saved = re.fullmatch(r"stopped by SIGINT; saved (.*checkpoint-\d+)\..*", errors.splitlines()[-1])
    assert saved is not None
    assert Path(saved[1]).is_dir()


# upscale


def test_upscale_gives_what_the_pipeline_gives(model: Path, small: Path, tmp_path: Path) -> None:
    said = succeeds("upscale", small, tmp_path / "large.png", "--model", model, "--steps", "3", "--seed", "5")
    assert "large.png: 22x18" in said
    pipe = SuperResolutionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    expected = pipe(Image.open(small), num_inference_steps=3, generator=generator).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "large.png")), np.asarray(expected))


def test_upscale_of_a_folder_gives_what_its_files_give(model: Path, photos: Path, tmp_path: Path) -> None:
    options = ["--model", str(model), "--steps", "1"]
    succeeds("upscale", photos, tmp_path / "new", *options)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["p0.png", "p1.png"]
    (tmp_path / "one").mkdir()
    succeeds("upscale", photos / "p1.png", tmp_path / "one", *options)
    assert (tmp_path / "one" / "p1.png").read_bytes() == (tmp_path / "new" / "p1.png").read_bytes()
    with Image.open(tmp_path / "one" / "p1.png") as large:
        assert large.size == (70, 66)


def test_upscale_takes_tiles_samplers_and_precisions(model: Path, small: Path, tmp_path: Path) -> None:
    common = ["upscale", str(small), str(tmp_path / "large.png"), "--model", str(model), "--steps", "2", "--force"]
    results = []
    for options in ([], ["--scheduler", "dpm++"], ["--tile", "8", "--overlap", "2"], ["--dtype", "bfloat16"]):
        succeeds(*common, *options)
        results.append((tmp_path / "large.png").read_bytes())
    assert len(set(results)) == len(results)
    succeeds(*common, "--scheduler", "ddim")
    assert (tmp_path / "large.png").read_bytes() == results[0]


def test_upscale_keeps_transparency_and_checks_the_format_before_it_works(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glass = picture(6, 6).convert("RGBA")
    glass.putalpha(100)
    glass.save(tmp_path / "glass.png")
    succeeds("upscale", tmp_path / "glass.png", tmp_path / "large.webp", "--model", model, "--steps", "1")
    with Image.open(tmp_path / "large.webp") as large:
        assert large.mode == "RGBA"
    monkeypatch.setattr(SuperResolutionPipeline, "__call__", raising(AssertionError("worked before checking")))
    before = contents(tmp_path)
    for name, words in (("large.jpg", "cannot hold a picture of mode 'RGBA'"), ("large.pgn", "Did you mean '.png'")):
        message = fails("upscale", tmp_path / "glass.png", tmp_path / name, "--model", model)
        assert words in message
        assert message.startswith(f"error: {tmp_path / name}: ")
    assert contents(tmp_path) == before


def test_upscale_overwrites_only_when_told_to(model: Path, small: Path, tmp_path: Path) -> None:
    target = tmp_path / "large.png"
    target.write_bytes(b"precious")
    assert "large.png: already exists" in fails("upscale", small, target, "--model", model)
    assert target.read_bytes() == b"precious"
    succeeds("upscale", small, target, "--model", model, "--steps", "1", "--force")
    assert target.read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.png", "no such file"),
        ("notes.txt", "is not a picture"),
        ("fake.png", "is not a picture"),
        ("cut.png", "cannot"),
        ("empty", "holds no pictures"),
        ("cut", "cannot"),
        ("twins", "would both become"),
    ],
)
def test_upscale_refuses_bad_pictures(model: Path, tmp_path: Path, source: str, words: str) -> None:
    for folder in ("empty", "cut", "twins"):
        (tmp_path / folder).mkdir()
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "fake.png").write_text("words")
    picture(20, 20).save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:-200]
    (tmp_path / "cut.png").write_bytes(cut)
    (tmp_path / "cut" / "b.png").write_bytes(cut)
    shutil.copy(tmp_path / "whole.png", tmp_path / "cut" / "a.png")
    for suffix in ("png", "bmp"):
        picture(4, 4).save(tmp_path / "twins" / f"a.{suffix}")
    before = contents(tmp_path)
    assert words in fails("upscale", tmp_path / source, tmp_path / "out.png", "--model", model)
    assert contents(tmp_path) == before


def test_upscale_refuses_places_where_it_cannot_or_must_not_write(model: Path, small: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    assert "does not exist" in fails("upscale", small, tmp_path / "no" / "large.png", "--model", model)
    assert "is a file" in fails("upscale", tmp_path, small, "--model", model)
    assert "is one of the pictures" in fails("upscale", tmp_path, tmp_path, "--model", model, "--force")
    assert "is one of the pictures" in fails("upscale", small, small, "--model", model, "--force")
    assert contents(tmp_path) == before


def test_ctrl_c_leaves_nothing_behind(
    model: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SuperResolutionPipeline, "__call__", raising(KeyboardInterrupt()))
    before = contents(tmp_path)
    result = run("upscale", small, tmp_path / "large.png", "--model", model)
    assert (result.exit_code, result.stderr) == (130, "error: interrupted\n")
    assert contents(tmp_path) == before


def test_upscale_says_what_helps_where_memory_runs_out(
    model: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["upscale", str(small), str(tmp_path / "large.png"), "--model", str(model)]
    monkeypatch.setattr(SuperResolutionPipeline, "__call__", raising(torch.OutOfMemoryError("CUDA out of memory")))
    assert "memory of cpu; try --tile 256" in fails(*command)
    no_memory = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9999 bytes")
    monkeypatch.setattr(SuperResolutionPipeline, "__call__", raising(no_memory))
    assert "try a --tile below 64" in fails(*command, "--tile", "64")
    monkeypatch.setattr(SuperResolutionPipeline, "__call__", raising(RuntimeError("something else")))
    assert isinstance(run(*command).exception, RuntimeError)
    assert not (tmp_path / "large.png").exists()


def test_a_device_that_is_not_there_is_refused(
    model: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = fails("upscale", small, tmp_path / "large.png", "--model", model, "--device", "cuda")
    assert "finds no such device here" in message


def test_upscale_writes_beside_the_picture_where_nothing_is_said(model: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(photos, folder)
    (folder / "p0.png").rename(folder / "a.b.PNG")
    before = contents(folder)
    succeeds("upscale", folder / "a.b.PNG", "--model", model, "--steps", "1")
    assert (folder / "a.b_x2.png").is_file()
    assert "a.b_x2.png: already exists" in fails("upscale", folder / "a.b.PNG", "--model", model)
    (folder / "a.b_x2.png").unlink()
    alone = shutil.copytree(model / "unet", tmp_path / "alone")
    succeeds("upscale", folder, "--model", alone, "--scale", "3", "--steps", "1")
    assert sorted(path.name for path in (tmp_path / "pictures_x3").iterdir()) == ["a.b.png", "p1.png"]
    assert contents(folder) == before


def test_upscale_takes_the_steps_that_the_model_says(model: Path, small: Path, tmp_path: Path) -> None:
    own = damaged(model, tmp_path / "own")
    edit_json(own / "model_index.json", num_inference_steps=3)
    said = succeeds("upscale", small, tmp_path / "a.png", "--model", own)
    assert re.search(r"^start-up \d+\.\d s, sampling \d+\.\d s \(3 steps a picture, on ", said, flags=re.MULTILINE)
    succeeds("upscale", small, tmp_path / "b.png", "--model", model, "--steps", "3")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "(1 step a picture" in succeeds("upscale", small, tmp_path / "c.png", "--model", own, "--steps", "1")


@pytest.mark.parametrize(
    ("size", "asked", "tile"),
    [((256, 150), None, None), ((150, 257), None, 256), ((4, 4), 96, 96), ((2000, 2000), 0, None)],
)
def test_large_results_are_made_of_tiles_unless_told_otherwise(
    size: tuple[int, int], asked: int | None, tile: int | None
) -> None:
    assert tile_for(size, 2, asked) == tile


@pytest.mark.parametrize("tile", [None, 16])
def test_the_bar_counts_the_passes_of_the_network(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int | None
) -> None:
    bars: list[Any] = []
    real = tqdm.tqdm

    class Watched(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False})
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Watched)
    picture(20, 9).save(tmp_path / "small.png")
    options = [] if tile is None else ["--tile", str(tile)]
    succeeds("upscale", tmp_path / "small.png", "--model", model, "--steps", "2", *options)
    assert bars[0].n == bars[0].total == 2 * (1 if tile is None else 3 * 2)  # steps, and rows and columns of tiles


def test_start_up_counts_from_the_start_of_the_program(model: Path, small: Path) -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "binarize.cli", "upscale", small, "--model", model, "--steps", "1", "--no-pack"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall = time.monotonic() - began
    found = re.search(r"start-up (\S+) s, sampling (\S+) s", done.stdout)
    assert found is not None
    assert float(found[1]) + float(found[2]) <= wall + 0.2
    if sys.platform == "linux":
        assert float(found[1]) > 0.5  # no import of torch is that fast


# Names on the hub


def test_a_model_on_the_hub_is_downloaded(
    model: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(model.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    succeeds("upscale", small, tmp_path / "a.png", "--model", f"someone/models/{model.name}", "--steps", "1")
    assert ("someone/models", [f"{model.name}/*.json", f"{model.name}/*.safetensors"]) in asked
    succeeds("upscale", small, tmp_path / "b.png", "--model", model, "--steps", "1")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "has no folder sub of a model" in fails("upscale", small, tmp_path / "c.png", "--model", "some/one/sub")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RepositoryNotFoundError("404", response=Mock()), "no repository some/one on the Hugging Face hub"),
        (HFValidationError("odd"), "no repository some/one"),
        (LocalEntryNotFoundError("offline"), "the Hugging Face hub cannot be reached, nor was some/one downloaded"),
        (OSError("disk\nfull"), "cannot be downloaded from the Hugging Face hub: disk full"),
    ],
)
def test_what_fails_on_the_hub_is_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", raising(error))
    assert words in fails("upscale", small, tmp_path / "large.png", "--model", "some/one")


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


# What is given as a model


def test_a_network_without_a_scale_needs_one(model: Path, small: Path, tmp_path: Path) -> None:
    target, alone = tmp_path / "large.png", shutil.copytree(model / "unet", tmp_path / "alone")
    assert "add --scale" in fails("upscale", small, target, "--model", alone)
    succeeds("upscale", small, target, "--model", alone, "--scale", "3", "--steps", "1")
    with Image.open(target) as large:
        assert large.size == (33, 27)
    message = fails("upscale", small, tmp_path / "other.png", "--model", model, "--scale", "4")
    assert "enlarges 2 times" in message


def test_the_network_of_a_pipeline_stands_for_the_pipeline(model: Path, small: Path, tmp_path: Path) -> None:
    for name, given in (("whole", model), ("folder", model / "unet"), ("file", weights_of(model))):
        succeeds("upscale", small, tmp_path / f"{name}.png", "--model", given, "--steps", "2")
    whole, *others = ((tmp_path / f"{name}.png").read_bytes() for name in ("whole", "folder", "file"))
    assert others == [whole, whole]
    assert "enlarges 2 times" in fails("upscale", small, tmp_path / "x.png", "--model", model / "unet", "--scale", "3")


def test_a_network_alone_must_be_of_the_released_schedule(small: Path, tmp_path: Path) -> None:
    SRUNet(**NETWORK, num_train_timesteps=1000).save_pretrained(tmp_path / "alone")
    message = fails("upscale", small, tmp_path / "large.png", "--model", tmp_path / "alone", "--scale", "2")
    assert "is a network alone, of 1000 timesteps" in message
    assert "Give the folder of its pipeline" in message


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights_of(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def drop_a_weight(folder: Path) -> None:
    path = weights_of(folder)
    weights = load_file(path)
    weights.pop("conv_out.bias")
    weights["left_over"] = torch.zeros(1)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "no such file or folder"),
        (lambda f: (f / "model_index.json").unlink(), "holds no model"),
        (lambda f: (f / "model_index.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "model_index.json").write_text("[]"), "must hold a JSON object; it holds a list"),
        (lambda f: edit_json(f / "model_index.json", _class_name="DDPMPipeline"), "is a DDPMPipeline"),
        (lambda f: shutil.rmtree(f / "unet"), "is missing; the model is not complete"),
        (lambda f: shutil.rmtree(f / "scheduler"), "cannot be read as a pipeline"),
        (lambda f: edit_json(f / "unet" / "config.json", _class_name="UNet2DModel"), "runs SRUNet"),
        (lambda f: edit_json(f / "unet" / "config.json", base_channels=16), "cannot be read as an SRUNet"),
        (lambda f: edit_json(f / "unet" / "config.json", fusion="sc"), "unknown fusion 'sc'"),
        (drop_a_weight, "1 missing keys, 1 unexpected keys, such as conv_out.bias"),
        (lambda f: weights_of(f).write_bytes(b"cut"), "cannot be read as an SRUNet"),
        (lambda f: weights_of(f).unlink(), "cannot be read as an SRUNet"),
    ],
)  # fmt: skip
def test_a_broken_model_is_one_line(model: Path, small: Path, tmp_path: Path, damage: Any, words: str) -> None:
    folder = damaged(model, tmp_path / "broken")
    damage(folder)
    before = contents(tmp_path)
    message = fails("upscale", small, tmp_path / "large.png", "--model", folder)
    assert words in message
    assert str(folder) in message
    assert contents(tmp_path) == before


def test_what_is_no_model_is_refused(small: Path, tmp_path: Path) -> None:
    assert "is not a model" in fails("upscale", small, tmp_path / "large.png", "--model", small)
    checkpoint = tmp_path / "run" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.pt").touch()
    message = fails("upscale", small, tmp_path / "large.png", "--model", checkpoint)
    assert "is a training checkpoint" in message
    assert str(tmp_path / "run" / "model") in message


# import-official


def official_names() -> tuple[Path, list[str]]:
    path = FIXTURES / "small.pth"
    if not path.is_file():
        pytest.skip("needs the small checkpoint in the released format")
    with safe_open(FIXTURES / "small.safetensors", "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"]) if "config" in metadata else {k: json.loads(v) for k, v in metadata.items()}
    known = set(binarize.models.OFFICIAL_CONFIG)
    return path, [f"{key}={json.dumps(value)}" for key, value in config.items() if key in known]


def test_import_official_gives_a_model_that_every_command_takes(small: Path, tmp_path: Path) -> None:
    checkpoint, config = official_names()
    target = tmp_path / "deep" / "imported"
    succeeds("import-official", checkpoint, target, "--scale", "4", *config)
    pipe = SuperResolutionPipeline.from_pretrained(target, pack=False)
    assert pipe.scale == 4
    expected = load_official(checkpoint, **{k: yaml.safe_load(v) for k, v in (c.split("=", 1) for c in config)})
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, pipe.unet.state_dict()[name])
    assert pipe.unet.config["conversion"]["method"]["sign_zero"] == "zero"
    succeeds("upscale", small, tmp_path / "large.png", "--model", target, "--steps", "1")
    assert "already holds a pipeline" in fails("import-official", checkpoint, target, "--scale", "2", *config)
    succeeds("import-official", checkpoint, target, "--scale", "2", "--sign-zero", "plus", "--force", *config)
    assert SuperResolutionPipeline.from_pretrained(target).scale == 2


def test_import_official_refuses_what_does_not_fit(tmp_path: Path) -> None:
    checkpoint, _ = official_names()
    target = tmp_path / "imported"
    command = ["import-official", str(checkpoint), str(target), "--scale", "2"]
    assert "does not fit the configuration" in fails(*command)
    assert "Did you mean 'inner_channel'" in fails(*command, "inner_chanel=32")
    assert "is not KEY=VALUE" in fails(*command, "inner_channel")
    assert "is no value" in fails(*command, "channel_mults=[1,2")
    assert "is not a file" in fails("import-official", tmp_path / "none.pth", target, "--scale", "2")
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:5000])
    assert "not a readable" in fails("import-official", tmp_path / "cut.pth", target, "--scale", "2")
    assert not target.exists()
    small = tmp_path / "small.png"
    picture(4, 4).save(small)
    assert "add --scale" in fails("upscale", small, tmp_path / "large.png", "--model", checkpoint)
    message = fails("upscale", small, tmp_path / "large.png", "--model", checkpoint, "--scale", "2")
    assert "does not fit the configuration" in message


def test_import_official_never_replaces_what_is_no_pipeline(tmp_path: Path) -> None:
    checkpoint, config = official_names()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    before = contents(tmp_path)
    message = fails("import-official", checkpoint, tmp_path / "thesis", "--scale", "2", "--force", *config)
    assert "is no pipeline's folder" in message
    assert contents(tmp_path) == before


# train, evaluate


def test_from_a_recipe_to_a_large_picture(photos: Path, small: Path, tmp_path: Path) -> None:
    run_folder, results = tmp_path / "run", tmp_path / "results"
    train = ["train", "demo", *TINY, f"train_data_dir={photos}", f"output_dir={run_folder}"]
    said = succeeds(*train)
    assert f"model: {run_folder / 'model'}" in said
    assert "already holds a run" in fails(*train)
    assert "step 3 was reached before" in succeeds(*train, "--resume", "latest")
    assert "the same thing" in fails(*train, "--resume", "latest", "resume_from_checkpoint=latest")
    assert "force removes it" in fails(*train, "--resume", "latest", "--force")

    evaluate = ["evaluate", str(run_folder), "--data", str(photos), "--lpips", "none", "--steps", "1"]
    table = succeeds(*evaluate, "--output", str(results))
    assert re.search(r"\| \*\*mean\*\* \| \*\*\d+\.\d\d\*\* \| \*\*0\.\d{4}\*\*", table)
    assert sorted(p.name for p in results.iterdir()) == [f"evaluation.{kind}" for kind in ("csv", "json", "md")]
    found = json.loads((results / "evaluation.json").read_text())
    assert [row["picture"] for row in found["pictures"]] == ["p0", "p1"]
    assert "already exists" in fails(*evaluate, "--output", str(results))
    assert "| p1 |" not in succeeds(*evaluate, "--output", str(results), "--force", "--limit", "1")

    succeeds("upscale", small, tmp_path / "large.png", "--model", run_folder, "--steps", "2")
    with Image.open(tmp_path / "large.png") as large:
        assert large.size == (22, 18)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "unknown recipe 'nothing'"),
        (["demo", "learning_rat=1"], "Did you mean 'learning_rate'?"),
        (["demo", "learning_rate"], "is not key=value"),
        (["demo", "method=bidifsr", "resolution=16", "train_data_dir={photos}"], "Did you mean 'bidiffsr'?"),
        (["demo", "method.group=3", "resolution=16", "train_data_dir={photos}"], "Did you mean 'groups'?"),
        (["demo"], "train_data_dir: missing"),
        (["demo", "train_data_dir=nowhere"], "no such folder"),
        (["demo", "train_data_dir={photos}", "resolution=64"], "at least 64x64 are needed"),
    ],
)
def test_train_refuses_what_it_cannot_run(photos: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    recipe, *changes = [argument.format(photos=photos) for argument in arguments]
    result = run("train", recipe, f"output_dir={tmp_path / 'run'}", *changes)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_evaluate_takes_low_resolution_files_and_refuses_other_sizes(model: Path, photos: Path, tmp_path: Path) -> None:
    lr = tmp_path / "lr"
    lr.mkdir()
    for path in photos.iterdir():
        pixels = degrade(read_image(path).pixels(), 2)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(lr / path.name)
    command = ["evaluate", str(model), "--data", str(photos), "--lpips", "none", "--steps", "1"]
    assert succeeds(*command, "--lr", str(lr)) == succeeds(*command)
    picture(7, 9).save(lr / "p1.png")
    message = fails(*command, "--lr", str(lr), "--output", str(tmp_path / "results"))
    assert "p1.png is 9x7; at scale 2 the latter must be 17x16" in message
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "{tmp}/none"], "no such folder"),
        (["--data", "{tmp}/empty"], "holds no pictures"),
        (["--data", "{photos}", "--output", "{photos}/p0.png"], "is a file; --output takes a folder"),
        (["--data", "{photos}", "--lpips-backbone", "{tmp}/none.pth"], "no such LPIPS backbone file"),
        (["--data", "{photos}", "--scale", "4"], "enlarges 2 times"),
    ],
)
def test_evaluate_refuses_what_it_cannot_measure(
    model: Path, photos: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert words in fails("evaluate", model, *(text.format(tmp=tmp_path, photos=photos) for text in arguments))


# summary, methods, recipes


@pytest.mark.parametrize(
    ("recipe", "params", "ops"), [("bidiffsr_x2", "4.575 M", "36.669 G"), ("sr3_x4", "55.407 M", "176.408 G")]
)
def test_summary_gives_the_published_figures(recipe: str, params: str, ops: str) -> None:
    said = succeeds("summary", recipe)
    assert params in said
    assert ops in said
    assert len(said.splitlines()) < 8


def test_summary_of_a_model_is_the_one_from_python(model: Path) -> None:
    unet = SRUNet.from_pretrained(model / "unet")
    whole = json.loads(succeeds("summary", model, "--format", "json"))
    assert whole["ops"] == binarize.summary(unet).ops
    picture, steps = torch.rand(1, 3, 32, 64), torch.zeros(1)
    part = json.loads(succeeds("summary", model / "unet", "--size", "32x64", "--format", "json"))
    assert part["ops"] == binarize.summary(unet, (picture, steps, picture)).ops
    table = succeeds("summary", model, "--layers", "--format", "markdown")
    assert "| conv_in |" in table
    assert "conv_in" in succeeds("summary", model, "--layers")
    assert "conv_in" not in succeeds("summary", model)


def test_summary_takes_a_recipe_file_and_refuses_the_rest(model: Path, tmp_path: Path) -> None:
    succeeds("recipes", "cp", "demo", tmp_path / "mine.yaml")
    assert succeeds("summary", tmp_path / "mine.yaml") == succeeds("summary", "demo")
    assert "Did you mean 'bidiffsr_x2'?" in fails("summary", "bidifsr_x2")
    assert "must be height and width" in fails("summary", "demo", "--size", "256")
    assert "needs a multiple of 2" in fails("summary", model, "--size", "31x32")


def test_methods_lists_all_and_describes_one() -> None:
    listed = [line.split()[0] for line in succeeds("methods").splitlines()]
    assert listed == binarize.list_methods()
    described = succeeds("methods", "bidiffsr")
    assert re.search(r"^  groups +5 +K", described, flags=re.MULTILINE)
    assert re.search(r"^  taa +True +RPReLU per timestep group", described, flags=re.MULTILINE)
    assert "Did you mean 'reactnet'?" in fails("methods", "reacnet")


def test_every_option_of_every_method_is_described() -> None:
    for name in binarize.list_methods():
        for line in succeeds("methods", name).splitlines()[2:]:
            assert len(line.split()) > 2, f"{name}: {line}"


def test_recipes_are_listed_shown_copied_and_checked(tmp_path: Path) -> None:
    assert "bidiffsr_x4 " in succeeds("recipes", "ls")
    assert "base: bidiffsr_x2" in succeeds("recipes", "show", "bidiffsr_x4")
    full = yaml.safe_load(succeeds("recipes", "show", "bidiffsr_x4", "--full"))
    assert (full["scale"], full["model"]["base_channels"]) == (4, 64)
    assert yaml.safe_load(succeeds("recipes", "show", "bidiffsr_x4", "seed=7"))["seed"] == 7
    mine = tmp_path / "mine.yaml"
    succeeds("recipes", "cp", "demo", mine)
    assert "already exists" in fails("recipes", "cp", "demo", mine)
    succeeds("recipes", "cp", "demo", mine, "--force")
    assert succeeds("recipes", "validate", mine, "seed=3") == f"{mine}: valid\n"


def test_validate_lists_every_error_at_once(tmp_path: Path) -> None:
    result = run("recipes", "validate", "demo", "learning_rate=-1", "sed=3")
    assert result.exit_code == 1
    assert "has 2 errors" in result.stderr
    assert "learning_rate: got -1" in result.stderr
    assert "Did you mean 'seed'?" in result.stderr
    assert "Did you mean 'groups'?" in fails("recipes", "validate", "demo", "method.grups=3")


def test_a_model_of_a_users_own_method_needs_its_plugin(small: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "import binarize\n"
        "@binarize.register_method('cli-mine', replace=True)\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(binarize.Method):\n"
        "    '''A user's own.'''\n"
    )
    program = (
        "import sys, binarize; from binarize.recipes import import_plugins; from binarize.models import SRUNet, "
        "SuperResolutionPipeline as P; import_plugins([sys.argv[1]]); "
        f"P(binarize.convert(SRUNet(**{NETWORK!r}), 'cli-mine'), scale=2).save_pretrained(sys.argv[2])"
    )
    folder = tmp_path / "model"
    subprocess.run([sys.executable, "-c", program, str(plugin), str(folder)], check=True, capture_output=True)
    assert "unknown method 'cli-mine'" in fails(
        "upscale", small, tmp_path / "out.png", "--model", folder, "--steps", "1"
    )
    succeeds("--plugin", plugin, "upscale", small, tmp_path / "out.png", "--model", folder, "--steps", "1")
    assert read_image(tmp_path / "out.png").rgb.shape[0] == 3
