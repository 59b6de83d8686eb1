"""Distributions, biases and plots; the model is not changed by any function of `binarize.inspect`."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cli_case import NETWORK
from errors_case import assert_error
from hosts_zoo import unet2d
from hypothesis import given
from hypothesis import strategies as st
from inspect_case import OneLayer, batch, network, signs
from torch import Tensor, nn

from binarize import inspect
from binarize.inspect.distribution import DistributionMeter
from binarize.layers import CSFusion
from binarize.models import SRUNet

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures() -> Any:
    yield
    from matplotlib import pyplot

    pyplot.close("all")


@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), min_size=1, max_size=4))
def test_moments_are_exact_and_values_are_a_sample(parts: list[list[float]]) -> None:
    gathered = DistributionMeter(samples=7)
    for part in parts:
        gathered.add(torch.tensor(part))
    gathered.add(torch.empty(0))
    every = np.concatenate([np.array(part, dtype=np.float64) for part in parts])
    found = gathered.result()
    assert (found.count, found.mean) == (len(every), pytest.approx(every.mean(), abs=1e-9))
    assert found.std == pytest.approx(every.std(), abs=1e-4)
    assert (found.minimum, found.maximum) == (every.min(), every.max())
    assert len(found.values) == sum(min(len(part), 7) for part in parts)
    assert set(found.values.astype(np.float64)) <= set(every)


class Doubled(nn.Module):
    """Its ``inner`` gets the input times the timestep, possibly changed."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.inner, self.change = nn.Identity(), change

    def forward(self, x: Tensor, timestep: Any) -> Any:
        return self.inner(self.change(x * torch.as_tensor(timestep).reshape(-1, 1)))


FLAT = Doubled(lambda x: x.reshape(-1))
activations, fused = inspect.activation_distribution, inspect.fusion_distributions


def test_inputs_are_separated_by_timestep_within_a_batch_too() -> None:
    model = Doubled()
    x = torch.randn(2, 50)

    def run() -> None:
        model(x, timestep=torch.tensor([10, 2]))
        model(x, 2)

    found = inspect.activation_distribution(model, "inner", run)
    assert found.timesteps.tolist() == [2, 10]
    at_two = np.concatenate([2 * x[1].numpy(), 2 * x.numpy().ravel()])
    assert found.distributions[0].mean == pytest.approx(at_two.mean(), abs=1e-6)
    assert found.distributions[0].count == 150
    np.testing.assert_array_equal(found.distributions[1].values, (10 * x[0]).numpy())
    q = found.quantiles((0.1, 0.5))
    np.testing.assert_allclose(q[1], np.quantile(10 * x[0].numpy().astype(np.float64), (0.1, 0.5)))
    edges, density = found.histogram(20)
    assert density.shape == (2, 20)
    np.testing.assert_allclose((density * np.diff(edges)).sum(axis=1), 1)


def test_the_sampling_of_a_pipeline_is_followed() -> None:
    from binarize.models import SuperResolutionPipeline

    unet = network()
    pipe = SuperResolutionPipeline(unet, scale=2)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(3, 4, 4)
    found = inspect.activation_distribution(unet, "middle.0.conv1", lambda: pipe(image, num_inference_steps=4))
    assert found.timesteps.tolist() == [0, 500, 1000, 1500]
    assert all(one.count == 16 * 4 * 4 for one in found.distributions)
    plain = inspect.activation_distribution(SRUNet(**NETWORK), "middle.1.conv2", batch(), samples=10)
    assert plain.timesteps.tolist() == [3, 1500]
    assert [len(one.values) for one in plain.distributions] == [10, 10]


def test_the_biases_are_the_parameters_by_group() -> None:
    model = network({"name": "bidiffsr", "groups": 3})
    layer = model.get_submodule("middle.0.conv1.pre")
    with torch.no_grad():
        layer.bias.copy_(torch.arange(3.0)[:, None].expand_as(layer.bias))
    found = inspect.tar_biases(model)
    assert found.num_train_timesteps == 2000
    np.testing.assert_array_equal(found.biases["middle.0.conv1"], layer.bias.detach().numpy())
    assert len(found.biases) == len(signs(model))
    ax = found.plot(layer="middle.0.conv1")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0-666", "667-1333", "1334-1999"]
    found = inspect.tar_biases(network("reactnet"), layers="middle")
    assert [rows.shape for rows in found.biases.values()] == [(1, 16)] * 4
    assert found.num_train_timesteps is None
    assert [label.get_text() for label in found.plot().get_xticklabels()] == ["all"]


def test_biases_that_cannot_be_shown() -> None:
    found = inspect.tar_biases(network(overrides={"middle.1.*": {"groups": 2}}))
    for call, message in (
        (lambda: inspect.tar_biases(network("bnn")), r"none of these .* has a shift.*bidiffsr \(TaR\), reactnet"),
        (lambda: found.plot(), r"different numbers of timestep groups \(2, 5\).*plot\(layer=\.\.\.\)"),
        (lambda: found.plot(layer="middle.0.conv3"), "no biases of a layer 'middle.0.conv3'.*Did you mean 'middle.0"),
    ):
        assert_error(message, call)


def fusions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, CSFusion)]


def test_fusion_mixes_both_inputs_and_is_compared_with_their_sum() -> None:
    model = network().eval()
    name = fusions(model)[0]
    fusion = model.get_submodule(name)
    seen: list[tuple[Tensor, Tensor]] = []
    inputs = batch()
    with fusion.register_forward_hook(lambda _, args, output: seen.append((args[0], output))), torch.no_grad():
        model(*inputs)
    x, output = seen[0]
    hidden, skip = x[:, : fusion.hidden_channels], x[:, fusion.hidden_channels :]
    found = inspect.fusion_distributions(model, name, inputs)
    for key, value in {"hidden": hidden, "skip": skip, "fused": output, "added": hidden + skip}.items():
        one = getattr(found, key)
        assert one.mean == pytest.approx(float(value.double().mean()), abs=1e-6)
        assert one.std == pytest.approx(float(value.double().std(correction=0)), abs=1e-6)
        assert one.count == value.numel()
    # The shuffle only deals the channels out anew.
    assert len(found.mixed) == 2
    assert sum(one.mean for one in found.mixed) == pytest.approx(found.hidden.mean + found.skip.mean, abs=1e-6)


RUNS = {
    "saturation": lambda model, run: inspect.saturation(model, run),
    "activations": lambda model, run: inspect.activation_distribution(model, "middle.0.conv1", run),
    "fusion": lambda model, run: inspect.fusion_distributions(model, fusions(model)[0], run),
}


def footprint(model: nn.Module) -> list[tuple[bool, int, int]]:
    return [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


@pytest.mark.parametrize("kind", RUNS)
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model = network().train()
    model.middle[0].eval()
    before = footprint(model)
    modes = []

    def run() -> None:
        modes.append((model.training, torch.is_grad_enabled()))
        model(*batch())

    RUNS[kind](model, run)
    assert modes == [(False, False)]
    assert footprint(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())

    def fails() -> None:
        model(*batch())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        RUNS[kind](model, fails)
    assert footprint(model) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_does_not_call_the_model_is_refused(kind: str) -> None:
    model = network()
    assert_error(r"the run did not call '.*', so there is nothing to show", RUNS[kind], model, lambda: None)
    assert_error(r"run must be a function without arguments .* got 7", RUNS[kind], model, 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: activations(network(), "middle.0.conv9", batch()), r"no module 'middle.0.conv9'.*mean 'middle.0.conv"),
        (lambda: fused(network(), "middle.0", batch()), r"no CSFusion 'middle.0'; it has decoder\.0\.blocks\.0\.fus"),
        (lambda: fused(OneLayer("bnn"), "layer", batch()), r"it has none\."),
        (
            lambda: activations(nn.Identity(), "", torch.zeros(1)),
            "Identity has no timestep: .*a distribution over timesteps",
        ),
        (lambda: activations(network(), "middle.0", batch(), samples=0), "samples is the number .* at least 1; got 0"),
        (lambda: activations(FLAT, "inner", (torch.zeros(2, 3), torch.tensor([1, 2]))), r"is \(6,\) while the batch"),
        (lambda: activations(Doubled(lambda x: None), "inner", (torch.zeros(2, 3), 1)), "not called with a tensor"),
    ],
)
def test_modules_and_inputs_that_cannot_be_observed(call: Any, message: str) -> None:
    assert_error(message, call)


def results() -> dict[str, Any]:
    model = network()
    tracker = inspect.FlipTracker(model)
    tracker.update()
    tracker.update()
    return {
        "flips": tracker.result(),
        "saturation": inspect.saturation(model, batch()),
        "activations": inspect.activation_distribution(model, "middle.0.conv1", batch()),
        "tar": inspect.tar_biases(model),
        "fusion": inspect.fusion_distributions(model, fusions(model)[0], batch()),
    }


def test_every_result_draws_itself_on_new_and_on_given_axes() -> None:
    from matplotlib import pyplot

    for name, result in results().items():
        ax = result.plot()
        assert ax.has_data(), name
        assert ax.get_xlabel(), name
        assert ax.get_ylabel(), name
        ax.figure.canvas.draw()
        _, mine = pyplot.subplots()
        assert result.plot(mine) is mine


def test_many_layers_are_numbered_and_many_timesteps_thinned() -> None:
    many = inspect.Saturation(tuple(f"layer{number}" for number in range(60)), np.full(60, 0.5), np.full(60, 10))
    assert many.plot().get_xlabel() == "layer (0 is layer0, 59 is layer59)"
    one = inspect.Distribution(3, 0.0, 1.0, -1.0, 1.0, np.array([-1.0, 0.0, 1.0], dtype=np.float32))
    ax = inspect.ActivationDistribution("m", np.arange(50.0), (one,) * 50).plot(boxes=5)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "12", "24", "37", "49"]


def test_plots_without_matplotlib_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = inspect.tar_biases(network())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_error(r"plots need matplotlib: pip install 'binarize-diffusion\[plot\]'", found.plot)


def test_class_labels_are_not_taken_for_timesteps() -> None:
    host, x = unet2d((8, 16), class_embed_type="timestep"), torch.randn(2, 3, 8, 8)
    run = {"sample": x, "timestep": torch.tensor([10, 900]), "class_labels": torch.tensor([1, 2])}
    assert inspect.activation_distribution(host, "mid_block.resnets.0.conv1", run).timesteps.tolist() == [10, 900]
