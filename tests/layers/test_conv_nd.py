"""Binary convolutions of one and three dimensions: their formula, every method, and their packed form."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_cases import DEFAULTS, Case
from packed_case import scatter
from torch import Tensor, nn

import binarize
from binarize.conversion.packing import packed_form
from binarize.layers import BinaryConv1d, BinaryConv2d, BinaryConv3d
from binarize.packed import PackedConv1d, PackedConv3d
from binarize.timestep import TimestepContext

PLAIN = binarize.methods.bnn(weight="scaled_sign", norm=None, post=None, keep_bias=True)
CONVS: list[nn.Conv1d | nn.Conv3d] = [
    nn.Conv1d(8, 8, 1),
    nn.Conv1d(8, 12, 5, 2, 1, 2, groups=4),
    nn.Conv1d(8, 8, 4, padding="same", padding_mode="reflect"),
    nn.Conv1d(8, 8, 3, padding=2, padding_mode="circular"),
    nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)),
    nn.Conv3d(8, 16, 3, (2, 1, 2), (2, 0, 1), (1, 2, 1), groups=2, bias=False),
    nn.Conv3d(8, 8, (2, 3, 1), padding="same"),
    nn.Conv3d(8, 4, 3, (3, 1, 1), (0, 1, 1), (2, 1, 1)),
    nn.Conv3d(8, 8, 3, padding=(1, 1, 2), padding_mode="replicate"),
]


def binary(conv: nn.Module, method: Any, context: TimestepContext | None = None) -> BinaryConv2d | BinaryConv3d:
    kind = BinaryConv1d if isinstance(conv, nn.Conv1d) else BinaryConv3d
    return kind.from_float(copy.deepcopy(conv), binarize.get_method(method), context)


def given(conv: nn.Module, batch: int = 3) -> Tensor:
    return torch.randn(batch, 8, *((16,) if isinstance(conv, nn.Conv1d) else (6, 7, 5)), dtype=torch.float64)


def textbook(conv: Any, x: Tensor) -> Tensor:
    """Return the convolution of signs with alpha sign(w), by torch.nn's own layer."""
    twin, signs = copy.deepcopy(conv), torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    dims = tuple(range(1, conv.weight.dim()))
    with torch.no_grad():
        twin.weight.copy_(conv.weight.abs().mean(dims, keepdim=True) * torch.where(conv.weight >= 0, 1.0, -1.0))
    return twin(signs)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of the full-precision convolution
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_every_geometry_equals_the_textbook_packed_and_unpacked(conv: nn.Conv1d | nn.Conv3d) -> None:
    conv = copy.deepcopy(conv).double()
    layer, x = binary(conv, PLAIN), given(conv)
    expected = textbook(conv, x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    packed = packed_form(layer)
    assert isinstance(packed, PackedConv1d | PackedConv3d)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(packed.codes(), layer.binary_weight().codes.to(torch.int8))
    assert f"kernel_size={conv.kernel_size}, stride={conv.stride}" in repr(layer)


@pytest.mark.parametrize("conv", [CONVS[0], CONVS[1], CONVS[4], CONVS[5]], ids=str)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_every_method_trains_and_packs(case: Case, conv: nn.Conv1d | nn.Conv3d) -> None:
    context = TimestepContext(1000)
    layer = scatter(binary(conv, case.method, context).double())
    x = given(conv).requires_grad_()
    with context.using(torch.tensor([1, 500, 999])):
        y = layer(x)
        assert y.shape == copy.deepcopy(conv).double()(x).shape
        y.square().sum().backward()
        assert x.grad is not None
        assert layer.weight.grad is not None
        assert layer.weight.grad.abs().sum() > 0
        layer.eval()
        packed = packed_form(layer)
        with torch.no_grad():
            torch.testing.assert_close(packed(x), layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("conv", [CONVS[0], CONVS[4]], ids=str)
def test_each_sample_has_the_parameters_of_its_timestep(conv: nn.Conv1d | nn.Conv3d) -> None:
    context = TimestepContext(1000)
    layer = scatter(binary(conv, "bidiffsr", context)).double().eval()
    x, steps = given(conv), torch.tensor([1, 500, 999])
    for run in (layer, packed_form(copy.deepcopy(layer))):
        one_by_one = []
        with torch.no_grad():
            for sample, step in zip(x, steps, strict=True):
                with context.using(step):
                    run.pre.context = run.post.context = context
                    one_by_one.append(run(sample[None]))
            with context.using(steps):
                torch.testing.assert_close(run(x), torch.cat(one_by_one), rtol=0, atol=1e-12)


def test_a_one_dimensional_layer_is_a_two_dimensional_one_of_height_one() -> None:
    line = nn.Conv1d(8, 8, 3, padding=1, bias=False)
    image = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), bias=False)
    image.weight = nn.Parameter(line.weight.detach().unsqueeze(2).clone())
    one, two = binary(line, "reactnet"), BinaryConv2d.from_float(image, "reactnet")
    x = torch.randn(2, 8, 9)
    for layer, value in ((one, x), (two, x.unsqueeze(2))):
        layer(value).square().sum().backward()
    torch.testing.assert_close(one.weight.grad, two.weight.grad.squeeze(2))  # type: ignore[union-attr]
    torch.testing.assert_close(one(x), two(x.unsqueeze(2)).squeeze(2))


def test_a_packed_video_layer_is_exact_in_bfloat16_and_compiles() -> None:
    conv = nn.Conv3d(64, 8, 3, padding=1, bias=False)
    packed = packed_form(binary(conv, PLAIN))
    x = torch.randn(1, 64, 4, 5, 5)
    with torch.no_grad():
        expected = textbook(conv, x)
        torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(packed, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        half = packed.bfloat16()(x.bfloat16())
        torch.testing.assert_close(half.float(), textbook(conv, x.bfloat16().float()), rtol=2e-2, atol=2e-2)


def test_pooled_shortcuts_average_the_depth_too() -> None:
    conv = nn.Conv3d(8, 4, 3, 2, 1)
    method, x = PLAIN.replace(shortcut=True), given(conv)
    layer = binary(conv.double(), method)
    pooled = F.adaptive_avg_pool3d(x, (3, 4, 3)).unflatten(1, (4, 2)).mean(2)
    torch.testing.assert_close(layer(x), textbook(conv, x) + pooled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_a_network_is_saved_packed_unpacked_and_reverted(kind: Any, tmp_path: Any) -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(*(kind(8, 8, 3, padding=1) for _ in range(4))).double()

    model, x = binarize.convert(network(), "reactnet"), given(kind(1, 1, 1))
    binary_form = BinaryConv1d if kind is nn.Conv1d else BinaryConv3d
    assert [type(layer) for layer in model[1:3]] == [binary_form] * 2
    scatter(model).eval()
    with torch.no_grad():
        expected = model(x)
        assert binarize.load(binarize.save(model, tmp_path / "float"), network())(x).equal(expected)
        counted = binarize.summary(model, x)
        binarize.memory_mode(model, "compact")
        state = binarize.binary_state(model)["1"]
        assert state.shape == tuple(model[1].weight.shape)
        latent = model[1].weight
        assert binarize.revert(copy.deepcopy(model))[1].weight.equal(latent)
        binarize.pack(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
        assert binarize.summary(model, x).macs_by_bits == counted.macs_by_bits
        taps, pixels = 3 ** (x.dim() - 2), x[0, 0].numel()
        assert counted.macs_by_bits == dict.fromkeys((1, 32), 2 * 3 * 8 * 8 * taps * pixels)
        loaded = binarize.load(binarize.save(model, tmp_path / "packed"), network())
        assert loaded(x).equal(model(x))
        torch.testing.assert_close(binarize.unpack(loaded)(x), expected, rtol=1e-10, atol=1e-10)
    reverted = binarize.revert(loaded)
    assert [type(layer) for layer in reverted] == [kind] * 4
