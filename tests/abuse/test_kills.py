"""Commands that are killed or interrupted at any of their changes to files: nothing is lost, half or left over."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from abuse_case import Result, amount, assert_bounded, forked
from cli_case import NETWORK, contents, official_checkpoint
from diffusers import UNet2DModel

import binarize
from binarize.cli import app
from binarize.models import SRUNet, SuperResolutionPipeline
from binarize.models.loading import load_network

OTHER = {"block_out_channels": (32, 32), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.utime")
COMMANDS = {
    "upscale": "upscale in/p0.png -o new.png --model model --steps 1",
    "upscale again": "upscale in/p0.png -o old.png --model model --steps 1 --force",
    "upscale a folder": "upscale in -o out --model model --steps 1 --force",
    "pack": "pack model new",
    "pack again": "pack model packed --force",
    "import": "import-official {checkpoint} new --scale 2",
    "import again": "import-official {checkpoint} packed --scale 2 --force",
    "copy a recipe": "recipes cp small_x2 new.yaml",
}


@pytest.fixture
def work(model: Path, packed: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with images, models and an earlier result."""
    folder = tmp_path / "work"
    shutil.copytree(photos, folder / "in")
    shutil.copytree(model, folder / "model")
    shutil.copytree(packed, folder / "packed")
    (folder / "old.png").touch()
    monkeypatch.chdir(folder)
    return folder


SAVES: dict[str, Callable[[Path], Any]] = {
    "pipeline": lambda folder: SuperResolutionPipeline.from_pretrained("model").save_pretrained(folder),
    "network": lambda folder: load_network(Path("model")).save_pretrained(folder / "unet"),
    "other network": lambda folder: UNet2DModel.from_pretrained("other").save_pretrained(folder / "unet"),
    "binarize.save": lambda folder: binarize.save(load_network(Path("packed")), folder / "unet"),
}


def run(name: str, folder: Path, happens: Callable[[int], Any], *more: str) -> Result:
    """Run a command; ``happens`` is called with the number of each change to a file, just before it."""
    checkpoint, options = official_checkpoint() if "import" in name else (None, [])
    args = [*COMMANDS[name].format(checkpoint=checkpoint).split(), *options, *more]
    return watched(lambda: app(args, prog_name="binarize"), folder, happens)


def watched(function: Callable[[], Any], folder: Path, happens: Callable[[int], Any]) -> Result:
    """Call a function in a forked process; see `run`."""
    seen = 0

    def audit(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        named = (writes or event in CHANGES) and isinstance(given[0], str | bytes | Path)
        if named and os.path.abspath(os.fsdecode(given[0])).startswith(str(folder)):
            seen += 1
            happens(seen)

    def call() -> None:
        sys.addaudithook(audit)
        function()

    return forked(call)


def nothing(_: int) -> None:
    pass


def whole_run(name: str, folder: Path) -> tuple[dict[str, Any], int]:
    """Return what a command leaves, and how many changes it makes."""
    return counted(lambda happens: run(name, folder, happens), folder)


def counted(call: Callable[[Callable[[int], Any]], Result], folder: Path) -> tuple[dict[str, Any], int]:
    """Return what a folder holds after a call, and how many changes it makes."""
    reader, writer = os.pipe()
    result = call(lambda _: os.write(writer, b"."))
    os.close(writer)
    assert result.status == 0, result
    with open(reader, "rb") as pipe:
        return contents(folder), len(pipe.read())


def reset(folder: Path, kept: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(kept, folder, dirs_exist_ok=True)


def parts(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a folder's contents by what has to be whole: its files, models and the files of other folders."""
    found: dict[str, dict[str, Any]] = {}
    for name, content in state.items():
        top = name.split("/")[0]
        if not Path(name).name.startswith(".") and not top.startswith(".") and name not in ("in", "out"):
            found.setdefault(name if top in ("in", "out") else top, {})[name] = content
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command(name: str, work: Path, tmp_path: Path, record_property: Any) -> None:
    shutil.copytree(work, tmp_path / "kept")
    before = contents(work)
    after, count = whole_run(name, work)
    assert count >= 2
    every = [*range(1, count + 1), *range(-count, 0)]  # negative: interrupted, not killed
    moments = sorted(np.random.default_rng(0).permutation(every)[: amount(0.2)].tolist())
    for moment in moments:
        reset(work, tmp_path / "kept")
        end = signal.SIGKILL if moment > 0 else signal.SIGINT

        def kill(number: int, moment: int = abs(moment), end: int = end) -> None:
            if number == moment:
                os.kill(os.getpid(), end)

        result = run(name, work, kill)
        there = contents(work)
        old, new, found = parts(before), parts(after), parts(there)
        wrong = [name for name in old.keys() | found.keys() if found.get(name) not in (old.get(name), new.get(name))]
        assert wrong == [], moment
        if end == signal.SIGKILL:
            assert result.status == -end, result
        elif result.status != 0:  # an interruption after the result was written may come too late
            assert (result.status, result.err.splitlines()[-1]) == (130, "error: interrupted"), (moment, result)
            assert_bounded(result)
        again = run(name, work, nothing, *([] if "--force" in COMMANDS[name] else ["--force"]))
        assert again.status == 0, again
        assert contents(work) == after, moment
    record_property("cases", len(moments))


@pytest.mark.parametrize("name", SAVES)
def test_a_killed_save_over_another_model(name: str, work: Path, tmp_path: Path, record_property: Any) -> None:
    """The folder holds the old model or the new one, and the user's own file."""
    binarize.convert(UNet2DModel(**OTHER), "bnn").save_pretrained(work / "other")
    (work / "old").mkdir()
    SuperResolutionPipeline(SRUNet(**{**NETWORK, "base_channels": 16}), scale=4).save_pretrained(work / "old")
    (work / "old" / "notes.txt").write_text("mine")
    (work / "old" / "unet" / "notes.txt").write_text("mine too")
    shutil.copytree(work, tmp_path / "kept")
    before = contents(work / "old")

    def save(happens: Callable[[int], Any]) -> Result:
        return watched(lambda: SAVES[name](Path("old")), work, happens)

    after, count = counted(save, work / "old")
    assert after["notes.txt"] == before["notes.txt"]
    assert after["unet/notes.txt"] == before["unet/notes.txt"]
    moments = sorted((np.random.default_rng(0).permutation(count) + 1)[: amount(0.2)].tolist())
    for moment in moments:
        reset(work, tmp_path / "kept")
        save(lambda number, moment=moment: number == moment and os.kill(os.getpid(), signal.SIGKILL))
        there = contents(work / "old")
        assert {path: there[path] for path in there if not path.startswith(".binarize-")} in (before, after), moment
        assert counted(save, work / "old")[0] == after, moment
        assert [path for path in work.rglob(".binarize-*") if path.is_dir()] == [], moment
    record_property("cases", len(moments))
