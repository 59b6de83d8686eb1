"""A swap drops no behavior in silence: layers that were changed or hooked are kept, patched parts run as they are."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from errors_case import assert_error
from packed_case import SMALL, inputs, network, scatter
from torch import Tensor, nn
from torch.nn.utils import prune

import binarize
from binarize.conversion.apply import apply_conversion
from binarize.conversion.record import conversion
from binarize.layers import BinaryConv2d, RPReLU


class Standardized(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Called(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


def tiled(layer: Any) -> None:
    layer._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w, b)


def as_buffer(layer: Any) -> None:
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)


def as_tensor(layer: Any) -> None:
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight


def offload(layer: nn.Module) -> None:
    pytest.importorskip("accelerate").cpu_offload(layer, torch.device("cpu"))


def body(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 1), layer, nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))


CHANGES: list[tuple[type[nn.Conv2d], Callable[[Any], Any], str]] = [
    (Standardized, lambda layer: None, "Standardized has a _conv_forward of its own"),
    (Called, lambda layer: None, "Called has a __call__ of its own"),
    (nn.Conv2d, tiled, "its _conv_forward was replaced on the instance"),
    (nn.Conv2d, lambda layer: setattr(layer, "forward", layer.forward), "its forward was replaced on the instance"),
    (nn.Conv2d, lambda layer: layer.register_forward_hook(lambda *_: None), "it has hooks, which a binary layer"),
    (nn.Conv2d, lambda layer: layer.register_forward_pre_hook(lambda *_: None), "it has hooks"),
    (nn.Conv2d, lambda layer: layer.register_full_backward_hook(lambda *_: None), "it has hooks"),
    (nn.Conv2d, as_buffer, "its weight is a buffer or a plain tensor"),
    (nn.Conv2d, as_tensor, "its weight is a buffer or a plain tensor"),
    (nn.Conv2d, offload, "accelerate moves its weights"),
]


@pytest.mark.parametrize(("kind", "change", "reason"), CHANGES, ids=[reason for *_, reason in CHANGES])
def test_a_changed_layer_is_kept_with_the_reason(kind: type[nn.Conv2d], change: Any, reason: str) -> None:
    layer = kind(4, 4, 3, padding=1)
    change(layer)
    model = binarize.convert(body(layer), "bnn", overrides={"1": "reactnet"})
    assert model[1] is layer
    assert binarize.report(model).kept[1].detail.startswith(reason)
    assert isinstance(model[2], BinaryConv2d)


def test_a_patched_class_of_torch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, *args: original(self, *args))
    assert_error("Conv2d has a _conv_forward of its own", binarize.convert, body(nn.Conv2d(4, 4, 1)), "bnn")


def test_pruned_networks_are_refused() -> None:
    model = body(nn.Conv2d(4, 4, 3))
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    assert_error("'1' is wrapped by torch.nn.utils.prune; remove or merge that", binarize.convert, model, "bnn")
    prune.remove(model[1], "weight")
    binarize.convert(model, "bnn")


def test_records_of_version_0_1_repeat_its_choice() -> None:
    model = nn.Sequential(*body(Standardized(4, 4, 3)), nn.Flatten(2), *(nn.Conv1d(4, 4, 1) for _ in range(3)))
    converted = binarize.convert(copy.deepcopy(model), "bnn")
    recorded = conversion(converted).to_config()
    assert recorded.pop("binary") == ["2", "3", "5", "6"]
    recorded["format"] = 1
    old = copy.deepcopy(model)
    apply_conversion(old, recorded)
    assert [row.name for row in binarize.report(old).replaced] == ["1", "2", "3"]
    again = copy.deepcopy(model)
    apply_conversion(again, conversion(converted).to_config())
    assert binarize.report(again) == binarize.report(converted)
    assert [row.name for row in binarize.report(again).replaced] == ["2", "3", "5", "6"]
    plain = binarize.convert(body(nn.Conv2d(4, 4, 3)), "bnn")
    assert "binary" not in conversion(plain).to_config()


@pytest.mark.parametrize("packed", [False, True])
def test_a_patched_part_runs_as_it_is(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def patched(self: RPReLU, x: Tensor) -> Tensor:
        return x * 0

    def forward(self: RPReLU, x: Tensor) -> Tensor:
        return x * 0

    model = scatter(binarize.convert(body(nn.Conv2d(4, 4, 3, padding=1)), "bbcu")).eval()
    if packed:
        binarize.pack(model)
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        before = model[1](x)
        for name, function in (("forward", patched), ("forward", forward), ("__call__", patched)):
            with monkeypatch.context() as patch:
                patch.setattr(RPReLU, name, function)
                torch.testing.assert_close(model[1](x), x)  # the shortcut alone is left
            torch.testing.assert_close(model[1](x), before)
        model[1].post.forward = lambda y: y * 0
        torch.testing.assert_close(model[1](x), x)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", ["bidiffsr", "reactnet", "binarydm"])
def test_offloaded_networks_compute_the_same(method: str, packed: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, given = network(method, **SMALL), inputs(8)
    if packed:
        binarize.pack(model)
    with torch.no_grad():
        expected = model(*given).sample
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert next(model.parameters()).is_meta
        for _ in range(2):
            torch.testing.assert_close(model(*given).sample, expected, rtol=1e-3, atol=1e-3)
