"""The fused operators of packed networks, against the modules that they replace."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import binarize
from binarize.layers import CSFusion
from binarize.models import SRUNet
from binarize.packed import blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_a_full_precision_fusion_equals_its_convolutions(biases: tuple[bool, bool], dtype: torch.dtype) -> None:
    fusion = CSFusion(6, 4, 5).to(dtype)
    for conv, has_bias in zip(fusion.convs, biases, strict=True):
        if not has_bias:
            conv.bias = None
    hidden, skip = torch.randn(2, 6, 4, 3, dtype=dtype), torch.randn(2, 4, 4, 3, dtype=dtype)
    with torch.no_grad():
        expected = fusion(torch.cat([hidden, skip], dim=1))
        for layout in (torch.contiguous_format, torch.channels_last):
            found = blocks.fuse(fusion, *(x.contiguous(memory_format=layout) for x in (hidden, skip)))
            torch.testing.assert_close(found, expected)


def test_a_packed_network_fuses_its_last_layers_and_copies_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = SRUNet(base_channels=16, channel_mults=(1, 2), res_blocks=1, norm_groups=4, dropout=0.0).eval()
    binarize.convert(unet, "bidiffsr")
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([10])
    with torch.no_grad():
        expected = unet(x, t, x).sample
    packed, widths = binarize.pack(unet), []
    plain = blocks.conv3x3

    def conv3x3(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        widths.append(weight.shape[0])
        return plain(x, weight, *others)

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(blocks, "conv3x3", conv3x3)
    monkeypatch.setattr(F, "pixel_shuffle", refuse)
    monkeypatch.setattr(F, "pixel_unshuffle", refuse)
    with torch.no_grad():
        torch.testing.assert_close(packed(x, t, x).sample, expected, rtol=1e-3, atol=1e-3)
    assert widths[-1] == 3
    packed.requires_grad_(False)
    torch.testing.assert_close(packed(x, t, x).sample, expected, rtol=1e-3, atol=1e-3)
    assert widths.count(3) == 2
    packed.conv_out.requires_grad_(True)
    packed(x, t, x).sample.mean().backward()
    assert packed.conv_out.weight.grad is not None
