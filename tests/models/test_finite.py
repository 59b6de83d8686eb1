"""Weights and schedules that are damaged give an error that names the model, not an image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_case import NETWORK, WEIGHTS, contents, fails, make_image
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

import binarize
from binarize.errors import BinarizeError
from binarize.models import SRUNet, SuperResolutionPipeline, checks

pytestmark = pytest.mark.slow


def pipeline(**options: object) -> SuperResolutionPipeline:
    torch.manual_seed(0)
    pipe = SuperResolutionPipeline(SRUNet(**NETWORK), scale=2, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("key", ["conv_in.weight", "conv_out.bias", "conv_out.weight"])
def test_values_that_are_no_image_are_an_error(key: str, value: float) -> None:
    pipe = pipeline()
    pipe.unet.get_parameter(key).data.view(-1)[0] = value
    with pytest.raises(checks.NotFiniteError, match="the network or its noise schedule gives values up to"):
        pipe(torch.rand(3, 8, 8), num_inference_steps=2)


def test_a_damaged_schedule_is_an_error() -> None:
    scheduler = DDIMScheduler(num_train_timesteps=2000)
    scheduler.alphas_cumprod[:] = float("nan")
    with pytest.raises(checks.NotFiniteError, match=r"the model: .* values up to nan"):
        pipeline(scheduler=scheduler)(torch.rand(3, 8, 8), num_inference_steps=2)


def test_float16_is_named_where_it_may_have_overflowed() -> None:
    with pytest.raises(checks.NotFiniteError, match=r"up to inf.*Or float16 overflowed: use bfloat16"):
        checks.check_prediction(float("inf"), "m", torch.float16)
    with pytest.raises(checks.NotFiniteError, match=r"copy the model again\.$"):
        checks.check_prediction(1e7, "m", torch.float32)
    checks.check_prediction(1e6, "m", torch.float32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_every_damaged_tensor_of_a_file_is_found(packed: bool, value: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = binarize.convert(SRUNet(**NETWORK), "bidiffsr")
    if packed:
        binarize.pack(unet)
    checks.check_weights(unet, "m")
    keys = [key for key, tensor in unet.state_dict().items() if tensor.is_floating_point() and tensor.numel()]
    for key in keys:
        tensor = unet.state_dict()[key]
        last = (-1,) * tensor.ndim
        kept = tensor[last].clone()
        tensor[last] = value
        with pytest.raises(checks.NotFiniteError, match=f"m: the tensor {key} has values from "):
            checks.check_weights(unet, "m")
        tensor[last] = kept


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_commands_and_from_pretrained_name_the_file(tmp_path: Path, value: float) -> None:
    folder = tmp_path / "model"
    unet = binarize.convert(SRUNet(**NETWORK), "bidiffsr")
    SuperResolutionPipeline(unet, scale=2).save_pretrained(folder)
    file = folder / "unet" / WEIGHTS
    state = load_file(file)
    key = next(key for key in state if key.endswith("weight") and state[key].ndim == 4)
    state[key].view(-1)[0] = value
    save_file(state, file, metadata={"format": "pt"})
    (tmp_path / "images").mkdir()
    make_image(20, 20).save(tmp_path / "images" / "a.png")
    before = contents(tmp_path)
    images = tmp_path / "images"
    for given in (
        ("upscale", images, "--model", folder),
        ("evaluate", folder, "--data", images, "--lpips", "none"),
        ("doctor", folder),
        ("pack", folder, tmp_path / "packed"),
    ):
        message = fails(*given)
        assert f"the tensor {key} has values from" in message
        assert str(folder) in message
    assert contents(tmp_path) == before
    with pytest.raises(BinarizeError, match=f"the tensor {key} has values"):
        SuperResolutionPipeline.from_pretrained(folder)


def test_the_check_changes_no_result() -> None:
    pipe, image = pipeline(), np.random.default_rng(0).random((9, 7, 3), dtype=np.float32)
    results = [pipe(image, 3, torch.Generator().manual_seed(1), output_type="np").images for _ in range(2)]
    assert np.array_equal(*results)
    assert np.isfinite(results[0]).all()
