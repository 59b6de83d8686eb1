"""Blur, resizing, noise and compression, against closed forms, scipy and Pillow."""

import io
import math

import numpy as np
import pytest
import torch
from errors_case import assert_error
from PIL import Image
from scipy.ndimage import gaussian_filter

from binarize.imaging.degradation import (
    FILTERS,
    blur_kernel,
    compress,
    convolve,
    gaussian_noise,
    poisson_noise,
    resize,
    sinc_kernel,
)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """A coloured 8-bit image (3, 23, 30) in [0, 1] with detail of all sizes."""
    levels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(levels).resize((30, 23), Image.Resampling.BICUBIC), np.int64)
    rough = (smooth + np.random.default_rng(1).integers(-20, 21, smooth.shape)).clip(0, 255)
    return torch.from_numpy(rough).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.2])
def test_a_gaussian_blur_is_that_of_scipy(image: torch.Tensor, sigma: float) -> None:
    ours = convolve(image, blur_kernel((sigma, sigma)))
    reach = blur_kernel((sigma, sigma)).shape[-1] // 2
    theirs = [gaussian_filter(plane.double().numpy(), sigma, radius=reach, mode="reflect") for plane in image]
    np.testing.assert_allclose(ours.numpy(), np.stack(theirs), atol=1e-6)


@pytest.mark.parametrize(("sigmas", "angle"), [((1.5, 1.5), 0.0), ((2.0, 1.2), 0.0), ((2.0, 1.2), 0.7)])
def test_the_covariance_of_a_gaussian_kernel_is_the_given_one(sigmas: tuple[float, float], angle: float) -> None:
    kernel = blur_kernel(sigmas, angle)
    axis = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
    x, y = axis.expand_as(kernel), axis[:, None].expand_as(kernel)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    expected = turn @ torch.diag(torch.tensor(sigmas, dtype=torch.float64).square()) @ turn.T
    found = torch.stack([torch.stack([(kernel * a * b).sum() for b in (x, y)]) for a in (x, y)])
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert kernel.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("sigma", [3.0, 5.0, 20.0])
def test_a_wide_gaussian_kernel_has_its_width(sigma: float) -> None:
    kernel = blur_kernel((sigma, sigma))
    axis = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
    assert math.sqrt(kernel.sum(0) @ axis.square()) == pytest.approx(sigma, rel=0.02)
    assert len(blur_kernel((2.8, 2.8))) == 21  # the widest of the preset `photo` at x4


def test_other_kernels_have_their_profiles() -> None:
    for options, profile in (
        ({"beta": 0.5}, lambda r: math.exp(-r / 4)),
        ({"beta": 2.0}, lambda r: math.exp(-((r / 2) ** 4) / 2)),
        ({"beta": 1.5, "plateau": True}, lambda r: 1 / (1 + (r / 2) ** 3)),
    ):
        kernel = blur_kernel((2.0, 2.0), **options)  # type: ignore[arg-type]
        centre = len(kernel) // 2
        for step in (1, 3, 5):
            found = float(kernel[centre, centre + step] / kernel[centre, centre])
            assert found == pytest.approx(profile(step)), (options, step)


def test_sinc_keeps_low_frequencies_and_removes_high_ones() -> None:
    response = torch.fft.fft2(sinc_kernel(1.5), s=(64, 64)).abs()
    for index in range(33):
        frequency = 2 * math.pi * index / 64
        if abs(frequency - 1.5) > 0.45:  # the transition of 21 taps
            assert float(response[0, index]) == pytest.approx(float(frequency < 1.5), abs=0.18)
    edge = torch.zeros(1, 21, 60)
    edge[..., 30:] = 1
    assert 1.03 < convolve(edge, sinc_kernel(1.5)).max() < 1.2  # it rings


@pytest.mark.parametrize("name", FILTERS)
def test_resizing_is_that_of_pillow(image: torch.Tensor, name: str) -> None:
    levels = (image * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.fromarray(levels).resize((13, 11), FILTERS[name]), dtype=np.float64)
    ours = resize(image, (11, 13), name).permute(1, 2, 0).double().numpy() * 255
    assert np.abs(ours.clip(0, 255) - theirs).max() < 1.2  # Pillow rounds after each axis


def test_box_is_the_mean_of_each_block(image: torch.Tensor) -> None:
    expected = torch.nn.functional.avg_pool2d(image[None, :, :22], 2)[0]
    torch.testing.assert_close(resize(image[:, :22].contiguous(), (11, 15), "box"), expected)


def test_the_noise_has_the_given_strength() -> None:
    flat, rng = torch.full((3, 100, 100), 0.5), np.random.default_rng(0)
    noise = (gaussian_noise(flat, 5.0, rng) - flat) * 255
    assert noise.std().item() == pytest.approx(5, rel=0.03)
    assert torch.corrcoef(noise.flatten(1))[0, 1].abs() < 0.05
    grey = gaussian_noise(flat, 5.0, rng, grey=True)
    assert (grey == grey[:1]).all()
    counted = poisson_noise(flat, 400.0, rng)
    assert counted.mean().item() == pytest.approx(0.5, abs=0.002)
    assert counted.std().item() == pytest.approx(math.sqrt(0.5 / 400), rel=0.03)
    assert not torch.equal(counted[0], counted[1])
    colour = torch.tensor([0.9, 0.5, 0.1])[:, None, None].expand(3, 100, 100)
    same = poisson_noise(colour, 400.0, rng, grey=True) - colour
    torch.testing.assert_close(same, same[:1].expand_as(same))
    light = 0.299 * 0.9 + 0.587 * 0.5 + 0.114 * 0.1
    assert same.std().item() == pytest.approx(math.sqrt(light / 400), rel=0.05)


@pytest.mark.parametrize(
    ("form", "options"), [("JPEG", {"quality": 60, "subsampling": "4:4:4"}), ("WEBP", {"quality": 60})]
)
def test_compressing_is_writing_and_reading_a_file(image: torch.Tensor, form: str, options: dict[str, object]) -> None:
    levels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, form, **options)
    theirs = np.asarray(Image.open(file).convert("RGB"))
    ours = (compress(image, form, **options) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != levels).any()


def test_too_large_for_a_format() -> None:
    assert_error("cannot compress 16384x1 pixels as WEBP", compress, torch.zeros(3, 1, 16384), "WEBP", quality=80)
