"""diffusers' 1-D and video U-Nets, and guided-diffusion's attention of 1-D convolutions."""

from typing import Any

import pytest
import torch
from packed_case import scatter
from torch import nn
from zoo.adm import ADMUNet

import binarize
from binarize.layers import BinaryConv1d, BinaryConv3d
from binarize.packed import PackedConv1d, PackedConv3d


def unet1d() -> nn.Module:
    from diffusers import UNet1DModel

    return UNet1DModel(
        in_channels=2, out_channels=2, sample_size=32, extra_in_channels=32, block_out_channels=(16, 32),
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"), up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
    )  # fmt: skip


def unet3d() -> nn.Module:
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip


HOSTS: dict[str, tuple[Any, Any, Any, Any, str, dict[str, Any]]] = {
    "1d": (unet1d, BinaryConv1d, PackedConv1d, (2, 2, 32), "bidiffsr", {}),
    "video": (unet3d, BinaryConv3d, PackedConv3d, (2, 4, 3, 8, 8), "reactnet", {"encoder_hidden_states": (2, 5, 8)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTS)
def test_a_host_converts_trains_packs_saves_and_loads(name: str, tmp_path: Any) -> None:
    pytest.importorskip("diffusers")
    build, kind, packed_kind, shape, method, more = HOSTS[name]
    model = binarize.convert(build(), method)
    converted = [m for m in model.modules() if isinstance(m, kind)]
    rows = [row for row in binarize.report(model).rows if row.type.startswith(kind.__name__.removeprefix("Binary"))]
    kept = [row.detail for row in rows if row.action == "kept"]
    assert set(kept) == ({"first convolution", "last convolution"} if name == "1d" else set())
    assert len(converted) == len(rows) - len(kept) >= 20
    given: dict[str, Any] = {key: torch.randn(size, dtype=torch.float64) for key, size in more.items()}
    given |= {"sample": torch.randn(shape, dtype=torch.float64), "timestep": torch.tensor([10, 990])}
    scatter(model).double()
    model(**given).sample.square().mean().backward()
    assert all(layer.weight.grad is not None and layer.weight.grad.isfinite().all() for layer in converted)
    model.eval()
    with torch.no_grad():
        expected = model(**given).sample
        loaded = binarize.load(binarize.save(model, tmp_path / "float"))
        torch.testing.assert_close(loaded(**given).sample, expected, rtol=0, atol=0)
        binarize.pack(model)
        assert sum(isinstance(m, packed_kind) for m in model.modules()) == len(converted)
        packed = model(**given).sample
        torch.testing.assert_close(packed, expected, rtol=1e-9, atol=1e-9)
        loaded = binarize.load(binarize.save(model, tmp_path / "packed"))
        torch.testing.assert_close(loaded(**given).sample, packed, rtol=0, atol=0)


def test_attention_of_one_dimensional_convolutions_converts_on_request() -> None:
    kept = {row.name: row.detail for row in binarize.plan(ADMUNet(), "bidiffsr").kept}
    assert kept["middle_block.1.qkv"] == "attention projection"
    model = binarize.convert(ADMUNet(), "bidiffsr", overrides={"*.qkv": "bidiffsr", "*.proj_out": "reactnet"})
    assert isinstance(model.middle_block[1].qkv, BinaryConv1d)
    x, steps, labels = torch.randn(2, 3, 16, 16), torch.tensor([10, 990]), torch.tensor([0, 1])
    scatter(model).double().eval()
    with torch.no_grad():
        expected = model(x.double(), steps, labels)
        torch.testing.assert_close(binarize.pack(model)(x.double(), steps, labels), expected, rtol=1e-9, atol=1e-9)
