"""Which layers `convert` replaces, and that the geometry of a replaced convolution is kept exactly."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from errors_case import assert_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import binarize
from binarize import methods
from binarize.layers import BinaryConv2d, BinaryLinear

PLAIN = methods.bnn(weight="scaled_sign", norm=None, post=None)


def between(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 1), layer, nn.Conv2d(4, 4, 1))


def textbook(conv: nn.Conv2d, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return alpha sign(w) * sign(x), the signs padded, by plain PyTorch."""
    signs = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    weight = conv.weight.abs().mean((1, 2, 3), keepdim=True) * torch.where(conv.weight >= 0, 1.0, -1.0).to(x.dtype)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    else:
        height, width = (0, 0) if conv.padding == "valid" else conv.padding
        sides = [width, width, height, height]
    padded = F.pad(signs, sides, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    return F.conv2d(padded, weight, bias, conv.stride, 0, conv.dilation, conv.groups)


@st.composite
def convolutions(draw: Any) -> nn.Conv2d:
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    same = draw(st.booleans())
    stride = 1 if same else draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding: Any = draw(st.sampled_from(["same", "valid"]) if same else st.tuples(st.integers(0, 2), st.integers(0, 2)))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    out, bias = 4 * draw(st.integers(1, 2)), draw(st.booleans())
    return nn.Conv2d(4, out, kernel, stride, padding, dilation, groups, bias, mode).double()


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of the full-precision convolution
@given(convolutions())
def test_every_geometry_is_kept_with_and_without_a_shortcut(conv: nn.Conv2d) -> None:
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    expected = textbook(conv, x)
    assert expected.shape == conv(x).shape
    model = nn.Sequential(nn.Conv2d(4, 4, 1), conv, nn.Conv2d(conv.out_channels, 4, 1)).double()
    with_shortcut, with_bias = copy.deepcopy(model), copy.deepcopy(model)
    latent = conv.weight
    binarize.convert(model, PLAIN)
    assert model[1].weight is latent
    torch.testing.assert_close(model[1](x), expected, rtol=0, atol=1e-12)
    height, width = expected.shape[2:]
    pooled = F.adaptive_avg_pool2d(x, (height, width)).repeat_interleave(conv.out_channels // 4, dim=1)
    binarize.convert(with_shortcut, PLAIN.replace(shortcut=True))
    torch.testing.assert_close(with_shortcut[1](x), expected + pooled, rtol=0, atol=1e-12)
    detail = binarize.report(model).replaced[0].detail
    assert ("bias dropped" in detail) == (conv.bias is not None)
    assert ("groups" in detail) == (conv.groups > 1)
    if conv.bias is not None:
        binarize.convert(with_bias, PLAIN.replace(keep_bias=True))
        torch.testing.assert_close(with_bias[1](x), textbook(conv, x, conv.bias), rtol=0, atol=1e-12)
        assert "bias kept" in binarize.report(with_bias).replaced[0].detail


class OwnForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose2d(4, 4, 2, 2), "transposed convolution: it inserts zeros between the pixels"),
        (OwnForward(4, 4, 1), "OwnForward has a forward of its own, which a binary convolution would drop"),
        (nn.MultiheadAttention(4, 2).out_proj, "nn.MultiheadAttention reads this layer's weight"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_has_no_binary_form_is_left_alone_with_the_reason(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), layer, nn.Conv2d(4, 4, 1))
    binarize.convert(model, "bnn", overrides={"2": "reactnet"})
    assert model[2] is layer
    assert {row.name: row.detail for row in binarize.report(model).kept}["2"].startswith(reason)


def test_lazy_layers_need_a_forward_first() -> None:
    model = between(nn.LazyConv2d(4, 1))
    for call in (binarize.convert, binarize.plan):
        assert_error("'1' is a LazyConv2d without weights; run one forward first", call, model, "bnn")
    model(torch.randn(1, 4, 3, 3))
    binarize.convert(model, "bnn")
    assert isinstance(model[1], BinaryConv2d)


def test_attention_modules_that_read_weights_directly_stay_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Linear(8, 8))
    plain = {row.name: row.detail for row in binarize.plan(model, "reactnet", linear=True).kept}
    assert plain["1.self_attn.out_proj"].startswith("nn.MultiheadAttention reads")
    binarize.convert(model, "reactnet", linear=["*.linear?", "*out_proj"])
    assert [row.name for row in binarize.report(model).replaced] == ["1.linear1", "1.linear2"]
    model(torch.randn(2, 3, 8)).sum().backward()


def conv_stack() -> nn.Sequential:
    return nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6)))


def actions(model: nn.Module, method: Any = "bnn", **options: Any) -> dict[str, str]:
    """Return the action for each layer, checked to be the same in a plan and in a conversion."""
    planned = binarize.plan(model, method, **options)
    assert binarize.report(binarize.convert(model, method, **options)) == planned
    return {row.name: row.action for row in planned.rows}


def test_keep_takes_patterns_and_predicates() -> None:
    def is_fifth(name: str, module: nn.Module) -> bool:
        return name == "4"

    for keep, kept in (("1", "1"), (["[12]"], "12"), (is_fifth, "4"), (["2", is_fifth], "24")):
        found = actions(conv_stack(), keep=keep, overrides={kept[0]: "reactnet"})  # `keep` comes first
        assert [name for name, action in found.items() if action == "kept"] == ["0", *kept, "5"]


def test_the_last_matching_override_counts() -> None:
    model = conv_stack()
    overrides = {"*": "reactnet", "[23]": {"variant": "original"}, "3": None, "4": methods.bbcu()}
    binarize.convert(model, "bnn", overrides=overrides)
    found = [row.detail.partition(",")[0] for row in binarize.report(model).rows]
    # An override reaches the first and the last layer, which are kept by default.
    assert found == ["reactnet", "reactnet", "bnn", "overrides['3'] is None", "bbcu", "reactnet"]
    assert model[2].method.variant == "original"


def test_linear_layers_convert_when_asked() -> None:
    def network() -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(8, 8) for name in ("first", "time_embed", "body", "last")})

    for linear, binary in ((True, "body"), (["time*"], "time_embed"), ("last", "last")):
        assert [n for n, a in actions(network(), linear=linear).items() if a == "binary"] == [binary]
    assert_error(r"would replace nothing in this ModuleDict: .*linear=True", lambda: binarize.convert(network(), "bnn"))


def test_a_layer_with_two_names_is_one_layer_under_both() -> None:
    """diffusers' Downsample2D(name="conv") holds its convolution as `conv` and as `Conv2d_0`."""
    from diffusers.models.resnet import Downsample2D

    model = between(Downsample2D(4, use_conv=True, name="conv"))
    assert model[1].Conv2d_0 is model[1].conv
    report = binarize.report(binarize.convert(model, "bnn"))
    assert isinstance(model[1].conv, BinaryConv2d)
    assert model[1].conv is model[1].Conv2d_0
    assert len(report.rows) == 3
    assert model(torch.randn(1, 4, 8, 8)).shape == (1, 4, 4, 4)
    for pattern in ("*.conv", "*.Conv2d_0"):
        spared = between(Downsample2D(4, use_conv=True, name="conv"))
        spared.append(nn.Conv2d(4, 4, 1))
        assert_error("fold_bias", binarize.convert, spared, "bnn", overrides={"2": {"fold_bias": True}})
        assert spared[1].conv is spared[1].Conv2d_0
        assert type(spared[1].conv) is nn.Conv2d
        binarize.convert(spared, "bnn", keep=pattern)
        assert type(spared[1].conv) is type(spared[1].Conv2d_0) is nn.Conv2d


def test_layers_that_share_a_weight_go_on_sharing_it() -> None:
    model = conv_stack()
    model[2].weight = model[1].weight
    assert binarize.convert(model, "bnn")[1].weight is model[2].weight


def test_linear_layers_match_the_textbook() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 6)).double()
    weight = model[1].weight
    binarize.convert(model, PLAIN, linear=True)
    assert isinstance(model[1], BinaryLinear)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    signs = torch.where(x >= 0, 1.0, -1.0).double()
    expected = signs @ (weight.abs().mean(1, keepdim=True) * torch.where(weight >= 0, 1.0, -1.0)).T
    torch.testing.assert_close(model[1](x), expected, rtol=0, atol=1e-12)
