"""The fused operators of packed networks, against the modules that they replace."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import binarize
from binarize.kernels import backends
from binarize.kernels.ops import norm_factors
from binarize.kernels.row_sums import RowSums
from binarize.layers import BinaryConv2d, CSFusion
from binarize.models import SRUNet
from binarize.models.blocks import ResBlock
from binarize.packed import PackedConv2d, blocks


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


def test_a_fusion_of_other_convolutions_calls_them() -> None:
    fusion = CSFusion(6, 6, 6)
    fusion.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
    hidden, skip = torch.randn(2, 6, 4, 3), torch.randn(2, 6, 4, 3)
    with torch.no_grad():
        expected = fusion(torch.cat([hidden, skip], dim=1))
        torch.testing.assert_close(blocks.fuse(fusion, hidden, skip), expected)


def test_each_block_gets_the_bias_of_its_own_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = small_network()
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([10])
    plain = ResBlock.forward

    def forward(self: ResBlock, x: Tensor, time: Tensor, skip: Tensor | None, time_bias: Tensor) -> Tensor:
        assert torch.equal(time_bias, self.time(F.silu(time)))
        return plain(self, x, time, skip)

    with torch.no_grad():
        expected = unet(x, t, x).sample
        monkeypatch.setattr(ResBlock, "forward", forward)
        assert torch.equal(unet(x, t, x).sample, expected)


def small_network() -> SRUNet:
    unet = SRUNet(base_channels=16, channel_mults=(1, 2), res_blocks=1, norm_groups=4, dropout=0.0).eval()
    binarize.convert(unet, "bidiffsr")
    return unet


def test_a_packed_network_fuses_its_last_layers_and_copies_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = small_network()
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([10])
    with torch.no_grad():
        expected = unet(x, t, x).sample
    packed, widths = binarize.pack(unet), []
    plain = blocks.conv3x3

    def conv3x3(x: Tensor, weight: Tensor, *others: Any, **sums: Any) -> Tensor:
        widths.append(weight.shape[0])
        return plain(x, weight, *others, **sums)

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


def factors(y: Tensor, sums: RowSums | None = None) -> Tensor:
    bias = torch.linspace(-1, 1, y.shape[1]).expand(y.shape[0], -1)
    return norm_factors(y, bias, 4, None, None, 1e-5, row_sums=sums)


def packed_conv(method: str = "reactnet", groups: int = 1) -> PackedConv2d:
    return PackedConv2d(BinaryConv2d.from_float(nn.Conv2d(32, 32, 3, padding=1, groups=groups), method).eval())


def after_a_norm(conv: nn.Module, sums: RowSums, x: Tensor) -> Tensor:
    return blocks.norm_silu_conv(nn.GroupNorm(4, 32), conv, x, out_sums=sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(7, 9), (32, 20)])
@pytest.mark.parametrize("kind", ["binary", "grouped", "full precision"])
@torch.no_grad()
def test_a_norm_reads_the_sums_that_a_convolution_left(kind: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, sums, conv = torch.randn(2, 32, *size, dtype=dtype), RowSums(), nn.Conv2d(32, 32, 3, padding=1)
    kernels: Any = backends.cpu_kernels()
    if kernels is None or (kind == "full precision" and not kernels.winograd.is_faster(x)):
        pytest.skip("torch computes this convolution, and leaves no sums")
    if kind != "full precision":
        conv = packed_conv(groups=2 if kind == "grouped" else 1)
    y = after_a_norm(conv, sums, x)
    assert sums.of is y
    assert sums.tensor is not None
    totals = torch.stack([y.float().sum(3), y.float().square().sum(3)], dim=2).transpose(1, 3)
    torch.testing.assert_close(sums.tensor, totals, rtol=1e-4, atol=1e-3)
    assert torch.equal(factors(y, sums), factors(y))
    sums.tensor.mul_(2)  # so that a norm that does not read them is noticed
    assert not torch.allclose(factors(y, sums), factors(y))
    assert torch.equal(factors(y.clone(), sums), factors(y))


def replace_forward(conv: PackedConv2d) -> None:
    plain = conv.forward
    conv.forward = lambda *inputs: plain(*inputs).mul_(3)  # type: ignore[method-assign]


CHANGES: dict[str, tuple[str, Any]] = {
    "two bases": ("binarydm", lambda conv: nullcontext()),
    "autocast": ("reactnet", lambda conv: torch.autocast("cpu", torch.bfloat16)),
    "profiler": ("reactnet", lambda conv: torch.profiler.profile()),
    "torch": ("reactnet", lambda conv: backends.use("torch")),
    "hook": ("reactnet", lambda conv: nullcontext(conv.register_forward_hook(lambda *_: _[2].mul_(3)))),
    "forward": ("reactnet", lambda conv: nullcontext(replace_forward(conv))),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_norm_does_not_read_the_sums_of_another_tensor(change: str) -> None:
    method, around = CHANGES[change]
    conv, sums, x = packed_conv(method), RowSums(), torch.randn(2, 32, 8, 8)
    with around(conv):
        y = after_a_norm(conv, sums, x)
        plain = blocks.norm_silu_conv(nn.GroupNorm(4, 32), conv, x)
    torch.testing.assert_close(y, plain)
    assert torch.equal(factors(y, sums), factors(y))


@torch.no_grad()
def test_a_packed_network_sums_no_image_that_a_block_has_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.cpu_kernels() is None:
        pytest.skip("plain torch leaves no sums")
    norm = pytest.importorskip("binarize.kernels.cpu.norm")
    packed, read, plain = binarize.pack(small_network()), [], norm._row_sums

    def row_sums(x: Tensor, p: Any) -> Tensor:
        read.append(x)
        return plain(x, p)

    monkeypatch.setattr(norm, "_row_sums", row_sums)
    x = torch.randn(1, 3, 16, 16)
    packed(x, torch.tensor([10]), x)
    known = [m for m in packed.modules() if isinstance(getattr(m, "conv1", None), PackedConv2d)]
    norms = sum(isinstance(m, nn.GroupNorm) for m in packed.modules())
    assert known
    assert len(read) <= norms - len(known)


def test_a_hook_that_changes_a_convolutions_output_changes_the_norm_after_it() -> None:
    packed = binarize.pack(small_network())
    block = next(m for m in packed.modules() if isinstance(getattr(m, "conv1", None), PackedConv2d))
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([10])
    with torch.no_grad():
        plain = packed(x, t, x).sample
        for hooks in (block.conv1.register_forward_hook, nn.modules.module.register_module_forward_hook):
            handle = hooks(lambda module, _, y: y.mul_(3).add_(1) if module is block.conv1 else None)
            fused = packed(x, t, x).sample
            with backends.use("torch"):
                expected = packed(x, t, x).sample
            handle.remove()
            assert not torch.allclose(fused, plain, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(fused, expected, rtol=1e-3, atol=1e-3)
