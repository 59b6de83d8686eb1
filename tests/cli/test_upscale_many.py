"""`binarize upscale` with several inputs, folders, formats and metadata."""

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_case import contents, fails, make_image, pixels, run, succeeds
from PIL import ExifTags, Image, features

Upscale = Callable[..., Any]


@pytest.fixture
def upscale(model: Path) -> Upscale:
    """Return a function that upscales with one step and returns the command's result."""
    return lambda *args: run("upscale", *args, "--model", model, "--steps", "1")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of three images, one of them in a folder in it, beside a hidden one and a file of text."""
    folder = tmp_path / "images"
    for name, size in (("a.png", (9, 11)), ("b.jpg", (9, 11)), ("sub/deep/a.png", (8, 6)), (".hidden/c.png", (4, 4))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(*size).save(folder / name)
    (folder / "sub" / "notes.txt").write_text("words")
    return folder


def test_several_images(upscale: Upscale, images: Path, tmp_path: Path) -> None:
    before = contents(images)
    result = upscale(images / "a.png", images / "b.jpg", "--force")
    assert result.exit_code == 0, result.output
    assert contents(images) == {**before, **{n: contents(images)[n] for n in ("a_x2.png", "b_x2.png")}}
    assert pixels(images / "b_x2.png").shape == (18, 22, 3)
    assert upscale(images / "a.png", images / "b.jpg", images / "sub" / "deep", "-o", tmp_path / "new").exit_code == 0
    new = contents(tmp_path / "new")
    assert list(new) == ["a.png", "b.png", "deep", "deep/a.png"]
    assert new["a.png"] == (images / "a_x2.png").read_bytes()


def test_folders_in_folders(upscale: Upscale, images: Path, tmp_path: Path) -> None:
    out = images / "large"  # within the folder: its results are no inputs of the next run
    assert upscale(images, "-o", out).exit_code == 0
    assert list(contents(out)) == ["a.png", "b.png"]
    result = upscale(images, "-o", out, "--recursive", "--skip-existing")
    assert result.exit_code == 0, result.output
    assert list(contents(out)) == ["a.png", "b.png", "sub", "sub/deep", "sub/deep/a.png"]
    assert pixels(out / "sub" / "deep" / "a.png").shape == (16, 12, 3)
    assert "nothing to do" in upscale(images, "-o", out, "-r", "--skip-existing").stdout
    (images / "loop").symlink_to(images)
    assert upscale(images, "-r").exit_code == 0
    assert list(contents(tmp_path / "images_x2"))[-1] == "sub/deep/a.png"


def test_a_broken_image_does_not_stop_the_others(upscale: Upscale, images: Path) -> None:
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:100])
    (images / "text.png").write_text("words")
    result = upscale(*(images / name for name in ("cut.png", "a.png", "text.png", "b.jpg")))
    assert result.exit_code == 1
    assert "error: 4 inputs: 2 images cannot be used: " in result.stderr
    assert all(str(images / name) in result.stderr.splitlines()[-1] for name in ("cut.png", "text.png"))
    assert (images / "a_x2.png").exists()
    assert (images / "b_x2.png").exists()


def test_formats_and_qualities(upscale: Upscale, images: Path, tmp_path: Path) -> None:
    large = make_image(40, 40)
    large.save(tmp_path / "photo.png")
    sizes = {}
    for form, quality, suffix in (
        ("jpeg", 30, "jpg"),
        ("jpeg", None, "jpg"),
        ("webp", 30, "webp"),
        ("webp", None, "webp"),
    ):
        out = tmp_path / f"{form}{quality}"
        out.mkdir()
        options = () if quality is None else ("--quality", quality)
        result = upscale(tmp_path / "photo.png", "-o", out, "--format", form, *map(str, options))
        assert result.exit_code == 0, result.output
        with Image.open(out / f"photo.{suffix}") as written:
            assert (written.format, written.size) == (form.upper(), (80, 80))
        sizes[form, quality] = (out / f"photo.{suffix}").stat().st_size
    assert sizes["jpeg", 30] < sizes["jpeg", None]
    assert sizes["webp", 30] < sizes["webp", None]
    assert upscale(images, "--format", "bmp").exit_code == 0
    assert list(contents(tmp_path / "images_x2")) == ["a.bmp", "b.bmp"]


@pytest.mark.parametrize(
    ("source", "target"), [(".jpg", ".png"), (".png", ".jpg"), (".webp", ".tif"), (".tif", ".webp")]
)
def test_exif_stays_true_of_the_upright_result(upscale: Upscale, tmp_path: Path, source: str, target: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.Artist] = "A person"
    exif[ExifTags.Base.ImageWidth] = 16
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ISOSpeedRatings: 200, ExifTags.Base.ExifImageWidth: 16, 0x927C: b"secret"}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N"}
    make_image(8, 16).save(tmp_path / f"a{source}", exif=exif.tobytes())
    result = upscale(tmp_path / f"a{source}", "-o", tmp_path / f"large{target}")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / f"large{target}") as large:
        assert large.size == (16, 32)
        written = large.getexif()
        assert (written[ExifTags.Base.Make], written[ExifTags.Base.Artist]) == ("Maker", "A person")
        assert written.get(ExifTags.Base.Orientation, 1) == 1
        assert written.get(ExifTags.Base.ImageWidth, 16) == 16  # of a TIFF's own pixels
        inner = written.get_ifd(ExifTags.IFD.Exif)
        assert inner[ExifTags.Base.ISOSpeedRatings] == 200
        assert not {ExifTags.Base.ExifImageWidth, 0x927C} & set(inner)
        assert written.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animations_are_refused_and_single_frames_are_not(upscale: Upscale, tmp_path: Path, suffix: str) -> None:
    frames = [make_image(8, 6, seed).convert("RGB") for seed in (0, 1)]
    frames[0].save(tmp_path / f"moves{suffix}", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / f"still{suffix}")
    result = upscale(tmp_path / f"moves{suffix}", tmp_path / f"still{suffix}")
    assert result.exit_code == 1
    assert f"moves{suffix}: is an animation, and only still images are upscaled; extract its frames" in result.stderr
    assert [path.name for path in tmp_path.glob("*_x2.png")] == ["still_x2.png"]


def png_of_16_bits(path: Path, channels: int) -> None:
    """Write a colour or grey PNG of 2x2 pixels with 16 bits, which Pillow cannot write in colour."""
    header = struct.pack(">IIBBBBB", 2, 2, 16, {1: 0, 2: 4, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + bytes(range(4 * channels)) for _ in range(2))
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(data)


def test_what_reading_loses_is_said(upscale: Upscale, tmp_path: Path) -> None:
    png_of_16_bits(tmp_path / "colour.png", 3)
    png_of_16_bits(tmp_path / "glass.png", 2)
    png_of_16_bits(tmp_path / "grey.png", 1)
    (tmp_path / "deep.ppm").write_bytes(b"P6 2 2 65535\n" + bytes(24))
    pages = [make_image(6, 6, seed) for seed in (0, 1)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    result = upscale(*sorted(tmp_path.iterdir()))
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    deep, first = "its 16-bit colours are read as 8-bit ones, as Pillow does", "only its first page is read"
    expected = (("colour.png", deep), ("deep.ppm", deep), ("glass.png", deep), ("pages.tif", first))
    assert notes == [f"note: {tmp_path / name}: {note}" for name, note in expected]
    with Image.open(tmp_path / "grey_x2.png") as grey:
        assert grey.mode == "I;16"


def test_jfif_and_avif(upscale: Upscale, images: Path, tmp_path: Path) -> None:
    shutil.copy(images / "b.jpg", images / "c.jfif")
    names = ["a.png", "b.png", "c.png"]
    if features.check("avif"):
        make_image(6, 6).save(images / "d.avif")
        names.append("d.png")
    assert upscale(images).exit_code == 0
    assert list(contents(tmp_path / "images_x2")) == names
    (images / "d.avif").write_text("words")
    assert "d.avif: is not an image that Pillow can read" in fails("upscale", images / "d.avif")
    if features.check("avif"):
        assert upscale(images / "a.png", "-o", tmp_path / "a.avif").exit_code == 0
        assert pixels(tmp_path / "a.avif").shape == (18, 22, 3)
    assert succeeds("upscale", "--help").count("--format") >= 1
