"""Every registered method through one list of tests; a new method gets all of them for free."""

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from closed_forms import weights
from method_cases import CASES, METHODS, Case
from packed_case import needs_inductor, scatter
from torch import Tensor, nn

import binarize
from binarize.conversion.export import binary_layers, packed_layers
from binarize.conversion.record import conversion
from binarize.errors import BinarizeError
from binarize.methods import get_method
from binarize.models import SRUNet

T = 100
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_method = pytest.mark.parametrize("method", METHODS)


def converted(model: nn.Module, method: Any) -> Any:
    """Convert a network, and give its shifts, slopes and scales values that matter."""
    binarize.convert(model, method, num_train_timesteps=T)
    for parameter in model.parameters():
        if parameter.dim() <= 2:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def tiny(method: Any) -> SRUNet:
    shape: dict[str, Any] = {"base_channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 4}
    return converted(SRUNet(**shape, dropout=0.0, num_train_timesteps=T), method)


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
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance, msg=name)


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
        assert torch.equal(twin(x, t, condition).sample, before)
        for parameter in twin.parameters():
            parameter.normal_()
        binarize.training_step(twin, 1.0)
        assert not torch.allclose(twin(x, t, condition).sample, before)
        with binarize.timesteps(twin, 99):
            assert torch.equal(model(x, t, condition).sample, before)
    contexts = [{m.context for m in each.modules() if getattr(m, "context", None)} for each in (model, twin)]
    assert [{conversion(each).context} - {None} for each in (model, twin)] == contexts
    assert contexts[0].isdisjoint(contexts[1])
    assert len(contexts[0]) == get_method(method).needs_timestep


@pytest.mark.slow
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
        out = network(x, t, condition).sample
        out.square().mean().backward()  # gradients depend on the training's progress
        results.append({"out": out.detach(), **gradients(network)})
    assert_equal(results[1], results[0], 0)
    assert all(b == torch.tensor(0.37) for name, b in loaded.named_buffers() if name.endswith(".progress"))


class Small(nn.Module):
    """A host that is nobody's: three convolutions and a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def small(method: Any) -> Small:
    return converted(Small(), method)


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


def assert_compiled_equals_eager(model: nn.Module, backend: str) -> None:
    torch._dynamo.reset()
    twin = copy.deepcopy(model.double())
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


@pytest.mark.long
@every_method
def test_compiled_without_a_graph_break_equals_eager(method):
    assert_compiled_equals_eager(small(method), "aot_eager")


@pytest.mark.long
@needs_inductor
def test_compiled_by_inductor_equals_eager():
    """With timesteps (bidiffsr) and with scalars that training changes (irnet)."""
    model = Small()
    model.last = nn.Sequential(nn.Conv2d(6, 6, 1), model.last)
    binarize.convert(model, "bidiffsr", num_train_timesteps=T, overrides={"last.0": "irnet"})
    assert_compiled_equals_eager(model, "inductor")


@pytest.mark.slow
@every_method
def test_gradient_checkpointing_gives_the_same_gradients(method):
    model = tiny(method).double()
    x, t, condition = batch()
    results = []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        first = model(x, t, condition).sample
        second = model(x + 0.1, t.flip(0), condition).sample  # before the first one's backward
        (first.square().mean() + second.abs().mean()).backward()
        results.append(gradients(model))
    assert_equal(results[1], results[0])


@every_method
def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients(method):
    model = tiny(method)
    x, t, condition = batch(dtype=torch.float32)
    layers = [made for _, made in binary_layers(model)]
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


@functools.cache
def _trained(name: str) -> SRUNet:
    model = scatter(tiny(next(case for case in CASES if str(case) == name).method))
    binarize.training_step(model, 1.0)
    return model.eval()


def trained(case: Case) -> SRUNet:
    """Return a network at the end of its training, with nontrivial shifts, slopes, scales and statistics."""
    return copy.deepcopy(_trained(str(case)))


def predict(model: nn.Module, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, condition = (torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    with torch.no_grad():
        return model(x, torch.tensor([0, 30, 55, T - 1]), condition).sample


@pytest.mark.slow
@every_case
def test_packed_equals_unpacked_and_survives_its_file(case, tmp_path: Path):
    model = trained(case)
    names = [name for name, _ in binary_layers(model)]
    exact, packed = copy.deepcopy(model).double(), copy.deepcopy(model)
    expected = predict(exact, torch.float64)
    assert [name for name, _ in packed_layers(binarize.pack(exact))] == names
    torch.testing.assert_close(predict(exact, torch.float64), expected, rtol=1e-10, atol=1e-10)
    # Rounding may flip a sign that sits near zero, which a network this small passes on; nearly all pixels are close.
    single = predict(binarize.pack(packed), torch.float32)
    difference = (single - predict(model, torch.float32)).abs()
    scale = expected.abs().mean()
    assert difference.mean() < 2e-2 * scale
    assert (difference < 1e-4 * scale).double().mean() > 0.5
    loaded = binarize.load(binarize.save(packed, tmp_path))
    assert binarize.is_packed(loaded)
    assert conversion(loaded).method == case.method
    assert torch.equal(predict(loaded, torch.float32), single)


@pytest.mark.slow
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
        weight = found[name].binary_weight()
        np.testing.assert_array_equal(found[name].weight.detach(), closed_form.codes[0])
        np.testing.assert_array_equal(weight.codes.detach(), closed_form.codes)
        np.testing.assert_allclose(weight.scales.detach(), closed_form.scales, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(predict(unpacked, torch.float64), before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(predict(binarize.pack(unpacked), torch.float64), before, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@every_case
def test_random_latents_train_further_with_the_packed_weights(case):
    packed = binarize.pack(trained(case).double())
    before = predict(packed, torch.float64)
    expected = {name: (made.codes(), made.weight_scales()) for name, made in packed_layers(packed)}
    if case.first is not None or case.form.weight not in ("sign", "sign_identity", "scaled", "tensor"):
        with pytest.raises(BinarizeError, match="random latents cannot give the packed weights; use latents='signs'"):
            binarize.unpack(packed, latents="random")
        assert torch.equal(predict(packed, torch.float64), before)
        return
    unpacked = binarize.unpack(packed, latents="random")
    assert conversion(unpacked).method == case.method
    relative = []
    for name, made in binary_layers(unpacked):
        codes, scales = expected[name]
        weight = made.binary_weight()
        assert torch.equal(weight.codes, codes)
        torch.testing.assert_close(weight.scales, scales, rtol=1e-9, atol=1e-9)
        magnitudes = made.weight.detach().abs()
        relative.append((magnitudes / magnitudes.flatten(1).mean(1).view(-1, *[1] * (magnitudes.dim() - 1))).flatten())
    # Half-normal magnitudes: 6% are below a tenth of the mean.
    assert 0.04 < (torch.cat(relative) < 0.1).double().mean() < 0.09
    torch.testing.assert_close(predict(unpacked, torch.float64), before, rtol=1e-10, atol=1e-10)


def replica(rank: int, folder: str, methods: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for method in methods:
        torch.manual_seed(0)
        model = small(method).double().eval()  # batch norms would see half the batch in training mode
        x, t, _ = batch()
        model(x, t).square().mean().backward()
        whole = gradients(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        half = slice(2 * rank, 2 * rank + 2)
        for _ in range(2):  # a parameter without a gradient is only found out at the next forward
            model.zero_grad()
            parallel(x[half], t[half]).square().mean().backward()
        found = gradients(model)
        relative = [(found[n] - g).abs().max() / g.abs().max().clamp_min(1) for n, g in whole.items()]
        assert max(relative) < 1e-12, method
        assert found.keys() == whole.keys() == dict(model.named_parameters()).keys()
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_give_the_gradients_of_the_whole_batch(tmp_path: Path):
    mp.spawn(replica, (str(tmp_path), METHODS), nprocs=2)  # raises what a process raises
