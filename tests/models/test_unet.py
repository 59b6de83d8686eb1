"""SRUNet: every structure, against shapes, diffusers' own time embedding and published sizes."""

import itertools
from unittest.mock import MagicMock

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from errors_case import assert_error

import binarize
from binarize.errors import BinarizeError
from binarize.models import SRUNet, blocks
from binarize.models.blocks import SelfAttention, SinusoidalTime, attend
from binarize.recipes import load_recipe

TINY = {"base_channels": 16, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 8}
PAIRS = [("conv", "wide"), *itertools.product(("pixel", "cp"), ("wide", "concat", "add", "split", "cs"))]


@pytest.mark.parametrize(("resampling", "fusion"), PAIRS)
def test_every_structure_maps_an_image_to_an_image(resampling, fusion):
    model = SRUNet(**TINY, resampling=resampling, fusion=fusion).eval()
    x, condition = torch.randn(2, 3, 16, 24), torch.rand(2, 3, 16, 24)
    out = model(x, torch.tensor([3, 1999]), condition)
    assert out.sample.shape == x.shape
    assert model(x, 7, condition, return_dict=False)[0].shape == x.shape
    out.sample.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_attention_levels_add_attention_to_their_blocks():
    model = SRUNet(**TINY, attention_levels=(1,))
    assert all(block.attention is not None for block in model.encoder[1].blocks)
    assert all(block.attention is None for block in model.decoder[0].blocks)


def test_without_arguments_it_is_the_released_structure_in_full_precision():
    config = SRUNet().config
    assert (config.resampling, config.fusion, config.base_channels) == ("cp", "cs", 64)
    assert tuple(config.channel_mults) == (1, 2, 4, 8)


def test_time_encoding_is_diffusers():
    t = torch.tensor([0.0, 1.0, 399.0, 1999.0])
    ours = SinusoidalTime(64)(t)
    theirs = get_timestep_embedding(t, 64, flip_sin_to_cos=False, downscale_freq_shift=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    torch.testing.assert_close(SinusoidalTime(64)(t.double())[:, 0], t.double().sin(), rtol=0, atol=1e-15)


def test_attention_is_softmax_of_scores_over_sqrt_c():
    attention = SelfAttention(16, 8).double()
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).chunk(3, dim=1)
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 16**0.5, dim=-1)
    expected = x + attention.out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("spread", "error"), [(1, 0.01), (16, 0.03)])  # of the scores, and relative
@pytest.mark.parametrize(("pixels", "trained"), [(81, False), (81, True), (2100, False)])
def test_attention_in_bfloat16_is_that_in_float64(pixels, trained, spread, error, monkeypatch):
    monkeypatch.setattr(blocks, "_AVX512_BF16", True)
    called = MagicMock(wraps=torch.baddbmm)
    monkeypatch.setattr(torch, "baddbmm", called)
    q, k, v = torch.randn(3, 2, pixels, 64).bfloat16()
    q *= spread
    weights = torch.softmax(torch.einsum("bic,bjc->bij", q.double(), k.double()) / 64**0.5, dim=-1)
    expected = torch.einsum("bij,bjc->bic", weights, v.double())
    with torch.set_grad_enabled(trained):
        found = attend(q, k, v)
    assert called.called == (pixels <= 2048 and not trained)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < error * expected.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter
def test_attention_in_bfloat16_is_exported_for_all_sizes(monkeypatch):
    monkeypatch.setattr(blocks, "_AVX512_BF16", True)
    attention, side = SelfAttention(16, 8).bfloat16(), torch.export.Dim("side", min=4, max=64)
    small, large = torch.randn(1, 16, 8, 8).bfloat16(), torch.randn(1, 16, 48, 48).bfloat16()
    with torch.no_grad():
        exported = torch.export.export(attention, (small,), dynamic_shapes=({2: side, 3: side},)).module()
        torch.testing.assert_close(exported(large), attention(large))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resampling": "cpp"}, "unknown resampling 'cpp'; allowed: conv, pixel, cp. Did you mean 'cp'"),
        ({"fusion": "css"}, "unknown fusion 'css'.*Did you mean 'cs'"),
        ({"resampling": "conv", "fusion": "cs"}, "goes with fusion='wide' only"),
        ({"channel_mults": (1, 3)}, "doubles the width at each level"),
        ({"channel_mults": ()}, "at least one level"),
        ({"norm_groups": 7}, "multiple of norm_groups=7"),
        ({"attention_levels": (2,)}, r"from 0 \(the finest\) to 1; got \[2\]"),
    ],
)
def test_options_that_cannot_be_built_are_refused(options, message):
    assert_error(message, SRUNet, **{**TINY, **options})


@pytest.mark.parametrize(
    ("sample", "timestep", "condition", "message"),
    [
        ((3, 9, 8), 0, (3, 9, 8), r"must be multiples of 2; got \(9, 8\)"),
        ((3, 8, 8), 0, (3, 16, 8), "of equal size"),
        ((3, 8, 8), 0, (3, 8, 16), "differ in width"),
        ((3, 8, 8), torch.tensor([1, 2, 3]), (3, 8, 8), r"one value for each of the 1 samples; got shape \(3,\)"),
        ((3, 8, 8), 0, (1, 8, 8), "expects 6 channels in all"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(sample, timestep, condition, message):
    assert_error(message, lambda: SRUNet(**TINY)(torch.zeros(1, *sample), timestep, torch.zeros(1, *condition)))


def test_condition_comes_before_the_sample():
    model = SRUNet(**TINY).eval()
    seen = []
    model.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.full((1, 3, 8, 8), 2.0), 0, torch.full((1, 3, 8, 8), 5.0))
    assert seen[0][:, :3].eq(5).all()
    assert seen[0][:, 3:].eq(2).all()


def test_build_makes_a_converted_network_from_a_recipe():
    with torch.device("meta"):
        model = binarize.build("bidiffsr_x2", "method.groups=2")
    assert binarize.report(model).method == "bidiffsr"
    assert model.middle[0].conv1.pre.bias.shape == (2, 512)
    with pytest.raises(BinarizeError, match="a loaded recipe takes no overrides"):
        binarize.build(load_recipe("bidiffsr_x2"), "method.groups=2")
    assert model.config.num_train_timesteps == 2000
