"""Numbers out of range, on the command line and in a model's index: refused before any work, with the range."""

import shutil
from pathlib import Path

import pytest
import torch
from abuse_case import assert_refused, forked
from cli_case import edit_json, fails, make_image
from PIL import Image

from binarize.errors import BinarizeError
from binarize.imaging import limits
from binarize.models import SRUNet, SuperResolutionPipeline, memory
from binarize.models.tiling import tile_grid

DIGITS = "9" * 5000
ODD = [
    "-1",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e9",
    "",
    "x",
    "0x10",
    "١٢٣x",
    "9" * 25,
    "-" + "9" * 25,
    DIGITS,
    "2\n3",
    "None",
]
OPTIONS = {
    "--seed": [str(2**63), str(2**64), str(-(2**63))],
    "--steps": ["0", "100001", str(2**31), str(2**63)],
    "--scale": ["0", "65", "1000", str(2**31)],
    "--tile": [str(2**20 + 1), str(2**63)],
    "--overlap": [str(2**20 + 1), str(2**63)],
    "--max-pixels": ["0"],
}


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, own in OPTIONS.items() for v in [*own, *ODD]])
def test_options_of_upscale(model: Path, small: Path, tmp_path: Path, option: str, value: str) -> None:
    scale = ("--model", model / "unet") if option == "--scale" else ("--model", model)
    result = assert_refused(["upscale", small, tmp_path / "a.png", *scale, f"{option}={value}"], tmp_path)
    assert result.status == 2, result
    assert len(result.err) < 400, result


@pytest.mark.parametrize("option", ["--seed", "--steps", "--scale", "--tile", "--overlap", "--limit"])
@pytest.mark.parametrize("value", ["-1", "x", DIGITS, "1e3"])
def test_options_of_evaluate(model: Path, photos: Path, tmp_path: Path, option: str, value: str) -> None:
    assert_refused(["evaluate", model, "--data", photos, f"{option}={value}"], tmp_path)


@pytest.mark.parametrize(
    "size",
    [
        "8000000000x8000000000",
        "65537x8",
        "8x65537",
        f"{DIGITS}x8",
        "0x8",
        "-8x8",
        "8",
        "x",
        "8x8x8",
        "8.0x8",
        "1e3x1e3",
        "8×-8",
    ],
)
def test_the_size_of_a_summary(tmp_path: Path, size: str) -> None:
    assert_refused(
        ["summary", "demo", f"--size={size}"], tmp_path, "must be height and width in pixels, from 1 to 65536"
    )


@pytest.mark.parametrize("scale", [0, -1, 65, 1000, 10**6, 2**31, 2**63, 2**70, 1.5, "2", None, True, [2], {}, 1e400])
def test_the_scale_in_an_index(model: Path, small: Path, tmp_path: Path, scale: object) -> None:
    own = shutil.copytree(model, tmp_path / "own")
    edit_json(own / "model_index.json", scale=scale)
    assert_refused(["upscale", small, tmp_path / "a.png", "--model", own], tmp_path, "scale")


@pytest.mark.parametrize(("scale", "side"), [(64, 40), (64, 65), (4, 800)])
def test_a_result_of_a_small_file_is_limited(model: Path, tmp_path: Path, scale: int, side: int) -> None:
    Image.new("L", (side, side)).save(tmp_path / "a.png")
    alone = shutil.copytree(model / "unet", tmp_path / "alone")
    given = ["upscale", tmp_path / "a.png", tmp_path / "b.png", "--model", alone, "--scale", str(scale)]
    if (scale * side) ** 2 > 2**23:
        assert_refused(given, tmp_path, f"add --max-pixels {(scale * side) ** 2} to allow it")
    assert_refused([*given, "--max-pixels", "99"], tmp_path, "is more than the 99 pixels allowed; add --max-pixels")


def test_work_that_does_not_fit_into_memory_is_refused(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "available_memory", lambda: 400_000.0)  # enough to decode the images
    message = fails("upscale", photos, tmp_path / "out", "--model", model)
    assert "upscaling to 96x80 pixels needs about" in message
    assert "use tiles (tile=256, --tile 256) or a smaller image" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("megabytes", [30, 60, 120, 250])
def test_under_a_limit_of_memory_a_command_ends_well_or_in_one_line(
    model: Path, tmp_path: Path, megabytes: int
) -> None:
    make_image(64, 64).save(tmp_path / "a.png")

    def upscale() -> None:
        from binarize.cli import app

        app(["upscale", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--model", str(model), "--steps", "1"])

    result = forked(upscale, memory=megabytes * 2**20)
    assert "Traceback" not in result.err
    if result.status != 0:
        assert (result.status, result.err.count("error: ")) == (1, 1), result
        assert not (tmp_path / "b.png").exists()


def test_the_estimate_of_memory() -> None:
    network = SRUNet(base_channels=8, channel_mults=(1, 2), res_blocks=1, norm_groups=4)
    whole, tiled = tile_grid(512, 512, multiple=2), tile_grid(512, 512, tile=64, multiple=2)
    assert memory.working_bytes(network, whole) == 512 * 512 * (100 + 8 * 8 * 4)
    assert memory.working_bytes(network, tiled, tiles=2) == 512 * 512 * 100 + 2 * 64 * 64 * 8 * 8 * 4
    assert memory.working_bytes(network, whole, images=3) == 3 * memory.working_bytes(network, whole)
    assert memory.working_bytes(torch.nn.Identity(), whole) == 512 * 512 * 100


def test_the_pipeline_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = SuperResolutionPipeline(SRUNet(base_channels=8, channel_mults=(1, 2), norm_groups=4), scale=2)
    monkeypatch.setattr(limits, "available_memory", lambda: 1e5)
    with pytest.raises(BinarizeError, match=r"upscaling to 40x40 pixels needs about 1 MB .* 0 MB are free; use tiles"):
        pipe(torch.rand(3, 20, 20))


def test_the_memory_that_is_available() -> None:
    assert 1e6 < limits.available_memory() < 1e15

    def limited() -> None:
        assert limits.available_memory() <= 2**27

    assert forked(limited, memory=2**27).status == 0


@pytest.mark.parametrize("value", [0, 65, 2**31])
def test_import_official_checks_the_scale_first(tmp_path: Path, value: int) -> None:
    assert_refused(["import-official", "none.pth", tmp_path / "out", "--scale", str(value)], tmp_path, "--scale")
