from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms

from binarize.errors import BinarizeError
from binarize.imaging import (
    DecodedImage,
    degrade,
    image_size,
    list_images,
    read_image,
    save_image,
    to_image,
    upscale_bicubic,
)

SHARED = Path(os.environ.get("BINARIZE_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
SET5 = SHARED / "data" / "Set5"
needs_set5 = pytest.mark.skipif(not SET5.is_dir(), reason="the Set5 pictures are not on this machine")
NAMES = ("baby", "bird", "butterfly", "head", "woman")


def opened(path: Path) -> Image.Image:
    """Pillow's image of a file, with the file closed again; ``format`` and ``info`` stay readable."""
    with Image.open(path) as image:
        image.load()
        return image


def cubic(x: float) -> float:
    """Keys' kernel with a = -1/2, as two polynomials."""
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def matlab_axis(line: np.ndarray, out: int, scale: float) -> np.ndarray:
    """MATLAB's contributions, sample by sample: 1-based centres, a kernel widened when shrinking, mirrored indices."""
    size = len(line)
    stretch = min(scale, 1.0)
    width = 4 / stretch
    result = np.zeros(out)
    for position in range(1, out + 1):
        centre = position / scale + 0.5 * (1 - 1 / scale)
        left = math.floor(centre - width / 2)
        taps = range(left, left + math.ceil(width) + 2)
        weights = np.array([stretch * cubic(stretch * (centre - tap)) for tap in taps])
        weights /= weights.sum()
        mirror = list(range(size)) + list(range(size - 1, -1, -1))
        values = np.array([line[mirror[(tap - 1) % (2 * size)]] for tap in taps], dtype=np.float64)
        result[position - 1] = (weights * values).sum()
    return result


def matlab_resize(image: np.ndarray, scale: float, *, to_8_bits: bool) -> np.ndarray:
    """Oracle for one plane; ``to_8_bits`` rounds after each axis, ties up (freed of float64's noise)."""
    out_height, out_width = (math.ceil(round(side * scale, 6)) for side in image.shape)

    def settle(values: np.ndarray) -> np.ndarray:
        return np.clip(np.floor(np.round(values, 9) + 0.5), 0, 255) if to_8_bits else values

    rows = settle(np.stack([matlab_axis(column, out_height, scale) for column in image.T], 1))
    return settle(np.stack([matlab_axis(row, out_width, scale) for row in rows], 0))


class TestResize:
    @needs_set5
    @pytest.mark.parametrize("scale", [2, 4])
    @pytest.mark.parametrize("name", NAMES)
    def test_degradation_equals_matlabs_files(self, name: str, scale: int) -> None:
        hr = np.array(opened(SET5 / "HR" / f"{name}.png").convert("RGB"))
        lr = np.asarray(opened(SET5 / "LR_bicubic" / f"X{scale}" / f"{name}x{scale}.png").convert("RGB"))
        assert np.count_nonzero(degrade(hr, scale) != lr) == 0
        tensor = degrade(torch.from_numpy(hr).permute(2, 0, 1)[None], scale)
        assert np.count_nonzero(tensor[0].permute(1, 2, 0).numpy() != lr) == 0

    @settings(max_examples=25, deadline=None)
    @given(data=st.data(), scale=st.sampled_from([1, 2, 3, 4]))
    def test_degrade_equals_an_independent_oracle(self, data: st.DataObject, scale: int) -> None:
        sides = st.integers(scale, 4 * scale + 3)
        image = data.draw(hnp.arrays(np.uint8, st.tuples(sides, sides)))
        cropped = image[: image.shape[0] // scale * scale, : image.shape[1] // scale * scale]
        np.testing.assert_array_equal(degrade(image, scale), matlab_resize(cropped, 1 / scale, to_8_bits=True))

    @settings(max_examples=25, deadline=None)
    @given(
        image=hnp.arrays(np.uint8, st.tuples(st.integers(1, 7), st.integers(1, 7))),
        scale=st.sampled_from([1, 2, 3, 4]),
    )
    def test_enlarge_equals_an_independent_oracle(self, image: np.ndarray, scale: int) -> None:
        np.testing.assert_array_equal(upscale_bicubic(image, scale), matlab_resize(image, scale, to_8_bits=True))
        smooth = matlab_resize(image / 255, scale, to_8_bits=False)
        exact = upscale_bicubic(torch.from_numpy(image / 255)[None, None], scale)[0, 0]
        np.testing.assert_allclose(exact.numpy(), smooth.clip(0, 1), atol=1e-12)
        single = upscale_bicubic(torch.from_numpy(image / 255).float()[None, None], scale)[0, 0]
        assert single.dtype == torch.float32
        np.testing.assert_allclose(single.numpy(), smooth.clip(0, 1), atol=2e-6)

    @pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("level", [0, 1, 128, 255])
    def test_a_constant_picture_stays_constant(self, scale: int, level: int) -> None:
        small = np.full((5, 3, 3), level, np.uint8)
        large = upscale_bicubic(small, scale)
        assert large.shape == (5 * scale, 3 * scale, 3)
        assert (large == level).all()
        assert (degrade(large, scale) == small).all()

    @pytest.mark.parametrize("scale", [2, 3, 4])
    def test_a_ramp_stays_a_ramp_inside(self, scale: int) -> None:
        ramp = torch.arange(12, dtype=torch.float64).div(16).expand(1, 1, 8, 12)
        large = upscale_bicubic(ramp, scale)[0, 0, 0]
        position = (torch.arange(12 * scale, dtype=torch.float64) + 0.5) / scale - 0.5
        inside = slice(2 * scale, -2 * scale)
        torch.testing.assert_close(large[inside], position[inside] / 16, atol=1e-12, rtol=0)

    def test_one_pixel(self) -> None:
        assert (upscale_bicubic(np.full((1, 1), 77, np.uint8), 4) == 77).all()
        assert degrade(np.full((1, 1), 77, np.uint8), 1).item() == 77
        assert upscale_bicubic(torch.full((1, 3, 1, 1), 0.25), 4).eq(0.25).all()

    def test_degrade_crops_to_a_multiple_at_the_end(self) -> None:
        image = np.random.default_rng(0).integers(0, 256, (23, 18, 3), dtype=np.uint8)
        np.testing.assert_array_equal(degrade(image, 4), degrade(image[:20, :16], 4))

    @pytest.mark.parametrize("scale", [2, 3, 4])
    def test_enlarging_a_crop_equals_cropping_the_enlargement(self, scale: int) -> None:
        lr = torch.rand(1, 3, 60, 50, generator=torch.Generator().manual_seed(0))
        whole = upscale_bicubic(lr, scale)[..., 22 * scale : 38 * scale, 12 * scale : 32 * scale]
        crop = upscale_bicubic(lr[..., 20:40, 10:34], scale)[..., 2 * scale : -2 * scale, 2 * scale : -2 * scale]
        assert torch.equal(whole, crop)

    def test_kinds_agree_and_inputs_stay(self) -> None:
        image = np.random.default_rng(1).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        before = image.copy()
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        for resize in (degrade, upscale_bicubic):
            array = resize(image, 2)
            assert isinstance(array, np.ndarray)
            assert array.dtype == np.uint8
            np.testing.assert_array_equal(array, resize(tensor, 2).permute(1, 2, 0).numpy())
            np.testing.assert_array_equal(array[..., 1], resize(image[..., 1], 2))
        np.testing.assert_array_equal(image, before)
        half = upscale_bicubic(torch.rand(1, 1, 4, 4).bfloat16(), 2)
        assert half.dtype == torch.bfloat16

    def test_the_result_is_clamped(self) -> None:
        step = torch.zeros(1, 1, 1, 8)
        step[..., 4:] = 1
        assert upscale_bicubic(step, 4).min() == 0
        assert upscale_bicubic(step, 4).max() == 1

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (
                lambda: degrade(np.zeros((4, 4), np.float32), 2),
                "degrade: expected uint8 pixels.*got ndarray of float32",
            ),
            (lambda: degrade(torch.zeros(3, 4, 4), 2), "degrade: expected uint8 pixels.*float32"),
            (
                lambda: upscale_bicubic(np.zeros((4, 4), np.float32), 2),
                r"upscale_bicubic: expected .*floating-point tensor in \[0, 1\]",
            ),
            (lambda: degrade(np.zeros((0, 4), np.uint8), 2), "degrade: expected uint8"),
            (lambda: degrade(np.zeros((3, 9), np.uint8), 4), "9x3 pixels is smaller than the scale 4"),
            (lambda: upscale_bicubic(torch.zeros(3), 2), r"upscale_bicubic: expected a tensor \(..., C, H, W\)"),
            (lambda: degrade(np.zeros((4, 4), np.uint8), 2.5), "scale must be a whole number of at least 1, got 2.5"),  # type: ignore[type-var]
            (lambda: upscale_bicubic(np.zeros((4, 4), np.uint8), 0), "at least 1, got 0"),
            (lambda: upscale_bicubic(torch.zeros(1, 1, 4, 4), True), "at least 1, got True"),
        ],
    )
    def test_errors(self, call, message: str) -> None:
        with pytest.raises(BinarizeError, match=message):
            call()


def noise(mode: str, size: tuple[int, int] = (6, 4)) -> Image.Image:
    rng = np.random.default_rng(5)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, size[::-1]).astype(np.uint16))
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, size[::-1]).astype(bool))
    bands = Image.getmodebands(mode)
    raw = rng.integers(0, 256, (*size[::-1], bands), dtype=np.uint8).tobytes()
    return Image.frombytes(mode, size, raw)


class TestPicture:
    @pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_a_round_trip_changes_nothing(self, mode: str, suffix: str, tmp_path: Path) -> None:
        source = noise(mode)
        path = save_image(source, tmp_path / f"a{suffix}")
        picture = read_image(path)
        assert picture.mode == mode
        assert picture.rgb.dtype == torch.float32
        assert picture.rgb.shape == (3, 4, 6)
        assert (picture.alpha is not None) == (mode in ("LA", "RGBA"))
        assert picture.is_grey == (mode in ("L", "LA", "I;16"))
        assert torch.equal(picture.pixels().float(), (picture.rgb * 255).round())
        back = picture.to_pil()
        assert back.mode == mode
        np.testing.assert_array_equal(np.array(back), np.array(source))

    def test_one_bit_becomes_greyscale(self, tmp_path: Path) -> None:
        save_image(noise("1"), tmp_path / "a.png")
        picture = read_image(tmp_path / "a.png")
        assert picture.mode == "1"
        assert set(picture.rgb.unique().tolist()) == {0.0, 1.0}
        np.testing.assert_array_equal(np.array(picture.to_pil()), np.array(noise("1")) * 255)

    def test_a_palette_with_transparency(self, tmp_path: Path) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 0])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
        picture = read_image(tmp_path / "a.png")
        assert picture.mode == "P"
        assert picture.alpha is not None
        assert picture.to_pil().mode == "RGBA"
        assert list(np.array(picture.to_pil()).reshape(-1)) == [10, 20, 30, 0, 200, 100, 0, 128]

    def test_greyscale_with_one_transparent_level(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[7, 9]], np.uint8)).save(tmp_path / "a.png", transparency=7)
        back = read_image(tmp_path / "a.png").to_pil()
        assert back.mode == "LA"
        assert np.array(back).tolist() == [[[7, 0], [9, 255]]]

    def test_cmyk(self, tmp_path: Path) -> None:
        Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "a.tif")
        picture = read_image(tmp_path / "a.tif")
        assert picture.mode == "CMYK"
        assert picture.rgb[:, 0, 0].tolist() == [1.0, 0.0, 0.0]
        assert picture.to_pil().mode == "RGB"

    def test_cmyk_with_a_foreign_profile_still_reads(self, tmp_path: Path) -> None:
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for profile in (srgb, b"not a profile"):
            Image.new("CMYK", (2, 2), (0, 0, 0, 255)).save(tmp_path / "a.tif", icc_profile=profile)
            picture = read_image(tmp_path / "a.tif")
            assert picture.rgb.max() == 0
            assert picture.icc_profile is None

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
            picture = read_image(tmp_path / "a.png")
            assert picture.icc_profile == kept
            save_image(picture, tmp_path / "b.png", force=True)
            assert opened(tmp_path / "b.png").info.get("icc_profile") == kept

    def test_new_pixels(self) -> None:
        picture = to_image(noise("L"))
        grey = picture.with_pixels(torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 2, 2), None).to_pil()
        assert grey.mode == "L"
        assert grey.size == (2, 2)
        assert grey.getpixel((0, 0)) == round(0.299 * 255)
        beyond = picture.with_pixels(torch.full((3, 1, 1), 2.0), torch.full((1, 1, 1), -1.0)).to_pil()
        assert beyond.getpixel((0, 0)) == (255, 0)
        deep = to_image(noise("I;16"))
        assert deep.with_pixels(torch.rand(3, 2, 2), torch.rand(1, 2, 2)).to_pil().mode == "LA"
        with pytest.raises(BinarizeError, match=r"rgb must be \(3, H, W\), got \(1, 2, 2\)"):
            picture.with_pixels(torch.zeros(1, 2, 2), None)
        with pytest.raises(BinarizeError, match=r"alpha must be \(1, 2, 2\), got \(1, 2, 3\)"):
            picture.with_pixels(torch.zeros(3, 2, 2), torch.zeros(1, 2, 3))

    def test_integer_pictures(self) -> None:
        levels = np.array([[0, 300], [65535, 2]], np.int32)
        assert np.array(to_image(Image.fromarray(levels)).to_pil()).tolist() == levels.tolist()
        with pytest.raises(BinarizeError, match=r"must stay within 0..65535, got 0..70000"):
            to_image(Image.fromarray(np.array([[0, 70000]], np.int32)))


class TestReading:
    def write(self, path: Path, content: bytes) -> Path:
        path.write_bytes(content)
        return path

    def test_what_is_no_picture(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        noise("RGB", (64, 64)).save(buffer, "PNG")
        png = buffer.getvalue()
        Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
        cases = {
            tmp_path / "missing.png": "no such file",
            tmp_path: "is a folder",
            self.write(tmp_path / "empty.png", b""): "is not a picture that Pillow can read",
            self.write(tmp_path / "text.png", b"hello"): "is not a picture that Pillow can read",
            self.write(tmp_path / "cut.png", png[: len(png) // 2]): "cannot decode|cannot be read",
            self.write(tmp_path / "stub.png", png[:20]): "is not a picture|cannot be read",
            tmp_path / "float.tif": "mode 'F' are not supported",
        }
        for path, message in cases.items():
            with pytest.raises(BinarizeError, match=message) as caught:
                read_image(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_large_pictures(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        noise("RGB", (30, 20)).save(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
        assert read_image(tmp_path / "a.png").rgb.shape == (3, 20, 30)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
        with pytest.raises(BinarizeError, match=r"a\.png: Image size \(600 pixels\) exceeds.*MAX_IMAGE_PIXELS"):
            read_image(tmp_path / "a.png")

    def test_list_pictures(self, tmp_path: Path) -> None:
        with pytest.raises(BinarizeError, match=r"holds no pictures; looked for \.png"):
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
            ("RGB", "a", "cannot write pictures with the suffix ''"),
            ("RGBA", "a.jpg", "JPEG cannot hold a picture of mode 'RGBA'; use .png or .tif"),
            ("I;16", "a.webp", "WEBP cannot hold a picture of mode 'I;16'"),
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


def test_pictures_cannot_be_compared_by_accident() -> None:
    picture = to_image(noise("RGB"))
    assert picture == picture
    assert picture != DecodedImage(picture.rgb, None, "RGB")
