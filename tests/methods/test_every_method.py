"""Every registered method through one list: a new one gets all of it for free, and must bring its closed form."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from closed_forms import activation, layer, sign, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from method_cases import CASES, DEFAULTS, METHODS, Case
from packed_case import scatter
from torch import Tensor, nn

import binarize
from binarize.conversion.export import binary_layers, packed_layers
from binarize.conversion.record import conversion
from binarize.layers import BinaryConv2d
from binarize.methods import get_method
from binarize.models import SRUNet
from binarize.timestep import TimestepContext

T = 100
CHANNELS, SIZE = 4, 5
PROGRESS = (0.0, 0.37, 1.0)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
both_zeros = pytest.mark.parametrize(
    ("case", "zero"),
    [(case, "plus") for case in CASES] + [(case, "zero") for case in DEFAULTS],
    ids=lambda value: str(value),
)
every_method = pytest.mark.parametrize("method", METHODS)

# Zeros of both signs, every threshold, and values on either side of it.
TIES = st.sampled_from([0.0, -0.0, 0.25, 0.5, -0.5, 1.0, -1.0, 1.0 + 2**-52, -1.0 - 2**-52, 2.0])
NUMBERS = st.one_of(TIES, st.floats(-3, 3).map(lambda x: round(x, 6)))


def tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(x, dtype=np.float64))


def same(actual: Tensor, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual.detach(), tensor(np.asarray(expected)), rtol=tolerance, atol=tolerance)


def build(case: Case, progress: float = 0.0, zero: str = "plus") -> BinaryConv2d:
    method = case.method.replace(sign_zero=zero)
    made = BinaryConv2d(CHANNELS, CHANNELS, 3, padding=1, method=method, context=TimestepContext(T)).double()
    binarize.training_step(made, progress)
    return made


def tiny(method: Any) -> SRUNet:
    """A converted network whose shifts, slopes and scales have values that matter."""
    shape: dict[str, Any] = {"base_channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 4}
    model = binarize.convert(SRUNet(**shape, dropout=0.0, num_train_timesteps=T), method)
    for parameter in model.parameters():
        if parameter.dim() <= 2:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def batch(size: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(size, 3, 8, 8, dtype=dtype)
    return x, torch.linspace(0, T - 1, size).long(), torch.rand_like(x)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        try:
            torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_every_registered_method_has_a_closed_form():
    assert sorted(case.name for case in DEFAULTS) == sorted(METHODS), "write its Form in method_cases.py"


@both_zeros
@settings(max_examples=10)
@given(values=arrays(np.float64, (2, 1, 2, 3), elements=NUMBERS), upstream=st.integers(0, 2**31))
def test_activation_values_and_surrogate_gradient(case, zero, values, upstream):
    g = np.random.default_rng(upstream).normal(size=values.shape)
    for progress in PROGRESS:
        made = build(case, progress, zero).activation
        x = tensor(values).requires_grad_()
        codes = made(x)
        codes.backward(tensor(g))
        expected, vjp = activation(case.at(progress), values, progress, zero)
        gradient = vjp(g)
        if case.form.activation == "mean":  # the magnitude is the scale's business, in values and gradient
            mean = np.abs(values).mean(axis=(1, 2, 3), keepdims=True)
            expected = sign(values, zero)
            gradient = np.where(mean == 0, 0.0, gradient / np.where(mean == 0, 1, mean))
        same(codes, expected, 0)
        same(x.grad, gradient)
        if zero == "plus":
            assert set(codes.unique().tolist()) <= ({0, 1} if case.form.activation == "round" else {-1, 1})


@both_zeros
@settings(max_examples=10)
@given(data=st.data(), upstream=st.integers(0, 2**31))
def test_weight_codes_scales_and_gradient(case, zero, data, upstream):
    rng = np.random.default_rng(upstream)
    # Ties, in a filter that is not constant: IR-Net divides by its deviation.
    w = data.draw(arrays(np.float64, (2, 3, 1, 2), elements=NUMBERS)) + 0.0
    w[:, 0, 0] = rng.normal(size=(2, 2))
    g = rng.normal(size=w.shape)
    binarizer = build(Case(case.name, case.form, case.options), 0, zero).weight_binarizer
    if case.form.weight == "two_basis":
        binarizer = type(binarizer)(tensor(w), zero).double()
        binarizer.scale.data += tensor(rng.normal(size=(2, 2)) / 10)
    for progress in PROGRESS:
        binarize.training_step(binarizer, progress)
        parameters = {f"weight_binarizer.{k}": v.detach().numpy() for k, v in binarizer.named_parameters()}
        expected = weights(case.at(progress), {"weight": w, **parameters}, progress, zero)
        latent = tensor(w).requires_grad_()
        binary = binarizer(latent)
        same(binary.codes, expected.codes, 0)
        same(binary.scales, expected.scales)
        if zero == "plus" and case.at(progress).weight != "real":
            assert set(binary.codes.unique().tolist()) <= {-1, 1}
        binarizer.zero_grad()
        (binary.surrogate * tensor(g)).sum().backward()
        found = {"weight": latent.grad, **{f"weight_binarizer.{k}": v.grad for k, v in binarizer.named_parameters()}}
        wanted = expected.vjp(g)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            same(found[name], value)


@both_zeros
@settings(max_examples=4)
@given(seed=st.integers(0, 2**31), progress=st.sampled_from(PROGRESS))
def test_whole_layer_and_all_its_gradients(case, zero, seed, progress):
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        ties = rng.choice([0.0, 0.5, -0.5, 1.0, -1.0], size=shape)
        return np.where(rng.random(shape) < 0.2, ties, rng.normal(size=shape))

    made = build(case, progress, zero)
    for name, parameter in made.named_parameters():
        value = draw(*parameter.shape) if name == "weight" else 0.5 + 0.3 * rng.normal(size=parameter.shape)
        parameter.data.copy_(tensor(value))
    p = {name: parameter.detach().numpy().copy() for name, parameter in made.named_parameters()}
    x, t = draw(3, CHANNELS, SIZE, SIZE), rng.integers(0, T, size=3)
    weighting = rng.normal(size=x.shape)
    group = np.array([int(v * case.method.groups / T) for v in t])
    y, grads = layer(case.at(progress), p, x, lambda y: weighting * y, group, progress, zero)

    inputs = tensor(x).requires_grad_()
    context = TimestepContext(T)
    for module in made.modules():
        if hasattr(module, "context"):
            module.context = context
    with context.using(torch.from_numpy(t)):
        out = made(inputs)
    same(out, y)
    (out.square() * tensor(weighting)).sum().div(2).backward()
    assert {name for name, _ in made.named_parameters()} | {"x"} == grads.keys()
    same(inputs.grad, grads.pop("x"))
    assert_equal(gradients(made), {name: tensor(value) for name, value in grads.items()}, 1e-9)


@every_case
def test_binary_state_is_two_valued(case):
    model = tiny(case.method)
    binarize.training_step(model, 1.0)
    state = binarize.binary_state(model)
    assert state
    assert all(set(layer.codes.unique().tolist()) == {-1, 1} for layer in state.values())


# -- networks ----------------------------------------------------------------------------------------------------------


@every_method
def test_mixed_timesteps_equal_samples_one_by_one(method):
    model = tiny(method).double().eval()
    x, t, condition = batch()
    with torch.no_grad():
        together = model(x, t, condition).sample
        alone = [model(x[i : i + 1], t[i], condition[i : i + 1]).sample for i in range(len(t))]
        other = model(x, t.flip(0), condition).sample
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-10)
    assert not torch.allclose(together, other)


@every_method
def test_a_deepcopy_is_independent(method):
    model = tiny(method).double().eval()
    x, t, condition = batch()
    with torch.no_grad():
        before = model(x, t, condition).sample
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(x, t, condition).sample, before, rtol=0, atol=0)
        for parameter in twin.parameters():
            parameter.normal_()
        binarize.training_step(twin, 1.0)
        assert not torch.allclose(twin(x, t, condition).sample, before)
        with binarize.timesteps(twin, 99):
            torch.testing.assert_close(model(x, t, condition).sample, before, rtol=0, atol=0)
    own, copied = conversion(model).context, conversion(twin).context
    assert (own is None) == (copied is None) == (not get_method(method).needs_timestep)
    assert own is None or own is not copied
    contexts = {id(m.context) for m in twin.modules() if getattr(m, "context", None) is not None}
    assert contexts == (set() if copied is None else {id(copied)})


@every_case
def test_saved_and_loaded_with_its_state(case, tmp_path: Path):
    model = tiny(case.method)
    x, t, condition = batch(dtype=torch.float32)
    model(x, t, condition)  # moves the statistics of batch norms
    binarize.training_step(model, 0.37)
    model.save_pretrained(tmp_path)
    loaded = SRUNet.from_pretrained(tmp_path)
    assert conversion(loaded).method == case.method
    results = []
    for network in (model.eval(), loaded):
        assert not network.training
        out = network(x, t, condition).sample
        out.square().mean().backward()  # what training has come to shows in the gradients
        results.append({"out": out.detach(), **gradients(network)})
    assert_equal(results[1], results[0], 0)
    progresses = {b.item() for name, b in loaded.named_buffers() if name.endswith(".progress")}
    assert progresses <= {torch.tensor(0.37).item()}


class Small(nn.Module):
    """A host that is nobody's: three convolutions and a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def small(method: Any) -> Small:
    model = binarize.convert(Small(), method, num_train_timesteps=T)
    for parameter in model.parameters():
        if parameter.dim() <= 2:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@every_method
def test_training_lowers_the_loss(method):
    model = small(method)
    x, t = torch.randn(8, 3, 6, 6), torch.linspace(0, T - 1, 8).long()
    target = 0.3 * x.roll(1, 3) + 0.1
    optimizer = torch.optim.Adam(binarize.param_groups(model), lr=1e-2)
    losses = []
    for step in range(40):
        loss = (model(x, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        binarize.training_step(model, (step + 1) / 40)
        losses.append(loss.item())
    assert np.mean(losses[-4:]) < 0.5 * losses[0], losses


@every_method
def test_a_foreign_host_is_saved_and_loaded(method, tmp_path: Path):
    model = small(method)
    binarize.training_step(model, 0.37)
    loaded = binarize.load(binarize.save(model, tmp_path), model=Small())
    x, t = torch.randn(2, 3, 6, 6), torch.tensor([3, 90])
    torch.testing.assert_close(loaded(x, t), model.eval()(x, t), rtol=0, atol=0)


def compiled_equals_eager(method: str, backend: str) -> None:
    torch._dynamo.reset()
    model = small(method).double()
    twin = copy.deepcopy(model)
    fast = torch.compile(twin, fullgraph=True, backend=backend)
    for t in ([3, 90], [55, 0]):
        results = []
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        for run, network in ((model, model), (fast, twin)):
            inputs = x.clone().requires_grad_()
            out = run(inputs, torch.tensor(t))
            out.square().mean().backward()
            results.append({"out": out.detach(), "x": inputs.grad, **gradients(network)})
        assert_equal(results[1], results[0])
        binarize.training_step(model, 0.6)
        binarize.training_step(twin, 0.6)


@every_method
def test_compiled_without_a_graph_break_equals_eager(method):
    compiled_equals_eager(method, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bidiffsr", "irnet"])  # timesteps, and scalars that training changes
def test_compiled_by_inductor_equals_eager(method):
    compiled_equals_eager(method, "inductor")


@every_method
def test_gradient_checkpointing_gives_the_same_gradients(method):
    model = tiny(method).double()
    x, t, condition = batch()
    results = []
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        first = model(x, t, condition).sample
        second = model(x + 0.1, t.flip(0), condition).sample  # before the first one's backward
        (first.square().mean() + second.abs().mean()).backward()
        results.append(gradients(model))
    assert_equal(results[1], results[0])


@every_method
def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients(method):
    model = tiny(method)
    x, t, condition = batch(dtype=torch.float32)
    dtypes = []
    layers = [made for _, made in binary_layers(model)]
    layers[0].register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, t, condition).sample.float().square().mean()
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
    assert any(made.weight.grad.abs().sum() > 0 for made in layers)


@every_method
def test_what_needs_no_gradient_saves_none(method):
    model = tiny(method).eval()
    saved: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model(*batch(dtype=torch.float32))
    assert saved == []


@every_case
def test_the_configuration_survives_json(case):
    text = json.dumps(case.method.to_config())
    assert get_method(json.loads(text)) == case.method
    assert case.method.replace() == case.method


# -- packed ------------------------------------------------------------------------------------------------------------


def trained(case: Case) -> SRUNet:
    """A network at the end of its training, every shift, slope, scale and statistic with a value that matters."""
    model = scatter(tiny(case.method))
    binarize.training_step(model, 1.0)
    return model.eval()


def predict(model: nn.Module, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, condition = (torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    with torch.no_grad():
        return model(x, torch.tensor([0, 30, 55, T - 1]), condition).sample


@every_case
def test_packed_equals_unpacked(case):
    model = trained(case)
    names = [name for name, _ in binary_layers(model)]
    exact, single = copy.deepcopy(model).double(), copy.deepcopy(model)
    expected = predict(exact, torch.float64)
    assert [name for name, _ in packed_layers(binarize.pack(exact))] == names
    torch.testing.assert_close(predict(exact, torch.float64), expected, rtol=1e-10, atol=1e-10)
    # Rounding may flip a sign that sits near zero, which a network this small passes on; nearly all pixels are close.
    difference = (predict(binarize.pack(single), torch.float32) - predict(model, torch.float32)).abs()
    scale = expected.abs().mean()
    assert difference.mean() < 2e-2 * scale
    assert (difference < 1e-4 * scale).double().mean() > 0.5


@every_case
def test_a_packed_network_survives_its_file(case, tmp_path: Path):
    packed = binarize.pack(trained(case))
    binarize.save(packed, tmp_path)
    for loaded in (binarize.load(tmp_path), SRUNet.from_pretrained(tmp_path)):
        assert binarize.is_packed(loaded)
        assert conversion(loaded).method == case.method
        assert torch.equal(predict(loaded, torch.float32), predict(packed, torch.float32))


@every_case
def test_unpacked_weights_are_the_signs_of_the_latents(case):
    model = trained(case).double()
    before = predict(model, torch.float64)
    expected = {}
    for name, made in binary_layers(model):
        parameters = {f"weight_binarizer.{k}": v.detach().numpy() for k, v in made.weight_binarizer.named_parameters()}
        expected[name] = weights(case.at(1.0), {"weight": made.weight.detach().numpy(), **parameters}, 1.0)
    unpacked = binarize.unpack(binarize.pack(model))
    assert not binarize.is_packed(unpacked)
    found = dict(binary_layers(unpacked))
    assert found.keys() == expected.keys()
    for name, closed_form in expected.items():
        same(found[name].weight, closed_form.codes[0], 0)
        same(found[name].binary_weight().codes, closed_form.codes, 0)
        same(found[name].binary_weight().scales, closed_form.scales)
    torch.testing.assert_close(predict(unpacked, torch.float64), before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(predict(binarize.pack(unpacked), torch.float64), before, rtol=1e-10, atol=1e-10)


# -- two processes -----------------------------------------------------------------------------------------------------


def replica(rank: int, folder: str, methods: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    differences = {}
    for method in methods:
        torch.manual_seed(0)
        model = tiny(method).double().eval()  # batch norms would see half the batch in training mode
        x, t, condition = batch()
        model(x, t, condition).sample.square().mean().backward()
        whole = gradients(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        half = slice(2 * rank, 2 * rank + 2)
        for _ in range(2):  # a parameter without a gradient is only found out at the next forward
            model.zero_grad()
            parallel(x[half], t[half], condition[half]).sample.square().mean().backward()
        found = gradients(model)
        relative = [(found[n] - g).abs().max() / g.abs().max().clamp_min(1) for n, g in whole.items()]
        differences[method] = max(relative).item()
        assert found.keys() == whole.keys() == dict(model.named_parameters()).keys()
    Path(folder, f"{rank}.json").write_text(json.dumps(differences))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_the_whole_batch(tmp_path: Path):
    mp.spawn(replica, (str(tmp_path), METHODS), nprocs=2)
    for rank in range(2):
        differences = json.loads((tmp_path / f"{rank}.json").read_text())
        assert sorted(differences) == sorted(METHODS)
        assert all(value < 1e-12 for value in differences.values()), differences
