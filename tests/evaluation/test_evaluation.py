"""Evaluation: PSNR, SSIM and LPIPS against formulas and published results, and reports."""

import csv
import io
import json
import math
import os
import re
import sys
import urllib.request
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from errors_case import assert_error
from PIL import Image
from rich.console import Console
from scipy.ndimage import convolve1d

from binarize.errors import BinarizeError
from binarize.evaluation import EvaluationReport, ImageScores, Lpips, LpipsUnavailable, Scores, evaluate
from binarize.evaluation.quality import luma, psnr, ssim
from binarize.imaging import ImagePairs, upscale_bicubic
from binarize.recipes import load_degradation

SHARED = Path(os.environ.get("BINARIZE_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
SET5 = SHARED / "data" / "Set5"
BACKBONE = SHARED / "metrics" / "squeeze.backbone.pth"
needs_set5 = pytest.mark.skipif(not SET5.is_dir(), reason="the Set5 images are not on this machine")
needs_backbone = pytest.mark.skipif(not BACKBONE.is_file(), reason="SqueezeNet's weights are not on this machine")


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def bicubic(scale: int):
    """An ``upscale`` that is the baseline."""
    return lambda lr: Image.fromarray(upscale_bicubic(np.array(lr), scale))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "hr"
    root.mkdir()
    for number, (height, width) in enumerate([(48, 60), (64, 44)]):
        rows, columns = np.mgrid[:height, :width]
        waves = [128 + 100 * np.sin(rows / (4 + band) + number) * np.cos(columns / (5 + band)) for band in range(3)]
        Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(root / f"p{number}.png")
    return root


class TestQuality:
    def test_luma_of_the_primaries(self) -> None:
        # ITU-R BT.601: black 16, white 235, and MATLAB's coefficients for the primaries.
        colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
        expected = torch.tensor([16, 235, 81.481, 144.553, 40.966], dtype=torch.float64)
        torch.testing.assert_close(luma(colours.T[:, None])[0], expected, atol=1e-9, rtol=0)

    def test_psnr_of_a_constant_difference(self) -> None:
        dark, light = torch.full((3, 20, 20), 100, dtype=torch.uint8), torch.full((3, 20, 20), 110, dtype=torch.uint8)
        assert psnr(dark, light) == pytest.approx(20 * math.log10(255 / (10 * 219 / 255)), abs=1e-9)
        assert psnr(dark, dark) == math.inf

    def test_the_border_is_not_seen(self) -> None:
        reference = noise(30, 40)
        result = reference.clone()
        result[:, :4] = 0
        result[:, :, -4:] = 255
        assert psnr(result, reference, border=4) == math.inf
        assert ssim(result, reference, border=4) == pytest.approx(1)
        assert psnr(result, reference, border=3) < 40

    def test_ssim_equals_the_formula_over_whole_windows(self) -> None:
        first, second = noise(25, 31), noise(25, 31, seed=1)
        kernel = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
        kernel /= kernel.sum()

        def blur(values: np.ndarray) -> np.ndarray:
            return convolve1d(convolve1d(values, kernel, axis=0), kernel, axis=1)[5:-5, 5:-5]

        x, y = luma(first).numpy(), luma(second).numpy()
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
        assert ssim(first, second) == pytest.approx(values.mean(), abs=1e-10)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: luma(torch.zeros(3, 4, 4)), r"expected uint8 pixels \(3, H, W\), got torch.float32 \(3, 4, 4\)"),
            (lambda: psnr(noise(4, 4), noise(4, 5)), r"differ in shape: \(3, 4, 4\) and \(3, 4, 5\)"),
            (lambda: psnr(noise(8, 8), noise(8, 8), border=4), "8x8 pixels has fewer than 1x1 inside a border of 4"),
            (lambda: psnr(noise(8, 8), noise(8, 8), border=-1), "border of -1"),
            (lambda: ssim(noise(12, 30), noise(12, 30), border=1), "fewer than 11x11 inside a border of 1"),
        ],
    )
    def test_errors(self, call, message: str) -> None:
        assert_error(message, call)

    def test_without_the_packages(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lpips", None)
        (note,) = evaluate(bicubic(2), folder, scale=2, progress=False).notes
        assert note == "LPIPS is left out. LPIPS needs the lpips package: pip install 'binarize-diffusion[eval]'"
        monkeypatch.setitem(sys.modules, "skimage.metrics", None)
        for call in (lambda: ssim(noise(20, 20), noise(20, 20)), lambda: evaluate(bicubic(2), folder, scale=2)):
            assert_error(r"scikit-image: pip install 'binarize-diffusion\[eval\]'", call)


class TestPublishedResults:
    @needs_set5
    @pytest.mark.parametrize(("scale", "decibels", "similarity"), [(2, 33.67, 0.9303), (4, 28.43, 0.8111)])
    def test_bicubic_on_set5(self, scale: int, decibels: float, similarity: float) -> None:
        data = (SET5 / "HR", SET5 / "LR_bicubic")
        report = evaluate(bicubic(scale), data, scale=scale, lpips=None, progress=False)
        assert (round(report.mean.model.psnr, 2), round(report.mean.model.ssim, 4)) == (decibels, similarity)
        assert report.mean.model == report.mean.bicubic
        made = evaluate(bicubic(scale), SET5 / "HR", scale=scale, lpips=None, progress=False)
        assert [row.model for row in made.rows] == [row.model for row in report.rows]


class TestLpips:
    @needs_backbone
    def test_the_known_value(self) -> None:
        distance = Lpips("squeeze", backbone=BACKBONE)
        assert distance.label == "LPIPS (squeeze)"
        torch.manual_seed(123)
        first, second = (torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2))
        assert distance._model(first, second).mean().item() == pytest.approx(0.1008, abs=5e-5)
        # The public function takes one 8-bit image at a time.
        levels = [((batch + 1) * 127.5).round().byte() for batch in (first, second)]
        each = [distance(one, two) for one, two in zip(*levels, strict=True)]
        assert np.mean(each) == pytest.approx(0.1008, abs=2e-4)
        assert distance(levels[0][0], levels[0][0]) == 0

    def backbone(self) -> dict[str, torch.Tensor]:
        from torchvision import models

        torch.manual_seed(0)
        return models.squeezenet1_1(weights=None).state_dict()

    def test_a_whole_torchvision_file_and_the_hub_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = self.backbone()
        features = {key.removeprefix("features."): value for key, value in whole.items() if key.startswith("features.")}
        checkpoints = tmp_path / "hub" / "checkpoints"
        checkpoints.mkdir(parents=True)
        torch.save(whole, checkpoints / "squeezenet1_1-b8a52dc0.pth")
        torch.save(features, tmp_path / "features.pth")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(urllib.request, "urlopen", None)
        state = torch.random.get_rng_state()
        values = {
            Lpips("squeeze", backbone=path)(noise(40, 40), noise(40, 40, seed=1))
            for path in (None, tmp_path / "features.pth", checkpoints / "squeezenet1_1-b8a52dc0.pth")
        }
        assert len(values) == 1
        assert torch.equal(state, torch.random.get_rng_state())

    def test_without_a_network(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[str, float]] = []

        def unreachable(request: urllib.request.Request, timeout: float) -> None:
            asked.append((request.full_url, timeout))
            raise URLError("no route")

        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(urllib.request, "urlopen", unreachable)
        with pytest.raises(LpipsUnavailable, match="could not be downloaded") as caught:
            Lpips("vgg")
        assert "\n" not in str(caught.value)
        report = evaluate(bicubic(2), folder, scale=2, progress=False)
        assert report.lpips is None
        (note,) = report.notes
        assert note.startswith("LPIPS is left out. LPIPS (alex): the backbone could not be downloaded")
        assert re.search(r"https://\S+/alexnet-owt-7be5be79\.pth", note)
        assert str(tmp_path / "cache" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth") in note
        assert note in report.to_markdown()
        assert [(Path(url).name, timeout) for url, timeout in asked[1:]] == [("alexnet-owt-7be5be79.pth", 5.0)]

    def test_errors(self, tmp_path: Path) -> None:
        (tmp_path / "text.pth").write_text("hello")
        narrow = {key: value[:1] for key, value in self.backbone().items()}
        for name, content in (("list", [1, 2]), ("squeeze", self.backbone()), ("narrow", narrow)):
            torch.save(content, tmp_path / f"{name}.pth")
        for net, name, message in (
            ("squeze", "none", r"unknown LPIPS backbone 'squeze'; choose alex, .*Did you mean 'squeeze'"),
            ("alex", "none", r"none\.pth: no such LPIPS backbone file"),
            ("alex", "text", r"text\.pth: is not a torch file of weights"),
            ("alex", "list", r"list\.pth: holds no state dict"),
            ("vgg", "squeeze", r"squeeze\.pth: is not the backbone of this LPIPS; it has no '2\.weight'"),
            ("squeeze", "narrow", "its weights have other shapes"),
        ):
            assert_error(message, Lpips, net, backbone=tmp_path / f"{name}.pth")
        distance = Lpips("squeeze", backbone=tmp_path / "squeeze.pth")
        with pytest.raises(BinarizeError, match=r"LPIPS \(squeeze\): needs at least 17 pixels per side, got 40x16"):
            distance(noise(16, 40), noise(16, 40))
        assert_error(r"one size, got \(3, 20, 20\) and \(3, 20, 21\)", distance, noise(20, 20), noise(20, 21))


class TestEvaluate:
    @needs_backbone
    def test_a_perfect_model_and_the_baseline(self, folder: Path) -> None:
        originals = iter([pair.hr for pair in ImagePairs(folder, scale=4)])
        options = {"lpips": "squeeze", "lpips_backbone": BACKBONE, "progress": False}
        report = evaluate(lambda lr: next(originals), folder, scale=4, **options)
        assert [row.image for row in report.rows] == ["p0", "p1"]
        assert report.border == 4
        mean = report.mean
        assert mean.model == Scores(math.inf, pytest.approx(1), 0)
        assert mean.bicubic.lpips > 0
        assert mean.bicubic.psnr < 60
        assert json.loads(report.to_json())["mean"]["model"] == {"PSNR": None, "SSIM": 1.0, "LPIPS (squeeze)": 0.0}

    def test_every_kind_of_result_gives_the_same(self, folder: Path) -> None:
        def tensor(pixels: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(pixels).permute(2, 0, 1)

        for kind in (Image.fromarray, np.asarray, tensor, lambda pixels: tensor(pixels)[None]):
            upscale = lambda lr, kind=kind: kind(upscale_bicubic(np.array(lr), 2))  # noqa: E731
            for row in evaluate(upscale, folder, scale=2, lpips=None, progress=False).rows:
                assert row.model == row.bicubic
                assert row.seconds > 0

    def test_options(self, folder: Path) -> None:
        report = evaluate(bicubic(2), folder, scale=2, lpips=None, limit=1, border=0, baseline=False, progress=False)
        assert (len(report.rows), report.border) == (1, 0)
        assert report.mean.bicubic is None
        assert "bicubic" not in report.to_json() + report.to_csv() + report.to_markdown()
        assert len(evaluate(bicubic(2), folder, scale=2, lpips=None, limit=9, progress=False).rows) == 2

    def test_degraded_images(self, folder: Path, tmp_path: Path) -> None:
        options = {"scale": 2, "lpips": None, "progress": False}
        degradation = load_degradation("[{reduce: box}, {gaussian_noise: 8}, {jpeg: 60}]")
        seen: list[np.ndarray] = []
        upscale = lambda lr: seen.append(np.array(lr)) or bicubic(2)(lr)  # noqa: E731
        report = evaluate(upscale, folder, degradation=degradation, **options)
        assert report.mean.model == report.mean.bicubic
        assert report.mean.model.psnr < evaluate(bicubic(2), folder, **options).mean.model.psnr - 1
        assert "made by [{reduce: {" in report.to_markdown()
        evaluate(upscale, folder, degradation=degradation, limit=1, **options)
        np.testing.assert_array_equal(seen[0], seen[2])
        assert_error("has no effect on given", evaluate, upscale, (folder, folder), degradation=degradation, **options)

    @pytest.mark.parametrize(
        ("result", "options", "message"),
        [
            (None, {"limit": 0}, "limit must be at least 1, got 0"),
            (None, {"border": -1}, "border must be"),
            (noise(24, 30), {}, r"upscale returned \(3, 24, 30\) for 'p0', expected \(3, 48, 60\)"),
            (None, {}, "must return a PIL image, a uint8 array or a uint8 tensor, got NoneType"),
            (np.zeros((48, 60, 3)), {}, "got ndarray of float64"),
            (torch.zeros(2, 3, 48, 60, dtype=torch.uint8), {}, r"returned \(2, 3, 48, 60\)"),
        ],
    )
    def test_errors(self, result, options, message: str, folder: Path) -> None:
        assert_error(message, evaluate, lambda lr: result, folder, scale=2, lpips=None, progress=False, **options)

    def test_bad_data_is_found_before_upscaling(self, folder: Path) -> None:
        never = mock.Mock(side_effect=AssertionError("upscaled something"))
        Image.new("RGB", (18, 13)).save(folder / "tiny.png")
        with pytest.raises(BinarizeError, match=r"tiny\.png: is 18x12 pixels; the metrics need 15x15 with a border of"):
            evaluate(never, folder, scale=2, lpips=None)
        (folder / "tiny.png").unlink()
        path = folder / "p1.png"
        path.write_bytes(path.read_bytes()[:-200])
        assert_error(r"p1\.png: cannot", evaluate, never, folder, scale=2, lpips=None)


class TestReport:
    @pytest.fixture
    def report(self) -> EvaluationReport:
        first = ImageScores("a|b", Scores(30.0, 0.9, 0.1), Scores(28.5, 0.8, 0.3), 1.5)
        second = ImageScores("c,d", Scores(32.0, 0.95, 0.2), Scores(29.5, 0.85, 0.4), 0.5)
        return EvaluationReport(
            (first, second), scale=2, border=2, lpips="squeeze", name="ours", notes=("something is missing",)
        )

    def test_json_and_the_mean(self, report: EvaluationReport) -> None:
        content = json.loads(report.to_json())
        assert content["pictures"][0] == {
            "picture": "a|b",
            "seconds": 1.5,
            "model": {"PSNR": 30.0, "SSIM": 0.9, "LPIPS (squeeze)": 0.1},
            "bicubic": {"PSNR": 28.5, "SSIM": 0.8, "LPIPS (squeeze)": 0.3},
        }
        mean = content.pop("mean")
        assert mean["model"] == pytest.approx({"PSNR": 31.0, "SSIM": 0.925, "LPIPS (squeeze)": 0.15})
        assert mean["bicubic"] == pytest.approx({"PSNR": 29.0, "SSIM": 0.825, "LPIPS (squeeze)": 0.35})
        assert mean["seconds"] == 1.0
        assert [*content.values()][:4] == ["ours", 2, 2, ["something is missing"]]

    def test_tables(self, report: EvaluationReport) -> None:
        rows = list(csv.reader(io.StringIO(report.to_csv())))
        heading = "picture,PSNR,SSIM,LPIPS (squeeze),bicubic PSNR,bicubic SSIM,bicubic LPIPS (squeeze),seconds"
        assert rows[0] == heading.split(",")
        assert (rows[2], rows[3][0]) == (["c,d", "32.0", "0.95", "0.2", "29.5", "0.85", "0.4", "0.5"], "mean")
        lines = report.to_markdown().splitlines()
        assert lines[0] == "ours, x2: PSNR and SSIM on Y, 2 pixels cut off each side."
        assert lines[4] == r"| a\|b | 30.00 | 0.9000 | 0.1000 | 28.50 | 0.8000 | 0.3000 |"
        assert lines[6].startswith("| **mean** | **31.00** | **0.9250** |")
        assert lines[-1] == "Note: something is missing."
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(report)
        text = console.export_text()
        for part in ("a|b", "31.00", "0.9250", "LPIPS (squeeze)", "bicubic PSNR", "something is missing."):
            assert part in text

    def test_save(self, report: EvaluationReport, tmp_path: Path) -> None:
        target = tmp_path / "new" / "folder"
        paths = report.save(target)
        assert [path.name for path in paths] == ["evaluation.json", "evaluation.csv", "evaluation.md"]
        assert [path.read_text() for path in paths] == [report.to_json(), report.to_csv(), report.to_markdown()]
        paths[0].unlink()
        assert_error(r"evaluation\.csv: already exists", report.save, target)
        assert not paths[0].exists()
        report.save(target, force=True)
        assert len(list(target.iterdir())) == 3
        assert_error(r"evaluation\.md: cannot create the folder", report.save, paths[2])
