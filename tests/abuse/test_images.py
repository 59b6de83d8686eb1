"""Damaged and hostile image files: each is an image with values in [0, 1], or one line of error."""

import contextlib
import os
import struct
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from abuse_case import amount, assert_bounded, assert_refused, forked
from abuse_images import VARIANTS, encoded, mutations, source
from PIL import Image

from binarize.errors import BinarizeError
from binarize.imaging import image_size, list_images, read_image, save_image, to_image

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("variant", VARIANTS)
def test_mutated_files(variant: str, tmp_path: Path, record_property: Any) -> None:
    path = tmp_path / f"a.{VARIANTS[variant][0]}"

    def read_all() -> None:
        warnings.simplefilter("error")
        messages = []
        for data in mutations(variant, amount(2)):
            path.write_bytes(data)
            try:
                image = read_image(path)
            except BinarizeError as error:
                messages.append(str(error))
                continue
            planes = [image.rgb] if image.alpha is None else [image.rgb, image.alpha]
            assert all(bool(((plane >= 0) & (plane <= 1)).all()) for plane in planes)
            assert image.to_pil().mode == image.saved_mode
        assert all(each.startswith(f"{path}: ") and each.isprintable() and len(each) < 1000 for each in messages)

    record_property("cases", amount(2))
    result = forked(read_all)
    assert (result.status, result.out, result.err) == (0, "", ""), result
    assert_bounded(result)


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_files_of_the_variants_are_read(variant: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{VARIANTS[variant][0]}"
    path.write_bytes(encoded(variant))
    image = read_image(path)
    assert sorted(image.rgb.shape) == [3, 13, 19]
    transparent = VARIANTS[variant][1] in ("RGBA", "LA") or "transparency" in VARIANTS[variant][2]
    assert (image.alpha is not None) == transparent or variant == "gif"  # Pillow drops colours that no pixel has
    assert image_size(path) == image.rgb.shape[1:]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp", "gif", "ppm"])
@pytest.mark.parametrize(
    "content", [POSTSCRIPT, b"\xc5\xd0\xd3\xc6" + POSTSCRIPT, b"DDS \x7c\0\0\0", b"8BPS\0\1", b"BLP2"]
)
def test_other_decoders_and_programs_are_not_started(suffix, content, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *_, **__: pytest.fail("started a program"))
    path = tmp_path / f"holiday.{suffix}"
    path.write_bytes(content + bytes(500))
    with pytest.raises(BinarizeError, match=r"is not an image that Pillow can read as PNG, JPEG|cannot be read as an"):
        read_image(path)


def png_that_declares(width: int, height: int) -> bytes:
    data = bytearray(encoded("png"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def headers(width: int, height: int) -> dict[str, bytes]:
    """Small files that declare a size."""
    jpeg = bytearray(encoded("jpeg"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    bmp = bytearray(encoded("bmp"))
    bmp[18:26] = struct.pack("<ii", width, height)
    return {"a.png": png_that_declares(width, height), "a.jpg": bytes(jpeg), "a.bmp": bytes(bmp),
            "a.ppm": f"P6 {width} {height} 255\n".encode() + bytes(100)}  # fmt: skip


@pytest.mark.parametrize("size", [(65500, 2700), (13000, 13000), (6000, 6000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.ppm"])
def test_a_small_file_that_declares_a_large_image(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(headers(*size)[name])
    started = time.monotonic()
    with pytest.raises(BinarizeError, match=r"more than the 33,554,432 pixels allowed for|exceeds limit|cannot"):
        read_image(path)
    assert time.monotonic() - started < 5


@pytest.mark.abuse
def test_the_limit_on_pixels_is_an_argument(tmp_path: Path) -> None:
    Image.new("1", (6000, 6000)).save(tmp_path / "white.png")
    with pytest.raises(BinarizeError, match="size of 6000x6000 is more than the 33,554,432 pixels allowed for a"):
        read_image(tmp_path / "white.png")
    assert read_image(tmp_path / "white.png", max_pixels=36_000_000).mode == "1"
    with pytest.raises(BinarizeError, match="is more than the 35,999,999 pixels allowed; pass a larger max_pixels"):
        read_image(tmp_path / "white.png", max_pixels=35_999_999)


def test_an_image_larger_than_the_free_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source("RGB", (100, 100)).save(tmp_path / "a.png")
    for free in (0.0, 239_000.0):
        monkeypatch.setattr("binarize.imaging.limits.available_memory", lambda free=free: free)
        with pytest.raises(
            BinarizeError, match=r"decoding it needs about 0 MB of memory, 0 MB are free; use a smaller"
        ):
            read_image(tmp_path / "a.png")
    monkeypatch.undo()
    Image.new("RGB", (5000, 5000)).save(tmp_path / "b.png")

    def read() -> None:
        with pytest.raises(BinarizeError, match="memory"):
            read_image(tmp_path / "b.png")

    for memory in (2**28, 2**29):
        assert forked(read, memory=memory).status == 0


@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "dangling", "folder", "sparse"])
def test_what_is_no_regular_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere.png")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(10 * 2**30)
    with pytest.raises(
        BinarizeError, match=r"pipe or a device|leads to no file|is a folder|image files may have up to"
    ):
        read_image(path)
    if kind in ("loop", "dangling"):
        assert list_images(tmp_path) == [path]
        (tmp_path / "b.png").write_bytes(encoded("png"))
    if kind != "sparse":
        assert_refused(["upscale", path, "--steps", "1"], tmp_path, "" if kind == "folder" else "a.png")


class TestTransparency:
    COLOURS = ((10, 20, 30, 0), (200, 100, 0, 128))

    def check(self, image: Image.Image) -> None:
        decoded = to_image(image)
        assert decoded.alpha is not None
        assert np.asarray(decoded.to_pil()).reshape(-1, 4).tolist() == [list(colour) for colour in self.COLOURS]

    def test_palettes(self) -> None:
        palette = Image.new("P", (2, 1))
        palette.putpalette([value for colour in self.COLOURS for value in colour], "RGBA")
        palette.putdata([0, 1])
        self.check(palette)
        opaque = Image.new("P", (2, 1))
        opaque.putpalette([value for colour in self.COLOURS for value in colour[:3]])
        opaque.putdata([0, 1])
        assert to_image(opaque).alpha is None
        both = opaque.convert("PA")
        both.putalpha(Image.frombytes("L", (2, 1), bytes(colour[3] for colour in self.COLOURS)))
        self.check(both)
        opaque.info["transparency"] = bytes([0, 128])
        self.check(opaque)

    @pytest.mark.parametrize("hidden", [0, 300, 65535])
    def test_16_bit_grey(self, hidden: int, tmp_path: Path) -> None:
        levels = np.array([[0, 300], [65535, 2]], np.uint16)
        Image.fromarray(levels).save(tmp_path / "a.png", transparency=hidden)
        image = read_image(tmp_path / "a.png")
        assert image.alpha is not None
        assert torch.equal(image.alpha[0] == 0, torch.from_numpy(levels == hidden))
        assert image.saved_mode == "LA"


def test_tiff_whose_size_is_no_integer(tmp_path: Path) -> None:
    for kind in range(1, 17):  # the type of the width: 5 and 10 are rational numbers, 11 and 12 floats
        data = bytearray(encoded("tiff"))
        at = data.index(struct.pack("<HH", 256, 4)) if struct.pack("<HH", 256, 4) in data else data.index(
            struct.pack("<HH", 256, 3))  # fmt: skip
        data[at + 2 : at + 4] = struct.pack("<H", kind)
        (tmp_path / "a.tif").write_bytes(data)
        with contextlib.suppress(BinarizeError):
            assert read_image(tmp_path / "a.tif").rgb.shape == (3, 13, 19)


@pytest.mark.parametrize(
    ("suffix", "size", "mode", "profile", "message"),
    [
        (".webp", (16384, 2), "RGB", 0, "WEBP holds at most 16383 pixels a side, not 16384x2"),
        (".jpg", (2, 65501), "RGB", 0, "JPEG holds at most 65500 pixels a side, not 2x65501"),
        (".png", (2, 2), "RGB", 2**20 + 1, "PNG holds colour profiles of at most 1,048,576 bytes, not 1,048,577"),
        (".webp", (16383, 1), "RGB", 2**21, None),
        (".tif", (2, 2), "RGB", 2**21, None),
        (".png", (2, 2), "RGB", 2**20, None),
        (".png", (70000, 1), "L", 0, None),
        (".jpg", (65500, 1), "L", 0, None),
    ],
)
def test_limits_of_formats_are_checked_before_writing(suffix, size, mode, profile, message, tmp_path):
    image = Image.new(mode, size)
    if profile:
        image.info["icc_profile"] = np.random.default_rng(0).bytes(16) + b"RGB " + bytes(profile - 20)
    if message is not None:
        with pytest.raises(BinarizeError, match=message):
            save_image(image, tmp_path / f"a{suffix}")
        assert list(tmp_path.iterdir()) == []
        return
    save_image(image, tmp_path / f"a{suffix}")
    read = read_image(tmp_path / f"a{suffix}")
    assert read.rgb.shape == (3, *size[::-1])
    assert read.icc_profile == image.info.get("icc_profile")


def test_an_image_without_pixels() -> None:
    for size in ((0, 0), (3, 0), (0, 3)):
        with pytest.raises(BinarizeError, match="has no pixels"):
            to_image(Image.new("RGB", size))
