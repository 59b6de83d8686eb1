"""Packed networks whose full-precision weights are stored in 8 bits."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from torch import nn

import binarize
from binarize.errors import BinarizeError
from binarize.models import SRUNet
from binarize.packed.int8 import full_precision_layers, has_int8_weights, round_weights

SMALL = {"base_channels": 16, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 4}


def small(method: str = "bidiffsr") -> SRUNet:
    torch.manual_seed(0)
    return binarize.convert(SRUNet(**SMALL).eval(), method=method)


def diffusers_model() -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = UNet2DModel(16, block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1, **blocks)
    return binarize.convert(model.eval(), method="reactnet")


def run(model: nn.Module) -> torch.Tensor:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        extra = (x.flip(2),) if isinstance(model, SRUNet) else ()
        return model(x, torch.tensor([700, 3]), *extra).sample


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 6)),
        elements=st.floats(-1e6, 1e6, width=32).map(lambda value: 0.0 if abs(value) < 1e-20 else value),
    )
)
def test_weights_are_rounded_to_the_nearest_of_255_levels_of_their_channel(values: np.ndarray) -> None:
    layer = nn.Linear(values.shape[1], values.shape[0])
    layer.weight.data = torch.from_numpy(values.copy())
    round_weights(layer)
    step = np.abs(values).max(1, keepdims=True).astype(np.float64) / 127
    exact = np.round(values / np.where(step > 0, step, 1))
    assert np.abs(layer.weight_int8.numpy() - exact).max() <= 1  # where rounding of the ratio decides
    error = np.abs(layer.weight.detach().double().numpy() - values)
    assert (error <= step * 0.501).all()  # a step is rounded to 17 bits
    largest = np.abs(values).max(1)
    assert np.allclose(np.abs(layer.weight.detach().numpy()).max(1), largest, rtol=1e-5, atol=0)


@pytest.mark.parametrize("build", [small, diffusers_model])
def test_a_saved_network_is_loaded_bit_for_bit(build, tmp_path: Path) -> None:
    model = binarize.pack(build(), full_precision="int8")
    expected = run(model)
    binarize.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "own")
    for again in (
        binarize.load(tmp_path / "saved"),
        type(model).from_pretrained(tmp_path / "own"),
        copy.deepcopy(model),
    ):
        assert torch.equal(run(again), expected)
        assert len(list(full_precision_layers(again))) == sum(map(has_int8_weights, again.modules())) > 5
    binarize.save(binarize.load(tmp_path / "saved"), tmp_path / "again")
    first, second = (next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("saved", "again"))
    assert first == second


def test_the_outputs_are_close_to_those_of_floats() -> None:
    floats, integers = run(binarize.pack(small())), run(binarize.pack(small(), full_precision="int8"))
    assert not torch.equal(floats, integers)
    # Untrained networks amplify differences, since some signs flip.
    assert torch.corrcoef(torch.stack([floats.flatten(), integers.flatten()]))[0, 1] > 0.99


def test_the_file_has_a_byte_for_each_weight_and_the_summary_says_so(tmp_path: Path) -> None:
    model = binarize.pack(small(), full_precision="int8")
    layers = list(full_precision_layers(model))
    binarize.save(model, tmp_path)
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    integers = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight_int8")}
    assert len(integers) == len(layers)
    assert {tensor.dtype for tensor in integers.values()} == {torch.int8}
    assert not {name.replace("_int8", "") for name in integers} & tensors.keys()
    size = sum(tensor.nbytes for tensor in tensors.values())
    figures = binarize.summary(model)
    assert figures.bytes == size
    weights = sum(layer.weight.numel() for layer in layers)
    of_floats = binarize.summary(binarize.pack(small()))
    assert of_floats.bytes - size == 3 * weights - 4 * sum(len(layer.weight) for layer in layers)
    assert of_floats.params - figures.params == pytest.approx(0.75 * weights)
    assert {row.bits for row in figures.rows} == {1, 8, 32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_other_tensors_are_stored_in_half_precision(dtype, tmp_path: Path) -> None:
    model = binarize.pack(small(), full_precision="int8")
    binarize.save(model, tmp_path, dtype=dtype)
    again = binarize.load(tmp_path)
    for one, other in zip(full_precision_layers(model), full_precision_layers(again), strict=True):
        assert torch.equal(one.weight_int8, other.weight_int8)
        assert torch.allclose(one.weight, other.weight, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_moved_network_keeps_its_integers(tmp_path: Path) -> None:
    model = binarize.pack(small(), full_precision="int8").to(torch.bfloat16)
    expected = [layer.weight_int8.clone() for layer in full_precision_layers(model)]
    binarize.save(model, tmp_path)
    loaded = [layer.weight_int8 for layer in full_precision_layers(binarize.load(tmp_path))]
    assert all(map(torch.equal, loaded, expected))


def test_unpacking_leaves_floats(tmp_path: Path) -> None:
    model = binarize.pack(small(), full_precision="int8")
    expected = run(model)
    binarize.unpack(model)
    assert not any(map(has_int8_weights, model.modules()))
    assert all("int8" not in name for name in model.state_dict())
    torch.testing.assert_close(run(model), expected)
    binarize.save(model, tmp_path)
    assert "full_precision" not in json.loads((tmp_path / "config.json").read_text())["conversion"]
    assert torch.equal(run(binarize.load(tmp_path)), run(model))


def test_weights_that_layers_share_stay_floats() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[2].weight = model[1].weight
    assert list(full_precision_layers(model)) == [model[0], model[3]]


def test_a_wrong_option_is_refused() -> None:
    model = small()
    with pytest.raises(BinarizeError, match="full_precision='int4'; allowed: 'float' and 'int8'"):
        binarize.pack(model, full_precision="int4")
    assert not binarize.is_packed(model)
