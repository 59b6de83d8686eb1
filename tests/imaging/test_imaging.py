"""Reading, decoding and writing images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from binarize.errors import BinarizeError
from binarize.imaging import (
    DecodedImage,
    image_size,
    list_images,
    read_image,
    save_image,
    to_image,
)


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
    bands = Image.getmodebands(mode)
    raw = rng.integers(0, 256, (*size[::-1], bands), dtype=np.uint8).tobytes()
    return Image.frombytes(mode, size, raw)


class TestDecodedImage:
    @pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_a_round_trip_changes_nothing(self, mode: str, suffix: str, tmp_path: Path) -> None:
        source = noise(mode)
        path = save_image(source, tmp_path / f"a{suffix}")
        image = read_image(path)
        assert image.mode == mode
        assert image.rgb.dtype == torch.float32
        assert image.rgb.shape == (3, 4, 6)
        assert (image.alpha is not None) == (mode in ("LA", "RGBA"))
        assert image.is_grey == (mode in ("L", "LA", "I;16"))
        assert torch.equal(image.pixels().float(), (image.rgb * 255).round())
        back = image.to_pil()
        assert back.mode == mode
        np.testing.assert_array_equal(np.array(back), np.array(source))

    def test_one_bit_becomes_greyscale(self, tmp_path: Path) -> None:
        save_image(noise("1"), tmp_path / "a.png")
        image = read_image(tmp_path / "a.png")
        assert image.mode == "1"
        assert set(image.rgb.unique().tolist()) == {0.0, 1.0}
        np.testing.assert_array_equal(np.array(image.to_pil()), np.array(noise("1")) * 255)

    def test_a_palette_with_transparency(self, tmp_path: Path) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 0])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
        image = read_image(tmp_path / "a.png")
        assert image.mode == "P"
        assert image.alpha is not None
        assert image.to_pil().mode == "RGBA"
        assert list(np.array(image.to_pil()).reshape(-1)) == [10, 20, 30, 0, 200, 100, 0, 128]

    def test_greyscale_with_one_transparent_level(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[7, 9]], np.uint8)).save(tmp_path / "a.png", transparency=7)
        back = read_image(tmp_path / "a.png").to_pil()
        assert back.mode == "LA"
        assert np.array(back).tolist() == [[[7, 0], [9, 255]]]

    def test_cmyk(self, tmp_path: Path) -> None:
        Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "a.tif")
        image = read_image(tmp_path / "a.tif")
        assert image.mode == "CMYK"
        assert image.rgb[:, 0, 0].tolist() == [1.0, 0.0, 0.0]
        assert image.to_pil().mode == "RGB"

    def test_cmyk_with_a_foreign_profile_still_reads(self, tmp_path: Path) -> None:
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for profile in (srgb, b"not a profile"):
            Image.new("CMYK", (2, 2), (0, 0, 0, 255)).save(tmp_path / "a.tif", icc_profile=profile)
            image = read_image(tmp_path / "a.tif")
            assert image.rgb.max() == 0
            assert image.icc_profile is None

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation_is_applied_once_and_dropped(self, orientation: int, tmp_path: Path) -> None:
        upright = np.array(noise("RGB", (3, 2)))
        # How a camera stores an upright scene under each tag (EXIF 2.3, 4.6.4 A): the inverse of the shown transform.
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: np.rot90(upright, 1),
            7: upright[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
        assert image_size(tmp_path / "a.png") == (2, 3)
        shown = read_image(tmp_path / "a.png").to_pil()
        np.testing.assert_array_equal(np.array(shown), upright)
        again = read_image(save_image(shown, tmp_path / "b.png"))
        np.testing.assert_array_equal(np.array(again.to_pil()), upright)
        assert 0x0112 not in opened(tmp_path / "b.png").getexif()

    def test_damaged_exif_is_ignored(self, tmp_path: Path) -> None:
        noise("RGB").save(tmp_path / "a.jpg", exif=b"Exif\x00\x00garbage")
        assert read_image(tmp_path / "a.jpg").rgb.shape == (3, 4, 6)
        assert image_size(tmp_path / "a.jpg") == (4, 6)

    def test_colour_profiles_are_kept_only_where_they_fit(self, tmp_path: Path) -> None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for mode, kept in (("RGB", profile), ("RGBA", profile), ("L", None)):
            noise(mode).save(tmp_path / "a.png", icc_profile=profile)
            image = read_image(tmp_path / "a.png")
            assert image.icc_profile == kept
            save_image(image, tmp_path / "b.png", force=True)
            assert opened(tmp_path / "b.png").info.get("icc_profile") == kept

    def test_new_pixels(self) -> None:
        image = to_image(noise("L"))
        grey = image.with_pixels(torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 2, 2), None).to_pil()
        assert grey.mode == "L"
        assert grey.size == (2, 2)
        assert grey.getpixel((0, 0)) == round(0.299 * 255)
        beyond = image.with_pixels(torch.full((3, 1, 1), 2.0), torch.full((1, 1, 1), -1.0)).to_pil()
        assert beyond.getpixel((0, 0)) == (255, 0)
        deep = to_image(noise("I;16"))
        assert deep.with_pixels(torch.rand(3, 2, 2), torch.rand(1, 2, 2)).to_pil().mode == "LA"
        with pytest.raises(BinarizeError, match=r"rgb must be \(3, H, W\), got \(1, 2, 2\)"):
            image.with_pixels(torch.zeros(1, 2, 2), None)
        with pytest.raises(BinarizeError, match=r"alpha must be \(1, 2, 2\), got \(1, 2, 3\)"):
            image.with_pixels(torch.zeros(3, 2, 2), torch.zeros(1, 2, 3))

    def test_integer_images(self) -> None:
        levels = np.array([[0, 300], [65535, 2]], np.int32)
        assert np.array(to_image(Image.fromarray(levels)).to_pil()).tolist() == levels.tolist()
        with pytest.raises(BinarizeError, match=r"must stay within 0..65535, got 0..70000"):
            to_image(Image.fromarray(np.array([[0, 70000]], np.int32)))


class TestReading:
    def write(self, path: Path, content: bytes) -> Path:
        path.write_bytes(content)
        return path

    def test_what_is_no_image(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        noise("RGB", (64, 64)).save(buffer, "PNG")
        png = buffer.getvalue()
        Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
        cases = {
            tmp_path / "missing.png": "no such file",
            tmp_path: "is a folder",
            self.write(tmp_path / "empty.png", b""): "is not an image that Pillow can read",
            self.write(tmp_path / "text.png", b"hello"): "is not an image that Pillow can read",
            self.write(tmp_path / "cut.png", png[: len(png) // 2]): "cannot decode|cannot be read",
            self.write(tmp_path / "stub.png", png[:20]): "is not an image|cannot be read",
            tmp_path / "float.tif": "mode 'F' are not supported",
        }
        for path, message in cases.items():
            with pytest.raises(BinarizeError, match=message) as caught:
                read_image(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_large_images(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        noise("RGB", (30, 20)).save(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
        assert read_image(tmp_path / "a.png").rgb.shape == (3, 20, 30)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
        with pytest.raises(BinarizeError, match=r"a\.png: Image size \(600 pixels\) exceeds.*MAX_IMAGE_PIXELS"):
            read_image(tmp_path / "a.png")

    def test_list_images(self, tmp_path: Path) -> None:
        with pytest.raises(BinarizeError, match=r"holds no images; looked for \.png"):
            list_images(tmp_path)
        for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt"):
            (tmp_path / name).touch()
        (tmp_path / "folder.png").mkdir()
        assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG"]
        with pytest.raises(BinarizeError, match="no such folder"):
            list_images(tmp_path / "missing")
        with pytest.raises(BinarizeError, match="is a file"):
            list_images(tmp_path / "a.jpg")


class TestWriting:
    @pytest.mark.parametrize(
        ("suffix", "name"), [(".png", "PNG"), (".JPG", "JPEG"), (".tiff", "TIFF"), (".webp", "WEBP"), (".bmp", "BMP")]
    )
    def test_the_suffix_decides(self, suffix: str, name: str, tmp_path: Path) -> None:
        path = save_image(noise("RGB"), tmp_path / f"a{suffix}")
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
        with pytest.raises(BinarizeError, match=message):
            save_image(noise(mode), tmp_path / name)
        assert list(tmp_path.iterdir()) == []

    def test_nothing_is_replaced_unasked(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(b"old")
        with pytest.raises(BinarizeError, match=r"a\.png: already exists"):
            save_image(noise("RGB"), path)
        assert path.read_bytes() == b"old"
        save_image(to_image(noise("RGB")), path, force=True)
        assert opened(path).size == (6, 4)
        (tmp_path / "folder.png").mkdir()
        with pytest.raises(BinarizeError, match="is a folder"):
            save_image(noise("RGB"), tmp_path / "folder.png", force=True)


def test_images_cannot_be_compared_by_accident() -> None:
    image = to_image(noise("RGB"))
    assert image == image
    assert image != DecodedImage(image.rgb, None, "RGB")
