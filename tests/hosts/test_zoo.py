"""The zoo of other people's networks, each through the whole life of a converted model."""

import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from fnmatch import filter as matching
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo.adm import ADMResBlock, AttentionBlock
from zoo.rows import GROUPS, ROWS, Inputs, Row

import binarize
from binarize import BinarizeError


def prediction(model: nn.Module, inputs: Inputs) -> Tensor:
    """Run a network and return all that it gives, ``(B, n)``."""
    out = model(*inputs[0], **inputs[1])
    tensors = [x for x in tree_leaves(out if isinstance(out, Tensor) else out.to_tuple()) if isinstance(x, Tensor)]
    return torch.cat([x.reshape(len(GROUPS), -1) for x in tensors], dim=1)


def built(name: str) -> tuple[Row, nn.Module]:
    """Return a row and a new network in float64, or skip the test if its library is not installed."""
    pytest.importorskip(ROWS[name].library, reason="needs the extra `zoo`")
    return ROWS[name], ROWS[name].build().double()


def method(row: Row) -> Any:
    return "bidiffsr" if row.timed else {"name": "bidiffsr", "groups": 1}


def options(row: Row, **more: Any) -> dict[str, Any]:
    return {"linear": bool(row.refused), **row.options, **more}


@functools.cache
def converted_once(name: str) -> tuple[nn.Module, Inputs, Tensor]:
    row, model = built(name)
    binarize.convert(model, method(row), **options(row))
    with torch.no_grad():
        for parameter in model.parameters():  # groups that differ, last layers that are not zero
            parameter += 0.3 * torch.randn_like(parameter)
        inputs = row.inputs()
        return model.eval(), inputs, prediction(model, inputs)


def converted(name: str) -> tuple[nn.Module, Inputs, Tensor]:
    """Return a converted network in eval mode, inputs, and its prediction. No test may change them."""
    pytest.importorskip(ROWS[name].library, reason="needs the extra `zoo`")
    return converted_once(name)


def loaded(name: str, folder: Path) -> nn.Module:
    row, model = built(name)
    return binarize.load(folder) if row.library == "diffusers" else binarize.load(folder, model)


def layers_are_chosen_by_their_roles(name: str, folder: Path) -> None:
    row = built(name)[0]
    for linear in (False, True):
        if row.refused and not (linear and row.convertible):
            with pytest.raises(BinarizeError, match=row.refused):
                binarize.plan(row.build(), method(row), **options(row, linear=linear))
            continue
        report = binarize.plan(row.build(), method(row), **options(row, linear=linear))
        binary, kept = ([each.name for each in rows] for rows in (report.replaced, report.kept))
        assert {p: matching(binary, p) for p in row.kept} == {p: [] for p in row.kept}
        wanted = row.binary + (row.linear if linear else ())
        assert {p: matching(kept, p) for p in wanted} == {p: [] for p in wanted}
        assert [p for p in (*row.kept, *wanted) if not matching(binary + kept, p)] == []


def a_plan_equals_the_report(name: str, folder: Path) -> None:
    row, model = built(name)
    planned = binarize.plan(model, method(row), **options(row))
    assert planned == binarize.report(converted(name)[0])
    assert all(each.detail for each in planned.rows)


def each_sample_has_its_own_group(name: str, folder: Path) -> None:
    model, inputs, _ = converted(name)
    aware = [module for module in model.modules() if getattr(module, "context", None) is not None]
    stacked = [
        p for module in aware for p in module.parameters(recurse=False) if p.shape[0] == len(GROUPS) and p.dim() > 1
    ]
    assert stacked
    rows = prediction(model, inputs)
    for row, group in zip(rows, GROUPS, strict=True):
        gradients = torch.autograd.grad(row.square().sum(), stacked, retain_graph=True, allow_unused=True)
        reached = [g.flatten(1).abs().sum(1).nonzero().flatten().tolist() for g in gradients if g is not None]
        assert {g for groups in reached for g in groups} == {group}


def every_parameter_gets_a_gradient(name: str, folder: Path) -> None:
    model, inputs, _ = converted(name)
    (prediction(model, inputs) - 1).square().mean().backward()
    try:
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert [n for n, gradient in trained.items() if gradient is None or not gradient.isfinite().all()] == []
    finally:
        model.zero_grad()


def a_deepcopy_is_independent(name: str, folder: Path) -> None:
    model, inputs, expected = converted(name)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.normal_()
        assert not torch.equal(prediction(twin, inputs), expected)
        assert torch.equal(prediction(model, inputs), expected)


@torch.no_grad()
def packing_computes_the_same(name: str, folder: Path) -> None:
    model, inputs, expected = converted(name)
    packed = binarize.pack(copy.deepcopy(model))
    torch.testing.assert_close(prediction(packed, inputs), expected, rtol=1e-9, atol=1e-9)
    binarize.save(packed, folder)
    assert torch.equal(prediction(loaded(name, folder), inputs), prediction(packed, inputs))


@torch.no_grad()
def more_bits_and_branches_pack_and_load(name: str, folder: Path) -> None:
    row, model = built(name)
    bits: dict[str, Any] = {"activation": {"name": "lsq", "bits": 4}, "weight": "twn", "branch": "low_rank_sparse"}
    binarize.convert(model, {**binarize.get_method(method(row)).to_config(), **bits}, **options(row))
    inputs = row.inputs()
    expected = prediction(model.eval(), inputs)
    binarize.pack(model)
    torch.testing.assert_close(prediction(model, inputs), expected, rtol=1e-9, atol=1e-9)
    binarize.save(model, folder)
    assert torch.equal(prediction(loaded(name, folder), inputs), prediction(model, inputs))


@torch.no_grad()
def saving_and_loading_changes_nothing(name: str, folder: Path) -> None:
    model, inputs, expected = converted(name)
    binarize.save(model, folder)
    assert torch.equal(prediction(loaded(name, folder), inputs), expected)


@torch.no_grad()
def diffusers_own_calls_save_and_load_it(name: str, folder: Path) -> None:
    model, inputs, expected = converted(name)
    cast(Any, model).save_pretrained(folder)
    again = cast(Any, type(model)).from_pretrained(folder, torch_dtype=torch.float64)
    assert torch.equal(prediction(again, inputs), expected)


def an_undeclared_noise_level_is_not_silent(name: str, folder: Path) -> None:
    row, model = built(name)
    row_options = {key: value for key, value in options(row).items() if key != "timestep"}
    remarks: list[str] = []
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            remarks += binarize.report(binarize.convert(model, method(row), **row_options)).notes
            prediction(model, row.inputs())
        except BinarizeError as error:
            remarks.append(str(error))
    remarks += [str(warning.message) for warning in raised]
    assert any(re.search("noise level|timestep=", remark) for remark in remarks)


STAGES: dict[str, Callable[[str, Path], None]] = {
    "layers": layers_are_chosen_by_their_roles,
    "plan": a_plan_equals_the_report,
    "groups": each_sample_has_its_own_group,
    "undeclared": an_undeclared_noise_level_is_not_silent,
    "backward": every_parameter_gets_a_gradient,
    "deepcopy": a_deepcopy_is_independent,
    "pack": packing_computes_the_same,
    "bits": more_bits_and_branches_pack_and_load,
    "save": saving_and_loading_changes_nothing,
    "pretrained": diffusers_own_calls_save_and_load_it,
}


def cases() -> Iterator[Any]:
    """Yield every row with every stage that applies to it."""
    for name, row in ROWS.items():
        applies = {
            "groups": row.timed,
            "undeclared": "timestep" in row.options,
            "pretrained": row.library == "diffusers",
        }
        for stage in STAGES:
            if applies.get(stage, True) and (row.convertible or stage == "layers"):
                marks = [pytest.mark.slow] if row.slow else []
                yield pytest.param(name, stage, id=f"{name}-{stage}", marks=marks)


@pytest.mark.parametrize(("name", "stage"), list(cases()))
def test_zoo(name: str, stage: str, tmp_path: Path) -> None:
    STAGES[stage](name, tmp_path)


def test_recomputation_by_an_autograd_function_of_ones_own_gives_the_same_gradients() -> None:
    plain, inputs, _ = converted("adm")
    recomputing = copy.deepcopy(plain)
    for module in recomputing.modules():
        if isinstance(module, ADMResBlock | AttentionBlock):
            module.recomputes = True
    gradients = []
    for model in (plain, recomputing):
        loss = prediction(model, inputs).square().sum()
        with binarize.timesteps(model, inputs[0][1]):
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-9)
