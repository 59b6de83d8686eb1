"""The packed convolution itself: integers equal to an oracle's, what follows them, and what holds the bits."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_case import CLOSE, MODES, Problem, dot_products, on_each, padded, problems, with_everything
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels import backends
from binarize.kernels.binary_conv import BinaryConv, OutputTransform, Shortcut, padding_correction
from binarize.kernels.bitpack import FilterShape, from_bits, from_dense, to_bits, to_dense
from binarize.kernels.checks import check_devices
from binarize.kernels.ops import binary_conv2d, conv3x3, norm_factors, norm_silu, packed_conv2d, shuffle
from binarize.layers import BinaryConv2d, BinaryLinear
from binarize.layers.activations import ApproxSign
from binarize.layers.scales import ReLU
from binarize.methods import Method
from binarize.packed import PackedConv2d, PackedLinear
from binarize.timestep import TimestepContext

EITHER = ("numba", "torch")


@pytest.mark.parametrize("backend", EITHER)
@settings(max_examples=60)
@given(problem=problems())
def test_dot_products_equal_the_oracle_bit_for_bit(backend: Any, problem: Problem) -> None:
    with backends.use(backend):
        found = binary_conv2d(problem.x, problem.conv, **problem.options)
    assert found.dtype == problem.x.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    # Integers are exact in float32 and float64; bfloat16 rounds them once, to nearest even.
    assert torch.equal(found, torch.from_numpy(problem.expected).to(found.dtype))


# Counts are widened every 31 words, or every 31 times eight after the first seven.
@pytest.mark.parametrize("words", [*range(1, 27), 31, 32, 62, 63, 255, 256, 262, 263, 264, 511, 520])
@pytest.mark.parametrize("differing", [0.0, 0.5, 1.0])
def test_sums_of_any_number_of_words_are_exact_where_all_bits_differ_too(words: int, differing: float) -> None:
    # All bits that differ are the most that a byte, in which they are counted, has to hold.
    channels, out_channels = 32 * words, [20, 48, 64, 120][words % 4]  # one to four blocks at a time, and a rest
    layer = PackedConv2d(BinaryConv2d(channels, out_channels, 1, method=Method(weight="sign")))
    codes = layer.codes()[0].float().flatten(1)
    signs = torch.where(torch.rand(channels) < differing, -codes[3], codes[3])
    x = torch.stack([signs, -signs, torch.randn(channels)], 1).view(1, channels, 1, 3).repeat(1, 1, 1, 3)
    expected = codes.double() @ x[0, :, 0].sign().double()
    assert torch.equal(layer(x)[0, :, 0].double(), expected)


def test_a_layer_that_changes_after_a_call_computes_what_it_is_now() -> None:
    layer = PackedConv2d(BinaryConv2d(8, 8, 3, padding=1, method="bbcu"))
    x = torch.randn(2, 8, 5, 6)

    def replace_slope() -> None:
        layer.post.slope = nn.Parameter(torch.full_like(layer.post.slope, 0.75))

    def replace_post() -> None:
        layer.post = copy.deepcopy(layer.post)
        layer.post.shift_out.data.fill_(3.0)

    with torch.no_grad():
        before = layer(x)
        changes = (lambda: layer.scales.mul_(2), replace_slope, replace_post, lambda: setattr(layer, "scales", None))
        for change in changes:
            change()
            after = layer(x)
            assert not torch.equal(after, before)
            assert torch.equal(after, copy.deepcopy(layer)(x))  # a copy compiles its own
            before = after


@settings(max_examples=40)
@given(case=with_everything((torch.float32, torch.bfloat16)))
def test_the_kernel_and_plain_torch_do_the_same(case: Any) -> None:
    x, conv, options = case
    results = on_each(EITHER, lambda: binary_conv2d(x, conv, **options))
    torch.testing.assert_close(*results, **CLOSE[x.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shortcut", [Shortcut.FIRST, Shortcut.LAST])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (2, 1), ((5, 3), 2), ((1, 4), (1, 3)), (1, 1)])
def test_a_shortcut_reads_the_activated_input(kernel: Any, dilation: Any, shortcut: Shortcut, dtype: Any) -> None:
    layer = BinaryConv2d(32, 32, kernel, padding="same", dilation=dilation, method=Method()).eval()
    conv = dataclasses.replace(PackedConv2d(layer).compiled().convs[0], shortcut=shortcut, compiled={})
    # Powers of two and steps of a quarter, so that no sign depends on rounding.
    x = (torch.randint(-8, 8, (2, 32, 37, 6)) / 4 + 0.125).to(dtype)
    norm = torch.stack([torch.randn(2, 32).sign(), torch.randn(2, 32).sign() / 16])
    results = on_each(EITHER, lambda: binary_conv2d(x, conv, input_norm=norm))
    torch.testing.assert_close(*results, **CLOSE[dtype])


@st.composite
def layers(draw: st.DrawFn) -> tuple[BinaryConv2d, TimestepContext, int]:
    groups, channels, out = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 20))
    kernel, dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3))), draw(st.integers(1, 2))
    mode, padding = draw(st.sampled_from(list(MODES))), draw(st.sampled_from(["same", "valid", (1, 0), (0, 1), (1, 2)]))
    stride = 1 if padding == "same" else draw(st.integers(1, 2))
    activation, pre = draw(st.sampled_from(["ste", "unit_round"])), draw(st.sampled_from([None, "tar"]))
    method = Method(activation=activation, weight="sign", pre=pre, groups=4, keep_bias=True)
    sizes = groups * channels, groups * out, kernel, stride, padding, dilation, groups
    conv, context = nn.Conv2d(*sizes, draw(st.booleans()), mode), TimestepContext(100)
    return BinaryConv2d.from_float(conv, method, context), context, draw(st.integers(0, 2**32))


@settings(max_examples=40)
@given(drawn=layers())
def test_a_layer_equals_the_oracle(drawn: tuple[BinaryConv2d, TimestepContext, int]) -> None:
    layer, context, seed = drawn
    rng = np.random.default_rng(seed)
    # Quarters: sums with shifts and biases are exact, and many of them are exactly 0 or 1/2.
    with torch.no_grad():
        for parameter in (p for p in (layer.bias, getattr(layer.pre, "bias", None)) if p is not None):
            parameter.copy_(torch.from_numpy(rng.integers(-4, 5, tuple(parameter.shape)) / 4))
    x = torch.from_numpy(rng.integers(-4, 5, (3, layer.in_channels, 7, 9)) / 4).float()
    timesteps = torch.tensor([3, 30, 99])

    shifted = x.double().numpy()
    if layer.pre is not None:
        shifted = shifted + layer.pre.bias.detach().double().numpy()[timesteps * 4 // 100][:, :, None, None]
    unsigned = layer.activation.levels == (0, 1)
    codes = (np.clip(shifted, 0, 1) > 0.5).astype(np.int64) if unsigned else 2 * (shifted >= 0) - 1
    codes = padded(codes, layer.declared_padding, layer.kernel_size, layer.dilation, layer.padding_mode)
    weight = np.where(layer.weight.detach().numpy() >= 0, 1, -1)
    expected = dot_products(codes, weight, layer.stride, (0, 0, 0, 0), layer.dilation, layer.groups).astype(np.float64)
    if layer.bias is not None:
        expected += layer.bias.detach().double().numpy()[:, None, None]

    packed = PackedConv2d(layer.eval())
    with torch.no_grad(), context.using(timesteps):
        for found in (layer(x), *on_each(EITHER, lambda: packed(x))):
            assert torch.equal(found.double(), torch.from_numpy(expected))


@settings(max_examples=30)
@given(tokens=st.lists(st.integers(1, 9), max_size=2), sizes=st.tuples(*[st.integers(1, 70)] * 2), mixed=st.booleans())
def test_a_linear_layer_equals_the_oracle(tokens: list[int], sizes: tuple[int, int], mixed: bool) -> None:
    method = Method(weight="sign", pre="tar" if mixed else None, groups=4, keep_bias=True)
    context = TimestepContext(100)
    plain = nn.Linear(*sizes)
    layer = BinaryLinear.from_float(plain, method, context).eval()
    with torch.no_grad():
        layer.bias.copy_(torch.randint(-3, 4, (sizes[1],)))
        if mixed:
            layer.pre.bias.copy_(torch.randint(-2, 3, (4, sizes[0])) / 4)
    x, timesteps = torch.randint(-3, 4, (3, *tokens, sizes[0])) / 4, torch.tensor([3, 30, 99])
    shifted = x.clone()
    for sample, group in enumerate(timesteps * 4 // 100):
        shifted[sample] += layer.pre.bias[group].detach() if mixed else 0
    codes = 2 * (shifted.numpy() >= 0).astype(np.int64) - 1
    weight = np.where(layer.weight.detach().numpy() >= 0, 1, -1)
    expected = codes @ weight.T + layer.bias.detach().numpy().astype(np.int64)
    packed = PackedLinear(layer)
    with torch.no_grad(), context.using(timesteps):
        assert torch.equal(packed(x), torch.from_numpy(expected).float())
        assert torch.equal(layer(x), packed(x))


@given(
    st.integers(1, 35), st.integers(1, 70), st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(1, 3),
    st.integers(1, 2), st.integers(0, 2**32),
)  # fmt: skip
def test_bits_survive_the_file_and_the_memory_layout(out, per_group, kernel, groups, bases, seed) -> None:
    shape = FilterShape(out * groups, per_group, kernel, groups, bases)
    size = bases, out * groups, per_group, *kernel
    bits = np.random.default_rng(seed).integers(0, 2, size, dtype=np.uint8)
    dense = np.packbits(bits.reshape(shape.bases, -1), axis=1)  # most significant bit first, zeros at the end
    words = from_dense(torch.from_numpy(dense), shape)
    assert words.dtype == torch.int32
    assert tuple(words.shape) == shape.memory
    assert torch.equal(words, from_bits(torch.from_numpy(bits), shape))
    assert np.array_equal(to_bits(words, shape).numpy(), bits)
    assert np.array_equal(to_dense(words, shape).numpy(), dense)
    # A word holds 32 input channels of one tap, and 16 output channels stand side by side.
    channel, tap, block = per_group - 1, kernel[0] * kernel[1] - 1, (groups - 1) * shape.blocks + (out - 1) // 16
    word = int(words[0, block, tap * shape.words + channel // 32, (out - 1) % 16])
    assert (word >> (channel % 32)) & 1 == bits[0, -1, -1, -1, -1]


def test_operators_keep_the_contract_of_torch_library() -> None:
    layer = PackedConv2d(BinaryConv2d(5, 6, 3, 2, 1, method="reactnet").eval())
    conv, x = layer.compiled().convs[0], torch.randn(2, 5, 7, 8)
    arguments = [
        x, *conv.tensors, None, conv.sizes, False, -math.inf, math.inf, 0, torch.randn(2, 2, 5), torch.randn(2, 6),
        torch.randn(2, 6, 4, 4),
    ]  # fmt: skip
    torch.library.opcheck(packed_conv2d.overload, arguments)
    torch.library.opcheck(packed_conv2d.overload, [x.bfloat16(), *arguments[1:11], None, None, None])
    torch.library.opcheck(
        norm_factors.overload, [torch.randn(2, 8, 3, 3), torch.randn(2, 8), 4, None, torch.randn(8), 1e-5]
    )
    wide = [torch.randn(2, 32, 4, 5), torch.randn(16, 32, 3, 3), torch.randn(16), None, torch.randn(2, 16, 4, 5)]
    torch.library.opcheck(conv3x3.overload, wide)
    torch.library.opcheck(conv3x3.overload, [wide[0], torch.randn(3, 32, 3, 3), torch.randn(3), None, None])
    torch.library.opcheck(norm_silu.overload, [torch.randn(2, 8, 3, 3), torch.randn(2, 2, 8)])
    torch.library.opcheck(shuffle.overload, [torch.randn(2, 32, 3, 3), torch.randn(2, 64, 3, 3)])


def test_empty_inputs_give_empty_outputs() -> None:
    layer = PackedConv2d(BinaryConv2d(4, 6, 3, padding=1, method=Method()).eval())
    assert layer(torch.randn(0, 4, 5, 5)).shape == (0, 6, 5, 5)
    linear = PackedLinear(BinaryLinear(4, 6, method=Method()).eval())
    assert linear(torch.randn(2, 0, 4)).shape == (2, 0, 6)


REFUSING: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "norm_factors": (norm_factors, "x", {"channel_bias": None, "groups": 4, "weight": None, "bias": None, "eps": 1e-5}),
    "norm_silu": (norm_silu, "x", {"input_norm": torch.randn(2, 2, 32)}),
    "shuffle": (shuffle, "hidden", {"skip": torch.randn(2, 32, 4, 4)}),
    "conv3x3": (
        conv3x3,
        "x",
        {"weight": torch.randn(16, 32, 3, 3), "bias": None, "input_norm": None, "residual": None},
    ),
    "packed_conv2d": (PackedConv2d(BinaryConv2d(32, 6, 3, padding=1, method=Method()).eval()), "input", {}),
}


@pytest.mark.parametrize("named", [False, True], ids=["positional", "named"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("which", REFUSING)
def test_packed_operators_refuse_a_gradient(which: str, compiled: bool, named: bool) -> None:
    operator, first, others = REFUSING[which]

    def loss(x: Tensor) -> Tensor:
        found = operator(**{first: x}, **others) if named else operator(x, *others.values())
        return sum((part.square().sum() for part in found), x.sum())

    torch._dynamo.reset()
    run = torch.compile(loss, backend="aot_eager") if compiled else loss
    # The compiler asks for the gradient's graph, and wraps what it is answered.
    error = torch._dynamo.exc.BackendCompilerFailed if compiled else BinarizeError
    with pytest.raises(error, match="packed layers have no gradient; train the model that it was packed from"):
        run(torch.randn(2, 32, 4, 4, requires_grad=True)).backward()


def test_a_group_may_lie_in_memory_in_any_way() -> None:
    conv = PackedConv2d(BinaryConv2d(16, 16, 3, padding=1, method=Method()).eval()).compiled().convs[0]
    transform = OutputTransform(*torch.randn(3, 16), *torch.randn(3, 3, 16))
    conv = BinaryConv.lay_out(conv.filters, conv.shape, conv.geometry, torch.randn(3, 16), transform)
    x = torch.randn(2, 16, 6, 7)
    for group in (torch.tensor([0, 2, 1, 2])[::2], torch.tensor([1]).expand(2)):
        found = on_each(EITHER, lambda group=group: binary_conv2d(x, conv, group))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: check_devices("packed convolution", torch.rand(1), None, torch.rand(1, device="meta")),
            r"the input is on cpu and the layer on meta; .* x\.to\('meta'\)",
        ),
        (lambda: conv3x3(torch.rand(1, 16, 8, 8), torch.rand(16, 32, 3, 3), None, None, None), "must have the shape"),
        (lambda: conv3x3(torch.rand(1, 8, 8, 8), torch.rand(16, 8, 3, 3), None, None, None), "8 input channels; .* 16"),
        (
            lambda: norm_factors(torch.rand(1, 16, 8, 8), None, 4, torch.rand(8), None, 1e-5),
            "GroupNorm: weight must have the shape",
        ),
    ],
)
def test_operators_refuse_what_does_not_fit(call: Any, message: str) -> None:
    with pytest.raises(BinarizeError, match=message):
        call()


@pytest.mark.parametrize("width", [3, 32])
@pytest.mark.parametrize("batch", [0, 2])
def test_a_3x3_convolution_equals_torchs_with_an_empty_batch_too(batch: int, width: int) -> None:
    x, weight, bias = torch.randn(batch, 16, 9, 7), torch.randn(width, 16, 3, 3), torch.randn(width)
    residual, plain = torch.randn(batch, width, 9, 7), nn.functional.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(conv3x3(x, weight, bias, None, None), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv3x3(x, weight, bias, None, residual), plain + residual, rtol=1e-4, atol=1e-4)
    norm = torch.randn(2, batch, 16)
    activated = nn.functional.silu(x * norm[0, ..., None, None] + norm[1, ..., None, None])
    expected = nn.functional.conv2d(activated, weight, None, padding=1)
    torch.testing.assert_close(conv3x3(x, weight, None, norm, None), expected, rtol=1e-4, atol=1e-4)
    with torch.device("meta"):
        assert conv3x3(x, weight, bias, None, None).device.type == "cpu"


def test_outputs_in_bfloat16_are_rounded_to_the_nearest_and_ties_to_even() -> None:
    packed = PackedConv2d(BinaryConv2d.from_float(nn.Conv2d(64, 32, 3, padding=1, bias=False), "bnn").eval())
    x = torch.randn(2, 64, 12, 12).bfloat16()
    residual = 2.0 * torch.randint(128, 256, (2, 32, 12, 12))  # bfloat16 holds even numbers here; odd sums are ties
    residual[0, :, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.38e38])
    with torch.no_grad():
        exact = packed(x.float()) + residual.bfloat16().float()
        assert (exact % 2 == 1).any()
        for found in on_each(EITHER, lambda: packed(x, residual=residual.bfloat16())):
            torch.testing.assert_close(found, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    x, norm, weight = torch.randn(2, 32, 9, 8), nn.GroupNorm(4, 32), torch.randn(16, 32, 3, 3)

    def run() -> list[Tensor]:
        factors = norm_factors(x, None, 4, norm.weight, norm.bias, norm.eps)
        return [factors, norm_silu(x, factors), conv3x3(x, weight, None, factors, None)]

    with torch.no_grad():
        expected = run()
        try:
            torch.set_default_dtype(dtype)
            found = run()
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_norm_of_zero_is_folded_as_zero() -> None:
    layer = BinaryConv2d(16, 20, 3, padding=1, method=Method(weight="scaled_sign", norm="batch_norm")).eval()
    nn.init.zeros_(layer.norm.weight)
    x = torch.randn(1, 16, 5, 5)
    packed = PackedConv2d(layer)
    for found in on_each(EITHER, lambda: packed(x)):
        assert torch.equal(found, layer(x))
        assert not found.any()


class Rooted(ReLU):
    """A user's activation function that inherits from one that the kernel computes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0).sqrt()


class Above(ApproxSign):
    """A sign of one's own, whose threshold is not 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 1)


def test_a_subclass_runs_as_what_it_is() -> None:
    layer = BinaryConv2d(8, 8, 3, padding=1, method=Method(weight="scaled_sign", post=lambda spec: Rooted())).eval()
    x = torch.randn(1, 8, 5, 5)
    packed = PackedConv2d(layer)
    assert packed.compiled().lowered.rest == ("post",)
    torch.testing.assert_close(packed(x), layer(x))
    layer.activation = Above()
    with pytest.raises(BinarizeError, match="Above does not declare the two values that it returns"):
        PackedConv2d(layer)


def test_layers_made_in_inference_mode_run() -> None:
    with torch.inference_mode():
        layer = PackedConv2d(BinaryConv2d(8, 8, 3, padding=1, method=Method(post="rprelu")).eval())
        x = torch.randn(1, 8, 5, 5)
        assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(("out_channels", "in_channels", "groups"), [(16, 32, 1), (6, 70, 1), (36, 2, 2)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
@pytest.mark.parametrize("unsigned", [False, True])
def test_padding_is_corrected_by_the_sums_of_weights(
    out_channels: int, in_channels: int, groups: int, kernel: tuple[int, int], unsigned: bool
) -> None:
    shape = FilterShape(out_channels, in_channels, kernel, groups)
    bits = torch.randint(0, 2, (1, out_channels, in_channels, *kernel), dtype=torch.uint8)
    sums = 2 * bits[0].int().sum(1).flatten(1) - in_channels  # of the weights of each tap
    full = torch.full((out_channels,), in_channels * math.prod(kernel))
    full = (full + sums.sum(1)) // 2 if unsigned else full
    found = padding_correction(from_bits(bits, shape)[0], shape, unsigned)
    by_group = found.view(1 + math.prod(kernel), groups, -1)[..., : out_channels // groups].flatten(1)
    assert torch.equal(by_group, torch.cat([full.unsqueeze(0), sums.T]).int())
