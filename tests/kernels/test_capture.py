"""Gradients of gradients, tracers and function transforms: right, or refused."""

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packed_case import SMALL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import binarize
from binarize.errors import BinarizeError
from binarize.kernels import backends
from binarize.layers import BinaryConv2d, BinaryLinear
from binarize.layers.fused import conv3x3, norm_silu
from binarize.models import SRUNet
from binarize.packed import PackedConv2d, PackedLinear
from binarize.timestep import TimestepContext

STEPS = torch.tensor([3, 30, 99])
METHODS = ["bidiffsr", "bnn", "xnor", "irnet", "dorefa", "recu", "bidm", "binarydm"]


def straight_through(values: Tensor, smooth: Tensor) -> Tensor:
    return values.detach() + smooth - smooth.detach()


def oracle(layer: Any, x: Tensor) -> Tensor:
    """A layer whose binary weights and signs are ordinary tensors with the derivatives of their surrogates."""
    weight = layer.weight_binarizer(layer.weight)
    w_hat = (weight.codes * weight.scales[:, :, None, None, None]).sum(0)
    shifted = layer.shifted(x)
    part, limited = layer.method.part("activation"), shifted.clamp(-1, 1)
    kind = part["name"] if isinstance(part, dict) else part
    if kind == "recu":
        limited = layer.activation.normalize(shifted).clamp(-1, 1)
    t = 10 ** (2 * float(getattr(layer.activation, "progress", 0)) - 1)
    smooth = {
        "ste": limited, "approx_sign": limited * (2 - limited.abs()), "recu": limited * (2 - limited.abs()),
        "ede": max(1 / t, 1) * torch.tanh(t * shifted), "unit_round": shifted.clamp(0, 1),
    }[kind]  # fmt: skip
    hard = (shifted > 0.5).to(x.dtype) if kind == "unit_round" else torch.where(shifted >= 0, 1.0, -1.0)
    y = F.conv2d(straight_through(hard.to(x.dtype), smooth), straight_through(w_hat, weight.surrogate), padding=1)
    return layer.run_stages(layer.stages(), y, x, shifted)


def twice(y: Tensor, inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Return the gradients of a function of the gradients of ``y``."""
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    first = torch.autograd.grad(y, inputs, upstream, create_graph=True)
    factors = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g.dtype) for g in first]
    total = torch.stack([(g * f).sum() + g.square().sum() for g, f in zip(first, factors, strict=True)]).sum()
    second = torch.autograd.grad(total, inputs, materialize_grads=True)
    return [*first, *second]


def binary_layer(method: str, context: TimestepContext, dtype: torch.dtype) -> BinaryConv2d:
    torch.manual_seed(0)
    layer = BinaryConv2d.from_float(nn.Conv2d(16, 16, 3, padding=1), method, context)
    binarize.training_step(layer, 0.8)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.to(dtype)


@pytest.mark.parametrize("backend", ["float64", "numba", "torch"])
@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_are_those_of_plain_operators(method: str, backend: Any) -> None:
    context, dtype = TimestepContext(100), torch.float64 if backend == "float64" else torch.float32
    layer = binary_layer(method, context, dtype)
    x = torch.randn(3, 16, 5, 5, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs = [x, *layer.parameters()]
    with context.using(STEPS), backends.use("auto" if backend == "float64" else backend):
        found = twice(layer(x), inputs)
        expected = twice(oracle(layer, x), inputs)
    bound = 1e-9 if backend == "float64" else 2e-3
    largest = max(float(wanted.detach().abs().max()) for wanted in expected)  # of whose sums some cancel
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=bound, atol=bound * (1 + largest))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_norm_silu_dropout_and_convolution_can_be_differentiated_twice(backend: Any, p: float) -> None:
    norm, drop, conv = nn.GroupNorm(4, 32), nn.Dropout(p), nn.Conv2d(32, 32, 3, padding=1)
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs = [x, *norm.parameters(), *conv.parameters()]
    with backends.use(backend):
        hidden = norm_silu(x, norm, drop)
        found = twice(conv3x3(conv, hidden), inputs)
    kept = torch.where(hidden == 0, 0.0, 1 / (1 - p)).detach()
    expected = twice(conv(F.silu(norm(x)) * kept), inputs)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=2e-3, atol=2e-3 * (1 + float(wanted.detach().abs().max())))


def test_compact_memory_cannot_be_differentiated_twice() -> None:
    layer = BinaryConv2d(16, 16, 3, padding=1, method="reactnet")
    layer.memory = "compact"
    y = layer(torch.randn(1, 16, 5, 5, requires_grad=True))
    with pytest.raises(BinarizeError, match=r'"compact" keeps too little.*memory_mode\(model, "exact"\)'):
        torch.autograd.grad(y.sum(), [layer.weight], create_graph=True)


class Prediction(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t, x, return_dict=False)[0]


@pytest.fixture(params=["unpacked", "packed"])
def network(request: pytest.FixtureRequest) -> Prediction:
    torch.manual_seed(0)
    model = binarize.convert(SRUNet(**{**SMALL, "dropout": 0.0}).eval().double(), "bidiffsr")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return Prediction(binarize.pack(model) if request.param == "packed" else model)


def inputs(size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, size, size, dtype=torch.float64), torch.randint(0, 2000, (2,))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_graphs_hold_for_other_images_and_other_timesteps(network: Prediction) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(network, inputs(), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        graphs = [
            make_fx(network)(*inputs()),
            make_fx(network, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs()),
        ]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(network(*map(mode.from_tensor, inputs())), FakeTensor)
        x, t = inputs()
        expected = network(x, t)
        for graph in (traced, torch.jit.load(file), *graphs):
            torch.testing.assert_close(graph(x, t), expected, rtol=0, atol=1e-9)
        x, t = inputs(24)
        torch.testing.assert_close(traced(x, t), network(x, t), rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_of_a_network_are_right(network: Prediction) -> None:
    x, t = inputs()
    steps, parameters = torch.tensor([3, 900, 1700]), dict(network.named_parameters())
    with torch.no_grad():
        expected = torch.stack([network(x, step) for step in steps])
        torch.testing.assert_close(vmap(lambda step: network(x, step))(steps), expected, rtol=0, atol=1e-9)
        other = {name: 1.5 * p for name, p in parameters.items()}
        found, before = functional_call(network, other, (x, t)), network(x, t)
        for parameter in parameters.values():
            parameter.mul_(1.5)
        torch.testing.assert_close(found, network(x, t), rtol=0, atol=1e-9)
    assert not torch.allclose(found, before)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_layers_under_grad_jvp_and_vmap() -> None:
    for method in METHODS:
        context = TimestepContext(100)
        layer, x = binary_layer(method, context, torch.float64).eval(), torch.randn(3, 16, 5, 5, dtype=torch.float64)
        parameters, direction = {n: p.detach() for n, p in layer.named_parameters()}, torch.randn_like(x)
        with context.using(STEPS):
            of = grad(lambda p, x, layer=layer: functional_call(layer, p, (x,)).square().sum(), (0, 1))
            of_parameters, of_x = of(parameters, x)
            _, tangent = jvp(layer, (x,), (direction,))
            image = x.clone().requires_grad_()
            y = layer(image)
            wanted = torch.autograd.grad(y.square().sum(), [image, *layer.parameters()], retain_graph=True)
            for value, gradient in zip((of_x, *of_parameters.values()), wanted, strict=True):
                torch.testing.assert_close(value, gradient, rtol=1e-9, atol=1e-9)
            (of_x,) = torch.autograd.grad(y, image, torch.ones_like(y))
            torch.testing.assert_close(tangent.sum(), (of_x * direction).sum(), rtol=1e-9, atol=1e-9)
        with context.using(3):
            each = vmap(lambda image, layer=layer: layer(image[None])[0])(x)
            torch.testing.assert_close(each, torch.cat([layer(image[None]) for image in x]), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("with_gradients", [False, True])
def test_packed_layers_refuse_tangents(with_gradients: bool) -> None:
    conv = PackedConv2d(BinaryConv2d(16, 16, 3, padding=1, method="reactnet").eval())
    linear = PackedLinear(BinaryLinear(16, 16, method="reactnet").eval())
    for layer, x in ((conv, torch.randn(1, 16, 5, 5)), (linear, torch.randn(2, 16))):
        with torch.set_grad_enabled(with_gradients):
            with pytest.raises(BinarizeError, match="packed layers have no gradient"):
                jvp(layer, (x,), (x,))
            with forward_ad.dual_level(), pytest.raises(BinarizeError, match="packed layers have no gradient"):
                layer(forward_ad.make_dual(x, x))
