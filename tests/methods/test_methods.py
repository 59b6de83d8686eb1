"""Methods as a user composes them: any part replaced alone, options in words, names in a registry."""

import copy
import dataclasses
import functools
import itertools
import json
import pickle
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from errors_case import assert_error
from torch import nn

import binarize
from binarize import layers
from binarize.errors import BinarizeError
from binarize.layers.parts import PART_KINDS
from binarize.methods import Method, bidiffsr, get_method, list_methods, reactnet, register_method
from binarize.timestep import TimestepContext


def without_addresses(value: object) -> str:
    """Return a parameter's id without memory addresses, which differ between the processes that run the tests."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def layer(method: Any, channels: int = 4, out: int = 4) -> layers.BinaryConv2d:
    context = TimestepContext(100)
    context.set(50)
    return layers.BinaryConv2d(channels, out, 3, padding=1, method=method, context=context)


def tiny() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 3))


def factory(spec: layers.LayerSpec) -> nn.Module:
    return nn.Softplus()


class Factories:
    @staticmethod
    def clip(spec: layers.LayerSpec, limit: float = 2.0) -> nn.Module:
        return nn.Hardtanh(-limit, limit)


@pytest.mark.parametrize(
    ("options", "attribute", "expected"),
    [
        ({"weight": "libra"}, "weight_binarizer", layers.LibraWeight),
        ({"weight": {"name": "two_stage", "switch": 0.2}}, "weight_binarizer", layers.DelayedWeight),
        ({"activation": "ede"}, "activation", layers.EDESign),
        ({"pre": None}, "pre", type(None)),
        ({"pre": "batch_norm"}, "pre", nn.BatchNorm2d),
        ({"scale": "k_map"}, "scale", layers.KMapScale),
        ({"norm": None}, "norm", type(None)),
        ({"post": None}, "post", type(None)),
        ({"post": "relu"}, "post", nn.ReLU),
        ({"post": factory}, "post", nn.Softplus),
        ({"post": f"{__name__}:factory"}, "post", nn.Softplus),
        ({"shortcut": False}, "shortcut", type(None)),
        ({"shortcut": None}, "shortcut", type(None)),
    ],
    ids=lambda value: without_addresses(value) if isinstance(value, dict) else "",
)
def test_one_part_is_replaced_and_the_others_stay(options, attribute, expected):
    made = layer(reactnet(**options))
    assert isinstance(getattr(made, attribute), expected)
    usual = layer(reactnet())
    for name in {"pre", "activation", "weight_binarizer", "scale", "norm", "post", "shortcut"} - {attribute}:
        assert type(getattr(made, name)) is type(getattr(usual, name))
    assert made(torch.randn(2, 4, 5, 5)).shape == (2, 4, 5, 5)


def test_the_order_of_post_and_shortcut_is_an_option():
    x = torch.randn(1, 4, 5, 5)
    last, first = layer(reactnet(post="relu")), layer(reactnet(post="relu", post_after_shortcut=False))
    bare = layer(reactnet(post=None, shortcut=None))
    for made in (first, bare):
        made.load_state_dict(last.state_dict())
    torch.testing.assert_close(last(x), (bare(x) + x).relu())
    torch.testing.assert_close(first(x), bare(x).relu() + x)


@pytest.mark.parametrize("kind", ["conv2d", "linear"])
@pytest.mark.parametrize("stage", PART_KINDS)
def test_every_registered_part_serves_convolutions_and_linear_layers(kind, stage):
    for name in layers.list_parts(stage):
        context = TimestepContext(100)
        options: Any = {"method": Method(groups=3, **{stage: name}), "context": context}
        conv = kind == "conv2d"
        made: Any = layers.BinaryConv2d(4, 6, 3, 2, 1, **options) if conv else layers.BinaryLinear(4, 6, **options)
        x = torch.randn((2, 4, 6, 6) if conv else (2, 5, 4))
        with context.using(torch.tensor([1, 99])):
            y = made(x.requires_grad_())
        assert y.shape == ((2, 6, 3, 3) if conv else (2, 5, 6)), name
        y.square().sum().backward()
        assert x.grad.isfinite().all(), name
        assert all(p.grad is not None for p in made.parameters()), name


def test_components_of_the_flagship_switch():
    for tar, taa in itertools.product((True, False), repeat=2):
        method = bidiffsr(groups=3, tar=tar, taa=taa)
        made = layer(method)
        assert (made.pre.groups, made.post.groups) == (3 if tar else 1, 3 if taa else 1)
        assert method.needs_timestep == (tar or taa)
    assert not bidiffsr(groups=1).needs_timestep
    assert not bidiffsr(pre=None, post="relu").needs_timestep
    assert [name for name, _ in layer(bidiffsr(pre=None, post=None, shortcut=False)).named_parameters()] == ["weight"]


def test_a_timestep_aware_part_of_your_own_gets_the_context(registries):
    @layers.register_part("post", "my_taa", timestep_aware=True)
    def my_taa(spec: layers.LayerSpec) -> nn.Module:
        return layers.RPReLU(spec.out_channels, spec.groups, spec.context)

    layers.register_part("post", "my_relu")(lambda spec: nn.ReLU())
    for post in ("my_taa", my_taa, {"name": "my_taa"}):
        assert reactnet(groups=3, post=post).needs_timestep
    assert not reactnet(groups=3, post="my_relu").needs_timestep
    assert not reactnet(post="my_taa").needs_timestep
    assert layer(reactnet(groups=3, post="my_taa")).post.groups == 3
    layers.register_part("post", "my_taa", replace=True)(lambda spec: nn.ReLU())
    assert not reactnet(groups=3, post="my_taa").needs_timestep


@pytest.mark.parametrize("how", [bidiffsr, bidiffsr().replace, functools.partial(get_method, "bidiffsr")])
def test_an_unknown_option_is_answered_with_the_nearest(how):
    assert_error(r"^bidiffsr: unknown option 'group'; options: groups, .*Did you mean 'groups'\?$", how, group=2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bidiffsr", {"groups": 0}, "groups must be a whole number of at least 1; got 0"),
        ("bidiffsr", {"groups": True}, "groups must be a whole number of at least 1; got True"),
        ("bidiffsr", {"tar": "yes"}, "bidiffsr: tar must be true or false; got 'yes'"),
        ("bidiffsr", {"fp_decoder_levels": [-1]}, r"fp_decoder_levels are level indices, 0 the finest; got \(-1,\)"),
        ("bidiffsr", {"fp_decoder_levels": 2}, "fp_decoder_levels are level indices, 0 the finest; got 2"),
        ("bnn", {"variant": "orignal"}, "bnn: variant must be 'bibench' or 'original'.*Did you mean 'original'"),
        ("dorefa", {"variant": "x"}, "dorefa: variant must be 'original' or 'bibench'; got 'x'"),
        ("xnor", {"variant": "x"}, "xnor: variant must be 'authors' or 'bibench'; got 'x'"),
        ("xnor", {"norm_position": "befor"}, "norm_position must be 'after' or 'before'.*Did you mean 'before'"),
        ("xnor", {"norm_position": "before", "pre": "shift"}, "puts the norm where pre='shift' stands; set norm=None"),
        ("xnor++", {"size": (3,)}, r"xnor\+\+: size must be \(H, W\) in pixels, or None; got \(3,\)"),
        ("irnet", {"t_min": 0}, "irnet: needs 0 < t_min <= t_max; got 0 and 10.0"),
        ("irnet", {"t_min": "0.1"}, "irnet: t_min must be a number; got '0.1'"),
        ("recu", {"tau_max": 1.0}, "recu: needs 0.5 < tau_min <= tau_max < 1; got 0.85 and 1.0"),
        ("reactnet", {"two_stage": 1.0}, r"two_stage is a share of training in \(0, 1\), or None; got 1.0"),
        ("reactnet", {"two_stage": "half"}, "reactnet: two_stage must be a number; got 'half'"),
        ("reactnet", {"sign_zero": "plsu"}, "sign_zero must be 'plus' or 'zero'; got 'plsu'. Did you mean 'plus'"),
        ("reactnet", {"keep_bias": True, "fold_bias": True}, "keep_bias and fold_bias exclude each other"),
        ("reactnett", {}, "unknown method 'reactnett'; registered: .*Did you mean 'reactnet'"),
    ],
)
def test_bad_values_are_refused_in_words(name, options, message):
    assert_error(message, get_method, name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "libre"}, "unknown weight part 'libre'; registered: .*Did you mean 'libra'"),
        ({"weight": {"switch": 0.5}}, "a weight part given as a mapping needs a 'name'; got"),
        ({"weight": {"name": "two_stage", "swich": 0.5}}, "unknown option 'swich'; options: switch. Did you mean"),
        ({"post": {"name": "relu", "inplace": True}}, "post part 'relu': unknown option 'inplace'; options: none."),
        ({"post": nn.ReLU()}, r"must be a name, a mapping, a factory or None; got ReLU\(\).*lambda spec: nn.ReLU\(\)"),
        ({"post": 3}, "a post part must be a name, a mapping, a factory or None; got 3"),
        ({"post": lambda: nn.ReLU()}, "cannot be built with options {}: .*takes 0 positional arguments"),
        ({"post": lambda spec: 3}, "must return an nn.Module; got int"),
        ({"post": "no.such.module:thing"}, "post part 'no.such.module:thing' cannot be imported: No module named"),
        ({"post": "binarize:nothing"}, "post part 'binarize:nothing' cannot be imported: .*nothing"),
        ({"weight": None}, "reactnet: the weight binarizer cannot be None"),
    ],
    ids=without_addresses,
)
def test_a_part_that_cannot_be_built_leaves_the_model_alone(options, message):
    model = tiny()
    modules = [(name, id(module)) for name, module in model.named_modules()]
    assert_error(message, lambda: binarize.convert(model, reactnet(**options)))
    assert [(name, id(module)) for name, module in model.named_modules()] == modules


def test_options_change_the_parts_that_they_name():
    narrow = get_method("irnet", t_min=0.5)
    assert narrow.part("weight") == {"name": "libra", "t_min": 0.5, "t_max": 10.0}
    assert narrow.part("activation") == {"name": "ede", "t_min": 0.5, "t_max": 10.0}
    own = {"name": "libra", "t_min": 0.3}
    assert narrow.replace(weight=own).part("weight") == own, "options of the part itself count"
    assert narrow.replace(weight="sign").part("weight") == "sign"
    bibench = get_method("xnor", variant="bibench", sgd=True)
    parts = [bibench.part(kind) for kind in ("weight", "scale", "activation")]
    assert parts == ["scaled_sign", "input_mean", "mean_ste"]
    assert bibench.replace(scale="channel").part("activation") == "ste"
    before = get_method("xnor", norm_position="before", norm="my_norm")
    assert (before.part("pre"), before.part("norm")) == ("my_norm", None)


def test_methods_are_values():
    method = bidiffsr(groups=2, fp_decoder_levels=[0])
    assert method.fp_decoder_levels == (0,)
    assert get_method({"name": "custom", "weight": "sign"}) == Method(weight="sign")
    assert method == copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == get_method(method)
    assert get_method(method, groups=3).groups == 3
    assert get_method({"name": "bidiffsr", "groups": 4}, groups=3).groups == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.groups = 3
    original = get_method("bnn", variant="original")
    assert original.clamps
    assert not original.replace(variant="bibench").clamps


@pytest.mark.parametrize(
    "options",
    [
        {"weight": {"name": "two_stage", "switch": 0.25}},
        {"post": "relu", "shortcut": False, "norm": None},
        {"post": factory},
        {"post": {"name": Factories.clip, "limit": 3.0}},
        {"post": f"{__name__}:factory"},
    ],
    ids=without_addresses,
)
def test_composed_methods_go_through_files(options):
    method = reactnet(**options)
    again = get_method(json.loads(json.dumps(method.to_config())))
    assert again.to_config() == method.to_config()
    first, second = layer(method), layer(again)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)


def test_a_part_that_no_file_can_name_says_so():
    mappings = {"name": lambda spec: nn.ReLU()}, {"name": "relu", "x": object()}
    for part in (lambda spec: nn.ReLU(), functools.partial(factory), *mappings):
        assert_error(r"the post part .* cannot be saved", reactnet(post=part).to_config)


def test_a_registered_method_is_like_any_other(registries):
    @register_method("mine")
    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        strength: float = 1.0

    assert "mine" in list_methods()
    assert get_method("mine", strength=2) == Mine(strength=2)
    assert Mine(strength=2).to_config() == {"name": "mine", "strength": 2}
    assert_error(r"mine: unknown option 'strenght'; options: strength, .*'strength'", Mine, strenght=2)
    assert_error(r"method 'mine' is already registered as .*pass replace=True", lambda: register_method("mine")(Mine))
    register_method("mine", replace=True)(Mine)


def test_only_frozen_dataclasses_are_registered(registries):
    with pytest.raises(BinarizeError, match="method 'a' must be a frozen dataclass; put @dataclass"):
        register_method("a")(type("NotADataclass", (Method,), {}))
    assert_error(r"must be a class derived from binarize\.methods\.Method; got", lambda: register_method("a")(nn.ReLU))
    assert "a" not in list_methods()


def test_parts_are_registered_by_kind(registries):
    with pytest.raises(BinarizeError, match=r"unknown kind of part 'wieght'; kinds: .*Did you mean 'weight'\?"):
        layers.register_part("wieght", "x")
    assert_error("unknown kind of part 'layer'", layers.list_parts, "layer")
    assert_error("post part 'relu' is already registered", lambda: layers.register_part("post", "relu")(factory))
    layers.register_part("post", "relu", replace=True)(factory)
    assert isinstance(layer(reactnet(post="relu")).post, nn.Softplus)
