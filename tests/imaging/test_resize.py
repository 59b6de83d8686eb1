"""MATLAB's resizing, against its published files and an independent implementation."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from binarize.errors import BinarizeError
from binarize.imaging import degrade, upscale_bicubic

SHARED = Path(os.environ.get("BINARIZE_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
SET5 = SHARED / "data" / "Set5"
needs_set5 = pytest.mark.skipif(not SET5.is_dir(), reason="the Set5 images are not on this machine")
NAMES = ("baby", "bird", "butterfly", "head", "woman")


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

    def to_levels(values: np.ndarray) -> np.ndarray:
        return np.clip(np.floor(np.round(values, 9) + 0.5), 0, 255) if to_8_bits else values

    rows = to_levels(np.stack([matlab_axis(column, out_height, scale) for column in image.T], 1))
    return to_levels(np.stack([matlab_axis(row, out_width, scale) for row in rows], 0))


@needs_set5
@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_degradation_equals_matlabs_files(name: str, scale: int) -> None:
    hr = np.array(Image.open(SET5 / "HR" / f"{name}.png").convert("RGB"))
    lr = np.asarray(Image.open(SET5 / "LR_bicubic" / f"X{scale}" / f"{name}x{scale}.png").convert("RGB"))
    assert np.count_nonzero(degrade(hr, scale) != lr) == 0
    tensor = degrade(torch.from_numpy(hr).permute(2, 0, 1)[None], scale)
    assert np.count_nonzero(tensor[0].permute(1, 2, 0).numpy() != lr) == 0


@settings(max_examples=25, deadline=None)
@given(data=st.data(), scale=st.sampled_from([1, 2, 3, 4]))
def test_degrade_equals_an_independent_oracle(data: st.DataObject, scale: int) -> None:
    sides = st.integers(scale, 4 * scale + 3)
    image = data.draw(hnp.arrays(np.uint8, st.tuples(sides, sides)))
    cropped = image[: image.shape[0] // scale * scale, : image.shape[1] // scale * scale]
    np.testing.assert_array_equal(degrade(image, scale), matlab_resize(cropped, 1 / scale, to_8_bits=True))


@settings(max_examples=25, deadline=None)
@given(image=hnp.arrays(np.uint8, st.tuples(*[st.integers(1, 7)] * 2)), scale=st.sampled_from([1, 2, 3, 4]))
def test_upscale_bicubic_equals_an_independent_oracle(image: np.ndarray, scale: int) -> None:
    np.testing.assert_array_equal(upscale_bicubic(image, scale), matlab_resize(image, scale, to_8_bits=True))
    smooth = matlab_resize(image / 255, scale, to_8_bits=False)
    exact = upscale_bicubic(torch.from_numpy(image / 255)[None, None], scale)[0, 0]
    np.testing.assert_allclose(exact.numpy(), smooth.clip(0, 1), atol=1e-12)
    single = upscale_bicubic(torch.from_numpy(image / 255).float()[None, None], scale)[0, 0]
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), smooth.clip(0, 1), atol=2e-6)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_a_constant_image_stays_constant(scale: int, level: int) -> None:
    small = np.full((5, 3, 3), level, np.uint8)
    large = upscale_bicubic(small, scale)
    assert large.shape == (5 * scale, 3 * scale, 3)
    assert (large == level).all()
    assert (degrade(large, scale) == small).all()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_ramp_stays_a_ramp_inside(scale: int) -> None:
    large = upscale_bicubic(torch.arange(12, dtype=torch.float64).div(16).expand(1, 1, 8, 12), scale)[0, 0, 0]
    position = (torch.arange(12 * scale, dtype=torch.float64) + 0.5) / scale - 0.5
    inside = slice(2 * scale, -2 * scale)
    torch.testing.assert_close(large[inside], position[inside] / 16, atol=1e-12, rtol=0)


def test_borders() -> None:
    assert (upscale_bicubic(np.full((1, 1), 77, np.uint8), 4) == 77).all()
    assert degrade(np.full((1, 1), 77, np.uint8), 1).item() == 77
    assert upscale_bicubic(torch.full((1, 3, 1, 1), 0.25), 4).eq(0.25).all()
    image = np.random.default_rng(0).integers(0, 256, (23, 18, 3), dtype=np.uint8)
    np.testing.assert_array_equal(degrade(image, 4), degrade(image[:20, :16], 4))
    step = (torch.arange(8) >= 4).float().view(1, 1, 1, 8)  # overshoots are clamped
    assert upscale_bicubic(step, 4).aminmax() == (0, 1)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_upscaling_a_crop_equals_cropping_the_result(scale: int) -> None:
    lr = torch.rand(1, 3, 60, 50, generator=torch.Generator().manual_seed(0))
    whole = upscale_bicubic(lr, scale)[..., 22 * scale : 38 * scale, 12 * scale : 32 * scale]
    crop = upscale_bicubic(lr[..., 20:40, 10:34], scale)[..., 2 * scale : -2 * scale, 2 * scale : -2 * scale]
    assert torch.equal(whole, crop)


def test_kinds_agree_and_inputs_stay() -> None:
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
    assert upscale_bicubic(torch.rand(1, 1, 4, 4).bfloat16(), 2).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("resize", "image", "scale", "message"),
    [
        (degrade, np.zeros((4, 4), np.float32), 2, "degrade: expected uint8 pixels.*got ndarray of float32"),
        (degrade, torch.zeros(3, 4, 4), 2, "degrade: expected uint8 pixels.*float32"),
        (upscale_bicubic, np.zeros((4, 4), np.float32), 2, r"upscale_bicubic: .*floating-point tensor in \[0, 1\]"),
        (degrade, np.zeros((0, 4), np.uint8), 2, "degrade: expected uint8"),
        (degrade, np.zeros((3, 9), np.uint8), 4, "9x3 pixels is smaller than the scale 4"),
        (upscale_bicubic, torch.zeros(3), 2, r"upscale_bicubic: expected a tensor \(..., C, H, W\)"),
        (degrade, np.zeros((4, 4), np.uint8), 2.5, "scale must be a whole number of at least 1, got 2.5"),
        (upscale_bicubic, np.zeros((4, 4), np.uint8), 0, "at least 1, got 0"),
        (upscale_bicubic, torch.zeros(1, 1, 4, 4), True, "at least 1, got True"),
    ],
)
def test_errors(resize: Any, image: Any, scale: Any, message: str) -> None:
    with pytest.raises(BinarizeError, match=message):
        resize(image, scale)
