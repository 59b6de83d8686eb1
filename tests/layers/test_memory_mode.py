"""Binary convolutions as one autograd node: gradients are the chain's, and compact memory is off by what it says."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_case import SMALL
from torch import Tensor, nn
from training_case import TINY

import binarize
from binarize.errors import BinarizeError
from binarize.kernels import backends
from binarize.layers import BinaryConv2d, RPReLU
from binarize.layers.activations import IdentitySign
from binarize.layers.fused import norm_silu
from binarize.methods import Method
from binarize.models import SRUNet
from binarize.packed import PackedConv2d
from binarize.recipes import load_recipe
from binarize.timestep import TimestepContext
from binarize.training import train

T = 100
STEPS = torch.tensor([3, 30, 99])


class Case(NamedTuple):
    """A layer whose parameters are random, its context, an input and the gradient of its output."""

    layer: BinaryConv2d
    context: TimestepContext
    x: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        return Case(self.layer.to(dtype), self.context, self.x.to(dtype), self.grad.to(dtype))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups, channels = draw(st.integers(1, 2)), draw(st.integers(1, 20))
    kernel, stride = draw(st.sampled_from([1, 3])), draw(st.integers(1, 2))
    same = draw(st.booleans())
    out = groups * (channels if same else draw(st.integers(1, 20)))
    choices = {"activation": ["approx_sign", "ste", "identity_ste"], "weight": ["scaled_sign", "sign"]}
    choices |= {"pre": [None, "tar"], "post": [None, "taa"], "shortcut": [False, True]}
    method = Method(groups=4, **{name: draw(st.sampled_from(values)) for name, values in choices.items()})
    torch.manual_seed(draw(st.integers(0, 2**32)))
    conv = nn.Conv2d(groups * channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    context = TimestepContext(T)
    layer = BinaryConv2d.from_float(conv, method, context)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(3, groups * channels, 6, 7)
    with torch.no_grad(), context.using(STEPS):
        return Case(layer, context, x, torch.randn_like(layer(x)))


def gradients(case: Case, forward: Any = "auto", backward: Any = "auto") -> tuple[Tensor, dict[str, Tensor]]:
    """Return a layer's output and the gradients of its input and its parameters, by backends."""
    layer, context, x, grad = case
    x = x.detach().clone().contiguous(memory_format=torch.channels_last).requires_grad_()
    layer.zero_grad()
    with context.using(STEPS), backends.use(forward):
        y = layer(x)
    with backends.use(backward):
        y.backward(grad.to(y.dtype))
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **found}


def chained(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The same through the modules one by one, which a layer with a hook on its activation runs."""
    handle = case.layer.activation.register_forward_hook(lambda *_: None)
    try:
        return gradients(case)
    finally:
        handle.remove()


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5, factor: float = 1, term: float = 0
) -> None:
    """Compare gradients. Those of parameters are sums, whose rounding depends on their largest ``term`` too."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = factor * bound * max(float(value.abs().max()), 0 if name == "x" else term)
        torch.testing.assert_close(found[name], value, rtol=bound, atol=atol, msg=name)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("backend", ["numba", "torch"])
@settings(max_examples=25)
@given(case=cases())
def test_exact_gradients_are_the_chains(case: Case, backend: str, dtype: torch.dtype, bound: float) -> None:
    case = case.to(dtype)
    y, found = gradients(case, backend, backend)
    expected_y, expected = chained(case)
    torch.testing.assert_close(y, expected_y, rtol=bound, atol=bound * float(expected_y.abs().max()))
    assert_same(found, expected, bound, 8, term=float(case.grad.abs().max()))


@pytest.mark.parametrize("backend", ["numba", "torch"])
@settings(max_examples=25)
@given(case=cases())
def test_compact_memory_changes_the_inputs_gradient_alone_and_by_no_more_than_a_step(case: Case, backend: Any) -> None:
    layer = case.layer
    layer.memory = "exact"
    y, exact = gradients(case, backend, backend)
    layer.memory = "compact"
    other_y, compact = gradients(case, backend, backend)
    assert torch.equal(y, other_y)
    of_shift = {name for name in exact if name.startswith("pre.")}
    others = exact.keys() - {"x"} - of_shift
    assert_same({name: compact[name] for name in others}, {name: exact[name] for name in others}, 1e-6)
    # What reaches the sign: the gradient of x where the surrogate lets everything through, less the shortcut's.
    through: Tensor | float = 0.0
    if layer.shortcut is not None:
        leaf = case.x.clone().requires_grad_()
        (through,) = torch.autograd.grad(layer.shortcut(torch.zeros_like(case.grad), leaf), leaf, case.grad)
    activation, layer.activation = layer.activation, IdentitySign()
    reaching = (chained(case)[1]["x"] - through).abs()
    layer.activation = activation
    bound = reaching / 127 + 1e-5 * float(reaching.max())
    assert ((compact["x"] - exact["x"]).abs() <= bound).all()
    for name in of_shift:  # sums over pixels
        assert float((compact[name] - exact[name]).abs().sum()) <= float(bound.sum())


def kept(network: nn.Module, *arguments: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no other can come to lie there
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(*arguments)
    return sum(storage.nbytes() for storage in storages.values())


def test_compact_memory_keeps_a_byte_for_four_and_gives_the_same_outputs() -> None:
    layer = BinaryConv2d(16, 16, 3, padding=1, method=Method(weight="scaled_sign", shortcut=True))
    x, few = torch.randn(2, 16, 20, 20, requires_grad=True), 1000  # scales
    assert x.numel() * 4 <= kept(layer, x) < x.numel() * 4 + few
    layer.memory = "compact"
    assert x.numel() <= kept(layer, x) < x.numel() + few
    network = binarize.convert(SRUNet(**SMALL, num_train_timesteps=T), "bidiffsr").eval()
    arguments = torch.randn(2, 3, 16, 16), torch.tensor([1, 50]), torch.rand(2, 3, 16, 16)
    exact = network(*arguments).sample, kept(network, *arguments)
    binarize.memory_mode(network, "compact")
    assert torch.equal(network(*arguments).sample, exact[0])
    assert kept(network, *arguments) < exact[1]


def test_unknown_modes_and_networks_without_binary_layers_are_refused() -> None:
    with pytest.raises(BinarizeError, match=r"unknown mode 'compat'.*Did you mean 'compact'"):
        binarize.memory_mode(nn.Conv2d(1, 1, 1), "compat")  # type: ignore[arg-type]
    with pytest.raises(BinarizeError, match="no binary convolution"):
        binarize.memory_mode(nn.Conv2d(1, 1, 1), "compact")


def test_a_recipe_chooses_the_mode(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Mock(wraps=binarize.memory_mode)
    monkeypatch.setattr("binarize.training.loop.memory_mode", watch)
    first = train(recipe("memory_mode=compact", "max_train_steps=2"), progress=False)
    assert [call.args[1] for call in watch.call_args_list] == ["compact"]
    # Not a part of what a run is: it may change on the way.
    again = recipe("max_train_steps=4", "resume_from_checkpoint=latest", f"output_dir={first.output_dir}")
    assert train(again, progress=False).steps == 4
    with pytest.raises(BinarizeError, match=r"memory_mode.*no effect while method is null"):
        load_recipe("sr3_x2", ["memory_mode=compact", *TINY])


def test_learned_fixed_scales_learn() -> None:
    torch.manual_seed(0)
    method = Method(weight={"name": "fixed", "learned": True}, post="rprelu")
    layer = BinaryConv2d(4, 4, 3, padding=1, method=method)
    case = Case(layer, TimestepContext(T), torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6))
    found, expected = gradients(case)[1], chained(case)[1]
    assert "weight_binarizer.scales" in found
    assert_same(found, expected)


@settings(max_examples=15)
@given(case=cases())
def test_a_backward_without_the_kernels_of_the_forward_gives_the_same(case: Case) -> None:
    assert_same(gradients(case, "numba", "torch")[1], gradients(case)[1])


@settings(max_examples=25)
@given(
    st.sampled_from([1, 2, 4]), st.integers(1, 6), st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(2, 9)),
    st.integers(0, 2**32),
)  # fmt: skip
def test_norm_and_silu_as_one_node_have_torchs_gradients(groups: int, channels: int, size: Any, seed: int) -> None:
    torch.manual_seed(seed)
    norm = nn.GroupNorm(groups, groups * channels)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(size[0], groups * channels, *size[1:]).contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(x)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        norm.to(dtype).zero_grad()
        leaf = x.detach().to(dtype).requires_grad_()
        y = function(leaf)
        y.backward(grad.to(dtype))
        return [y.detach(), *(t.grad.clone() for t in (leaf, norm.weight, norm.bias))]  # type: ignore[union-attr]

    with backends.use("numba"):
        found = run(lambda t: norm_silu(t, norm), torch.float32)
    expected = run(lambda t: nn.functional.silu(norm(t)), torch.float64)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-4, atol=2e-4 * (1 + float(other.abs().max())))


def test_dropout_after_the_norm_drops_its_share_anew_and_scales_the_rest() -> None:
    norm, dropout = nn.GroupNorm(2, 16), nn.Dropout(0.25)
    x = torch.randn(4, 16, 40, 40).contiguous(memory_format=torch.channels_last).requires_grad_()
    plain = norm_silu(x, norm).detach()
    with backends.use("numba"):
        one, other = norm_silu(x, norm, dropout), norm_silu(x, norm, dropout)
    for dropped in (one, other):
        kept = dropped != 0
        assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.01)
        torch.testing.assert_close(dropped[kept], (plain / 0.75)[kept], rtol=1e-4, atol=1e-5)
    assert float(((one != 0) == (other != 0)).float().mean()) == pytest.approx(0.75**2 + 0.25**2, abs=0.02)
    # The backward drops what the forward dropped: no gradient of x would be seen through a changed mask.
    (grad,) = torch.autograd.grad(one.sum(), x, retain_graph=True)
    again = torch.autograd.grad(one.sum(), x)[0]
    assert torch.equal(grad, again)
    leaf = x.detach().double().requires_grad_()
    reference = nn.functional.silu(nn.functional.group_norm(leaf, 2)) * ((one != 0).double() / 0.75)
    expected = torch.autograd.grad(reference.sum(), leaf)[0]
    torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-4)


class PartialRPReLU(RPReLU):
    """An activation function of which the kernels compute some rows of an RPReLU."""

    def __init__(self, channels: int, rows: tuple[str, ...]) -> None:
        super().__init__(channels)
        self.present = rows
        for name in ("shift_in", "slope", "shift_out"):
            if name not in rows:
                setattr(self, name, None)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> Tensor:
        def row(name: str) -> Any:
            return getattr(self, name)[0][:, None, None] if name in self.present else float(name == "slope")

        x = x + row("shift_in")
        return torch.where(x > 0, x, x * row("slope")) + row("shift_out")

    def lower(self, transform: Any, site: Any) -> Any:
        return transform.then_rprelu(**{name: getattr(self, name) for name in self.present})


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("present", [("slope",), ("shift_in",), ("shift_out",), ("shift_in", "slope")])
def test_a_part_may_lower_any_rows_of_an_rprelu(present: tuple[str, ...], backend: Any) -> None:
    layer = BinaryConv2d(8, 8, 3, padding=1, method=Method(post=lambda spec: PartialRPReLU(8, present)))
    case = Case(layer, TimestepContext(T), torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6))
    with backends.use(backend):
        y, found = gradients(case)
        packed = PackedConv2d(layer)
        assert packed.compiled().lowered.is_one_kernel
        torch.testing.assert_close(packed(case.x), y, rtol=1e-5, atol=1e-5)
    expected_y, expected = chained(case)
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)
