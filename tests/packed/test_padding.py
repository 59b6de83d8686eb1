"""Packed convolutions with every padding mode, kernel size and shortcut equal the unpacked layer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packed_case import MODES
from torch import nn

from binarize.layers import BinaryConv2d
from binarize.methods import get_method
from binarize.packed import PackedConv2d

KERNELS = [(1, 0, 1), (1, 1, 1), (3, 1, 2), ((1, 3), (0, 1), 1), (2, "same", 1)]


@pytest.mark.parametrize("shortcut", [None, "pool", "scaled", "projection"])
@pytest.mark.parametrize("method", ["reactnet", "irnet"])
@pytest.mark.parametrize("mode", sorted(set(MODES) - {"zeros"}))
def test_a_layer_adds_its_input_and_not_the_padded_one(mode: Any, method: str, shortcut: str | None) -> None:
    torch.manual_seed(0)
    for kernel, padding, stride in KERNELS:
        conv = nn.Conv2d(16, 16, kernel, stride, padding, padding_mode=mode)
        layer = BinaryConv2d.from_float(conv, get_method(method).replace(shortcut=shortcut)).double().eval()
        x, norm = torch.randn(2, 16, 6, 6).double(), torch.randn(2, 2, 16).double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            expected = layer(x), layer(F.silu(x * norm[0, :, :, None, None] + norm[1, :, :, None, None]))
            packed, residual = PackedConv2d(layer), torch.randn_like(expected[0])
            torch.testing.assert_close(packed(x), expected[0], rtol=0, atol=1e-9)
            torch.testing.assert_close(packed(x, norm, residual), expected[1] + residual, rtol=0, atol=1e-9)
            packed, half = packed.bfloat16(), x.bfloat16()
            y = packed(half)
            assert y.shape == expected[0].shape
            assert (y - expected[0]).abs().mean() < 0.2 * expected[0].abs().mean() + 0.05
