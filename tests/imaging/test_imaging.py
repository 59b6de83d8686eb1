"""Reading, decoding and writing images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from errors_case import assert_error
from PIL import Image, ImageCms

from binarize.errors import BinarizeError
from binarize.imaging import DecodedImage, image_size, list_images, read_image, save_image, to_image


def opened(path: Path) -> Image.Image:
    """Pillow's image of a file, with the file closed again; ``format`` and ``info`` stay readable."""
    with Image.open(path) as image:
        image.load()
        return image


def noise(mode: str, size: tuple[int, int] = (6, 4)) -> Image.Image:
    rng = np.random.default_rng(5)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, size[::-1]).astype(np.uint16))
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, size[::-1]).astype(bool))
    raw = rng.integers(0, 256, (*size[::-1], Image.getmodebands(mode)), dtype=np.uint8).tobytes()
    return Image.frombytes(mode, size, raw)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


class TestDecodedImage:
    @pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_a_round_trip_changes_nothing(self, mode: str, suffix: str, tmp_path: Path) -> None:
        source = noise(mode)
        image = read_image(save_image(source, tmp_path / f"a{suffix}"))
        assert (image.mode, image.rgb.dtype, image.rgb.shape) == (mode, torch.float32, (3, 4, 6))
        assert (image.alpha is not None) == (mode in ("LA", "RGBA"))
        assert image.is_grey == (mode in ("L", "LA", "I;16"))
        assert torch.equal(image.pixels().float(), (image.rgb * 255).round())
        assert image.to_pil().mode == mode
        np.testing.assert_array_equal(np.array(image.to_pil()), np.array(source))

    @pytest.mark.parametrize(
        ("mode", "levels", "options", "written", "expected"),
        [
            ("1", [True, False], {}, "L", [255, 0]),
            ("P", [0, 1], {"transparency": bytes([0, 128])}, "RGBA", [10, 20, 30, 0, 200, 100, 0, 128]),
            ("L", [7, 9], {"transparency": 7}, "LA", [7, 0, 9, 255]),
            ("CMYK", [(0, 255, 255, 0), (0, 0, 0, 255)], {}, "RGB", [255, 0, 0, 0, 0, 0]),
            ("CMYK", [(0, 0, 0, 255), (0, 0, 0, 0)], {"icc_profile": SRGB}, "RGB", [0, 0, 0, 255, 255, 255]),
            ("CMYK", [(0, 0, 0, 255), (0, 0, 0, 0)], {"icc_profile": b"none"}, "RGB", [0, 0, 0, 255, 255, 255]),
        ],
    )
    def test_other_modes(self, mode, levels, options, written, expected, tmp_path):
        source = Image.new(mode, (2, 1))
        if mode == "P":
            source.putpalette([10, 20, 30, 200, 100, 0])
        source.putdata(levels)
        path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
        source.save(path, **options)
        image = read_image(path)
        assert (image.mode, image.icc_profile, image.to_pil().mode) == (mode, None, written)
        assert np.array(image.to_pil()).ravel().tolist() == expected

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation_is_applied_once_and_dropped(self, orientation: int, tmp_path: Path) -> None:
        upright = np.array(noise("RGB", (3, 2)))
        # How a camera stores an upright scene under each tag (EXIF 2.3, 4.6.4 A): the inverse of the shown transform.
        turned, mirrored = upright[::-1, ::-1], upright.transpose(1, 0, 2)
        stored = [
            upright, upright[:, ::-1], turned, upright[::-1],
            mirrored, np.rot90(upright, 1), turned.transpose(1, 0, 2), np.rot90(upright, -1),
        ][orientation - 1]  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
        assert image_size(tmp_path / "a.png") == (2, 3)
        shown = read_image(tmp_path / "a.png").to_pil()
        np.testing.assert_array_equal(np.array(shown), upright)
        np.testing.assert_array_equal(np.array(read_image(save_image(shown, tmp_path / "b.png")).to_pil()), upright)
        assert 0x0112 not in opened(tmp_path / "b.png").getexif()

    def test_damaged_exif_is_ignored(self, tmp_path: Path) -> None:
        noise("RGB").save(tmp_path / "a.jpg", exif=b"Exif\x00\x00garbage")
        assert read_image(tmp_path / "a.jpg").rgb.shape == (3, 4, 6)
        assert image_size(tmp_path / "a.jpg") == (4, 6)

    def test_colour_profiles_are_kept_only_where_they_fit(self, tmp_path: Path) -> None:
        for mode, kept in (("RGB", SRGB), ("RGBA", SRGB), ("L", None)):
            noise(mode).save(tmp_path / "a.png", icc_profile=SRGB)
            image = read_image(tmp_path / "a.png")
            assert image.icc_profile == kept
            save_image(image, tmp_path / "b.png", force=True)
            assert opened(tmp_path / "b.png").info.get("icc_profile") == kept

    def test_new_pixels(self) -> None:
        image = to_image(noise("L"))
        grey = image.with_pixels(torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 2, 2), None).to_pil()
        assert (grey.mode, grey.size, grey.getpixel((0, 0))) == ("L", (2, 2), round(0.299 * 255))
        beyond = image.with_pixels(torch.full((3, 1, 1), 2.0), torch.full((1, 1, 1), -1.0)).to_pil()
        assert beyond.getpixel((0, 0)) == (255, 0)
        assert to_image(noise("I;16")).with_pixels(torch.rand(3, 2, 2), torch.rand(1, 2, 2)).to_pil().mode == "LA"
        assert_error(r"rgb must be \(3, H, W\), got \(1, 2, 2\)", image.with_pixels, torch.zeros(1, 2, 2), None)
        with pytest.raises(BinarizeError, match=r"alpha must be \(1, 2, 2\), got \(1, 2, 3\)"):
            image.with_pixels(torch.zeros(3, 2, 2), torch.zeros(1, 2, 3))

    def test_integer_images(self) -> None:
        levels = np.array([[0, 300], [65535, 2]], np.int32)
        assert np.array(to_image(Image.fromarray(levels)).to_pil()).tolist() == levels.tolist()
        with pytest.raises(BinarizeError, match=r"must stay within 0..65535, got 0..70000"):
            to_image(Image.fromarray(np.array([[0, 70000]], np.int32)))


class TestReading:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("missing.png", None, "no such file"),
            (".", None, "is a folder"),
            ("empty.png", slice(0), "is not an image that Pillow can read"),
            ("text.png", b"hello", "is not an image that Pillow can read"),
            ("cut.png", slice(6000), "cannot decode|cannot be read"),
            ("stub.png", slice(20), "is not an image|cannot be read"),
            ("float.tif", None, "mode 'F' are not supported"),
        ],
    )
    def test_what_is_no_image(self, name: str, content: Any, message: str, tmp_path: Path) -> None:
        noise("RGB", (64, 64)).save(tmp_path / "whole.png")
        Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
        if content is not None:
            cut = (tmp_path / "whole.png").read_bytes()[content] if isinstance(content, slice) else content
            (tmp_path / name).write_bytes(cut)
        with pytest.raises(BinarizeError, match=message) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_large_images(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        noise("RGB", (30, 20)).save(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
        assert read_image(tmp_path / "a.png").rgb.shape == (3, 20, 30)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
        assert_error(r"a\.png: Image size \(600 pixels\) exceeds.*MAX_IMAGE_PIXELS", read_image, tmp_path / "a.png")

    def test_list_images(self, tmp_path: Path) -> None:
        assert_error(r"holds no images; looked for \.png", list_images, tmp_path)
        for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt"):
            (tmp_path / name).touch()
        (tmp_path / "folder.png").mkdir()
        assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG"]
        for name, message in (("missing", "no such folder"), ("a.jpg", "is a file")):
            assert_error(message, list_images, tmp_path / name)


class TestWriting:
    @pytest.mark.parametrize("suffix", [".png", ".JPEG", ".tiff", ".webp", ".bmp"])
    def test_the_suffix_decides(self, suffix: str, tmp_path: Path) -> None:
        path, name = save_image(noise("RGB"), tmp_path / f"a{suffix}"), suffix[1:].upper()
        assert opened(path).format == name
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
        if name != "JPEG":
            np.testing.assert_array_equal(np.array(opened(path)), np.array(noise("RGB")))

    @pytest.mark.parametrize(
        ("mode", "name", "message"),
        [
            ("RGB", "a.pngg", r"suffix '\.pngg'; use one of .*Did you mean '\.png'\?"),
            ("RGB", "a", "cannot write images with the suffix ''"),
            ("RGBA", "a.jpg", "JPEG cannot hold an image of mode 'RGBA'; use .png or .tif"),
            ("I;16", "a.webp", "WEBP cannot hold an image of mode 'I;16'"),
            ("RGB", "nowhere/a.png", "nowhere does not exist; create it first"),
        ],
    )
    def test_refusals_leave_nothing(self, mode: str, name: str, message: str, tmp_path: Path) -> None:
        assert_error(message, save_image, noise(mode), tmp_path / name)
        assert list(tmp_path.iterdir()) == []

    def test_nothing_is_replaced_unasked(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(b"old")
        assert_error(r"a\.png: already exists", save_image, noise("RGB"), path)
        assert path.read_bytes() == b"old"
        save_image(to_image(noise("RGB")), path, force=True)
        assert opened(path).size == (6, 4)


def test_images_cannot_be_compared_by_accident() -> None:
    image = to_image(noise("RGB"))
    assert image == image
    assert image != DecodedImage(image.rgb, None, "RGB")
