"""The default models, the released structure and hosts of diffusers, exported at their real size."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from onnx_case import difference, inputs, ort
from packed_case import scatter
from torch import Tensor, nn

import binarize
from binarize.models import SRUNet, SuperResolutionPipeline, default_model

UNET2D: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


class Session:
    """An exported network; a call takes the tensors of its inputs by name."""

    def __init__(self, model: nn.Module | SuperResolutionPipeline, path: Path, **options: Any) -> None:
        self.path = binarize.export_onnx(model, path, **options)
        self.session = ort.InferenceSession(self.path, providers=["CPUExecutionProvider"])

    def __call__(self, **given: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {name: value.numpy() for name, value in given.items()})[0])


def check_twenty_inputs(network: nn.Module, path: Path, steps: int, names: tuple[str, ...]) -> None:
    """Compare 39 samples in batches of mixed timesteps.

    Rounding flips single signs in either network, which those that are not trained pass on to all that follows.
    """
    session, found = Session(network, path), []
    for seed in range(20):
        given = inputs(1 + seed % 3, 16 + 8 * (seed % 4), 24, seed, steps)
        given = {name: given[name] for name in names}
        with torch.no_grad():
            expected = network(**given).sample
        found += [difference(*pair) for pair in zip(session(**given), expected, strict=True)]
    assert len(found) == 39
    assert sorted(found)[35] < 1e-5
    assert max(found) < 0.1


SRUNET_INPUTS = ("sample", "timestep", "condition")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("scale", [2, 4])
def test_the_default_models(scale: int, tmp_path: Path) -> None:
    pipe = SuperResolutionPipeline.from_pretrained(default_model(scale))
    pipe.set_progress_bar_config(disable=True)
    check_twenty_inputs(pipe.unet, tmp_path / "network.onnx", 1000, SRUNET_INPUTS)
    packed = os.path.getsize(default_model(scale) / "unet" / "diffusion_pytorch_model.safetensors")
    assert os.path.getsize(tmp_path / "network.onnx") <= 1.15 * packed
    session = Session(pipe, tmp_path / "upscale.onnx", steps=2)
    assert session.path.stat().st_size <= 1.15 * packed
    image, noise = torch.rand(1, 3, 24, 20), torch.randn(1, 3, 24 * scale, 20 * scale)
    expected = pipe(image, latents=noise, output_type="pt").images
    assert (255 * (session(image=image, noise=noise) - expected).abs() <= 1).float().mean() >= 0.999


@pytest.mark.timeout(900)
def test_the_released_structure(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = binarize.pack(binarize.convert(SRUNet().eval(), "bidiffsr"))
    check_twenty_inputs(network, tmp_path / "network.onnx", 2000, SRUNET_INPUTS)


@pytest.mark.parametrize("method", ["bidiffsr", "reactnet", "xnor"])
def test_a_network_of_diffusers(method: str, tmp_path: Path) -> None:
    network = binarize.pack(scatter(binarize.convert(UNet2DModel(**UNET2D).eval(), method)))
    check_twenty_inputs(network, tmp_path / "network.onnx", 1000, ("sample", "timestep"))
