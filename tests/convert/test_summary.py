"""Accounting: the published rows, and closed forms of the counting rules."""

import json

import pytest
import torch
from torch import nn

import binarize
from binarize.errors import BinarizeError
from binarize.models import SRUNet


def on_meta(**options) -> SRUNet:
    with torch.device("meta"):
        return SRUNet(**options)


def convert(model, method, **options):
    with torch.device("meta"):
        return binarize.convert(model, method, **options)


def test_bidiffsr_as_published():
    result = binarize.summary(convert(on_meta(), "bidiffsr"))
    assert result.params / 1e6 == pytest.approx(4.575043, abs=1e-6)
    assert result.ops / 1e9 == pytest.approx(36.6686, abs=1e-4)
    assert result.raw_params == 51_280_387
    assert result.macs_by_bits[1] / 1e9 == pytest.approx(98.65, abs=1e-3)
    assert 18.2e6 < result.bytes < 18.5e6
    attention = sum(r.macs.get(32, 0) for r in result.rows if r.type == "SelfAttention")
    assert attention / 1e9 == pytest.approx(1.0737, abs=1e-4)
    for kind, billions in (("Linear", 0.0004), ("GroupNorm", 0.4273)):
        assert sum(r.ops for r in result.rows if r.type == kind) / 1e9 == pytest.approx(billions, abs=1e-4)


def test_sr3_as_published():
    result = binarize.summary(on_meta(resampling="conv", fusion="wide"))
    assert result.params == result.raw_params == 55_407_235
    assert result.ops / 1e9 == pytest.approx(176.408, abs=1e-3)
    assert set(result.macs_by_bits) == {32}


ABLATIONS = {
    "K = 1": ({}, {"groups": 1}, 4.2975, 36.67),
    "concat": ({"fusion": "concat"}, {"groups": 1}, 4.2901, 36.67),
    "add": ({"fusion": "add"}, {"groups": 1}, 4.094, 33.40),
    "TaR only": ({}, {"taa": False}, 4.367, 36.67),
    "TaA only": ({}, {"tar": False}, 4.506, 36.67),
    "K = 2": ({}, {"groups": 2}, 4.367, 36.67),
    "baseline": ({"resampling": "pixel", "fusion": "concat"}, {"groups": 1, "shortcut": False}, 4.2885, 36.67),
}


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "options", "params", "ops"), ABLATIONS.values(), ids=ABLATIONS)
def test_ablation_rows_as_published(structure, options, params, ops):
    result = binarize.summary(convert(on_meta(**structure), {"name": "bidiffsr", **options}, structure="keep"))
    assert result.params / 1e6 == pytest.approx(params, abs=1e-3)
    assert result.ops / 1e9 == pytest.approx(ops, abs=1e-2)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 20)])
def test_counts_of_a_small_network_by_hand(height, width):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 12, 3, padding=1, stride=2),
        nn.GroupNorm(4, 12),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 3, 1),
    )
    binarize.convert(model, "bbcu")
    result = binarize.summary(model, torch.zeros(1, 3, height, width))
    pixels, half = height * width, height * width // 4
    full = 3 * 8 * 9 * pixels + 12 * 3 * pixels
    binary = 8 * 12 * 9 * half
    assert result.macs_by_bits == {1: binary, 32: full}
    assert result.ops == full + binary / 64 + 5 * 12 * half + 12 * pixels + 2 * 12 * pixels
    extra = 8 + 3 * 12  # shift and RPReLU
    plain = (3 * 8 * 9 + 8) + extra + 2 * 12 + 2 * 12 + (12 * 3 + 3)
    assert result.params == plain + 8 * 12 * 9 / 32
    assert result.raw_params == plain + 8 * 12 * 9
    assert result.bytes == 4 * plain + 8 * 12 * 9 // 8 + 4 * 12 + 2 * 12 * 4 + 8


def test_linear_attention_and_tokens():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 4, batch_first=True)
            self.hidden, self.last = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.hidden(x + self.attention(x, x, x, need_weights=False)[0]))

    result = binarize.summary(binarize.convert(Block(), "bbcu", linear=True), torch.zeros(1, 10, 16))
    assert result.macs_by_bits[1] == 10 * 16 * 32
    projections, scores = 4 * 10 * 16 * 16, 2 * 10 * 10 * 16
    assert result.macs_by_bits[32] == 10 * 16 * 16 + projections + scores + 10 * 32 * 16


def test_formats_and_that_nothing_is_touched():
    model = binarize.convert(SRUNet(base_channels=16, channel_mults=(1, 2), res_blocks=1, norm_groups=8), "bidiffsr")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = binarize.summary(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    totals = result.to_text(layers=False)
    assert "operations" in totals
    assert "middle.1.conv2" in str(result).removesuffix(totals)
    assert result.to_markdown().startswith("parameters")
    assert "| middle.1.conv2 | BinaryConv2d |" in result.to_markdown()
    loaded = json.loads(result.to_json())
    assert loaded["params"] == result.params
    assert sum(row["raw_params"] for row in loaded["rows"]) == sum(p.numel() for p in model.parameters())


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(BinarizeError, match=r"cannot run on 1x4x8x8.*Pass example_inputs"):
        binarize.summary(nn.Conv2d(3, 3, 1), torch.zeros(1, 4, 8, 8))
    with pytest.raises(BinarizeError, match="must be a tensor, a tuple of arguments or a dict; got str"):
        binarize.summary(nn.Conv2d(3, 3, 1), "a picture")
    assert binarize.summary(nn.Conv2d(3, 3, 1)).input == "1x3x224x224"
