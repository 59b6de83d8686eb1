"""The structure pass: CP-Down, CP-Up and CS-Fusion in diffusers' U-Nets."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts_zoo import HOSTS, built, is_block, output_of, shapes_of, state_of, unet2d, unet2d_condition

import binarize
from binarize import BinarizeError
from binarize.hosts import find_host
from binarize.layers import BinaryConv2d, CPDown, CPUp, CSFusion

UNET2D = ("ddpm_cifar", "unet2d_attention", "unet2d_odd_widths", "unet2d_resnet_sampling", "stable_diffusion")


@pytest.mark.parametrize("name", UNET2D)
def test_the_structure_pass_puts_the_blocks_in(name: str) -> None:
    host, model = built(name)
    inputs = host.inputs(2)
    before, plain = shapes_of(model, inputs), dict(model.named_parameters())
    resamplers = [
        n for n, m in model.named_modules() if type(m).__name__ in ("Downsample2D", "Upsample2D") and m.use_conv
    ]
    fused = [n for n, m in model.named_modules() if re.fullmatch(r"up_blocks\.\d+\.resnets\.\d+", n)]
    binarize.convert(model, "reactnet", structure="cp_cs")
    modules = dict(model.named_modules())
    report = binarize.report(model)
    assert report.structure == "(cp, cs)"
    assert {row.name for row in report.new} == {*resamplers, *(f"{n}.fusion" for n in fused)}
    assert all(isinstance(modules[n], CPDown | CPUp) for n in resamplers)
    assert all(isinstance(modules[f"{n}.fusion"], CSFusion) for n in fused)
    assert not any(n.startswith("up_blocks") and n.endswith("conv_shortcut") for n in modules)

    after = shapes_of(model, inputs)
    assert after["conv_out"] == before["conv_out"]
    assert any(note.startswith(f"{host.form} form") for note in report.notes)
    assert all(f"{host.form} form" in row.detail for row in report.new)
    if host.form == "published":
        assert {len(modules[n].convs) for n in resamplers} == {2}
        assert {modules[f"{n}.fusion"].form for n in fused} == {"published"}
        # Every binary convolution keeps its width, which is the point of the structure.
        binary = [m for m in model.modules() if isinstance(m, BinaryConv2d)]
        assert all(m.in_channels == m.out_channels and m.stride == (1, 1) for m in binary)
    else:
        blocks = [n for n in before if n in modules and is_block(modules[n])]
        assert len(blocks) > 8
        assert {n: after[n] for n in blocks} == {n: before[n] for n in blocks}

    # What kept its name and shape kept its weights, as the same Parameter; the report marks what did not.
    fresh = {row.name for row in report.rows if row.detail.endswith("freshly initialized")}
    for parameter_name, parameter in model.named_parameters():
        layer, before_it = parameter_name.rpartition(".")[0], plain.get(parameter_name)
        if before_it is not None and before_it.shape == parameter.shape and not layer.endswith("norm1"):
            assert (parameter is before_it) == (layer not in fresh), parameter_name
    assert fresh >= {f"{n}.fusion.convs.0" for n in fused}


def test_the_fused_resnet_is_a_fusion_and_a_resnet() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    model = unet2d((8, 16), dropout=0.0, resnet_time_scale_shift="scale_shift", act_fn="gelu", norm_eps=1e-3)
    binarize.revert(binarize.convert(model, "bidiffsr"))
    fused: Any = model.get_submodule("up_blocks.1.resnets.0")
    options: Any = {"temb_channels": 32, "groups": 4, "eps": 1e-3, "non_linearity": "gelu"}
    plain = ResnetBlock2D(in_channels=8, out_channels=8, time_embedding_norm="scale_shift", **options)
    plain.load_state_dict({n: p for n, p in fused.state_dict().items() if not n.startswith("fusion.")})
    hidden, skip, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6), torch.randn(2, 32)
    one, two = fused.fusion.convs
    mixed = one(torch.cat([hidden[:, 1::2], skip[:, 0::2]], 1)) + two(torch.cat([hidden[:, 0::2], skip[:, 1::2]], 1))
    torch.testing.assert_close(fused(torch.cat([hidden, skip], 1), emb), plain(mixed, emb))


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(8, 16, 32), (8, 12, 20)])
@pytest.mark.parametrize("size", [(10, 12), (11, 7)])
def test_sizes_that_do_not_halve_come_out_as_from_the_host(widths: tuple[int, ...], size: tuple[int, int]) -> None:
    """UNet2DConditionModel passes ``upsample_size`` for those."""
    inputs = (torch.randn(2, 4, *size), torch.tensor([3, 700])), {"encoder_hidden_states": torch.randn(2, 5, 8)}
    for padding in (1, 0):
        model = unet2d_condition(widths, downsample_padding=padding)
        before = shapes_of(model, inputs)
        binarize.convert(model, "bidiffsr")
        after = shapes_of(model, inputs)
        assert after["conv_out"] == before["conv_out"]
        resampled = [n for n in before if re.fullmatch(r"(down|up)_blocks\.\d+\.(down|up)samplers\.0", n)]
        assert len(resampled) == 4
        assert [after[n][2:] for n in resampled] == [before[n][2:] for n in resampled]


def test_resamplers_that_no_cp_block_replaces_are_left_with_a_note() -> None:
    report = binarize.plan(HOSTS["unet2d_resnet_sampling"].build(), "bidiffsr")
    assert any("down_blocks.0.downsamplers.0 keeps its structure" in note for note in report.notes)
    assert {row.type for row in report.new} == {"CSFusion"}
    report = binarize.plan(unet2d((6, 18), norm_num_groups=2, attention_head_dim=2), "bidiffsr")
    assert any("6 to 6 channels; CP blocks need the same multiple of 4" in note for note in report.notes)
    assert "down_blocks.0.downsamplers.0.conv" in {row.name for row in report.replaced}


def test_skip_blocks_get_fusions() -> None:
    """NCSN++'s blocks normalise with group counts of their own."""
    model = unet2d((8, 16), down_block_types=("SkipDownBlock2D",) * 2, up_block_types=("SkipUpBlock2D",) * 2)
    inputs = HOSTS["ddpm_cifar"].inputs(2)
    before = output_of(model, inputs).shape
    binarize.convert(model, "bidiffsr")
    assert output_of(model, inputs).shape == before
    assert {row.type for row in binarize.report(model).new} == {"CSFusion"}


def test_hosts_without_known_blocks_keep_their_structure() -> None:
    blocks: dict[str, Any] = {"down_block_types": ("KDownBlock2D",) * 2, "up_block_types": ("KUpBlock2D",) * 2}
    settings = {"norm_num_groups": 4, "resnet_time_scale_shift": "scale_shift", "time_embedding_type": "positional"}
    model = unet2d_condition((32, 32), **blocks, **settings, mid_block_type=None)
    assert binarize.plan(model, "bidiffsr").structure == "its own"
    before = state_of(model)
    with pytest.raises(BinarizeError, match=r"no block that takes CP-Down, CP-Up or CS-Fusion; its blocks are KDown"):
        binarize.convert(model, "bnn", structure="cp_cs")
    assert state_of(model) == before
    for name in ("adm", "sr3"):
        assert binarize.plan(HOSTS[name].build(), "bidiffsr").structure == "its own"
        with pytest.raises(BinarizeError, match="no structure that the toolkit can rewire"):
            binarize.convert(HOSTS[name].build(), "bidiffsr", structure="cp_cs")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_new_blocks_follow_the_host(dtype: torch.dtype) -> None:
    model = unet2d((8, 16)).to(dtype).eval()
    binarize.convert(model, "bidiffsr")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(module.training for module in model.modules())


def test_a_reverted_host_converts_again_and_reloads(tmp_path: Path) -> None:
    for name in ("ddpm_cifar", "stable_diffusion"):
        host, model = built(name)
        model.eval()
        binarize.revert(binarize.convert(model, "bidiffsr"))
        assert find_host(model).rewired(model)
        binarize.convert(model, "reactnet", structure="keep")
        assert binarize.report(model).structure == "(cp, cs)"
        again = binarize.load(binarize.save(model, tmp_path / name))
        inputs = host.inputs(2)
        with torch.no_grad():
            assert torch.equal(output_of(again, inputs), output_of(model, inputs))


def test_the_contract_form_can_be_asked_for(tmp_path: Path) -> None:
    host, model = built("unet2d_attention")
    inputs = host.inputs(2)
    before = shapes_of(model, inputs)
    published = binarize.plan(model, "bidiffsr").notes
    assert any("ControlNet and adapters of the host no longer fit; structure='contract'" in note for note in published)
    binarize.convert(model, "bidiffsr", structure="contract")
    assert not any("no longer fit" in note for note in binarize.report(model).notes)
    after = shapes_of(model, inputs)
    assert {n: after[n] for n in before if n in after and "blocks" in n and n.count(".") == 1} == {
        n: before[n] for n in before if "blocks" in n and n.count(".") == 1
    }
    again = binarize.load(binarize.save(model.eval(), tmp_path / "converted"))
    with torch.no_grad():
        assert torch.equal(output_of(again, inputs), output_of(model, inputs))
    reverted = binarize.convert(binarize.revert(model), "reactnet")
    again = binarize.load(binarize.save(reverted.eval(), tmp_path / "reverted"))
    with torch.no_grad():
        assert torch.equal(output_of(again, inputs), output_of(reverted, inputs))
    for name in ("srunet", "adm"):
        with pytest.raises(BinarizeError, match=r"has no contract form \(taken for: .*Use structure='cp_cs' or 'keep'"):
            binarize.plan(HOSTS[name].build(), "bidiffsr", structure="contract")


@pytest.mark.parametrize("name", ["ddpm_cifar", "stable_diffusion", "srunet"])
def test_the_report_says_how_many_weights_the_new_blocks_discard(name: str) -> None:
    _, model = built(name)
    before = {id(p): p for p in model.parameters()}
    kept = binarize.plan(model, "bidiffsr", structure="keep")
    assert not any("of the host's weights" in note for note in kept.notes)
    notes = binarize.plan(model, "bidiffsr").notes
    for edit in find_host(model).rewire(model):
        model.set_submodule(edit.path, edit.module)
    left = {id(p) for p in model.parameters()}
    total, lost = sum(p.numel() for p in before.values()), sum(p.numel() for i, p in before.items() if i not in left)
    assert lost > 0.1 * total
    said = f"replace {100 * lost / total:.0f}% of the host's weights ({lost:,} of {total:,} parameters)"
    assert any(said in note for note in notes)
