"""A packed layer follows every change of its parameters, also those that no version counter sees."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed_case import SMALL
from torch import Tensor, nn

import binarize
from binarize.kernels import backends
from binarize.layers import BinaryConv2d, BinaryLinear
from binarize.models import SRUNet
from binarize.packed import PackedConv2d, PackedLinear


def add_to_data(p: Tensor) -> None:
    p.data.add_(0.5)


def replace_data(p: Tensor) -> None:
    p.data = p.data + 0.5


def write_memory(p: Tensor) -> None:
    p.detach().numpy()[...] += 0.5


EDITS = [add_to_data, replace_data, write_memory]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("method", ["bidiffsr", "reactnet", "xnor++", "irnet", "binarydm"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_layer_follows_edits_after_its_first_call(kind: str, method: str, edit: Callable[[Tensor], None]) -> None:
    plain, shape = (nn.Conv2d(16, 16, 3, padding=1), (2, 16, 5, 5)) if kind == "conv" else (nn.Linear(16, 16), (2, 16))
    binary: Any = BinaryConv2d if kind == "conv" else BinaryLinear
    packed: Any = PackedConv2d if kind == "conv" else PackedLinear
    options = {"groups": 1} if method == "bidiffsr" else {}
    layer = packed(binary.from_float(plain, binarize.methods.get_method(method, **options)).eval())
    x = torch.randn(shape)
    floats = [t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point() and t.dim()]
    changes = 0
    for tensor in floats:
        before = layer(x)
        edit(tensor)
        found = layer(x)
        with backends.use("torch"):
            layer._compiled = None
            torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
        changes += not torch.equal(found, before)
    assert changes > 0


def test_a_network_follows_an_average_of_weights_written_through_data() -> None:
    model = binarize.pack(binarize.convert(SRUNet(**SMALL).eval(), "bidiffsr"))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10, 1900])
    with torch.no_grad():
        before = model(x, t, x).sample
        for parameter in model.parameters():
            parameter.data.mul_(0.9)
        found = model(x, t, x).sample
        expected = model.to(torch.float32)(x, t, x).sample  # which lays all out anew
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)
