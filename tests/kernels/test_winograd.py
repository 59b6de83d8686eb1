"""Winograd's algorithm for 3x3 convolutions: products and gradients, against torch's convolution."""

from typing import Any, Literal, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import binarize
from binarize.kernels import ops
from binarize.kernels.cpu.threads import has_amx
from binarize.layers import BinaryConv2d
from binarize.layers.fused import conv3x3
from binarize.methods import Method
from binarize.models import SRUNet

winograd = pytest.importorskip("binarize.kernels.cpu.winograd")
BOUNDS = {2: 2e-6, 4: 2e-5}


class Case(NamedTuple):
    """A convolution's input, weights and the gradient of its output, in channels_last memory."""

    x: Tensor
    weight: Tensor
    grad: Tensor


def drawn(batch: int, widths: tuple[int, int], size: tuple[int, int], seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, widths[0], *size), (*widths[::-1], 3, 3), (batch, widths[1], *size)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return Case(*(t.contiguous(memory_format=torch.channels_last) for t in (x, weight, grad)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    width = st.sampled_from([16, 32, 48, 80])
    size = draw(st.tuples(st.integers(4, 19), st.integers(4, 19)))
    return drawn(draw(st.integers(1, 3)), (draw(width), draw(width)), size, draw(st.integers(0, 2**32)))


def expected(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return output and gradients of input and weights in float64."""
    x, weight, grad = (t.double() for t in case)
    x.requires_grad_()
    weight.requires_grad_()
    y = nn.functional.conv2d(x, weight, padding=1)
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad)


def assert_near(found: Tensor, value: Tensor, bound: float) -> None:
    torch.testing.assert_close(found.double(), value, rtol=0, atol=bound * float(value.abs().max()))


def check(case: Case, tile: Literal[2, 4], bias: Tensor | None = None) -> None:
    y, of_x, of_weight = expected(case)
    y = y if bias is None else y + bias.double().view(-1, 1, 1)
    assert_near(winograd.conv3x3(case.x, case.weight, bias, None, None, tile), y, BOUNDS[tile])
    assert_near(winograd.conv3x3(case.grad, case.weight, None, None, None, tile, transposed=True), of_x, BOUNDS[tile])
    assert_near(winograd.weight_gradient(case.x, case.grad, tile), of_weight, BOUNDS[tile])


@pytest.mark.parametrize("tile", [2, 4])
@settings(max_examples=25)
@given(case=cases(), contiguous=st.booleans())
def test_products_and_gradients_are_those_of_a_plain_convolution(tile, case, contiguous):
    check(case._replace(weight=case.weight.contiguous()) if contiguous else case, tile)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("together", [1, 24_000_000])
def test_filters_and_sums_that_leave_the_cache_are_the_same(tile: Any, together: int, monkeypatch: Any) -> None:
    assert 4 * (tile + 2) ** 2 * 208 * 192 > max(winograd.SUMS_BYTES, winograd.FILTER_BYTES)
    monkeypatch.setattr(winograd, "PLANES_BYTES", together)  # 1 makes as many parts as possible
    check(drawn(2, (208, 192), (13, 18)), tile, torch.randn(192))


@pytest.mark.parametrize("widths", [(64, 64), (208, 192)])
def test_products_and_gradients_on_two_threads_are_the_same_each_time(widths: tuple[int, int]) -> None:
    case, before = drawn(3, widths, (31, 29)), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (winograd.weight_gradient(case.x, case.grad, 2) for _ in range(20))
        product, *products = (winograd.conv3x3(case.x, case.weight, None, None, None, 2) for _ in range(5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, first) for other in others)
    assert all(torch.equal(other, product) for other in products)
    assert_near(first, expected(case)[2], BOUNDS[2])


@pytest.mark.parametrize("widths", [(32, 32), (208, 192)])
def test_an_empty_batch_has_gradients_of_zero(widths: tuple[int, int]) -> None:
    x, grad = (torch.empty(0, width, 8, 8).contiguous(memory_format=torch.channels_last) for width in widths)
    assert winograd.conv3x3(x, torch.randn(*widths[::-1], 3, 3), None, None, None, 2).shape == grad.shape
    assert torch.equal(winograd.weight_gradient(x, grad, 2), torch.zeros(*widths[::-1], 3, 3))


def test_autocast_does_not_change_products_and_gradients() -> None:
    for widths in ((32, 32), (208, 192)):
        case = drawn(1, widths, (8, 9))
        product = winograd.conv3x3(case.x, case.weight, None, None, None, 2)
        gradient = winograd.weight_gradient(case.x, case.grad, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(winograd.conv3x3(case.x, case.weight, None, None, None, 2), product)
            assert torch.equal(winograd.weight_gradient(case.x, case.grad, 2), gradient)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are called from here on, in order."""
    if not winograd.TRAINS:
        pytest.skip("training uses these kernels only on processors with AVX-512")
    seen: list[str] = []

    for name in ("conv3x3", "weight_gradient"):
        function = getattr(winograd, name)

        def spy(*args: Any, function: Any = function, name: str = name, **options: Any) -> Any:
            seen.append(name)
            return function(*args, **options)

        monkeypatch.setattr(winograd, name, spy)
    return seen


FORTH_AND_BACK = ["conv3x3", "conv3x3", "weight_gradient"]


def gradients(run: Any, x: Tensor, module: nn.Module, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = run(x)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **found}


def assert_same(found: dict[str, Tensor], value: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == value.keys()
    for name, tensor in value.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=bound * float(tensor.abs().max()), msg=name)


@pytest.mark.parametrize("bias", [True, False])
def test_a_full_precision_convolution_has_the_same_gradients(bias: bool, calls: list[str]) -> None:
    case = drawn(2, (32, 48), (9, 14))
    conv = nn.Conv2d(32, 48, 3, padding=1, bias=bias)
    y, found = gradients(lambda x: conv3x3(conv, x), case.x, conv, case.grad)
    assert calls == FORTH_AND_BACK
    plain_y, plain = gradients(conv, case.x, conv, case.grad)
    torch.testing.assert_close(y, plain_y, rtol=0, atol=2e-6 * float(plain_y.abs().max()))
    assert_same(found, plain, 2e-6)


@pytest.mark.skipif(has_amx(), reason="processors with AMX multiply bfloat16 themselves")
def test_under_autocast_it_rounds_as_bfloat16_does(calls: list[str]) -> None:
    case = drawn(2, (32, 48), (16, 14))
    conv = nn.Conv2d(32, 48, 3, padding=1)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return conv3x3(conv, x)

    y, found = gradients(run, case.x, conv, case.grad)
    assert calls == FORTH_AND_BACK
    assert y.dtype == torch.bfloat16
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(found, torch.float32)
    plain_y, plain = gradients(conv, case.x, conv, case.grad.bfloat16().float())
    torch.testing.assert_close(y.float(), plain_y, rtol=0, atol=2**-7 * float(plain_y.abs().max()))
    assert_same(found, plain, 2**-6)


def test_a_module_with_hooks_is_called() -> None:
    conv, heard = nn.Conv2d(32, 32, 3, padding=1), []
    conv.register_forward_hook(lambda module, args, out: heard.append(out))
    y = conv3x3(conv, torch.randn(1, 32, 8, 8).contiguous(memory_format=torch.channels_last))
    assert len(heard) == 1
    assert heard[0] is y


@pytest.mark.parametrize("conv", [nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3, 2, 1), nn.Conv2d(6, 32, 3, padding=1)])
def test_other_convolutions_stay_as_they_are(conv: nn.Conv2d) -> None:
    x = torch.randn(1, conv.in_channels, 8, 8)
    assert torch.equal(conv3x3(conv, x), conv(x))


def test_a_binary_convolution_has_the_gradients_of_its_chain_of_modules(calls: list[str]) -> None:
    case = drawn(2, (48, 48), (10, 11))
    layer = BinaryConv2d(48, 48, 3, padding=1, method=Method(shortcut=True))
    y, found = gradients(layer, case.x, layer, case.grad)
    assert calls == FORTH_AND_BACK[1:]
    handle = layer.activation.register_forward_hook(lambda *_: None)  # hooks disable the fused node
    chain_y, chain = gradients(layer, case.x, layer, case.grad)
    handle.remove()
    torch.testing.assert_close(y, chain_y, rtol=1e-6, atol=1e-6 * float(chain_y.abs().max()))
    assert_same(found, chain, 2e-6)


def test_a_network_has_the_same_gradients_with_and_without_winograd(calls: list[str], monkeypatch: Any) -> None:
    torch.manual_seed(0)
    net = binarize.convert(SRUNet(base_channels=32, channel_mults=(1, 2), res_blocks=1), "bidiffsr").train()
    x, condition = torch.rand(2, 2, 3, 16, 16)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(1)  # dropout
        net.zero_grad()
        y = net(x, torch.tensor([3, 900]), condition).sample
        y.square().mean().backward()
        return y.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    y, found = run()
    assert len(calls) > 20
    calls.clear()
    monkeypatch.setattr(winograd, "TRAINS", False)
    plain_y, plain = run()
    assert not calls
    torch.testing.assert_close(y, plain_y, rtol=0, atol=1e-5)
    for name, value in plain.items():
        assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-7, name


@pytest.mark.parametrize("widths", [(16, 3), (32, 48)])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dots", [True, False])
def test_weights_in_bfloat16_are_their_values_in_float32(
    dots: bool, dtype: torch.dtype, tile: Literal[2, 4], widths: tuple[int, int]
) -> None:
    x, weight = torch.randn(2, widths[0], 6, 9).to(dtype), torch.randn(*widths[::-1], 3, 3).bfloat16()
    for layout in (torch.contiguous_format, torch.channels_last):
        given = weight.contiguous(memory_format=layout)
        found, expected = (
            winograd.conv3x3(x, w, None, None, None, tile, bf16_products=dots) for w in (given, weight.float())
        )
        assert torch.equal(found, expected)
    if widths[1] % 16 == 0 and dtype == torch.float32:
        grad = torch.randn(2, widths[1], 6, 9)
        found, expected = (
            winograd.conv3x3(grad, w, None, None, None, tile, transposed=True) for w in (weight, weight.float())
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("widths", [(16, 3), (48, 32), (80, 144)])
@pytest.mark.parametrize("size", [(5, 7), (9, 70)])
@pytest.mark.parametrize("dots", [True, False])
def test_a_3x3_convolution_in_bfloat16_is_near_torchs_in_float32(
    dots: bool, size: tuple[int, int], widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not dots:  # the code that processors without AVX512_BF16 run
        monkeypatch.setattr(winograd, "AVX512_BF16", False)
    x, weight = torch.randn(2, widths[0], *size).bfloat16(), torch.randn(*widths[::-1], 3, 3)
    bias, residual = torch.randn(widths[1]), torch.randn(2, widths[1], *size).bfloat16()
    norm = torch.randn(2, 2, widths[0])
    activated = nn.functional.silu(x.float() * norm[0, ..., None, None] + norm[1, ..., None, None])
    expected = nn.functional.conv2d(activated, weight, bias, padding=1) + residual.float()
    error = ops.conv3x3(x, weight, bias, norm, residual).float() - expected
    share = 0.02 if dots else 0.006
    assert error.norm() <= share * expected.norm()
    assert error.abs().max() <= 3 * share * expected.abs().max()
