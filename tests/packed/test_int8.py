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
from binarize.conversion.apply import apply_conversion
from binarize.conversion.record import conversion
from binarize.errors import BinarizeError
from binarize.models import SRUNet
from binarize.packed.int8 import full_precision_layers, has_int8_weights, round_to_int8

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
    integers, bits = round_to_int8(torch.from_numpy(values.copy()))
    steps = bits.view(torch.float32)
    rounded = (integers * steps[:, None]).numpy()
    exact = np.abs(values).max(1, keepdims=True).astype(np.float64) / 127
    assert np.allclose(steps[:, None].double(), exact, rtol=2**-17, atol=1e-43)
    assert (np.abs(rounded.astype(np.float64) - values) <= exact * 0.501).all()  # since steps are rounded
    assert np.array_equal(rounded.astype(np.float64), integers.double().numpy() * steps[:, None].double().numpy())
    again = round_to_int8(torch.from_numpy(rounded))
    assert torch.equal(again[0], integers)
    assert torch.equal(again[1], bits)


@pytest.mark.parametrize("build", [small, diffusers_model])
def test_a_saved_network_is_loaded_bit_for_bit(build, tmp_path: Path) -> None:
    model = binarize.pack(build(), full_precision="int8")
    expected = run(model)
    binarize.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "own")
    for again in (
        binarize.load(tmp_path / "saved"),
        type(model).from_pretrained(tmp_path / "own"),
        type(model).from_pretrained(tmp_path / "own", device_map="cpu"),
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
def test_the_weights_do_not_depend_on_the_dtype_of_the_rest(dtype, tmp_path: Path) -> None:
    model = binarize.pack(small(), full_precision="int8")
    expected = [layer.weight for layer in full_precision_layers(model)]
    binarize.save(model, tmp_path / "as dtype", dtype=dtype)
    binarize.save(copy.deepcopy(model).to(dtype), tmp_path / "moved")
    for folder in tmp_path.iterdir():
        again = binarize.load(folder)
        assert all(map(torch.equal, [layer.weight for layer in full_precision_layers(again)], expected))
        low = SRUNet.from_pretrained(folder, torch_dtype=dtype)
        assert {tensor.dtype for tensor in low.parameters()} == {dtype}
        assert all(
            torch.equal(x.weight, y.to(dtype)) for x, y in zip(full_precision_layers(low), expected, strict=True)
        )


def test_a_network_of_another_library(tmp_path: Path) -> None:
    def host() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 3, 3)).eval()

    model = binarize.pack(binarize.convert(host(), "bnn"), full_precision="int8")
    binarize.save(model, tmp_path)
    again = binarize.load(tmp_path, model=host())
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(again(x), model(x))
    assert [p.stride() for p in again.parameters()] == [p.stride() for p in model.parameters()]


def test_packing_again_and_later(tmp_path: Path) -> None:
    model = binarize.pack(small(), full_precision="int8")
    expected = run(model)
    binarize.pack(binarize.unpack(model), full_precision="int8")
    binarize.save(model, tmp_path / "again")
    assert torch.equal(run(binarize.load(tmp_path / "again")), run(model))
    later = binarize.pack(binarize.pack(small()), full_precision="int8")
    assert torch.equal(run(later), expected)
    for option in ("float", "int8"):
        with pytest.raises(BinarizeError, match="is packed already"):
            binarize.pack(later, full_precision=option)


def test_a_state_dict_has_floats(caplog: pytest.LogCaptureFixture) -> None:
    model, other = (binarize.pack(small(), full_precision=option) for option in ("int8", "float"))
    assert model.state_dict().keys() == other.state_dict().keys()
    model.load_state_dict(other.state_dict())
    assert torch.equal(run(model), run(other))
    assert not caplog.text


def test_changed_weights_are_rounded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = binarize.pack(small(), full_precision="int8")
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    binarize.save(model, tmp_path / "exact")
    assert not caplog.text  # twice the steps
    assert torch.equal(run(binarize.load(tmp_path / "exact")), run(model))
    with torch.no_grad():
        model.conv_in.weight.add_(0.001)
    binarize.save(model, tmp_path / "rounded")
    assert "conv_in.weight has changed since the network was packed, and is rounded to 8 bits again" in caplog.text
    error = (binarize.load(tmp_path / "rounded").conv_in.weight - model.conv_in.weight).abs()
    assert 0 < error.max() < model.conv_in.weight.abs().max() / 250


def test_older_versions_refuse_the_file(tmp_path: Path) -> None:
    for option, version in (("float", 2), ("int8", 3)):
        model = binarize.pack(small(), full_precision=option)
        binarize.save(model, tmp_path / option)
        config = json.loads((tmp_path / option / "config.json").read_text())["conversion"]
        with safe_open(next((tmp_path / option).glob("*.safetensors")), "pt") as file:
            assert (config["packed"], file.metadata()["binarize_packed"]) == (version, str(version))


@pytest.mark.parametrize("changes", [{"full_precision": "int4"}, {"packed": None, "full_precision": "int8"}])
def test_a_damaged_record_is_refused(changes) -> None:
    record = conversion(binarize.pack(small(), full_precision="int8")).to_config()
    config = {key: value for key, value in {**record, **changes}.items() if value is not None}
    with pytest.raises(BinarizeError, match=r"has full_precision 'int.'; allowed: int8 with packed"):
        apply_conversion(SRUNet(**SMALL), config)


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
