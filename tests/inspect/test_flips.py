"""Sign flips and saturation, against numpy."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from cli_case import NETWORK
from hypothesis import given
from hypothesis import strategies as st
from inspect_case import OneLayer, batch, network, signs
from torch import nn

import binarize
from binarize import inspect
from binarize.errors import BinarizeError
from binarize.inspect.flips import count_bits
from binarize.models import SRUNet


@given(st.lists(st.integers(0, 255), min_size=1, max_size=50))
def test_bits_are_counted(words: list[int]) -> None:
    assert int(count_bits(torch.tensor(words, dtype=torch.uint8))) == sum(word.bit_count() for word in words)


def test_flips_since_the_last_update_and_since_the_start() -> None:
    model = network()
    tracker = inspect.FlipTracker(model)
    history, returned = [signs(model)], []
    for step in (10, 20, 25):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        returned.append(tracker.update(step))
        history.append(signs(model))
    found = tracker.result()
    assert (found.layers, found.steps.tolist()) == (tuple(history[0]), [10, 20, 25])
    for number, name in enumerate(found.layers):
        codes = [one[name] for one in history]
        assert found.weights[number] == codes[0].size
        assert found.since_last[:, number].tolist() == [(a != b).mean() for a, b in itertools.pairwise(codes)]
        assert found.since_start[:, number].tolist() == [(codes[0] != b).mean() for b in codes[1:]]
    every = [np.concatenate([one[name].ravel() for name in found.layers]) for one in history]
    np.testing.assert_allclose(found.overall(), [(a != b).mean() for a, b in itertools.pairwise(every)])
    np.testing.assert_allclose(found.overall("start"), [(every[0] != b).mean() for b in every[1:]])
    np.testing.assert_allclose(returned, found.overall())
    assert 0 < returned[0] < 0.5
    held = sum(bits.numel() * bits.element_size() for bits in tracker._start)  # one bit per weight
    assert every[0].size / 8 <= held <= every[0].size / 8 + len(tracker._start)


def test_signs_are_those_that_the_forward_uses() -> None:
    model = OneLayer("xnor")  # centres its weights, so that adding a constant over the inputs flips nothing
    tracker = inspect.FlipTracker(model)
    with torch.no_grad():
        model.layer.weight += 0.2
    assert tracker.update() == 0
    both = OneLayer("binarydm")  # two signs a weight
    assert inspect.FlipTracker(both).result().weights.tolist() == [2 * both.layer.weight.numel()]


def test_flips_of_some_layers_and_mistakes() -> None:
    tracker = inspect.FlipTracker(network(), layers=["middle", "encoder.0.blocks.*"])
    assert {name.split(".")[0] for name in tracker.result().layers} == {"middle", "encoder"}
    assert tracker.result().since_last.shape == (0, len(tracker.result().layers))
    tracker.update(5)
    for call, message in (
        (lambda: inspect.FlipTracker(SRUNet(**NETWORK)), "this SRUNet has no binary layer; call binarize.convert"),
        (lambda: inspect.FlipTracker(network(), "midle.*"), r"pattern 'midle\.\*' matches no binary layer; .* like"),
        (lambda: tracker.update(5), "update: step 5 is not after the last one, 5"),
        (lambda: tracker.result().overall("begin"), "since must be 'last' or 'start'; got 'begin'"),  # type: ignore
    ):
        with pytest.raises(BinarizeError, match=message):
            call()


@pytest.mark.parametrize(
    ("method", "saturated"),
    [
        ("bnn", lambda x: np.abs(x) > 1),
        ("bidiffsr", lambda x: np.abs(x) >= 1),
        ("dorefa", lambda x: (x < 0) | (x > 1)),
        ("recu", lambda x: np.abs(x) >= np.sqrt(x.var(axis=(1, 2, 3), ddof=1, keepdims=True) + 1e-5)),
    ],
)
def test_saturated_activations_have_no_gradient_through_the_sign(method: str, saturated: Any) -> None:
    model = OneLayer(method, **({"groups": 1} if method == "bidiffsr" else {}))
    x = 1.5 * torch.randn(3, 4, 5, 5)
    x[0, 0] = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    found = inspect.saturation(model, x)
    assert found.layers == ("layer",)
    assert found.share[0] == found.overall == pytest.approx(saturated(x.double().numpy()).mean())
    assert found.count[0] == x.numel()


def test_the_shift_counts_and_several_forwards_add_up() -> None:
    model = OneLayer("reactnet").eval()
    nn.init.constant_(model.layer.pre.bias, 3.0)
    x = torch.zeros(1, 4, 2, 2)
    assert inspect.saturation(model, {"x": x}).overall == 1
    assert inspect.saturation(model, lambda: (model(x), model(x - 3))).overall == 0.5


def test_saturation_under_inference_mode_and_of_chosen_layers() -> None:
    model = network()
    inputs = batch()

    def run() -> None:
        with torch.inference_mode():
            model(*inputs)

    some = inspect.saturation(model, run, layers="middle")
    assert len(some.layers) == 4
    every = inspect.saturation(model, inputs)
    shares = dict(zip(every.layers, every.share, strict=True))
    np.testing.assert_array_equal(some.share, [shares[name] for name in some.layers])


def test_saturation_of_tokens_is_normalised_as_the_layer_normalises_them() -> None:
    model = binarize.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), "recu", linear=True)
    x = torch.randn(2, 5, 8)
    result = inspect.saturation(model, x)
    h = model[0](x)
    normal = h / torch.sqrt(h.var(-1, keepdim=True) + 1e-5)
    assert result.share[0] == pytest.approx((normal.abs() >= 1).float().mean().item())
