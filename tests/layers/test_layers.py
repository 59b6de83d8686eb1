"""Layers and their parts against index arithmetic, plain loops and torch's own modules."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from errors_case import assert_error
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_case import MODES, dot_products, padded
from tensors_case import doubles, equal
from torch import Tensor, nn

import binarize
from binarize import layers
from binarize.conditioning import timestep_group
from binarize.kernels.product import binary_conv
from binarize.layers import BinaryConv2d, BinaryLinear, PoolShortcut, ProjectionShortcut, hard_sign
from binarize.layers.delayed import TwoStageWeight
from binarize.layers.scales import TokenBatchNorm
from binarize.layers.schedule import ede_schedule, recu_schedule
from binarize.layers.shortcut import _pool_axis, pool_channels
from binarize.methods import Method
from binarize.timestep import TimestepContext


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_signs_keep_the_dtype_and_differ_at_zero_alone(dtype):
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0], dtype=dtype)
    assert (hard_sign(x).tolist(), hard_sign(x, "zero").tolist()) == ([-1, 1, 1, 1], [-1, 0, 0, 1])
    assert hard_sign(x).dtype == hard_sign(x, "zero").dtype == dtype


@pytest.mark.parametrize(
    ("function", "saved_bytes", "own_copy"),
    [
        (layers.identity_sign, 0, False),
        (layers.approx_sign, 4, False),
        *[(function, 1, True) for function in (layers.clipped_sign, layers.unit_round, layers.clipped_identity)],
        (lambda x: layers.ede_sign(x, torch.tensor(1.0), torch.tensor(1.0)), 4, False),
    ],
)
def test_a_sign_saves_as_little_as_its_gradient_needs(function, saved_bytes, own_copy):
    x = torch.randn(1000, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(x)
    large = [t for t in saved if t.numel() > 1]
    assert sum(t.numel() * t.element_size() for t in large) == 1000 * saved_bytes
    assert all((t.data_ptr() != x.data_ptr()) == own_copy for t in large)


def test_a_variance_over_a_single_feature_gives_a_finite_gradient():
    x = torch.tensor([[[[0.5]]]], requires_grad=True)
    layers.NormalizedApproxSign()(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_shift_and_rprelu_take_each_samples_row(channel_dim):
    context = TimestepContext(100)
    shift, post = layers.Shift(3, 5, context, channel_dim).double(), layers.RPReLU(3, 5, context, channel_dim).double()
    for parameter in (*shift.parameters(), *post.parameters()):
        parameter.data.normal_()
    shape, rows = ((4, 3, 2, 2), (-1, 3, 1, 1)) if channel_dim == 1 else ((4, 2, 3), (-1, 1, 3))
    x, t = doubles(*shape), torch.tensor([0, 39, 40, 99])
    with context.using(t):
        shifted, activated = shift(x), post(x)
        (shifted.square().sum() + activated.square().sum()).backward()
    bias, shift_in, slope, shift_out = (p[[0, 1, 2, 4]].view(rows) for p in (*shift.parameters(), *post.parameters()))
    assert torch.equal(shifted, x + bias)
    u = x + shift_in
    equal(activated, torch.where(u > 0, u, u * slope) + shift_out)
    with context.using(60):  # one timestep for the whole batch
        equal(shift(x), x + shift.bias[3].view(rows))
    for parameter in (*shift.parameters(), *post.parameters()):  # no sample was in group 3: zero, not None
        assert parameter.grad[3].abs().sum() == 0
    assert all(post.shift_out.grad[row].abs().sum() > 0 for row in (0, 1, 2, 4))


def test_rprelu_is_prelu_at_exactly_zero_too():
    ours, theirs = layers.RPReLU(2).double(), nn.PReLU(2).double()
    x = torch.tensor([[[-1.0, 0.0, 1.0], [0.0, -0.0, 2.0]]], dtype=torch.float64)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    outs = ours(inputs[0]), theirs(inputs[1])
    (outs[0].sum() + outs[1].sum()).backward()
    equal(*outs)
    equal(inputs[0].grad, inputs[1].grad)
    equal(ours.slope.grad[0], theirs.weight.grad)


def test_channel_scale_multiplies_channels_rows_and_columns():
    scale = layers.ChannelScale(2, 4, 5).double()
    for parameter in scale.parameters():
        parameter.data.normal_()
    y = doubles(1, 2, 3, 5)
    equal(scale(y, y), y * torch.einsum("c,ik,j->cij", scale.scale, scale.row_scale[:3], scale.column_scale))
    assert_error(r"outputs up to 4 pixels high; got 6\. Give a larger size=\(H, W\)", scale, doubles(1, 2, 6, 5), y)
    assert_error("up to 5 pixels wide; got 7", scale, doubles(1, 2, 4, 7), y)
    linear = BinaryLinear(3, 4, method=binarize.get_method("xnor++", size=(2, 2)))  # tokens have no rows and columns
    assert linear.scale.row_scale is None


def test_input_mean_is_of_a_sample_or_of_a_token():
    x, y = doubles(2, 3, 4, 5), doubles(2, 6, 4, 5)
    equal(layers.InputMeanScale()(y, x), np.stack([y[b].numpy() * np.abs(x[b].numpy()).mean() for b in range(2)]))
    tokens, out = doubles(2, 7, 3), doubles(2, 7, 5)
    equal(layers.InputMeanScale(-1)(out, tokens), out.numpy() * np.abs(tokens.numpy()).mean(-1, keepdims=True))


def test_token_batch_norm_is_batch_norm_over_tokens():
    ours, theirs = TokenBatchNorm(3), nn.BatchNorm1d(3)
    x = torch.randn(4, 7, 3) * 3 + 1
    equal(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2), 1e-5)
    equal(ours.running_var, theirs.running_var, 1e-6)
    assert ours.eval()(x[0, 0]).shape == (3,)


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 2), st.integers(0, 2))))
    stride = (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
    widths, dilation = draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(st.tuples(*[st.integers(1, 2)] * 2))
    return {
        "in_channels": groups * widths[0], "out_channels": groups * widths[1], "kernel_size": kernel, "stride": stride,
        "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": draw(st.sampled_from(list(MODES))),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own, of the plain twin
@settings(max_examples=60)
@given(geometry=geometries(), bias=st.sampled_from(["dropped", "kept", "folded"]), k_map=st.booleans())
def test_binary_convolution_of_any_geometry(geometry, bias, k_map):
    conv = nn.Conv2d(**geometry).double()
    conv.weight.data[0, 0, 0, 0] = 0.0
    scale, kept = "k_map" if k_map and bias == "dropped" else None, {"kept": "keep_bias", "folded": "fold_bias"}
    options = {kept[bias]: True} if bias in kept else {}
    layer = BinaryConv2d.from_float(conv, Method(activation="approx_sign", scale=scale, post="rprelu", **options))
    assert layer.weight is conv.weight
    x = doubles(2, geometry["in_channels"], 7, 8)
    x[0, 0, 0, :2] = 0.0
    image, w = x.numpy(), conv.weight.detach().numpy()
    alpha = np.abs(w).mean((1, 2, 3)).reshape(1, -1, 1, 1)
    steps = geometry["stride"], (0, 0, 0, 0), geometry["dilation"]
    pads = [geometry[name] for name in ("padding", "kernel_size", "dilation", "padding_mode")]
    codes = padded(np.where(image >= 0, 1.0, -1.0), *pads)  # after the sign: a border tap of zeros adds 0
    expected = alpha * dot_products(codes, np.where(w >= 0, 1.0, -1.0), *steps, geometry["groups"])
    if bias != "dropped":
        expected = expected + conv.bias.detach().numpy().reshape(1, -1, 1, 1)
    if layer.scale is not None:
        layer.scale.weight.data.normal_()
        magnitude = padded(np.abs(image).mean(1, keepdims=True), *pads)
        expected = expected * dot_products(magnitude, layer.scale.weight.detach().numpy(), *steps, 1)
    equal(layer(x), np.where(expected > 0, expected, 0.25 * expected), 1e-10)
    plain = layer.to_float()
    assert plain.weight is conv.weight
    if bias == "kept":
        equal(plain(x).detach(), conv(x).detach())
    else:
        assert plain(x).shape == conv(x).shape
        assert plain.bias.abs().sum() == 0


def test_a_k_map_is_a_box_filter_at_first():
    k_map = layers.KMapScale((3, 3), (1, 1), (1, 1), (1, 1)).double()
    x, y = doubles(1, 4, 5, 5), doubles(1, 2, 5, 5)
    equal(k_map(y, x), y * F.avg_pool2d(x.abs().mean(1, keepdim=True), 3, 1, 1), 1e-7)


def test_a_k_map_of_the_input_ignores_the_shift():
    for of_input in (True, False):
        method = Method(pre="shift", scale={"name": "k_map", "of_input": of_input})
        conv, linear = BinaryConv2d(3, 2, 1, method=method), BinaryLinear(3, 2, method=method)
        linear.weight.data = conv.weight.data[:, :, 0, 0]
        x = torch.rand(5, 3) + 2  # positive before and after the shift, so only the map can tell
        results = []
        for shift in (0.0, 1.0):
            conv.pre.bias.data.fill_(shift)
            linear.pre.bias.data.fill_(shift)
            results.append(conv(x[:, :, None, None])[:, :, 0, 0])
            equal(linear(x), results[-1], 1e-6)
        assert torch.allclose(*results) == of_input


def test_dot_products_are_exact_integers_in_float32():
    layer = BinaryConv2d(2048, 2, 3, method="bnn")
    x = torch.randn(1, 2048, 3, 3)
    dot = binary_conv(layer.activation(x), layer.binary_weight(), *layer.steps)
    exact = (torch.where(x >= 0, 1, -1) * torch.where(layer.weight >= 0, 1, -1)).sum((1, 2, 3))
    assert dot.flatten().tolist() == exact.tolist()


def test_a_pooled_shortcut_averages_pixels_and_channels():
    x = doubles(2, 6, 8, 4)
    blocks = x.view(2, 6, 4, 2, 2, 2).mean((3, 5))
    equal(PoolShortcut(6)(torch.zeros(2, 6, 4, 2), x), blocks)
    equal(PoolShortcut(3)(torch.zeros(2, 3, 4, 2), x), blocks.view(2, 3, 2, 4, 2).mean(2))
    equal(PoolShortcut(12)(torch.zeros(2, 12, 4, 2), x), blocks.repeat_interleave(2, 1))
    equal(pool_channels(x, 6), x)
    tokens = doubles(2, 5, 6)
    equal(PoolShortcut(3, -1)(torch.zeros(2, 5, 3), tokens), tokens.view(2, 5, 3, 2).mean(-1))


@pytest.mark.parametrize("length", [1, 2, 5, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 24])
def test_the_pooling_of_exported_graphs_is_adaptive_pooling(length: int, size: int):
    x = doubles(2, 3, length)
    equal(_pool_axis(x, 2, size), F.adaptive_avg_pool1d(x, size))


def test_a_projection_shortcut_is_pooling_a_convolution_and_a_norm():
    shortcut = ProjectionShortcut(4, 6).double()
    x, y = doubles(2, 4, 8, 8), doubles(2, 6, 4, 4)
    normal = nn.BatchNorm2d(6).double()
    equal(shortcut(y, x), y + normal(F.conv2d(F.avg_pool2d(x, 2), shortcut.conv.weight)))
    equal(shortcut(y, x[..., ::2, ::2]), y + normal(F.conv2d(x[..., ::2, ::2], shortcut.conv.weight)))


def test_projections_are_for_convolutions_that_change_shape():
    assert type(BinaryConv2d(4, 4, 3, padding=1, method="bireal").shortcut) is PoolShortcut
    assert type(BinaryConv2d(4, 4, 3, 2, 1, method="bireal").shortcut) is ProjectionShortcut
    assert type(BinaryConv2d(4, 8, 1, method="bireal").shortcut) is ProjectionShortcut
    assert type(BinaryLinear(4, 8, method="bireal").shortcut) is PoolShortcut


def test_a_scaled_shortcut_learns_its_factor():
    y, x = doubles(1, 2, 3, 3), doubles(1, 2, 3, 3)
    equal(layers.ScaledShortcut(2).double()(y, x), y)
    equal(layers.ScaledShortcut(2, start=-0.5).double()(y, x), y - 0.5 * x)
    equal(layers.ScaledShortcut(2, start=-0.5, magnitude=True).double()(y, x), y + 0.5 * x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: layers.CPDown(5), "CPDown: 5 channels cannot be split into 2 equal parts"),
        (lambda: layers.RPReLU(4, 3), "RPReLU with 3 timestep groups needs a TimestepContext; got None"),
        (lambda: layers.CPUp(3, 2), "CPUp: 2 branches of 3 channels are not a multiple of 4"),
        (lambda: layers.PixelDown(3), "PixelDown: needs an even number of channels; got 3"),
        (lambda: layers.PixelUp(3), "PixelUp: needs an even number of channels; got 3"),
        (lambda: layers.EDESign(t_min=0.0), "EDESign: needs 0 < t_min <= t_max; got 0.0 and 10.0"),
        (lambda: layers.LibraWeight(t_min=2, t_max=1), "LibraWeight: needs 0 < t_min <= t_max; got 2 and 1"),
        (lambda: layers.RectifiedWeight(tau_min=0.4), "RectifiedWeight: needs 0.5 < tau_min <= tau_max < 1; got 0.4"),
        (lambda: TwoStageWeight(switch=0.0), r"TwoStageWeight: until is a share of training, in \(0, 1\]; got 0.0"),
        (lambda: BinaryConv2d(2, 2, 1, method=Method(activation=None)), "custom: the activation binarizer cannot be"),
        *[
            (lambda wrong=wrong: binarize.training_step(nn.Identity(), wrong), r"finished training steps, in \[0, 1\]")
            for wrong in (-0.1, 1.1, float("nan"))
        ],
        (
            lambda: BinaryConv2d.from_float(nn.Conv2d(2, 2, 1), Method(norm="batch_norm", post="taa", fold_bias=True)),
            "custom: fold_bias=True needs an RPReLU right after the convolution",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(build, message):
    assert_error(message, build)


def test_a_constant_filter_adds_nothing_under_irnet_and_can_still_learn():
    w = torch.zeros(2, 3, 1, 1, dtype=torch.float64)
    w[1] = 0.1
    w.requires_grad_()
    binary = layers.LibraWeight().double()(w)
    assert binary.scales.tolist() == [[0, 0]]
    (binary.surrogate * doubles(2, 3, 1, 1)).sum().backward()
    assert w.grad.isfinite().all()
    assert (w.grad.abs().sum((1, 2, 3)) > 0).all()


def test_xnor_does_not_centre_a_single_channel_away():
    w = doubles(4, 1, 3, 3).requires_grad_()
    binary = layers.XnorWeight()(w)
    equal(binary.codes[0], torch.where(w >= 0, 1.0, -1.0).detach())
    binary.surrogate.sum().backward()
    inside = (w.abs() < 1).double() * w.clamp(-1, 1).abs().mean((1, 2, 3), keepdim=True)
    equal(w.grad, (inside + 1 / 9).detach())


def test_schedules_are_the_published_ones():
    for progress in (0.0, 0.25, 0.5, 1.0):
        t, k = ede_schedule(torch.tensor(progress, dtype=torch.float64), 0.1, 10.0)
        assert t.item() == pytest.approx(10 ** (-1 + 2 * progress))
        assert k.item() == pytest.approx(max(1, 10 ** (1 - 2 * progress)))
        tau = recu_schedule(torch.tensor(progress, dtype=torch.float64), 0.85, 0.99).item()
        slope = 0.14 / (np.e - 1)  # as the released code writes it: A e^progress + B with B = tau_min - A
        assert tau == pytest.approx(slope * np.e**progress + 0.85 - slope)


def test_latents_are_clamped_where_the_method_clamps_them():
    for variant, options, bound in (("original", {}, 1), ("bibench", {}, 5), ("original", {"clamps_latent": False}, 5)):
        layer = BinaryConv2d(2, 2, 3, method=binarize.get_method("bnn", variant=variant, **options))
        layer.weight.data.fill_(5.0)
        binarize.training_step(layer, 0.1)
        assert layer.weight.max() == bound


@pytest.mark.parametrize(("groups", "total"), [(5, 2000), (3, 1000), (7, 1000), (1, 10), (10, 4)])
def test_groups_are_the_released_codes_for_every_timestep(groups, total):
    t = torch.arange(-3, total + 3)
    expected = [min(max(int(v * groups / total), 0), groups - 1) for v in t.tolist()]
    for dtype in (torch.int64, torch.int32, torch.float32):
        assert timestep_group(t.to(dtype), groups, total).tolist() == expected
    assert timestep_group(torch.tensor(total - 1), groups, total).tolist() == [expected[-4]]


def test_a_timestep_is_known_within_its_forward_alone():
    context = TimestepContext(100)
    assert_error(r"ran outside a forward of its model.*binarize\.timesteps", context.group, 5)
    with context.using(30):
        assert context.group(5).tolist() == [1]
        with context.using(torch.tensor([0, 99])):
            assert context.group(5).tolist() == [0, 4]
        assert context.group(5).tolist() == [1]
        with context.using(None):
            assert context.group(2).tolist() == [0]
    assert_error("ran outside a forward", context.group, 5)
    context.set(7.5)
    context.clear()
    assert_error("ran outside a forward", context.group, 1)


def test_a_layer_says_what_it_is():
    conv = BinaryConv2d(2, 4, 3, 2, "valid", 2, 2, "reflect", method="bnn")
    text = "2, 4, kernel_size=(3, 3), stride=(2, 2), padding=(0, 0), dilation=(2, 2), groups=2, padding_mode='reflect'"
    assert conv.extra_repr() == f"{text}, method='bnn'"
    assert BinaryLinear(2, 4, method="bnn").extra_repr() == "2, 4, method='bnn'"
    assert "5, groups=1" in repr(layers.Shift(5))
    assert "sign_zero='plus'" in repr(conv)
