"""The conversion pass on SRUNet: what it replaces, what it refuses, and that whole networks agree in float64."""

import copy
import json
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from errors_case import assert_error
from hosts_zoo import state_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import binarize
from binarize.conversion.record import is_converted
from binarize.errors import BinarizeError
from binarize.layers import CPDown, CPUp, CSFusion
from binarize.models import SRUNet


def tiny(**options) -> SRUNet:
    return SRUNet(base_channels=16, channel_mults=(1, 2), res_blocks=1, norm_groups=8, dropout=0.0, **options)


@pytest.fixture
def converted() -> SRUNet:
    model = binarize.convert(tiny(), "bidiffsr").double()
    for parameter in model.parameters():  # give shifts, slopes and norms values that matter
        if parameter.dim() <= 2:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    return x, torch.tensor([0, 399, 1000, 1999]), torch.rand_like(x)


def test_the_released_full_precision_set(converted):
    report = binarize.report(converted)
    kept = {row.name: row.detail for row in report.kept}
    assert (kept["conv_in"], kept["conv_out"]) == ("first convolution", "last convolution")
    assert kept["middle.0.attention.qkv"] == "attention projection"
    assert kept["decoder.1.blocks.0.fusion.convs.0"] == "decoder level 1 (fp_decoder_levels)"
    assert {row.name for row in report.replaced} >= {"decoder.1.up.convs.0", "encoder.0.down.convs.1", "middle.1.conv2"}
    layers = {n for n, m in tiny().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {row.name for row in report.rows} == layers
    assert "bias dropped" in next(row.detail for row in report.rows if row.name == "middle.1.conv2")
    json.loads(report.to_json())
    assert "middle.1.conv2" in report.to_markdown()
    assert str(report).startswith("bidiffsr on SRUNet, structure (cp, cs):")


def test_auto_structure_rewires_sr3_and_keeps_what_fits():
    model = tiny(resampling="conv", fusion="wide")
    carried = model.encoder[0].blocks[0].conv1.weight
    assert binarize.convert(model, "bidiffsr") is model
    assert (model.config.resampling, model.config.fusion) == ("cp", "cs")
    kinds = Counter(type(m) for m in model.modules())
    assert (kinds[CPDown], kinds[CPUp], kinds[CSFusion]) == (1, 1, 4)
    assert model.encoder[0].blocks[0].conv1.weight is carried
    assert {row.name for row in binarize.report(model).new} >= {"encoder.0.down", "decoder.1.blocks.0.fusion"}
    assert model(torch.randn(1, 3, 8, 8), 3, torch.rand(1, 3, 8, 8)).sample.shape == (1, 3, 8, 8)


def test_other_methods_and_keep_leave_the_structure():
    assert binarize.convert(tiny(resampling="conv", fusion="wide"), "reactnet").config.resampling == "conv"
    kept = binarize.convert(tiny(resampling="pixel", fusion="concat"), "bidiffsr", structure="keep")
    assert (kept.config.resampling, kept.config.fusion) == ("pixel", "concat")
    forced = binarize.convert(tiny(resampling="conv", fusion="wide"), "reactnet", structure="cp_cs")
    assert forced.config.fusion == "cs"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bidifsr", {}, "unknown method 'bidifsr'.*Did you mean 'bidiffsr'"),
        ({"name": "bidiffsr", "group": 3}, {}, "unknown option 'group'; options: .*Did you mean 'groups'"),
        ({"groups": 3}, {}, "needs a 'name'"),
        (3, {}, "must be a name, a Method or a mapping"),
        ("bidiffsr", {"structure": "cs"}, "structure must be one of 'auto', 'keep', 'cp_cs', 'contract'; got 'cs'"),
        ("bidiffsr", {"keep": ["nothing.*"]}, r"pattern 'nothing\.\*' matches no convolution"),
        ("bidiffsr", {"keep": [lambda n, m: False]}, "predicate .* in keep matches no module"),
        ("bidiffsr", {"keep": [3]}, "keep takes glob patterns and predicates"),
        ("bidiffsr", {"overrides": {"zzz": None}}, "pattern 'zzz' matches no convolution"),
        ("bidiffsr", {"overrides": {"middle.*": 3}}, "must be a method, a mapping of options or None; got 3"),
        ("bidiffsr", {"linear": ["conv_in"]}, "pattern 'conv_in' matches no linear layer"),
        ("bidiffsr", {"keep": "*"}, "would replace nothing"),
        ("bidiffsr", {"num_train_timesteps": 1000}, "=1000, but the model's configuration says 2000"),
        ("bidiffsr", {"num_train_timesteps": "10"}, "must be a whole number of at least 1; got '10'"),
        ("bidiffsr", {"keep": 5}, "keep must be a sequence of glob patterns; got 5"),
        ("bidiffsr", {"linear": None}, "linear must be True, False or glob patterns; got None"),
        ("bidiffsr", {"overrides": ["a"]}, "overrides must map glob patterns"),
        ("bidiffsr", {"num_train_timesteps": 0}, "must be a whole number of at least 1; got 0"),
        ("reactnet", {"overrides": {"middle.*": {"shortcut": "nowhere"}}}, "unknown shortcut part 'nowhere'"),
        ({"name": "reactnet", "fold_bias": True}, {}, "fold_bias=True needs an RPReLU right after the convolution"),
    ],
)
@pytest.mark.parametrize("structure", [("cp", "cs"), ("conv", "wide")])
def test_a_failed_convert_leaves_the_model_untouched(structure, method, options, message):
    model = tiny(resampling=structure[0], fusion=structure[1])
    before = state_of(model)
    assert_error(message, binarize.convert, model, method, **options)
    assert state_of(model) == before
    binarize.convert(model, "bidiffsr")


def test_a_part_that_fails_in_the_middle_leaves_the_model_untouched():
    parts = iter([nn.Identity(), nn.Identity()])
    model = tiny(resampling="conv", fusion="wide")
    before = state_of(model)
    with pytest.raises(StopIteration):
        binarize.convert(model, binarize.methods.bidiffsr(norm=lambda spec: next(parts)))
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (binarize.convert(tiny(), "bidiffsr"), "already converted, by method 'bidiffsr'"),
        (nn.Sequential(binarize.convert(tiny(), "bidiffsr")), "'0' is already binary"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), r"wrapped by torch\.nn\.utils\.parametrize"),
        (nn.DataParallel(tiny()), "wrapped by DataParallel, which must come after the conversion"),
        ("unet", r"needs an nn\.Module; got str"),
    ],
    ids=["twice", "inside", "parametrized", "parallel", "string"],
)
def test_a_model_that_cannot_be_converted_is_an_error(model, message):
    assert_error(message, binarize.convert, model, "reactnet")


def test_scalar_timesteps_of_every_kind_agree(converted, batch):
    x, _, condition = batch
    expected = converted(x, 1000, condition).sample
    for t in (1000.0, torch.tensor(1000), torch.tensor([1000]), torch.full((4,), 1000), torch.tensor(1000.0)):
        torch.testing.assert_close(converted(x, t, condition).sample, expected, rtol=0, atol=1e-12)


def test_a_part_run_alone_needs_a_timestep(converted):
    block = converted.middle[1]
    h, time = torch.randn(1, 32, 4, 4, dtype=torch.float64), torch.randn(1, 16, dtype=torch.float64)
    assert_error("ran outside a forward of its model", block, h, time)
    outs = []
    for t in (1999, 0):
        with binarize.timesteps(converted, t):
            outs.append(block(h, time))
    assert not torch.equal(*outs)
    assert_error("ran outside a forward", block, h, time)
    converted.conv_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        converted(torch.zeros(1, 3, 8, 8).double(), 5, torch.zeros(1, 3, 8, 8).double())
    with pytest.raises(BinarizeError, match="outside a forward"):  # cleared after an error as well
        block(h, time)


def test_timestep_groups_that_did_not_run_get_a_zero_gradient(converted, batch):
    x, _, condition = batch
    converted(x, torch.full((4,), 1999), condition).sample.square().sum().backward()
    assert converted.middle[1].conv1.post.shift_out.grad.any(1).tolist() == [False] * 4 + [True]


def test_users_own_checkpointing_gets_a_context_function(converted, batch):
    x, t, condition = batch

    def gradients():
        first, second = converted(x, t, condition).sample, converted(x, t.flip(0), condition).sample
        return torch.autograd.grad(first.square().sum() + 3 * second.sum(), list(converted.parameters()))

    converted.train()
    plain, block = gradients(), converted.middle[1]
    original, context = block.forward, binarize.checkpoint_context(converted)
    block.forward = lambda *a: checkpoint(original, *a, use_reentrant=False, context_fn=context)
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_revert_gives_plain_layers_with_the_latent_weights(converted, batch):
    latent = {name: layer.weight for name, layer in binarize.conversion.export.binary_layers(converted)}
    binarize.revert(converted)
    for name, weight in latent.items():
        layer = converted.get_submodule(name)
        assert type(layer) is nn.Conv2d
        assert layer.weight is weight
        assert not layer.bias.any()
    assert converted.config.conversion is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in converted.modules())
    x, t, condition = batch
    twin = tiny().double().eval()
    twin.load_state_dict(converted.state_dict())
    torch.testing.assert_close(converted(x, t, condition).sample, twin(x, t, condition).sample, rtol=0, atol=1e-12)
    binarize.convert(converted, "reactnet")


def test_binary_state_is_signs_and_scales(converted):
    state = binarize.binary_state(converted)
    packed = binarize.binary_state(converted, packed=True)
    assert set(state) == {row.name for row in binarize.report(converted).replaced}
    for name, layer in state.items():
        weight = converted.get_submodule(name).weight
        assert layer.codes.dtype == torch.int8
        assert torch.equal(layer.codes[0], torch.where(weight >= 0, 1, -1).to(torch.int8))
        torch.testing.assert_close(layer.scales[0], weight.abs().mean((1, 2, 3)))
        bits = torch.from_numpy(np.unpackbits(packed[name].bits.numpy(), axis=1))
        assert torch.equal(bits[0, : weight.numel()], (weight >= 0).flatten().to(torch.uint8))
        assert packed[name].codes is None
    assert_error("has no binary layer", lambda: binarize.binary_state(tiny()))
    latent = binarize.convert(tiny(), {"name": "reactnet", "two_stage": 0.5})
    assert_error("still full precision", binarize.binary_state, latent)
    assert_error("is not converted", lambda: binarize.report(tiny()))


def test_param_groups_decay_full_precision_weights_alone(converted):
    decayed, rest = binarize.param_groups(converted, weight_decay=0.1)
    names = {id(p): n for n, p in converted.named_parameters()}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decayed["params"]} >= {"conv_in.weight", "decoder.0.blocks.0.conv1.weight"}
    undecayed = {names[id(p)] for p in rest["params"]}
    assert undecayed >= {"middle.1.conv1.weight", "middle.1.conv1.pre.bias", "middle.1.norm1.weight", "conv_in.bias"}
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    torch.optim.AdamW([decayed, rest])


def test_a_folded_bias_is_exact():
    model = tiny().double()
    torch.nn.init.normal_(model.middle[1].conv2.bias)
    folded = binarize.convert(copy.deepcopy(model), {"name": "bidiffsr", "fold_bias": True})
    kept = binarize.convert(model, {"name": "bidiffsr", "keep_bias": True})
    x, c = torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(folded.eval()(x, 9, c).sample, kept.eval()(x, 9, c).sample, rtol=0, atol=1e-10)
    assert any("bias folded" in row.detail for row in binarize.report(folded).replaced)


class _Configured(nn.Module):
    """A host with a configuration that is none of diffusers'."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.proj_in, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.proj_out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.body(self.proj_in(x)))

    def register_to_config(self, **options: Any) -> None:
        raise TypeError("this configuration is frozen")


@dataclass(frozen=True)
class _Config:
    width: int = 16


STEPS = (lambda model: binarize.convert(model, "bnn"), binarize.pack, binarize.unpack, binarize.revert)


@pytest.mark.parametrize("config", [{"width": 16}, _Config(), SimpleNamespace(width=16), None])
def test_a_host_may_have_any_configuration(config: Any) -> None:
    model = _Configured(config)
    for step in STEPS:
        step(model)
    assert type(model.body) is nn.Conv2d
    assert model.config is config


def test_a_configuration_that_cannot_be_written_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    for step in STEPS:
        modules, config = dict(model.named_modules()), dict(model.config)
        with monkeypatch.context() as patch:
            patch.setattr("binarize.conversion.record.update_config", Mock(side_effect=TypeError("frozen")))
            with pytest.raises(TypeError, match="frozen"):
                step(model)
        assert dict(model.named_modules()) == modules
        assert dict(model.config) == config
        step(model)
    assert not is_converted(model)
