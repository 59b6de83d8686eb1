"""The demonstration with a tiny budget, and its report, which must agree with the scores."""

import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from cli_case import run as run_cli
from PIL import Image

from binarize.demo import report, run
from binarize.errors import BinarizeError
from binarize.evaluation import ImageScores, Scores
from binarize.imaging import degrade
from binarize.models import SuperResolutionPipeline

NETWORK = ("model.base_channels=8", "model.channel_mults=[1,2]", "model.norm_groups=4", "num_inference_steps=1")
TINY = (*NETWORK, "train_batch_size=2", "max_train_steps=2", "lr_warmup_steps=1")


def scores(model: float, bicubic: float | None) -> ImageScores:
    return ImageScores("mean", Scores(model, 0.9), None if bicubic is None else Scores(bicubic, 0.9), 1.0)


@pytest.mark.parametrize(
    ("model", "bicubic", "text"),
    [
        (30.0, 29.0, "**1.00 dB above bicubic upscaling**: 30.00 dB against 29.00 dB"),
        (29.0, 30.5, "**1.50 dB below bicubic upscaling**: 29.00 dB against 30.50 dB"),
        (30.02, 30.0, "**level with bicubic upscaling**: 30.02 dB against 30.00 dB"),
        (29.98, 30.0, "**level with bicubic upscaling**"),
        (29.0, None, "The network reaches 29.00 dB."),
    ],
)
def test_the_verdict_agrees_with_the_scores(model: float, bicubic: float | None, text: str) -> None:
    assert text in report.verdict(scores(model, bicubic), 700)


def test_the_comparison_shows_the_given_pixels() -> None:
    rng = np.random.default_rng(0)
    large = [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(3)]
    low = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    left, top, right, bottom = detail = (8, 4, 38, 34)
    sheet = np.asarray(report.side_by_side([low, *large], scores(30, 29), detail))
    repeated = Image.fromarray(np.asarray(low).repeat(2, 0).repeat(2, 1))
    width, height = report.ZOOM * (right - left), report.ZOOM * (bottom - top)
    for index, panel in enumerate([repeated, *large]):
        at = report.MARGIN + index * (width + report.MARGIN)
        shown = sheet[report.MARGIN : report.MARGIN + height : report.ZOOM, at : at + width : report.ZOOM]
        assert np.array_equal(shown, np.asarray(panel)[top:bottom, left:right])


def test_missing_images_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for found, message in (
        (None, r"pip install 'binarize-diffusion\[eval\]'"),
        (SimpleNamespace(origin=str(tmp_path / "init")), f"this scikit-image lacks {run.TRAINING[0]}.*{run.HELD_OUT}"),
    ):
        monkeypatch.setattr(importlib.util, "find_spec", Mock(return_value=found))
        with pytest.raises(BinarizeError, match=message):
            run.image_folder()


def test_the_held_out_image_is_not_trained_on(tmp_path: Path) -> None:
    run.prepare_images(run.image_folder(), tmp_path, 2)
    assert run.HELD_OUT not in run.TRAINING
    assert {path.stem for path in (tmp_path / "training").iterdir()} == {Path(name).stem for name in run.TRAINING}
    held_out = np.asarray(Image.open(tmp_path / "held-out" / run.HELD_OUT))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "held-out-x2-small.png")), degrade(held_out, 2))
    width, height = run.CROP[2] - run.CROP[0], run.CROP[3] - run.CROP[1]
    assert held_out.shape == (height, width, 3)
    assert (run.DETAIL[2] <= width, run.DETAIL[3] <= height) == (True, True)


@pytest.mark.long
def test_the_demonstration_from_start_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_cached_backbone", lambda: None)
    lines: list[str] = []
    folder = tmp_path / "out"
    result = run.run_demo(folder, overrides=TINY, say=lines.append, progress=False)
    assert [line[:3] for line in lines] == ["1/3", "2/3", "3/3"]
    mean = result.scores.mean
    assert mean.bicubic is not None
    assert mean.bicubic.psnr == pytest.approx(31.66, abs=0.01)
    text = result.report.read_text(encoding="utf-8")
    assert report.verdict(mean, 2) in text
    assert f"{mean.model.psnr:.2f}" in text
    assert "LPIPS is omitted" in text
    with Image.open(result.upscaled) as upscaled, Image.open(folder / "images" / "held-out" / run.HELD_OUT) as hr:
        assert upscaled.size == hr.size
    with Image.open(result.comparison) as comparison:
        assert comparison.size[0] > 4 * 2 * (run.DETAIL[2] - run.DETAIL[0])
    assert SuperResolutionPipeline.from_pretrained(result.model).scale == 2
    assert dataclasses.asdict(result)["folder"] == folder

    with pytest.raises(BinarizeError, match="holds a demonstration; choose another folder, or --force"):
        run.run_demo(folder, overrides=TINY, say=lines.append, progress=False)
    command = run_cli("demo", *TINY, "--output", folder, "--force")  # the same again, with a log in plain lines
    assert command.exit_code == 0, command.output
    assert not set(command.output) & set("\r\x1b")
    assert len(command.output.splitlines()) < 20
    assert f"{mean.model.psnr:.2f}" in command.stdout


@pytest.mark.long
def test_a_sixth_of_its_steps_are_above_bicubic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_cached_backbone", lambda: None)
    mean = run.run_demo(tmp_path, overrides=["max_train_steps=100"], say=lambda line: None, progress=False).scores.mean
    assert mean.bicubic is not None
    assert mean.model.psnr > mean.bicubic.psnr + 0.5
    assert mean.model.ssim > mean.bicubic.ssim
