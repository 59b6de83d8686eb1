"""Every family of host under every method: what is converted, what keeps its shape, what is refused."""

import copy
import functools
import re
from typing import Any

import pytest
import torch
from hosts_zoo import HOSTS, built, is_block, output_of, recorded, shapes_of, state_of, unet2d, unet2d_condition
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import binarize
from binarize import BinarizeError
from binarize.layers import BinaryConv2d, BinaryLinear

UNTIMED = [name for name, host in HOSTS.items() if not host.timed]


@functools.cache
def plain_shapes(name: str) -> dict[str, tuple[int, ...]]:
    host, model = built(name)
    return shapes_of(model, host.inputs(2))


def double(inputs: Any) -> Any:
    return tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("method", binarize.list_methods())
@pytest.mark.parametrize("name", HOSTS)
def test_every_method_on_every_host(name: str, method: str) -> None:
    host, model = built(name)
    before = plain_shapes(name)
    timed = host.timed or not binarize.get_method(method).needs_timestep
    binarize.convert(model, method if timed else {"name": method, "groups": 1}, **host.options)
    after, out = recorded(model, host.inputs(2))
    assert out.shape == before[""]
    (out - 1).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]

    # Complete: every convolution and linear layer has one row that says what became of it.
    kinds = nn.modules.conv._ConvNd | nn.Linear | BinaryConv2d | BinaryLinear
    layers = {n for n, m in model.named_modules() if isinstance(m, kinds)}
    report = binarize.report(model)
    inside_binary = {n for n in layers if any(n.startswith(f"{row.name}.") for row in report.replaced)}
    assert sorted([row.name for row in report.rows if row.action != "new"]) == sorted(layers - inside_binary)
    assert all(row.detail for row in report.rows)

    # Two-valued, and nearly all of what could be: all 2-D convolutions but first, last and attention's.
    state = binarize.binary_state(model)
    binary = eligible = 0
    attention = [n for n, m in model.named_modules() if "Attention" in type(m).__name__ or n.endswith("attentions")]
    for layer_name, layer in model.named_modules():
        if isinstance(layer, BinaryConv2d):
            codes: Any = state[layer_name].codes
            assert (codes.dtype, codes.shape[1:]) == (torch.int8, layer.weight.shape)
            assert bool((codes.abs() == 1).all())
            binary += layer.weight.numel()
            eligible += layer.weight.numel()
        elif isinstance(layer, nn.Conv2d) and layer_name not in inside_binary:
            # BI-DiffSR keeps SRUNet's two finest decoder levels, which are all of this one's.
            spared = (method, name) == ("bidiffsr", "srunet") and re.match(r"decoder\.\d+\.blocks", layer_name)
            spared = spared or layer_name in host.kept or any(layer_name.startswith(a) for a in attention)
            eligible += 0 if spared else layer.weight.numel()
    assert binary >= 0.8 * eligible

    # Under `keep`, and in the contract form, every block gives what it gave.
    if binarize.get_method(method).default_structure == "keep" or host.form in (None, "contract"):
        blocks = {n for n, m in model.named_modules() if is_block(m)} & before.keys()
        assert {block: after[block] for block in blocks} == {block: before[block] for block in blocks}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm_cifar", "unet2d_attention", "stable_diffusion", "adm", "sr3"])
def test_a_mixed_batch_equals_its_samples_and_a_deepcopy_is_independent(name: str) -> None:
    host, model = built(name)
    model.double().eval()
    binarize.convert(model, "bidiffsr", **host.options)
    inputs = (image, timesteps, *rest), keywords = double(host.inputs(5))
    with torch.no_grad():
        for parameter in model.parameters():  # groups that differ, last layers that are not zero
            parameter += 0.3 * torch.randn_like(parameter)
        together = output_of(model, inputs)
        for i in range(5):
            one = {k: v[i : i + 1] for k, v in keywords.items()}
            alone = output_of(model, ((image[i : i + 1], timesteps[i : i + 1], *rest), one))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-10)
        assert (output_of(model, ((image, timesteps.flip(0), *rest), keywords)) - together).abs().max() > 1e-3
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.normal_()
        assert not torch.equal(output_of(twin, inputs), together)
        assert torch.equal(output_of(model, inputs), together)
    contexts = [{id(m.context) for m in each.modules() if getattr(m, "context", None)} for each in (model, twin)]
    assert len(contexts[0] | contexts[1]) == 2


def test_projected_class_labels_are_not_taken_for_timesteps() -> None:
    model = unet2d((8, 16), class_embed_type="timestep")
    binarize.convert(model, "bidiffsr")
    context = model.get_submodule("mid_block.resnets.0.conv1.pre").context
    seen: list[Tensor] = []
    model.get_submodule("mid_block").register_forward_hook(lambda *_: seen.append(context.group(5)))
    model(torch.randn(2, 3, 16, 16), torch.tensor([3, 990]), class_labels=torch.tensor([700, 700]))
    model(torch.randn(1, 3, 16, 16), torch.tensor([450]), class_labels=torch.tensor([3]))
    assert [group.tolist() for group in seen] == [[0, 4], [2]]


@pytest.mark.parametrize("name", UNTIMED)
def test_hosts_without_timesteps_say_so(name: str) -> None:
    host, model = built(name)
    before = state_of(model)
    with pytest.raises(BinarizeError, match=r"has no timestep: .* bidiffsr\(groups=1\)"):
        binarize.convert(model, "bidiffsr", **host.options)
    assert state_of(model) == before
    binarize.convert(model, {"name": "bidiffsr", "groups": 1}, **host.options)
    assert output_of(model, host.inputs(2)).isfinite().all()


def test_training_timesteps_come_from_the_argument_the_config_or_are_assumed() -> None:
    assumed = binarize.plan(unet2d((8, 16)), "bidiffsr")
    assert "num_train_timesteps was not given and the host has none: 1000 assumed" in assumed.notes
    learned = {"time_embedding_type": "learned", "num_train_timesteps": 50}
    for settings, options, expected in (({}, {"num_train_timesteps": 400}, 400), (learned, {}, 50)):
        model = binarize.convert(unet2d((8, 16), **settings), "bidiffsr", **options)
        assert model.get_submodule("mid_block.resnets.0.conv1.pre").context.num_train_timesteps == expected
        assert output_of(model, ((torch.randn(2, 3, 16, 16), torch.tensor([1, 49])), {})).isfinite().all()
    with pytest.raises(BinarizeError, match="num_train_timesteps=1000, but the model's configuration says 50"):
        binarize.plan(unet2d((8, 16), **learned), "bidiffsr", num_train_timesteps=1000)
    noise_levels = binarize.plan(unet2d((8, 16), time_embedding_type="fourier"), "bidiffsr")
    assert any("the host takes noise levels" in note for note in noise_levels.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm_cifar", "unet2d_attention", "stable_diffusion"])
def test_checkpointing_gives_the_same_gradients_with_two_forwards_before_one_backward(name: str) -> None:
    host, model = built(name)
    model.double()
    binarize.convert(model, "bidiffsr", **host.options)
    saver = copy.deepcopy(model)
    saver.enable_gradient_checkpointing()  # type: ignore[operator]
    batches = [double(host.inputs(batch)) for batch in (2, 3)]
    gradients = []
    for each in (model, saver):
        loss = sum(output_of(each, batch).square().sum() for batch in batches)
        loss.backward()  # type: ignore[union-attr]
        gradients.append({n: p.grad for n, p in each.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter_name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter_name], gradient, rtol=0, atol=1e-10, msg=parameter_name)


@pytest.mark.long
def test_compiled_equals_eager_in_one_graph() -> None:
    host, model = built("unet2d_attention")
    binarize.convert(model.double().eval(), "bidiffsr", **host.options)
    (image, timesteps), _ = host.inputs(3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        results = [run(image.double(), timesteps).sample for run in (model, compiled)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["ddpm_cifar", "stable_diffusion"])
def test_a_convert_that_fails_after_the_structure_pass_leaves_the_host_untouched(name: str) -> None:
    _, model = built(name)
    before = state_of(model)
    for options in ({"keep": ["down_blocks.0.downsamplers.0.conv"]}, {"overrides": {"conv_out": {"fold_bias": True}}}):
        with pytest.raises(BinarizeError, match=r"matches no convolution or linear layer|fold_bias=True needs"):
            binarize.convert(model, "reactnet", structure="cp_cs", **options)
        assert state_of(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bidiffsr", "binarydm", "bireal"])
@pytest.mark.parametrize("name", ["srunet", "ddpm_cifar", "stable_diffusion", "adm"])
def test_plan_changes_neither_model_nor_random_state(name: str, method: str) -> None:
    host, model = built(name)
    options = {"structure": "cp_cs" if host.form else "keep", **host.options}
    before, state = state_of(model), torch.get_rng_state()
    planned = binarize.plan(model, method, **options)
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert planned == binarize.report(binarize.convert(model, method, **options))


@pytest.mark.parametrize("name", ["unet2d_attention", "stable_diffusion"])
def test_defaults_keep_embeddings_and_attention(name: str) -> None:
    _, model = built(name)
    report = binarize.plan(model, "bidiffsr", linear=True)
    kept = {row.name: row.detail for row in report.kept}
    assert (kept["conv_in"], kept["conv_out"]) == ("first convolution", "last convolution")
    assert {d for n, d in kept.items() if "time_" in n} == {"embedding of time or condition"}
    assert {d for n, d in kept.items() if re.search(r"to_|proj_(in|out)", n)} == {"attention projection"}
    feed_forward = [row.name for row in report.replaced if ".ff." in row.name]
    assert len(feed_forward) == (8 if name == "stable_diffusion" else 0)
    assert not any(".attentions." in n and ".ff." not in n for n in (row.name for row in report.replaced))


def test_fp_decoder_levels_keep_fusions_and_resnet_blocks() -> None:
    for levels, blocks in (((0,), "1"), ((1,), "0"), ((0, 1), "01"), (None, "")):
        method = binarize.methods.bidiffsr(fp_decoder_levels=levels)
        report = binarize.plan(unet2d((8, 16)), method)
        kept = {row.name for row in report.kept if "fp_decoder_levels" in row.detail and "time_emb" not in row.name}
        assert {name.split(".")[1] for name in kept} == set(blocks)
        assert sum("fusion" in name for name in kept) == 4 * len(blocks)
        assert not any("samplers" in name for name in kept)
    method = binarize.methods.bidiffsr(fp_decoder_levels=(2,))
    with pytest.raises(BinarizeError, match=r"fp_decoder_levels=\(2,\), but UNet2DModel has levels 0 .* to 1"):
        binarize.convert(unet2d((8, 16)), method)
    with pytest.raises(BinarizeError, match="ADMUNet has no known decoder levels; use keep"):
        binarize.convert(HOSTS["adm"].build(), method)


def test_attention_converts_where_a_pattern_names_it() -> None:
    model = binarize.convert(unet2d_condition(), "bidiffsr", linear=["*.attn2.to_?"], overrides={"*proj_in": {}})
    names = {row.name for row in binarize.report(model).replaced}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k" in names
    assert isinstance(model.get_submodule("down_blocks.0.attentions.0.proj_in"), BinaryConv2d)
    assert not any(".attn1." in n or ".ff." in n for n in names)
    assert output_of(model, HOSTS["stable_diffusion"].inputs(2)).isfinite().all()


def test_a_rectifier_before_the_sign_is_noted() -> None:
    assert any("every sign is +1" in note for note in binarize.plan(HOSTS["resnet18"].build(), "bnn").notes)
    assert not binarize.plan(HOSTS["adm"].build(), "bnn").notes
