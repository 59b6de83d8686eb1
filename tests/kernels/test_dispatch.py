"""Calls of packed operators that skip the dispatcher: the same results, and never when something has to see them."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from binarize.errors import BinarizeError
from binarize.kernels import backends
from binarize.kernels.cpu import conv as cpu_conv
from binarize.kernels.cpu import threads as cpu_threads
from binarize.kernels.ops import binary_conv2d, norm_factors, norm_silu, packed_conv2d, skips_dispatcher
from binarize.layers import BinaryConv2d
from binarize.packed import PackedConv2d

EITHER = ("numba", "torch")


class Listener(TorchDispatchMode):
    """Records the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def layer(channels: int = 16) -> PackedConv2d:
    unpacked = BinaryConv2d(channels, channels, 3, padding=1, method="reactnet").eval()
    return PackedConv2d(unpacked.requires_grad_(False))


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The packed convolution as the dispatcher calls it."""
    overload = Mock(wraps=packed_conv2d.overload)
    monkeypatch.setattr(packed_conv2d, "overload", overload)
    return overload


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The sizes, dtypes and thread counts that convolutions are compiled for."""
    made: list[tuple[Any, ...]] = []
    build = cpu_conv.CompiledConv.__init__

    def record(self: Any, conv: Any, size: Any, dtype: Any, has_norm: bool) -> None:
        made.append((tuple(size), dtype, cpu_threads.count()))
        build(self, conv, size, dtype, has_norm)

    monkeypatch.setattr(cpu_conv.CompiledConv, "__init__", record)
    return made


def test_an_ordinary_call_skips_the_dispatcher_and_computes_the_same(dispatched: Mock) -> None:
    convolution = layer()
    for dtype in (torch.float32, torch.bfloat16):
        for size in ((1, 16, 5, 6), (2, 16, 5, 6), (1, 16, 9, 4), (0, 16, 5, 6), (1, 16, 5, 6)):
            x = torch.randn(size).to(dtype)
            given = {"input_norm": torch.rand(2, size[0], 16), "residual": torch.randn(size).to(dtype)}
            for names in ((), ("input_norm",), ("residual",), tuple(given)):
                some = {name: given[name] for name in names}
                dispatched.reset_mock()
                found = convolution(x, **some)
                dispatched.assert_not_called()
                with Listener():
                    expected = convolution(x, **some)
                dispatched.assert_called_once()
                assert torch.equal(found, expected)
                assert found.is_contiguous(memory_format=torch.channels_last)


def see(how: str, convolution: Any, x: Tensor) -> str:
    """Return what a recorder of operators has seen of a call."""
    if how in EITHER:
        with backends.use(how), Listener() as listener:
            convolution(x)
            norm_silu(x, torch.rand(2, 1, 16))
        assert "binarize.norm_silu.default" in listener.seen
        return str(listener.seen)
    if how == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(convolution(mode.from_tensor(x)), FakeTensor)
        return "packed_conv2d"
    if how.endswith("profile"):
        with torch.profiler.profile() if how == "profile" else torch.autograd.profiler.profile() as profile:
            convolution(x)
        return str([event.key for event in profile.key_averages()])
    traced = make_fx(convolution)(x) if how == "make_fx" else torch.fx.symbolic_trace(convolution)
    assert torch.equal(traced(-x), convolution(-x))
    return str(traced.code)


@pytest.mark.parametrize("how", [*EITHER, "profile", "autograd.profile", "make_fx", "symbolic_trace", "fake"])
def test_whatever_records_operators_sees_them(how: str) -> None:
    convolution, x = layer(), torch.randn(1, 16, 5, 5)
    convolution(x)
    assert "packed_conv2d" in see(how, convolution, x)


def test_only_plain_tensors_skip_the_dispatcher(dispatched: Mock) -> None:
    convolution, x = layer(), torch.randn(1, 16, 5, 5)
    negated = torch.randn(1, 16, 5, 5, dtype=torch.complex64).conj().imag  # a view with its negative bit set
    for given, skips in ((x, True), (nn.Parameter(x, requires_grad=False), True), (negated, False)):
        assert skips_dispatcher(given) == skips
        dispatched.reset_mock()
        found = convolution(given)
        assert dispatched.call_count == int(not skips)
        assert torch.equal(found, convolution(given.detach().clone().resolve_neg()))
    for other in (x.to_mkldnn(), x.to_sparse(), x.to("meta"), x.as_subclass(type("Named", (Tensor,), {}))):
        assert not skips_dispatcher(other)


def test_a_layer_may_be_shared_with_another_process_between_calls() -> None:
    convolution = PackedConv2d(BinaryConv2d(512, 512, 1, method="reactnet").eval())
    x = torch.randn(1, 512, 8, 8)
    expected = convolution(x).clone()
    convolution.words.share_memory_()  # moves the storage, under the same tensor
    taken = [torch.full_like(convolution.words, -1) for _ in range(200)]
    assert torch.equal(convolution(x), expected)
    assert taken


def test_sizes_share_the_tensors_that_are_laid_out() -> None:
    convolution = layer(64)
    images = [torch.randn(1, 64, size, 4) for size in (4, 5, 6)]
    expected, codes = [convolution(x) for x in images], convolution.codes()
    convolution.to(memory_format=torch.channels_last)  # which reorders the words of bits, too
    assert all(torch.equal(convolution(x), y) for x, y in zip(images, expected, strict=True))
    assert torch.equal(convolution.codes(), codes)
    runs = convolution.compiled().convs[0].compiled.values()
    assert len({run._tensors[0].data_ptr() for run in runs if hasattr(run, "_tensors")}) == 1


def test_a_call_that_is_transformed_or_differentiated_is_dispatched() -> None:
    seen: list[bool] = []
    for x in (torch.randn(3, 1, 16, 5, 5), torch.randn(3, 2)):
        torch.func.vmap(lambda x: (seen.append(skips_dispatcher(x)), x)[1])(x)
    assert seen == [False, False]
    x = torch.randn(1, 16, 5, 5, requires_grad=True)
    assert not skips_dispatcher(x)
    with torch.no_grad():
        assert skips_dispatcher(x)
    with torch.inference_mode():
        assert skips_dispatcher(torch.randn(3))
    assert skips_dispatcher(None, 3, [1, 2], x.detach())


@pytest.mark.parametrize("backend", EITHER)
def test_inputs_that_do_not_fit_raise_an_error_after_a_call_that_did_fit(backend: Any) -> None:
    convolution, x = layer(), torch.randn(2, 16, 5, 5)
    conv = convolution.compiled().convs[0]
    zeros, input_shape = torch.zeros(2, dtype=torch.int64), r"the input must have the shape \(any, 16, any, any\)"
    with backends.use(backend):
        convolution(x, residual=x)
        binary_conv2d(x, conv, zeros)
        for call, message in (
            (lambda: convolution(x, residual=x[:1]), "the residual must have the shape"),
            (lambda: convolution(x, residual=x[..., :4]), "the residual must have the shape"),
            (lambda: convolution(x, input_norm=torch.rand(2, 1, 16)), "input_norm must have the shape"),
            (lambda: convolution(x[:, :8]), input_shape + r"; got \(2, 8, 5, 5\)"),
            (lambda: convolution(torch.tensor(1.0)), input_shape),
            (lambda: binary_conv2d(x, conv, zeros.int()), r"group must be int64 of shape \(2,\) or \(1,\); got torch"),
            (lambda: binary_conv2d(x, conv, zeros.repeat(2)), r"group must be int64 of shape \(2,\) or \(1,\)"),
        ):
            with pytest.raises(BinarizeError, match=message):
                call()
        assert torch.equal(convolution(x, residual=x), convolution(x) + x)


def test_threads_and_backends_may_change_between_calls(compiled: list[tuple[Any, ...]]) -> None:
    convolution, x = layer(32), torch.randn(1, 32, 40, 40)
    threads = torch.get_num_threads()
    try:
        found = []
        for many in (1, 2, 1):
            torch.set_num_threads(many)
            for backend in EITHER:
                with backends.use(backend):
                    found.append(convolution(x))
    finally:
        torch.set_num_threads(threads)
    assert [threads for *_, threads in compiled] == [1, 2]  # and none for plain torch
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-4)
    assert all(torch.equal(other, found[0]) for other in found[2::2])


def test_a_convolution_is_compiled_once_per_size_and_keeps_few_sizes(compiled: list[tuple[Any, ...]]) -> None:
    convolution = layer()
    for size in (5, 6, 5, 6, 5):
        convolution(torch.randn(1, 16, size, 4))
    convolution(torch.randn(1, 16, 5, 4).bfloat16())
    expected = [(5, torch.float32), (6, torch.float32), (5, torch.bfloat16)]
    assert [(size[2], dtype) for size, dtype, _ in compiled] == expected
    for size in range(7, 40):
        convolution(torch.randn(1, 16, size, 4))
    # One entry holds the tensors that sizes share.
    assert 0 < len(convolution.compiled().convs[0].compiled) <= cpu_conv.COMPILED_SIZES + 1


def test_several_threads_call_one_layer_with_several_sizes() -> None:
    convolution, norm = layer(32), nn.GroupNorm(4, 32)

    def call(x: Tensor) -> list[Tensor]:
        factors = norm_factors(x, None, 4, norm.weight, norm.bias, norm.eps)
        return [factors, norm_silu(x, factors), convolution(x), convolution(x, factors)]

    images = [torch.randn(2, 32, 20 + i, 18) for i in range(12)]
    with torch.no_grad():
        expected = [call(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(torch.no_grad()(call), images * 20):
            turn = next(i for i, x in enumerate(images) if x.shape == found[1].shape)
            assert all(torch.equal(a, b) for a, b in zip(found, expected[turn], strict=True))
