"""The demonstration, with a tiny budget; and its report, which must say what the figures say."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from binarize.demo import report as _demo_report
from binarize.demo import run as demo
from binarize.errors import BinarizeError
from binarize.evaluation import ImageScores, Scores
from binarize.imaging import degrade
from binarize.models import SuperResolutionPipeline

TINY = (
    "model.base_channels=8",
    "model.channel_mults=[1,2]",
    "model.norm_groups=4",
    "train_batch_size=2",
    "max_train_steps=2",
    "lr_warmup_steps=1",
    "num_inference_steps=1",
)


def scores(model: float, bicubic: float | None) -> ImageScores:
    return ImageScores("mean", Scores(model, 0.9), None if bicubic is None else Scores(bicubic, 0.9), 1.0)


@pytest.mark.parametrize(
    ("model", "bicubic", "words"),
    [
        (30.0, 29.0, "**1.00 dB above bicubic enlargement**: 30.00 dB against 29.00 dB"),
        (29.0, 30.5, "**1.50 dB below bicubic enlargement**: 29.00 dB against 30.50 dB"),
        (30.02, 30.0, "**level with bicubic enlargement**: 30.02 dB against 30.00 dB"),
        (29.98, 30.0, "**level with bicubic enlargement**"),
        (29.0, None, "The network reaches 29.00 dB."),
    ],
)
def test_the_verdict_is_the_arithmetic(model: float, bicubic: float | None, words: str) -> None:
    assert words in _demo_report.verdict(scores(model, bicubic), 700)


def test_the_comparison_shows_the_pixels_that_it_was_given() -> None:
    rng = np.random.default_rng(0)
    large = [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(3)]
    low = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    left, top, right, bottom = detail = (8, 4, 38, 34)
    sheet = np.asarray(_demo_report.side_by_side(_demo_report.Comparison(low, *large, scores(30, 29)), detail))
    repeated = Image.fromarray(np.asarray(low).repeat(2, 0).repeat(2, 1))
    margin, zoom = _demo_report._MARGIN, _demo_report._ZOOM
    width, height = zoom * (right - left), zoom * (bottom - top)
    for index, panel in enumerate([repeated, *large]):
        at = margin + index * (width + margin)
        shown = sheet[margin : margin + height : zoom, at : at + width : zoom]
        assert np.array_equal(shown, np.asarray(panel)[top:bottom, left:right])


def test_pictures_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found(origin: str | None) -> Any:
        return lambda name: None if origin is None else SimpleNamespace(origin=origin)

    monkeypatch.setattr(importlib.util, "find_spec", found(None))
    with pytest.raises(BinarizeError, match=r"pip install 'binarize-diffusion\[eval\]'"):
        demo.image_folder()
    monkeypatch.setattr(importlib.util, "find_spec", found(str(tmp_path / "__init__.py")))
    with pytest.raises(BinarizeError, match=f"comes without {demo.TRAINING[0]}.*{demo.HELD_OUT}"):
        demo.image_folder()


def test_the_held_out_picture_is_not_trained_on(tmp_path: Path) -> None:
    demo.prepare_images(demo.image_folder(), tmp_path, 2)
    assert demo.HELD_OUT not in demo.TRAINING
    training = {path.stem for path in (tmp_path / "training").iterdir()}
    assert training == {Path(name).stem for name in demo.TRAINING}
    held_out = np.asarray(Image.open(tmp_path / "held-out" / demo.HELD_OUT))
    small = np.asarray(Image.open(tmp_path / "held-out-x2-small.png"))
    assert np.array_equal(small, degrade(held_out, 2))
    width, height = demo.PART[2] - demo.PART[0], demo.PART[3] - demo.PART[1]
    assert held_out.shape == (height, width, 3)
    assert demo.DETAIL[2] <= width
    assert demo.DETAIL[3] <= height


@pytest.mark.slow
def test_the_demonstration_from_start_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_cached_backbone", lambda: None)
    said: list[str] = []
    folder = tmp_path / "out"
    result = demo.run_demo(folder, overrides=TINY, say=said.append, progress=False)

    assert [line[:3] for line in said] == ["1/3", "2/3", "3/3"]
    mean = result.scores.mean
    assert mean.bicubic is not None
    assert mean.bicubic.psnr == pytest.approx(31.66, abs=0.01)
    text = result.report.read_text(encoding="utf-8")
    assert _demo_report.verdict(mean, 2) in text
    assert f"{mean.model.psnr:.2f}" in text
    assert "LPIPS is left out" in text
    with Image.open(result.enlarged) as enlarged, Image.open(folder / "pictures" / "held-out" / demo.HELD_OUT) as hr:
        assert enlarged.size == hr.size
    with Image.open(result.comparison) as comparison:
        assert comparison.size[0] > 4 * 2 * (demo.DETAIL[2] - demo.DETAIL[0])
    assert SuperResolutionPipeline.from_pretrained(result.model).scale == 2
    assert dataclasses.asdict(result)["folder"] == folder

    with pytest.raises(BinarizeError, match="holds a demonstration; choose another folder, or --force"):
        demo.run_demo(folder, overrides=TINY, say=said.append, progress=False)
    again = demo.run_demo(folder, overrides=TINY, force=True, say=said.append, progress=False)
    assert again.scores.mean.model == mean.model


@pytest.mark.slow
def test_a_sixth_of_its_steps_are_above_bicubic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_cached_backbone", lambda: None)
    mean = demo.run_demo(tmp_path, overrides=["max_train_steps=100"], say=lambda line: None, progress=False).scores.mean
    assert mean.bicubic is not None
    assert mean.model.psnr > mean.bicubic.psnr + 0.5
    assert mean.model.ssim > mean.bicubic.ssim
