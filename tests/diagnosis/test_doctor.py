"""`binarize doctor` on networks in files."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import FIXTURES, NETWORK, WEIGHTS, edit_json, run
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import nn

import binarize
from binarize.diagnosis import doctor
from binarize.diagnosis.diagnose import _judge_network
from binarize.diagnosis.files import find_mismatch
from binarize.diagnosis.sampling import make_case
from binarize.models import SRUNet, SuperResolutionPipeline


def examine(*args: str | Path) -> tuple[int, str]:
    result = run("doctor", *args)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "new"
    torch.manual_seed(0)
    unet = binarize.convert(SRUNet(**NETWORK), "bidiffsr")
    SuperResolutionPipeline(unet, scale=2, num_inference_steps=2).save_pretrained(folder)
    return folder


def test_a_new_network_is_untrained(new: Path) -> None:
    status, output = examine(new)
    assert status == 1
    assert "likely cause: untrained network" in output
    assert "weights 1 and 0 of a new network" in output
    assert "bicubic      32." in output


def test_a_network_that_no_change_helps() -> None:
    unet = SRUNet(**NETWORK)
    nn.init.uniform_(unet.norm_out.weight, 0.9, 1.1)
    for before, cause, explanation in ((20, "untrained network", "hardly trained"), (30, "quality", "2.00 dB below")):
        finding = _judge_network(before, 32.0, unet)
        assert finding.cause == cause
        assert explanation in finding.explanation


def change_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "unet" / WEIGHTS)
    change(weights)
    save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})


HOW = "scheduler/scheduler_config.json"
SHAPES = "conv_in.weight is (8, 6, 3, 3) in the file and (16, 6, 3, 3) by"


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (lambda f: change_weights(f, lambda w: w.pop("conv_out.bias")), ["1 missing from the file: conv_out.bias."]),
        (lambda f: change_weights(f, lambda w: w.update(b=torch.zeros(2))), ["1 not known to the configuration: b."]),
        (lambda f: edit_json(f / "unet" / "config.json", base_channels=16), [SHAPES, "base_channels 8"]),
        (lambda f: edit_json(f / "unet" / "config.json", conversion=None), ["configuration has no conversion"]),
        (lambda f: edit_json(f / "unet" / "config.json", fusion="sc"), ["builds no network", "unknown fusion 'sc'"]),
        (lambda f: save_file(SRUNet(**NETWORK).state_dict(), f / "unet" / WEIGHTS), ["weights are of another one"]),
        (lambda f: edit_json(f / HOW, num_train_timesteps=1000), ["likely cause: noise", 'num_train_timesteps": 2000']),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named(new: Path, tmp_path: Path, damage: Any, texts: list[str]) -> None:
    folder = shutil.copytree(new, tmp_path / "broken")
    damage(folder)
    status, output = examine(folder)
    assert status == 1
    for text in ["likely cause: configuration", *texts] if len(texts) == 1 else texts:
        assert text in output


def test_a_configuration_that_a_packed_or_a_released_file_contradicts_is_named(new: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    pipe = SuperResolutionPipeline.from_pretrained(new)  # packed if there are kernels
    if not binarize.is_packed(pipe.unet):
        binarize.pack(pipe.unet)
    pipe.save_pretrained(folder)
    assert find_mismatch(folder / "unet") is None
    edit_json(folder / "unet" / "config.json", base_channels=16)
    released = [FIXTURES / "small.pth", "--scale", "2"]
    for given, text in (([folder], "is 16 there, 8 in the file"), (released, "Pass the configuration the checkpoint")):
        status, output = examine(*given)
        assert (status, "likely cause: configuration" in output, text in output) == (1, True, True), output


def test_a_missing_model_is_an_error(tmp_path: Path) -> None:
    status, output = examine(tmp_path / "none")
    assert (status, output.count("\n")) == (1, 1)
    assert "no such file or folder" in output
    (tmp_path / "empty").mkdir()
    with pytest.raises(binarize.BinarizeError, match="holds no model"):
        doctor(tmp_path / "empty")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real network of residuals that was trained on the embedded image until it is better than bicubic."""
    torch.manual_seed(0)
    unet = SRUNet(**NETWORK, num_train_timesteps=1000, detail_factor=30.0, dropout=0.0)
    case = make_case(2, unet.size_multiple, 0)
    scale = 0.035
    residual = (case.original[None] / 255 - case.condition) / scale
    optimizer = torch.optim.Adam(unet.parameters(), 3e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads gain little, and lose much on a busy machine
    for here in [(..., slice(y, y + 64), slice(x, x + 64)) for y in (0, 64) for x in (0, 64)] * 15:
        target = residual[here]
        loss = (unet(torch.randn_like(target), 999, case.condition[here]).sample - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("models") / "trained"
    betas = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "clip_sample_range": 10.0}
    how = DDIMScheduler(**betas, prediction_type="sample", timestep_spacing="trailing")
    SuperResolutionPipeline(unet, how, scale=2, residual_scale=scale, num_inference_steps=1).save_pretrained(folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "changes", "cause"),
    [
        ("model_index.json", {}, "healthy"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction type"),
        ("model_index.json", {"residual_scale": None}, "residual target"),
    ],
)
def test_a_trained_network_whose_files_were_edited(trained, tmp_path, file, changes, cause):
    folder = shutil.copytree(trained, tmp_path / "edited")
    edit_json(folder / file, **changes)
    assert doctor(folder).finding.cause == cause
