"""`binarize upscale` loses no input and no result, and one bad image does not stop a folder."""

import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
from abuse_case import assert_refused, command, sampled
from cli_case import contents, make_image, run, succeeds
from PIL import Image

from binarize.errors import BinarizeError
from binarize.files import write_atomic, write_text_atomic


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder of images of several formats, with links, and the results of one."""
    for name, size in (("a.png", (9, 11)), ("b.png", (9, 11)), ("c.jpg", (20, 20)), ("d.tif", (7, 5))):
        make_image(*size).save(tmp_path / name)
    make_image(18, 22).save(tmp_path / "two.png")
    make_image(3, 3).save(tmp_path / "d_x2.png")
    (tmp_path / "link.png").symlink_to("b.png")
    os.link(tmp_path / "a.png", tmp_path / "hard.png")
    return tmp_path


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("a.png -o b.png --force", "b.png: is an image of 11x9 pixels, not an earlier result, which has 22x18"),
        ("d.tif --force", "d_x2.png: is an image of 3x3 pixels, not an earlier result, which has 10x14"),
        ("a.png -o c.jpg --force", "is an image of 20x20 pixels"),
        ("a.png -o d.tif --force", "is an image of 5x7 pixels"),
        ("a.png -o link.png --force", "is an image of 11x9"),
        ("a.png two.png --force", "two.png: already exists, and may be a result or another image; add --output"),
        ("a.png -o a.png --force", "is one of the source images"),
        ("a.png c.jpg -o . --force", "is one of the source images"),
        ("a.png c.jpg -o two.png --force", "two.png: is a file; several images need a folder"),
        ("a.png c.jpg -o new.png", "new.png: is the name of one image; several images need a folder"),
        ("a.png c.jpg none.png", "none.png: no such file"),
        ("a.png -o a.webp --format jpeg", "a.webp: is not the name of a jpeg file"),
        ("a.png --quality 80", "PNG is lossless and has no quality"),
        ("b.png link.png --force", "is one of the source images"),
        ("link.png b.png --force", "is one of the source images"),
        ("a.png hard.png --force", "is one of the source images"),
        ("a.png ./a.png --force", "is one of the source images"),
        ("a.png -o b.png", "already exists"),
        ("a.png b.png --force --skip-existing", "give one"),
        (
            "a.png new.webp --max-pixels 10",
            "a result of 22x18 is more than the 10 pixels allowed; add --max-pixels 396",
        ),
        ("none.png b.png --force", "no such file"),
    ],
)
def test_an_input_is_never_a_result(model: Path, inputs: Path, monkeypatch, args: str, words: str) -> None:
    monkeypatch.chdir(inputs)
    assert_refused(["upscale", *args.split(), "--model", model, "--steps", "1"], inputs, words)


def test_an_earlier_result_is_replaced(model: Path, small: Path, tmp_path: Path) -> None:
    options = ("--model", model, "--steps", "1", "--force")
    for target in sampled(("large.png", "large.webp", "empty.png", "words.png")):
        if target in ("empty.png", "words.png"):
            (tmp_path / target).write_text("" if target == "empty.png" else "no image")
        for seed in ("1", "2"):
            succeeds("upscale", small, "--output", tmp_path / target, *options, "--seed", seed)
    make_image(18, 22).save(tmp_path / "small_x2.png")
    succeeds("upscale", small, *options)
    with Image.open(tmp_path / "small_x2.png") as large:
        assert large.size == (22, 18)


def test_a_broken_image_does_not_stop_a_folder(model: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "cut.png").write_bytes((folder / "p1.png").read_bytes()[:-200])
    (folder / "float.tif").write_bytes(b"II*\0")
    (folder / "gone.png").symlink_to("nowhere.png")
    result = run("upscale", folder, tmp_path / "out", "--model", model, "--steps", "1")
    assert result.exit_code == 1
    assert "3 of 5 images cannot be used; upscaling the others\n" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {folder}: 3 images cannot be used: ")
    assert all(name in last for name in ("cut.png", "float.tif", "gone.png"))
    assert list(contents(tmp_path / "out")) == ["p0.png", "p1.png"]
    for name in ("p0.png", "p1.png"):
        (folder / name).unlink()
    assert_refused(["upscale", folder, tmp_path / "none", "--model", model], tmp_path, "3 images cannot be used")


@pytest.mark.abuse
def test_an_image_that_breaks_while_a_folder_runs(model, photos, tmp_path, monkeypatch):
    from binarize.models import loading

    sample = loading.sample

    def failing(pipeline, image, **options):
        if image.rgb.shape[-1] == 48:
            raise BinarizeError("the image is too large for the memory of cpu")
        return sample(pipeline, image, **options)

    monkeypatch.setattr(loading, "sample", failing)
    result = run("upscale", photos, tmp_path / "out", "--model", model, "--steps", "1")
    assert (result.exit_code, list(contents(tmp_path / "out"))) == (1, ["p1.png"])
    assert result.stderr.endswith("error: the image is too large for the memory of cpu\n")


def test_an_interrupted_folder_goes_on(model: Path, photos: Path, tmp_path: Path) -> None:
    given = ("upscale", photos, tmp_path / "out", "--model", model, "--steps", "1")
    succeeds(*given)
    whole = contents(tmp_path / "out")
    assert "nothing to do: every result exists" in succeeds(*given, "--skip-existing")
    (tmp_path / "out" / "p1.png").unlink()
    (tmp_path / "out" / "p0.png").write_bytes(b"mine")
    assert len(re.findall(r"p\d.png: ", succeeds(*given, "--skip-existing"))) == 1
    assert contents(tmp_path / "out") == {**whole, "p0.png": b"mine"}


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("large.webp", (8192, 1), "WEBP holds at most 16383 pixels a side, not 2x16384"),
        ("large.jpg", (32751, 1), "JPEG holds at most 65500 pixels a side, not 2x65502"),
    ],
)
def test_what_the_format_cannot_hold_is_found_before_sampling(model, tmp_path, name, size, words):
    Image.new("RGB", size[::-1]).save(tmp_path / "long.png")
    assert_refused(["upscale", tmp_path / "long.png", tmp_path / name, "--model", model], tmp_path, words)


@pytest.mark.abuse
def test_a_large_profile_is_found_before_sampling(model: Path, tmp_path: Path) -> None:
    profile = bytes(16) + b"RGB " + np.random.default_rng(0).bytes(2**20)
    make_image(6, 6).save(tmp_path / "a.tif", icc_profile=profile)
    words = "PNG holds colour profiles of at most"
    assert_refused(["upscale", tmp_path / "a.tif", tmp_path / "b.png", "--model", model], tmp_path, words)
    succeeds("upscale", tmp_path / "a.tif", tmp_path / "b.tif", "--model", model, "--steps", "1")
    with Image.open(tmp_path / "b.tif") as large:
        assert large.info["icc_profile"] == profile


@pytest.mark.abuse
@pytest.mark.parametrize("length", [100, 230, 251])
def test_long_names(model: Path, small: Path, tmp_path: Path, length: int) -> None:
    for name in (f"{'n' * length}.png", f"{chr(233) * (length // 2)}.png"):
        succeeds("upscale", small, tmp_path / name, "--model", model, "--steps", "1")
    assert_refused(["upscale", small, tmp_path / f"{'n' * 252}.png", "--model", model, "--steps", "1"], tmp_path)


class TestWriteAtomic:
    @pytest.mark.parametrize("mode", [0o600, 0o644, 0o640, 0o400, 0o755])
    def test_permissions_are_kept(self, mode: int, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("old")
        path.chmod(mode)
        seen = []

        def write(temporary: Path) -> None:
            seen.append(stat.S_IMODE(temporary.stat().st_mode) & 0o077)
            temporary.write_text("new")

        write_atomic(path, write, force=True)
        assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)
        assert seen == [mode & 0o077]

    def test_links_are_followed(self, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        real, link = tmp_path / "there" / "a.txt", tmp_path / "link.txt"
        real.write_text("old")
        link.symlink_to("there/a.txt")
        with pytest.raises(BinarizeError, match="already exists"):
            write_text_atomic(link, "new", force=False)
        write_text_atomic(link, "new")
        assert (real.read_text(), link.is_symlink(), os.readlink(link)) == ("new", True, "there/a.txt")
        assert sorted(contents(tmp_path)) == ["link.txt", "there", "there/a.txt"]

    @pytest.mark.parametrize("kind", ["dangling", "loop", "fifo", "device"])
    def test_dead_ends_are_refused(self, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        if kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to({"dangling": "nowhere", "loop": "a.txt", "device": "/dev/null"}[kind])
        for force in (False, True):
            with pytest.raises(BinarizeError, match=r"leads to no file|is a pipe or a device"):
                write_text_atomic(path, "new", force=force)
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.abuse
def test_targets_that_are_no_files(model: Path, small: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    for name in ("pipe.png", "dangling.png", "loop.png", "null.png"):
        for force in ((), ("--force",)):
            result = command("upscale", small, tmp_path / name, "--model", model, "--steps", "10000", *force)
            assert (result.status, result.err.count("\n")) == (1, 1), result
            assert not (tmp_path / name).is_file()
    assert not (tmp_path / "nowhere.png").exists()
