"""Layers whose class is not one of torch.nn's: EDM's and score_sde's, registered ones, and those nobody knows."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from errors_case import assert_error
from torch import Tensor, nn

import binarize
from binarize.layers import BinaryConv2d, BinaryLinear, adapters


class EDMConv(nn.Module):
    """A convolution in EDM's style, which can also resample with a filter."""

    def __init__(self, channels: int, out: int, kernel: int, bias: bool = True, up: bool = False) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.up, self.down = channels, out, up, False
        self.weight = nn.Parameter(torch.randn(out, channels, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.randn(out)) if kernel and bias else None
        self.register_buffer("resample_filter", torch.ones(1, 1, 2, 2) / 4 if up else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            filters = self.resample_filter.mul(4).tile([self.in_channels, 1, 1, 1])
            x = F.conv_transpose2d(x, filters, groups=self.in_channels, stride=2)
        if self.weight is not None:
            x = F.conv2d(x, self.weight.to(x.dtype), padding=self.weight.shape[-1] // 2)
        return x if self.bias is None else x.add_(self.bias.to(x.dtype).reshape(1, -1, 1, 1))


class EDMLinear(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, width)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.to(x.dtype).t()).add_(self.bias.to(x.dtype))


class NIN(nn.Module):
    """score_sde's 1x1 convolution."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.einsum("bchw,cd->bhwd", x, self.W) + self.b).permute(0, 3, 1, 2)


class AttnBlockpp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.NIN_0, self.NIN_1 = NIN(width, width), NIN(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.NIN_1(self.NIN_0(x))


class NormalizedConv(nn.Module):
    """Forced weight normalization in training, as in EDM2 and lucidrains' KarrasUnet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.copy_(self.weight / self.weight.norm())
        return F.conv2d(x, self.weight, padding=1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.up = EDMConv(3, 8, 3), EDMConv(8, 8, 3, up=True)
        self.body, self.shortcut = EDMConv(8, 8, 3, bias=False), NIN(8, 16)
        self.resample, self.attn = EDMConv(16, 16, 0), AttnBlockpp(16)
        self.normalized, self.qkv, self.proj = NormalizedConv(16), EDMConv(16, 16, 1), EDMConv(16, 16, 1)
        self.affine, self.proj_out = EDMLinear(4, 16), EDMConv(16, 3, 3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.shortcut(self.body(self.up(self.proj_in(x))))
        x = (
            self.normalized(self.attn(self.resample(x)))
            + self.affine(time.float()[:, None].expand(-1, 4))[..., None, None]
        )
        return self.proj_out(x + self.proj(self.qkv(x)))


def given() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8, 8), torch.tensor([3, 900])


def test_convolutions_of_edm_and_score_sde_become_binary_and_the_rest_is_counted() -> None:
    model, random_state = Net(), torch.get_rng_state()
    planned, body = binarize.plan(model, "bidiffsr"), model.body.weight
    binarize.convert(model, "bidiffsr")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert binarize.report(model) == planned
    rows = {row.name: row for row in planned.rows}
    assert {row.name for row in planned.replaced} == {"body", "shortcut"}
    assert isinstance(model.body, BinaryConv2d)
    assert model.body.weight is body
    reasons = {"proj_in": "first", "proj_out": "last", "affine": "time or class embedding", "up": "EDMConv resamples"}
    reasons |= dict.fromkeys(("attn.NIN_0", "attn.NIN_1", "qkv", "proj"), "attention projection")
    reasons |= {"normalized.weight": "parameters in NormalizedConv, a class the toolkit does not know"}
    assert {
        name: row.detail.startswith(reasons.get(name, "?")) for name, row in rows.items() if row.action == "kept"
    } == (dict.fromkeys(reasons, True))
    weights = sum(p.numel() for p in Net().parameters() if p.dim() > 1)
    assert sum(row.weights for row in planned.rows) == weights
    assert planned.binary_share == (8 * 8 * 9 + 8 * 16) / weights
    model(*given()).square().sum().backward()
    assert model.body.weight.grad.abs().sum() > 0


def test_linear_layers_of_a_class_of_their_own_follow_linear() -> None:
    model = binarize.convert(Net(), "reactnet", linear=["affine"], overrides={"qkv": "bnn"})
    assert isinstance(model.affine, BinaryLinear)
    assert isinstance(model.qkv, BinaryConv2d)


def test_revert_gives_the_original_classes_back_also_after_packing(tmp_path: Any) -> None:
    model, plain = binarize.convert(Net(), "reactnet").double().eval(), Net().double()
    x, time = given()
    expected = model(x.double(), time)
    float_copy = binarize.revert(copy.deepcopy(model))
    assert {name: type(m) for name, m in float_copy.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert float_copy.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(float_copy.shortcut.W.t(), model.shortcut.weight[:, :, 0, 0])
    float_copy(x.double(), time)
    assert pickle.loads(pickle.dumps(model)).body.original is not None
    loaded = binarize.load(binarize.save(binarize.pack(model), tmp_path), Net().double())
    with torch.no_grad():
        torch.testing.assert_close(loaded(x.double(), time), expected, rtol=1e-9, atol=1e-9)
    assert not any(p.numel() and not p.is_meta for p in loaded.body.original.shell.parameters())
    back = binarize.revert(binarize.unpack(loaded))
    assert isinstance(back.shortcut, NIN)
    assert set(back.shortcut.W.abs().unique().tolist()) == {1.0}


class Wavy(nn.Conv2d):
    """A convolution of a class of one's own, with another forward and a scale."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


class Gained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.gain = nn.Parameter(torch.randn(4, 4, 3)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.kernel * self.gain, padding=1)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_ADAPTERS", {})


def as_conv(layer: Any) -> nn.Module:
    plain = nn.Conv2d(4, 4, 3, padding=1, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


@pytest.mark.usefixtures("registry")
def test_a_registered_class_becomes_binary_and_comes_back() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 4, 1), Wavy(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))

    assert (
        binarize.report(binarize.convert(network(), "bnn")).kept[1].detail.startswith("Wavy has a forward of its own")
    )
    binarize.register_layer(Wavy, as_conv)
    assert_error("Wavy is already registered", binarize.register_layer, Wavy, as_conv)
    model = network()
    weight, x = model[1].weight, torch.randn(1, 4, 5, 5)
    expected, biases = model(x), [layer.bias.detach().clone() for layer in model[:3]]
    binarize.convert(model, "bnn")
    assert isinstance(model[1], BinaryConv2d)
    assert model[1].weight is weight
    binarize.revert(model)
    assert type(model[1]) is Wavy
    assert model[1].weight is weight
    with torch.no_grad():
        assert not model[1].bias.any()  # "bnn" drops biases
        for layer, old in zip(model[:3], biases, strict=True):
            layer.bias.copy_(old)
    torch.testing.assert_close(model(x), expected)
    binarize.register_layer(Wavy, lambda layer: "a sine follows", replace=True)
    assert binarize.report(binarize.convert(network(), "bnn")).kept[1].detail == "a sine follows"


@pytest.mark.usefixtures("registry")
def test_registrations_that_would_lose_something_are_refused() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv1d(4, 4, 1), Gained(), nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1))

    def without_gain(layer: Any) -> nn.Module:
        plain = nn.Conv1d(4, 4, 3, padding=1, bias=False)
        plain.weight = layer.kernel
        return plain

    def copied(layer: Any) -> nn.Module:
        plain = without_gain(layer)
        plain.weight = nn.Parameter(layer.kernel.detach() * layer.gain.detach())
        plain.bias = nn.Parameter(torch.zeros(1))
        return plain

    for to_plain, problem in (
        (without_gain, "must take over all 49 numbers in the layer's parameters; it took 48"),
        (lambda layer: layer, "must return one of nn.Conv1d, .* got Gained"),
        (copied, "made new parameters; return the layer's own Parameter objects, or pass from_plain="),
    ):
        binarize.register_layer(Gained, to_plain, replace=True)
        assert_error(problem, binarize.convert, network(), "bnn")
    assert_error("needs a class derived from nn.Module", binarize.register_layer, "Gained", copied)


def test_a_network_of_unknown_classes_says_which() -> None:
    model = nn.Sequential(NormalizedConv(4), NormalizedConv(4))
    assert_error("parameters in NormalizedConv, a class the toolkit does not know", binarize.convert, model, "bnn")
