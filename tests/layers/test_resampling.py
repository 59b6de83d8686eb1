"""CP-Down, CP-Up, CS-Fusion and the plainer blocks, against index arithmetic and torch's own operators."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tensors_case import doubles, equal

from binarize import layers
from binarize.layers.structure import pixel_shuffle, pixel_unshuffle


@pytest.mark.parametrize(("channels", "splits"), [(4, 2), (8, 4), (6, 3), (3, 1)])
def test_cp_down_splits_sums_and_unshuffles(channels, splits):
    block = layers.CPDown(channels, splits).double()
    width = channels // splits
    assert (block.in_channels, block.out_channels) == (channels, 4 * width)
    assert all(conv.in_channels == conv.out_channels for conv in block.convs)
    x = doubles(2, channels, 4, 6)
    total = sum(conv(x[:, i * width : (i + 1) * width]) for i, conv in enumerate(block.convs))
    equal(block(x), F.pixel_unshuffle(total, 2))


@pytest.mark.parametrize(("channels", "branches"), [(4, 2), (6, 2), (3, 4), (4, 1)])
def test_cp_up_branches_and_shuffles(channels, branches):
    block = layers.CPUp(channels, branches).double()
    assert (block.in_channels, block.out_channels) == (channels, branches * channels // 4)
    x = doubles(2, channels, 2, 3)
    equal(block(x), F.pixel_shuffle(torch.cat([conv(x) for conv in block.convs], 1), 2))


@given(
    batch=st.integers(1, 2), widths=st.lists(st.sampled_from([1, 2, 3, 16, 48]), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 5, 19])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), grad=st.booleans(),
)  # fmt: skip
def test_pixels_in_channels_last_are_shuffled_as_torch_does(batch, widths, size, dtype, grad):
    parts = [torch.randn(batch, 4 * width, *size, dtype=torch.float64).to(dtype) for width in widths]
    expected = F.pixel_shuffle(torch.cat(parts, 1), 2)
    dense = [part.to(memory_format=torch.channels_last).requires_grad_(grad) for part in parts]
    shuffled = pixel_shuffle(dense)
    assert torch.equal(shuffled, expected)
    assert torch.equal(pixel_unshuffle(shuffled), torch.cat(parts, 1))
    assert shuffled.requires_grad == grad
    with torch.device("meta"):
        assert pixel_shuffle(dense).device == pixel_unshuffle(shuffled).device == torch.device("cpu")
    assert pixel_shuffle([dense[0].detach().half(), dense[0].detach().float()]).dtype == torch.float32
    with pytest.raises(RuntimeError, match="divisible"):
        pixel_unshuffle(torch.empty(1, 4, 3, 2, memory_format=torch.channels_last))


@pytest.mark.parametrize("other", [(1, 64, 10, 10), (1, 64, 4, 8), (2, 64, 8, 8), (1, 64, 8, 1)])
def test_parts_of_different_sizes_are_not_shuffled(other):
    parts = [torch.randn(size).to(memory_format=torch.channels_last) for size in ((1, 64, 8, 8), other)]
    with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        pixel_shuffle(parts)


def test_negated_pixels_are_shuffled_with_their_signs():
    x = torch.randn(1, 16, 4, 6).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(pixel_unshuffle(torch._neg_view(x)), -F.pixel_unshuffle(x, 2))
        part = torch.randn(1, 64, 2, 3).to(memory_format=torch.channels_last)
        assert torch.equal(pixel_shuffle([torch._neg_view(part)]), -F.pixel_shuffle(part, 2))


@pytest.mark.parametrize(
    ("hidden", "skip", "out", "form"),
    [
        *[(*widths, "published") for widths in ((4, 4, 4), (6, 2, 4), (3, 3, 3), (5, 3, 4))],
        *[(*widths, "strided") for widths in ((8, 4, 4), (6, 6, 4))],
        *[(*widths, "general") for widths in ((8, 4, 8), (2, 2, 8))],
    ],
)
def test_cs_fusion_mixes_every_channel_once(hidden, skip, out, form):
    fusion = layers.CSFusion(hidden, skip, out).double()
    x = doubles(1, hidden + skip, 2, 2)
    h, s = list(range(hidden)), list(range(hidden, hidden + skip))
    n = (hidden + skip) // out if form == "strided" else 1
    picked = [(h + s)[j::n] for j in range(n)]
    if form == "published":
        picked = [h[1::2] + s[0::2], h[0::2] + s[1::2]]
    assert fusion.form == form
    assert sorted(itertools.chain(*picked)) == h + s
    if form != "general":
        assert all(conv.in_channels == conv.out_channels == out for conv in fusion.convs)
    expected = sum(F.conv2d(x[:, c], conv.weight, conv.bias) for c, conv in zip(picked, fusion.convs, strict=True))
    equal(fusion(x), expected)


def test_plain_fusions_and_resamplers():
    x = doubles(1, 6, 4, 4)
    equal(layers.AddFusion(3, 3, 3)(x), x[:, :3] + x[:, 3:])
    equal(layers.AddFusion(4, 2, 2)(x), x[:, :4].reshape(1, 2, 2, 4, 4).mean(2) + x[:, 4:])
    concat, split = layers.ConcatFusion(4, 2, 3).double(), layers.SplitFusion(4, 2, 3).double()
    equal(concat(x), F.conv2d(x, concat.conv.weight, concat.conv.bias))
    first, second = split.convs
    equal(split(x), first(x[:, :4]) + second(x[:, 4:]))
    down, up = layers.PixelDown(6).double(), layers.PixelUp(6).double()
    equal(down(x), F.pixel_unshuffle(down.conv(x), 2))
    equal(up(x), F.pixel_shuffle(up.conv(x), 2))
    assert (down(x).shape, up(x).shape) == ((1, 12, 2, 2), (1, 3, 8, 8))
