"""Every family of host under every method: what is converted, what keeps its shape, what is refused."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts_zoo import HOSTS, ZooHost, output_of, unet2d, unet2d_condition
from torch import Tensor, nn

import binarize
from binarize import BinarizeError
from binarize.hosts import Edit, Host, find_host
from binarize.layers import BinaryConv2d, BinaryLinear, CPDown, CPUp, CSFusion
from binarize.methods import Method

UNET2D = ("ddpm_cifar", "unet2d_attention", "unet2d_odd_widths", "unet2d_resnet_sampling", "stable_diffusion")
TIMED = [name for name, host in HOSTS.items() if host.timed]
UNTIMED = [name for name, host in HOSTS.items() if not host.timed]


def built(name: str) -> tuple[ZooHost, nn.Module]:
    """Return a host of the zoo, where its library is there."""
    host = HOSTS[name]
    pytest.importorskip(host.library)
    return host, host.build()


def method_for(name: str, host: ZooHost) -> str | Mapping[str, Any]:
    """Return the method, told to do without timesteps where the host has none."""
    if host.timed or not binarize.get_method(name).needs_timestep:
        return name
    return {"name": name, "groups": 1}


def recorded(model: nn.Module, inputs: Any) -> tuple[dict[str, tuple[int, ...]], Tensor]:
    """Run a host and return the shape of every module's output, by name (the model's own under ""), and its output."""
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
            if isinstance(out, Tensor):
                shapes[name] = tuple(out.shape)

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules()]
    out = output_of(model, inputs)
    for handle in handles:
        handle.remove()
    return shapes, out


def shapes_of(model: nn.Module, inputs: Any) -> dict[str, tuple[int, ...]]:
    with torch.no_grad():
        return recorded(model, inputs)[0]


@functools.cache
def plain_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return what the modules of an unconverted host of the zoo give for a batch of two."""
    host, model = built(name)
    return shapes_of(model, host.inputs(2))


def is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and not isinstance(module, BinaryConv2d | BinaryLinear)


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Return all that a failed conversion must leave alone."""
    modules = {name: (id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    parameters = {name: (id(p), p._version) for name, p in model.named_parameters(remove_duplicate=False)}
    config = dict(model.config) if hasattr(model, "config") else None
    return modules, hooks, parameters, list(model.state_dict()), config, sorted(vars(model))


@pytest.mark.parametrize("method", binarize.list_methods())
@pytest.mark.parametrize("name", HOSTS)
def test_every_method_on_every_host(name: str, method: str) -> None:
    host, model = built(name)
    before = plain_shapes(name)
    assert binarize.convert(model, method_for(method, host), **host.options) is model
    after, out = recorded(model, host.inputs(2))
    assert out.shape == before[""]
    (out - 1).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name

    # Complete: every convolution and linear layer has one row that says what became of it.
    layers = {
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.modules.conv._ConvNd | nn.Linear | BinaryConv2d | BinaryLinear)
    }
    report = binarize.report(model)
    inside_binary = {n for n in layers if any(n.startswith(f"{row.name}.") for row in report.replaced)}
    rows = [row.name for row in report.rows if row.action != "new"]
    assert sorted(rows) == sorted(layers - inside_binary)
    assert all(row.detail for row in report.rows)

    # Two-valued, and nearly all of what could be: all 2-D convolutions but first, last and attention's.
    state = binarize.binary_state(model)
    binary = eligible = 0
    attention = [n for n, m in model.named_modules() if "Attention" in type(m).__name__ or n.endswith("attentions")]
    for layer_name, layer in model.named_modules():
        if isinstance(layer, BinaryConv2d):
            codes = state[layer_name].codes
            assert codes is not None
            assert codes.dtype == torch.int8
            assert bool((codes.abs() == 1).all())
            assert codes.shape[1:] == layer.weight.shape
            binary += layer.weight.numel()
            eligible += layer.weight.numel()
        elif isinstance(layer, nn.Conv2d) and layer_name not in inside_binary:
            spared = layer_name in host.kept or any(layer_name.startswith(a) for a in attention)
            eligible += 0 if spared or _kept_by_method(method, name, layer_name) else layer.weight.numel()
    assert binary >= 0.8 * eligible

    # Under `keep`, and in the contract form, every block gives what it gave.
    if binarize.get_method(method).default_structure == "keep" or host.form in (None, "contract"):
        modules = dict(model.named_modules())
        for block, shape in before.items():
            if block in modules and is_block(modules[block]):
                assert after[block] == shape, block


def _kept_by_method(method: str, host: str, layer: str) -> bool:
    """Say whether BI-DiffSR keeps a layer of SRUNet: the two finest decoder levels, which are all of this one's."""
    return method == "bidiffsr" and host == "srunet" and re.match(r"decoder\.\d+\.blocks", layer) is not None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bidiffsr", "reactnet", "irnet"])
def test_the_whole_resnet18(method: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(weights=None)
    binarize.convert(model, method_for(method, HOSTS["resnet18"]))
    out = model(torch.randn(2, 3, 96, 96))
    out.square().mean().backward()
    assert out.shape == (2, 1000)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert [row.name for row in binarize.report(model).kept] == ["conv1", "fc"]


@pytest.mark.parametrize(("name", "method"), [("unet2d_attention", "bidiffsr"), ("adm", "dorefa"), ("sr3", "irnet")])
def test_training_lowers_the_loss(name: str, method: str) -> None:
    host, model = built(name)
    binarize.convert(model, method, **host.options)
    inputs = host.inputs(4)
    target = torch.randn_like(output_of(model, inputs))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = F.mse_loss(output_of(model, inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.97 * losses[0]


# Structure


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
        splits = {len(modules[n].convs) for n in resamplers}
        assert splits == {2}
        assert {modules[f"{n}.fusion"].form for n in fused} == {"published"}
        # Every binary convolution keeps its width, which is the point of the structure.
        binary = [m for m in model.modules() if isinstance(m, BinaryConv2d)]
        assert all(m.in_channels == m.out_channels and m.stride == (1, 1) for m in binary)
    else:
        blocks = [n for n in before if n in modules and is_block(modules[n])]
        assert len(blocks) > 8
        assert {n: after[n] for n in blocks} == {n: before[n] for n in blocks}

    # What kept its name and shape kept its weights, as the same Parameter; the report marks what did not.
    now = {n: p for n, p in model.named_parameters() if n in plain and plain[n].shape == p.shape}
    fresh = {row.name for row in report.rows if row.detail.endswith("freshly initialised")}
    for parameter_name, parameter in now.items():
        layer = parameter_name.rpartition(".")[0]
        if not re.search(r"norm1$", layer):
            assert (parameter is plain[parameter_name]) == (layer not in fresh), parameter_name
    assert fresh >= {f"{n}.fusion.convs.0" for n in fused}


def test_a_carried_layer_computes_what_it_did() -> None:
    """Undo the binarizer of a rewired host: its resnet blocks of unchanged shape agree with the host's."""
    model = unet2d((8, 12))
    block = copy.deepcopy(model.get_submodule("down_blocks.1.resnets.0"))
    binarize.revert(binarize.convert(model, "bidiffsr", keep="down_blocks.1.*"))
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    assert torch.equal(model.get_submodule("down_blocks.1.resnets.0")(x, emb), block(x, emb))


def test_the_fused_resnet_is_a_fusion_and_a_resnet() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    model = unet2d((8, 16), dropout=0.0, resnet_time_scale_shift="scale_shift", act_fn="gelu", norm_eps=1e-3)
    binarize.revert(binarize.convert(model, "bidiffsr"))
    fused: Any = model.get_submodule("up_blocks.1.resnets.0")
    plain = ResnetBlock2D(
        in_channels=8,
        out_channels=8,
        temb_channels=32,
        groups=4,
        eps=1e-3,
        non_linearity="gelu",
        time_embedding_norm="scale_shift",
    )
    plain.load_state_dict({n: p for n, p in fused.state_dict().items() if not n.startswith("fusion.")})
    hidden, skip, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6), torch.randn(2, 32)
    one, two = fused.fusion.convs
    mixed = one(torch.cat([hidden[:, 1::2], skip[:, 0::2]], 1)) + two(torch.cat([hidden[:, 0::2], skip[:, 1::2]], 1))
    torch.testing.assert_close(fused(torch.cat([hidden, skip], 1), emb), plain(mixed, emb))


@pytest.mark.parametrize("widths", [(8, 16, 32), (8, 12, 20)])
@pytest.mark.parametrize("size", [(10, 12), (11, 7), (9, 16)])
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


def test_resnet_resamplers_are_left_with_a_note() -> None:
    report = binarize.plan(HOSTS["unet2d_resnet_sampling"].build(), "bidiffsr")
    assert any("down_blocks.0.downsamplers.0 keeps its structure" in note for note in report.notes)
    assert {row.type for row in report.new} == {"CSFusion"}


def test_widths_that_no_cp_block_takes_are_left_with_a_note() -> None:
    model = unet2d((6, 18), norm_num_groups=2, attention_head_dim=2)
    report = binarize.plan(model, "bidiffsr")
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
    for name in ("ddpm_cifar", "unet2d_attention", "stable_diffusion"):
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


# Timesteps


@pytest.mark.parametrize("name", ["ddpm_cifar", "unet2d_attention", "stable_diffusion", "adm", "sr3"])
def test_a_mixed_batch_equals_its_samples_one_by_one(name: str) -> None:
    host, model = built(name)
    model.double().eval()
    binarize.convert(model, "bidiffsr", **host.options)
    with torch.no_grad():
        for parameter in model.parameters():  # groups that differ, last layers that are not zero
            parameter += 0.3 * torch.randn_like(parameter)
        (picture, timesteps, *rest), keywords = host.inputs(5)
        picture = picture.double()
        keywords = {k: v.double() if v.is_floating_point() else v for k, v in keywords.items()}
        together = output_of(model, ((picture, timesteps, *rest), keywords))
        for i in range(5):
            one = {k: v[i : i + 1] for k, v in keywords.items()}
            alone = output_of(model, ((picture[i : i + 1], timesteps[i : i + 1], *rest), one))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-10)
        shifted = output_of(model, ((picture, timesteps.flip(0), *rest), keywords))
        assert (shifted - together).abs().max() > 1e-3


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
    model = binarize.convert(unet2d((8, 16)), "bidiffsr", num_train_timesteps=400)
    context = model.get_submodule("mid_block.resnets.0.conv1.pre").context
    assert context.num_train_timesteps == 400
    learned = unet2d((8, 16), time_embedding_type="learned", num_train_timesteps=50)
    binarize.convert(learned, "bidiffsr")
    assert learned.get_submodule("mid_block.resnets.0.conv1.pre").context.num_train_timesteps == 50
    assert output_of(learned, ((torch.randn(2, 3, 16, 16), torch.tensor([1, 49])), {})).isfinite().all()
    learned = unet2d((8, 16), time_embedding_type="learned", num_train_timesteps=50)
    with pytest.raises(BinarizeError, match="num_train_timesteps=1000, but the model's configuration says 50"):
        binarize.plan(learned, "bidiffsr", num_train_timesteps=1000)
    noise_levels = binarize.plan(unet2d((8, 16), time_embedding_type="fourier"), "bidiffsr")
    assert any("the host takes noise levels" in note for note in noise_levels.notes)


# Whole-model properties


@pytest.mark.parametrize("name", ["ddpm_cifar", "unet2d_attention", "stable_diffusion"])
def test_checkpointing_gives_the_same_gradients_with_two_forwards_before_one_backward(name: str) -> None:
    host, model = built(name)
    model.double()
    binarize.convert(model, "bidiffsr", **host.options)
    saver = copy.deepcopy(model)
    saver.enable_gradient_checkpointing()  # type: ignore[operator]
    batches = []
    for shift in (0, 400):
        (picture, timesteps), keywords = host.inputs(2)
        keywords = {k: v.double() for k, v in keywords.items()}
        batches.append(((picture.double(), (timesteps + shift) % 1000), keywords))
    gradients = []
    for each in (model, saver):
        loss = sum(output_of(each, batch).square().sum() for batch in batches)
        loss.backward()  # type: ignore[union-attr]
        gradients.append({n: p.grad for n, p in each.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter_name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter_name], gradient, rtol=0, atol=1e-10, msg=parameter_name)


@pytest.mark.parametrize("name", ["unet2d_attention", "adm"])
def test_a_deepcopy_is_independent(name: str) -> None:
    host, model = built(name)
    binarize.convert(model, "bidiffsr", **host.options)
    model.eval()
    inputs = host.inputs(2)
    with torch.no_grad():
        before = output_of(model, inputs)
        twin = copy.deepcopy(model)
        assert torch.equal(output_of(twin, inputs), before)
        for parameter in twin.parameters():
            parameter.normal_()
        assert not torch.equal(output_of(twin, inputs), before)
        assert torch.equal(output_of(model, inputs), before)
    contexts = [{id(m.context) for m in each.modules() if getattr(m, "context", None)} for each in (model, twin)]
    assert len(contexts[0]) == len(contexts[1]) == 1
    assert contexts[0] != contexts[1]


@pytest.mark.slow
def test_compiled_equals_eager_in_one_graph() -> None:
    host, model = built("unet2d_attention")
    model.double().eval()
    binarize.convert(model, "bidiffsr", **host.options)
    inputs = host.inputs(3)
    inputs = (inputs[0][0].double(), inputs[0][1]), {}
    with torch.no_grad():
        eager = output_of(model, inputs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(output_of(compiled, inputs), eager, rtol=0, atol=1e-10)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bidiffsr", {"keep": ["down_blocks.0.downsamplers.0.conv"]}, "matches no convolution or linear layer"),
        ("reactnet", {"structure": "cp_cs", "overrides": {"conv_out": {"fold_bias": True}}}, "fold_bias=True needs"),
        ("bidiffsr", {"keep": ["*"]}, "would replace nothing"),
        ("bidiffsr", {"num_train_timesteps": 0}, "must be a whole number of at least 1"),
    ],
)
@pytest.mark.parametrize("name", ["ddpm_cifar", "unet2d_attention", "stable_diffusion"])
def test_a_failed_convert_leaves_the_host_untouched(
    name: str, method: str, options: dict[str, Any], message: str
) -> None:
    host, model = built(name)
    model.get_submodule("mid_block").eval()
    inputs = host.inputs(2)
    before, output = state_of(model), output_of(model, inputs)
    with pytest.raises(BinarizeError, match=message):
        binarize.convert(model, method, **options)
    assert state_of(model) == before
    assert torch.equal(output_of(model, inputs), output)
    binarize.convert(model, "bidiffsr")


@pytest.mark.parametrize("method", ["bidiffsr", "binarydm", "bireal"])
@pytest.mark.parametrize("name", ["ddpm_cifar", "unet2d_attention", "stable_diffusion", "adm"])
def test_plan_tells_without_touching_model_or_random_state(name: str, method: str) -> None:
    host, model = built(name)
    options = {"structure": "cp_cs" if host.form else "keep", **host.options}
    before, state = state_of(model), torch.get_rng_state()
    planned = binarize.plan(model, method, **options)
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert planned == binarize.report(binarize.convert(model, method, **options))


# What stays full precision


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
    with pytest.raises(BinarizeError, match="ADMUNet has no decoder levels that the toolkit knows; use keep"):
        binarize.convert(HOSTS["adm"].build(), method)


def test_attention_converts_where_a_pattern_names_it() -> None:
    model = unet2d_condition()
    binarize.convert(model, "bidiffsr", linear=["*.attn2.to_?"], overrides={"*proj_in": {}})
    names = {row.name for row in binarize.report(model).replaced}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k" in names
    assert isinstance(model.get_submodule("down_blocks.0.attentions.0.proj_in"), BinaryConv2d)
    assert not any(".attn1." in n or ".ff." in n for n in names)
    assert output_of(model, HOSTS["stable_diffusion"].inputs(2)).isfinite().all()


def test_a_rectifier_before_the_sign_is_noted() -> None:
    assert any("every sign is +1" in note for note in binarize.plan(HOSTS["resnet18"].build(), "bnn").notes)
    assert not binarize.plan(HOSTS["adm"].build(), "bnn").notes


# Hosts and methods of one's own


@pytest.fixture
def registries() -> Iterator[None]:
    """Let a test register what it likes."""
    from binarize.hosts.base import HOSTS as hosts
    from binarize.layers.method import METHODS as methods

    saved = dict(hosts._items), dict(methods._items)
    yield
    hosts._items, methods._items = saved


class HalvingNet(nn.Module):
    """A network whose structure no built-in host knows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 16, 4, stride=2, padding=1)
        self.precious = nn.Conv2d(16, 16, 3, padding=1)
        self.tail = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.tail(self.precious(self.body(self.head(x))))
        return out


@pytest.mark.usefixtures("registries")
def test_a_host_of_ones_own() -> None:
    @binarize.register_host("halving")
    class HalvingHost(Host):
        @classmethod
        def matches(cls, model: nn.Module) -> bool:
            return isinstance(model, HalvingNet)

        def num_train_timesteps(self, model: nn.Module) -> int | None:
            return 300

        def has_structure(self, model: nn.Module) -> bool:
            return True

        def rewire(self, model: nn.Module) -> list[Edit]:
            return [Edit("body", CPDown(8), "replaces the strided convolution")]

        def full_precision(self, model: nn.Module, method: Method) -> dict[str, str]:
            return {**super().full_precision(model, method), "precious": "asked for by its authors"}

    assert "halving" in binarize.list_hosts()
    model = HalvingNet()
    binarize.convert(model, "bidiffsr")
    report = binarize.report(model)
    assert (report.host, [row.name for row in report.new]) == ("halving", ["body"])
    assert {row.name: row.detail for row in report.kept} == {
        "head": "first convolution",
        "precious": "asked for by its authors",
        "tail": "last convolution",
    }
    assert model.body.convs[0].pre.context.num_train_timesteps == 300  # type: ignore[union-attr, index]
    assert model(torch.randn(2, 3, 8, 8), torch.tensor([1, 299])).shape == (2, 3, 4, 4)
    with pytest.raises(BinarizeError, match="host 'halving' is already registered"):
        binarize.register_host("halving")(HalvingHost)
    with pytest.raises(BinarizeError, match=r"must be a class derived from binarize\.hosts\.Host"):
        binarize.register_host("nonsense")(HalvingNet)  # type: ignore[type-var]


@pytest.mark.usefixtures("registries")
def test_a_method_of_ones_own_on_a_host() -> None:
    @binarize.register_method("mine")
    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        weight: Any = "libra"
        pre: Any = "shift"
        shortcut: Any = True

    model = unet2d((8, 16))
    binarize.convert(model, {"name": "mine", "groups": 2}, structure="cp_cs")
    assert {row.detail.split(",")[0] for row in binarize.report(model).replaced} == {"mine"}
    assert output_of(model, HOSTS["ddpm_cifar"].inputs(2)).isfinite().all()


# Learning


def _stripes(batch: int, generator: torch.Generator) -> Tensor:
    """Return ``(batch, 1, 16, 16)`` stripes of random direction, width and phase, in [-1, 1]."""
    angle, phase, rate = torch.rand(3, batch, 1, 1, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    wave = rows * torch.sin(3.14 * angle) + columns * torch.cos(3.14 * angle)
    return torch.sign(torch.sin((0.5 + rate) * wave + 6.28 * phase)).unsqueeze(1)


@pytest.mark.slow
def test_better_methods_learn_better() -> None:
    """Some hundred steps of noise prediction on stripes: reactnet and bidiffsr end below bnn."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=1000)
    losses = {}
    for method in ("bnn", "reactnet", "bidiffsr"):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        model = unet2d((8, 16), in_channels=1, out_channels=1)
        binarize.convert(model, method, num_train_timesteps=1000)
        optimizer = torch.optim.Adam(binarize.param_groups(model), 3e-3)
        history = []
        for step in range(200):
            clean = _stripes(8, generator)
            noise = torch.randn(clean.shape, generator=generator)
            timesteps = torch.randint(0, 1000, (8,), generator=generator)
            noisy = scheduler.add_noise(clean, noise, timesteps)  # type: ignore[arg-type]
            loss = F.mse_loss(output_of(model, ((noisy, timesteps), {})), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            binarize.training_step(model, (step + 1) / 200)
            history.append(loss.item())
        losses[method] = sum(history[-40:]) / 40
    assert losses["reactnet"] < 0.9 * losses["bnn"]
    assert losses["bidiffsr"] < 0.9 * losses["bnn"]


@pytest.mark.parametrize("page", ["convert", "hosts"])
@pytest.mark.usefixtures("registries")
def test_the_how_to_runs_as_it_stands(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("timm", "torchvision"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "howto" / f"{page}.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    exec(compile(code, f"{page}.md", "exec"), {"__name__": "how_to"})
