"""Packed networks under autocast give what unpacked ones give, in the same dtype."""

import copy

import pytest
import torch
from hosts_zoo import HOSTS, output_of
from torch import nn

import binarize
from binarize.layers import BinaryConv2d, BinaryConv3d, BinaryLinear
from binarize.packed import PackedConv2d, PackedConv3d, PackedLinear

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", ["bidiffsr", "bnn", "irnet", "binarydm"])
def test_a_layer_has_the_unpacked_dtype(method: str, dtype: torch.dtype) -> None:
    options = {"groups": 1} if method == "bidiffsr" else {}
    with torch.no_grad(), torch.autocast("cpu", dtype):
        for kept in (torch.float32, dtype):
            method_ = binarize.methods.get_method(method, **options)
            conv = BinaryConv2d.from_float(nn.Conv2d(16, 16, 3, padding=1), method_).eval()
            linear = BinaryLinear.from_float(nn.Linear(16, 16), method_).eval()
            video = BinaryConv3d.from_float(nn.Conv3d(16, 16, 3, padding=1), method_).eval()
            layers = (conv, PackedConv2d, (2, 16, 5, 5)), (linear, PackedLinear, (2, 3, 16))
            for layer, packed, shape in (*layers, (video, PackedConv3d, (2, 16, 3, 5, 5))):
                x = torch.randn(shape).to(kept)
                expected = layer(x)
                found = packed(layer)(x)
                assert found.dtype == expected.dtype
                torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", ["bidiffsr", "reactnet"])
@pytest.mark.parametrize("name", ["srunet", "unet2d_attention"])
def test_a_network_has_the_unpacked_dtype(name: str, method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    host = HOSTS[name]
    if host.library != "torch":
        pytest.importorskip(host.library)
    model = binarize.convert(host.build().eval(), method)
    inputs = host.inputs(2)
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            expected = output_of(model, inputs)
            found = output_of(binarize.pack(copy.deepcopy(model)), inputs)
        exact = output_of(model, inputs)
    assert found.dtype == expected.dtype == dtype
    noise = (expected.float() - exact).norm()
    assert (found.float() - exact).norm() < 2 * noise + 0.05 * exact.norm()  # signs flip near 0, as they do unpacked
