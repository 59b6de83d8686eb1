"""Weight-only and k-bit layers, and ternary weights: declared values, calibration, packing and accounting."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from errors_case import assert_error
from packed_case import MadeTensors
from torch import Tensor, nn

import binarize
from binarize.conversion.export import binary_layers, packed_layers
from binarize.conversion.packing import pack_if_possible, packed_form
from binarize.errors import BinarizeError
from binarize.kernels import backends
from binarize.layers import BinaryConv1d, BinaryConv2d, BinaryConv3d, BinaryLinear, LayerSpec, LearnedStep, delayed
from binarize.layers.parts import activation_bits
from binarize.methods import Method, get_method
from binarize.packed import PackedConv2d

BINARY: dict[type[nn.Module], Any] = {
    nn.Conv1d: BinaryConv1d, nn.Conv2d: BinaryConv2d, nn.Conv3d: BinaryConv3d, nn.Linear: BinaryLinear
}  # fmt: skip
LSQ4 = {"name": "lsq", "bits": 4}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.line, self.last = nn.Linear(8, 8), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(torch.tanh(self.first(x)))
        return self.last(self.line(hidden.movedim(1, -1)).movedim(-1, 1))


def net(**options: Any) -> Any:
    return binarize.convert(Net(), get_method("custom", **options), linear=["line"]).eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lsq", "bits": 1}, "lsq: bits must be a whole number from 2 to 16; got 1"),
        ({"name": "lsq", "bits": 4.0}, "got 4.0"),
        ({"name": "lsq", "bits": 17}, "got 17"),
        ({"name": "unit_round", "bits": 0}, "unit_round: bits must be a whole number from 1 to 16; got 0"),
    ],
)
def test_impossible_bits_are_refused(options: dict[str, Any], message: str) -> None:
    assert_error(message, lambda: net(activation=options))


def undeclared(spec: LayerSpec) -> nn.Module:
    return nn.Hardtanh()


@pytest.mark.parametrize(
    ("part", "bits"),
    [
        ("ste", 1),
        ("unit_round", 1),
        ({"name": "unit_round", "bits": 2}, 2),
        (LSQ4, 4),
        ("none", 32),
        (delayed("ste", 0.5), 1),
        (delayed(LSQ4, 0.5), 4),
        (undeclared, None),
    ],
)
def test_an_activation_declares_its_bits(part: Any, bits: int | None) -> None:
    layer = BinaryConv2d(8, 8, 3, padding=1, method=Method(activation=part))
    assert activation_bits(layer.activation) == bits


def test_unsigned_codes_and_their_range() -> None:
    activation = LearnedStep(bits=2, signed=False)
    activation.step.data.fill_(0.5)
    x = torch.tensor([[-1.0, 0.2, 0.3, 0.75, 1.2, 9.0]])
    assert activation(x).tolist() == [[0, 0, 0.5, 1.0, 1.0, 1.5]]


def test_calibration_is_that_of_a_first_batch() -> None:
    model, x = net(activation=LSQ4), torch.randn(2, 3, 6, 6)
    before = copy.deepcopy(model)
    assert binarize.calibrate(model, x) == 2
    hidden = torch.tanh(model.first(x))
    expected = 2 * hidden.abs().mean() / 7**0.5
    torch.testing.assert_close(model.middle.activation.step, expected, check_dtype=False)
    line = 2 * model.middle(hidden).abs().mean() / 7**0.5  # of what the first one lets through
    torch.testing.assert_close(model.line.activation.step, line)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not torch.equal(before(x), model(x))
    assert LearnedStep(4).step.item() == pytest.approx(2 * math.sqrt(2 / math.pi) / math.sqrt(7))


def test_calibration_of_what_cannot_be_calibrated() -> None:
    assert_error("no k-bit activation", binarize.calibrate, net(), torch.randn(1, 3, 4, 4))
    model = net(activation=LSQ4)
    steps = [p.clone() for name, p in model.named_parameters() if name.endswith("step")]
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.zero_()
    message = "the mean magnitude of the input of 'middle.activation' is 0.0; use other data"
    assert_error(message, binarize.calibrate, model, torch.ones(1, 3, 4, 4))
    assert [p for name, p in model.named_parameters() if name.endswith("step")] == steps


@pytest.mark.parametrize("error", [None, RuntimeError("too large"), KeyboardInterrupt()], ids=repr)
def test_a_calibration_that_fails_changes_no_step(error: BaseException | None) -> None:
    model = net(activation=LSQ4)
    before = copy.deepcopy(model.state_dict())

    def fail(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        assert not torch.equal(model.middle.activation.step, before["middle.activation.step"])
        if error is not None:
            raise error
        return torch.zeros_like(output)  # the input of the next activation

    model.middle.register_forward_hook(fail)
    with pytest.raises(BinarizeError if error is None else type(error)):
        binarize.calibrate(model, torch.randn(2, 3, 6, 6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("weight", ["scaled_sign", "two_basis", "twn", "absmean"])
@pytest.mark.parametrize("activation", ["none", LSQ4, {"name": "unit_round", "bits": 3}], ids=str)
def test_a_packed_layer_holds_bits_and_computes_the_same(weight: str, activation: Any, tmp_path: Path) -> None:
    model, x = net(weight=weight, activation=activation), torch.randn(2, 3, 7, 7)
    with torch.no_grad():
        packed = binarize.pack(copy.deepcopy(model))
        expected = packed(x)
        torch.testing.assert_close(expected, model(x))
        layers = dict(packed_layers(packed))
        bases = 1 if weight == "scaled_sign" else 2
        assert {name: layer.bits.numel() for name, layer in layers.items()} == {"middle": bases * 72, "line": bases * 8}
        assert {layer.words.dtype for layer in layers.values()} == {
            torch.uint8 if activation == "none" else torch.int32
        }
        binarize.save(packed, tmp_path)
        loaded = binarize.load(tmp_path, Net())
        assert torch.equal(loaded(x), expected)
        unpacked = binarize.unpack(packed)
        torch.testing.assert_close(unpacked(x), expected)
        assert torch.equal(binarize.pack(unpacked)(x), expected)


@pytest.mark.parametrize("weight", ["twn", "absmean"])
def test_ternary_weights_with_signs_are_two_products_of_the_kernel(weight: str) -> None:
    model, x = net(weight=weight, activation="ste").double(), torch.randn(2, 3, 7, 7, dtype=torch.float64)
    state = binarize.binary_state(model)["middle"]
    ternary = (state.codes[0] + state.codes[1]) // 2
    assert set(ternary.unique().tolist()) == {-1, 0, 1}
    with torch.no_grad():
        expected = model(x)
        binarize.pack(model)
        assert model.middle.words.dtype == torch.int32
        torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_padding_modes_pad_the_quantized_values() -> None:
    for options in ({"padding_mode": "circular"}, {"padding": "same", "dilation": 3}, {"padding_mode": "reflect"}):
        conv = nn.Conv2d(4, 6, (3, 4), **{"padding": 1, **options}).double()
        layer = BinaryConv2d.from_float(conv, Method(activation=LSQ4)).eval()
        x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
        twin = copy.deepcopy(conv)
        with torch.no_grad():
            _, codes, scales = layer.binary_weight()
            twin.weight.copy_(codes[0] * scales[0].view(-1, 1, 1, 1))
            twin.bias.zero_()
            torch.testing.assert_close(layer(x), twin(layer.activation(x)))
            torch.testing.assert_close(PackedConv2d(layer)(x), twin(layer.activation(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8, 9])
@pytest.mark.parametrize("signed", [True, False])
@torch.no_grad()
def test_bit_planes_of_the_kernel_give_the_product_of_the_values(bits: int, signed: bool, dtype: torch.dtype) -> None:
    part = {"name": "lsq", "bits": bits, "signed": signed}
    geometries: list[tuple[Any, Any]] = [
        (nn.Conv2d(5, 6, 3, stride=2, padding=1), (9, 8)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", groups=2), (5, 6)),
        (nn.Conv2d(4, 4, 4, padding="same"), (5, 6)),
        (nn.Conv1d(33, 3, 3, dilation=2), (11,)),
        (nn.Conv3d(3, 4, 3, padding=1), (3, 5, 4)),
        (nn.Linear(7, 6), (5, 3)),
    ]
    for plain, size in geometries:
        layer = BINARY[type(plain)].from_float(plain.to(dtype), Method(activation=part, weight="twn", scale="channel"))
        layer = layer.eval()
        x = torch.randn(2, *((*size, 7) if isinstance(plain, nn.Linear) else (plain.in_channels, *size)), dtype=dtype)
        packed, expected = packed_form(layer), layer(x)
        assert (packed.compiled() is not None) == (bits <= 8 and not isinstance(plain, nn.Conv3d))
        close = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(packed(x), expected, **close)
        with backends.use("torch"):
            torch.testing.assert_close(packed(x), expected, **close)


@pytest.mark.parametrize("activation", ["none", LSQ4], ids=str)
def test_a_packed_layer_refuses_a_gradient(activation: Any) -> None:
    packed, x = packed_form(BinaryConv2d(4, 6, 3, method=Method(activation=activation)).eval()), torch.randn(2, 4, 5, 5)
    expected = packed(x.requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(packed(x), expected.detach())
    assert_error("packed layers have no gradient; train the model that it was packed from", expected.sum().backward)


@pytest.mark.slow
def test_bit_planes_are_in_a_captured_graph() -> None:
    packed, x = binarize.pack(net(activation=LSQ4)), torch.randn(2, 3, 6, 6)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), packed(x))


def test_what_has_no_kernel_is_not_packed_for_speed() -> None:
    possible = pack_if_possible(net())
    assert not pack_if_possible(net(activation="none"))
    mixed = binarize.convert(Net(), "custom", overrides={"middle": {"activation": "none"}}, linear=["line"])
    assert [pack_if_possible(mixed), pack_if_possible(net(activation=LSQ4))] == [possible, possible]


def test_an_activation_replaced_after_packing() -> None:
    x, signs = torch.randn(1, 8, 5, 5), binarize.layers.ClippedSign()
    for before, after in ((LSQ4, "none"), ("ste", LSQ4), ("none", "ste"), (LSQ4, "ste"), ("ste", "none")):
        made, other = (BinaryConv2d(8, 8, 3, padding=1, method=Method(activation=part)) for part in (before, after))
        packed = PackedConv2d(made.eval())
        with torch.no_grad():
            packed(x)
            made.activation = packed.activation = other.activation
            torch.testing.assert_close(packed(x), made(x))
    packed.activation = nn.Hardtanh()
    assert_error("Hardtanh does not declare the two values that it returns.*bits = k", packed, x)
    packed.activation = signs
    packed(x)


@pytest.mark.parametrize("activation", ["none", LSQ4, "ste"], ids=str)
def test_loading_makes_no_float_weights(activation: Any, tmp_path: Path) -> None:
    config = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(**config, **blocks, add_attention=False)
    binarize.convert(unet, {"name": "custom", "activation": activation})
    binary = {layer.weight.numel() for _, layer in binary_layers(unet)}
    assert binary >= {32 * 32 * 9, 64 * 32 * 9}
    binarize.save(binarize.pack(unet), tmp_path)
    with MadeTensors() as made:
        binarize.load(tmp_path)
    sizes = {tensor.numel for tensor in made.tensors if tensor.dtype.is_floating_point}
    assert 128 * 128 in sizes  # of the time embedding
    assert not binary & sizes


@torch.no_grad()
def test_a_watched_activation_is_called() -> None:
    packed, seen = PackedConv2d(BinaryConv2d(8, 8, 3, method=Method(activation=LSQ4)).eval()), []
    expected = packed(x := torch.randn(1, 8, 5, 5))
    packed.activation.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(packed(x), expected)
    assert len(seen) == 1


def test_accounting_by_bits() -> None:
    x, pixels, weights = torch.randn(1, 3, 6, 6), 36, 8 * 8 * 9 + 8 * 8
    kinds: list[tuple[dict[str, Any], int, int]] = [
        ({}, 1, 1),
        ({"weight": "twn"}, 1, 2),
        ({"activation": LSQ4}, 4, 1),
        ({"activation": LSQ4, "weight": "twn"}, 4, 2),
    ]
    for options, bits, products in kinds:
        counted = binarize.summary(net(**options), x)
        full = counted.macs_by_bits[32]
        assert counted.macs_by_bits == {bits: products * weights * pixels, 32: full}
        assert counted.ops == pytest.approx(full + products * weights * pixels * bits / 64)
        assert [row.activation_bits for row in counted.rows if row.bits == 1] == [bits, bits]
        assert f"1/{bits}" in counted.to_text() or bits == 1
    floats = binarize.summary(net(activation="none", weight="two_basis"), x)
    assert floats.macs_by_bits == {32: full + weights * pixels}
    rows = {row.name: row for row in floats.rows}
    assert rows["middle"].params == 2 * 8 * 8 * 9 / 32 + 16
    assert "1/32" in floats.to_text()
