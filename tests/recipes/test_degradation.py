"""The degradation of a recipe: its forms, its mistakes, and what it makes of images."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from errors_case import assert_error

from binarize.imaging.degradation import compress, resize
from binarize.recipes import Degradation, load_degradation, load_recipe
from binarize.recipes.degradation import PRESETS

JPEG = "[{reduce: box}, {jpeg: 75}]"


@pytest.fixture(scope="module")
def hr() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (1, 3, 8, 10), generator=generator, dtype=torch.uint8).float()
    large = torch.nn.functional.interpolate(small, scale_factor=6.5, mode="bilinear")
    return large[0].round().to(torch.uint8)  # (3, 52, 65)


def make(value: Any, hr: torch.Tensor, scale: int = 2, *, seed: int = 0, index: int = 0) -> torch.Tensor:
    degrader = load_degradation(value).seeded(seed)
    assert degrader is not None
    return degrader(hr, scale, index)


def test_steps_are_applied_in_order(hr: torch.Tensor) -> None:
    reduced = resize(hr[:, :, :64].float() / 255, (26, 32), "box").clamp(0, 1)
    expected = (compress(reduced, "JPEG", quality=75, subsampling="4:2:0") * 255).round().to(torch.uint8)
    assert torch.equal(make(JPEG, hr), expected)
    early = compress(hr[:, :, :64].float() / 255, "JPEG", quality=75, subsampling="4:2:0")
    other = make("[{jpeg: 75}, {reduce: box}]", hr)
    assert torch.equal(other, (resize(early, (26, 32), "box") * 255 + 0.5).floor().to(torch.uint8))


def test_short_and_long_forms_are_the_same() -> None:
    long = [{"reduce": {"filters": ["box"]}}, {"jpeg": {"quality": [75, 75], "subsampling": "4:2:0", "share": 1}}]
    assert load_degradation(long) == load_degradation(JPEG)
    assert load_degradation("photo") == load_degradation(PRESETS["photo"])
    assert load_degradation(load_degradation("photo")) == load_degradation("photo")
    assert load_degradation("bicubic") == Degradation()
    assert load_degradation("bicubic").seeded(0) is None
    assert load_degradation("bicubic").to_text() == "bicubic"
    assert load_degradation(JPEG).to_text().startswith("[{reduce: {share: 1.0, filters: [box]}}, {jpeg: ")


def test_a_written_recipe_reads_back_and_names_every_step(tmp_path: Path) -> None:
    for value in ("photo", JPEG, "bicubic"):
        recipe = load_recipe("demo", [f"degradation={value}"])
        path = tmp_path / "mine.yaml"
        path.write_text(recipe.to_yaml())
        assert load_recipe(path).degradation == recipe.degradation
    assert "degradation: bicubic\n" in load_recipe("demo").to_yaml()
    assert "jpeg:" in load_recipe("photo_x2").to_yaml()


def test_random_steps_are_a_function_of_seed_and_index(hr: torch.Tensor) -> None:
    degrader = load_degradation("photo").seeded(3)
    assert degrader is not None
    copy = pickle.loads(pickle.dumps(degrader))
    results = [degrader(hr, 2, index) for index in range(12)]
    for index in reversed(range(12)):
        assert torch.equal(results[index], copy(hr, 2, index))
        assert (results[index].shape, results[index].dtype) == ((3, 26, 32), torch.uint8)
    assert len({result.numpy().tobytes() for result in results}) == 12
    assert not torch.equal(results[0], make("photo", hr, seed=4))
    assert not torch.equal(results[0], results[0].flip(-1))


@pytest.mark.parametrize("scale", [2, 4])
def test_the_preset_keeps_place_and_colour(scale: int) -> None:
    ramp = torch.linspace(40, 215, 96)
    hr = torch.stack([ramp.expand(96, 96), ramp[:, None].expand(96, 96), torch.full((96, 96), 90.0)]).to(torch.uint8)
    expected = torch.nn.functional.avg_pool2d(hr.float(), scale)
    degraded = torch.stack([make("photo", hr, scale, index=index).float() for index in range(60)])
    # The mean over many noises; blur and the filters' tails reach a few pixels from the mirrored border.
    difference = (degraded.mean(0) - expected)[:, 3:-3, 3:-3]
    assert difference.abs().mean() < 1
    assert difference.flatten(1).mean(1).abs().max() < 0.7


def test_shares_are_those_of_samples(hr: torch.Tensor) -> None:
    plain = make("[{reduce: box}]", hr)
    steps = "[{reduce: box}, {gaussian_noise: {sigma: 20, share: 0.25}}]"
    changed = sum(not torch.equal(make(steps, hr, index=index), plain) for index in range(200))
    assert 30 <= changed <= 70  # 50 expected, standard deviation 6.1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "phto",
            r"degradation: got 'phto'; must be one of bicubic, photo, or a list of steps\. Did you mean 'photo'\?",
        ),
        ("[{jpeg: 75}]", r"degradation: must have `reduce` once, .*has it 0 times"),
        ("[{reduce: box}, {reduce: box}]", r"has it 2 times"),
        ("[{reduce: box}, {resize: 2}]", r"degradation: has `resize` after `reduce`"),
        ("[{reduce: {filters: box, share: 0.5}}]", r"degradation\.0\.reduce\.share: got 0\.5"),
        ("[{jpg: 75}, {reduce: box}]", r"degradation\.0\.jpg: unknown key\. Did you mean 'jpeg'\?"),
        ("[{jpeg: {qualty: 75}}]", r"degradation\.0\.jpeg\.qualty: unknown key\. Did you mean 'quality'\?"),
        ("[{jpeg: 0}, {reduce: box}]", r"degradation\.0\.jpeg\.quality\.0: got 0; must be greater than or equal to 1"),
        ("[{jpeg: [90, 60]}, {reduce: box}]", r"degradation\.0\.jpeg\.quality: must be \[lowest, highest\]"),
        ("[{jpeg: 75, reduce: box}]", r"degradation\.0: must be one step, such as .*steps: blur, sinc"),
        ("[{}]", r"degradation\.0: must be one step"),
        ("[{jpeg: null}]", r"degradation\.0: must be one step"),
        ("[{reduce: nearest}]", r"degradation\.0\.reduce\.filters\.0: got 'nearest'; must be 'box'"),
        ("[{blur: 0}, {reduce: box}]", r"degradation\.0\.blur\.sigma\.0: got 0; must be greater than 0"),
        ("[{blur: 6}, {reduce: box}]", r"degradation\.0\.blur\.sigma\.0: got 6; must be less than or equal to 5"),
        ("[{jpeg: true}]", r"degradation\.0\.jpeg\.quality: got True; must be a number, or \[lowest, highest\]"),
        ("[{resize: true}]", r"degradation\.0\.resize\.factor: got True; must be a number"),
        ("[{blur: {sigma: [1, true]}}]", r"degradation\.0\.blur\.sigma: must be a number, or \[lowest, highest\]"),
        ("[{sinc: 4}, {reduce: box}]", r"degradation\.0\.sinc\.cutoff\.0: got 4"),
        ("5", r"degradation: got 5"),
        ("[a", r"the degradation is not valid YAML"),
    ],
)
def test_mistakes(value: str, message: str) -> None:
    assert_error(message, load_degradation, value)


def test_given_low_resolution_images_are_not_degraded() -> None:
    overrides = ["train_data_dir=x", "train_lr_data_dir=y", "degradation=photo"]
    assert_error(
        "degradation: got .photo.; has no effect on the images of train_lr_data_dir", load_recipe, "demo", overrides
    )
