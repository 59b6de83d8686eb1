"""`binarize summary`, `binarize methods` and `binarize recipes`."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from cli_case import WEIGHTS, fails, succeeds

import binarize
from binarize.models import SRUNet


@pytest.mark.slow
def test_the_published_figures() -> None:
    for recipe, params, ops in (("bidiffsr_x2", "4.575 M", "36.669 G"), ("sr3_x4", "55.407 M", "176.408 G")):
        output = succeeds("summary", recipe)
        assert (params in output, ops in output) == (True, True), output
        assert len(output.splitlines()) < 8


@pytest.mark.slow
def test_the_summary_of_a_model_is_the_one_from_python(model: Path, packed: Path) -> None:
    small = ("--size", "32x64", "--format", "json")
    part = json.loads(succeeds("summary", model / "unet", *small))
    image = torch.rand(1, 3, 32, 64)
    assert part["ops"] == binarize.summary(SRUNet.from_pretrained(model / "unet"), (image, torch.zeros(1), image)).ops
    assert json.loads(succeeds("summary", packed, *small)) == part
    assert "| conv_in |" in succeeds("summary", model, "--layers", "--format", "markdown", "--size", "32x32")
    output = succeeds("summary", packed / "unet" / WEIGHTS, "--size", "32x32")
    assert "conv_in" not in output
    assert float(re.search(r"packed +([\d.]+) MB", output)[1]) > 0  # type: ignore[index]


def test_the_summary_of_a_recipe_file(model: Path, tmp_path: Path) -> None:
    succeeds("recipes", "cp", "demo", tmp_path / "mine.yaml")
    assert succeeds("summary", tmp_path / "mine.yaml") == succeeds("summary", "demo")
    assert "Did you mean 'bidiffsr_x2'?" in fails("summary", "bidifsr_x2")
    assert "must be height and width" in fails("summary", "demo", "--size", "256")
    assert "needs a multiple of 2" in fails("summary", model, "--size", "31x32")


def test_methods_lists_all_and_describes_every_option() -> None:
    assert [line.split()[0] for line in succeeds("methods").splitlines()] == binarize.list_methods()
    described = {name: succeeds("methods", name) for name in binarize.list_methods()}
    assert re.search(r"^  groups +5 +K", described["bidiffsr"], flags=re.MULTILINE)
    assert re.search(r"^  taa +True +.*RPReLU per timestep group", described["bidiffsr"], flags=re.MULTILINE)
    for name, text in described.items():
        for line in text.splitlines()[2:]:
            assert len(line.split()) > 2, f"{name}: {line}"
    assert "Did you mean 'reactnet'?" in fails("methods", "reacnet")


def test_recipes_are_listed_shown_copied_and_checked(tmp_path: Path) -> None:
    assert "bidiffsr_x4 " in succeeds("recipes", "ls")
    assert "base: bidiffsr_x2" in succeeds("recipes", "show", "bidiffsr_x4")
    full = yaml.safe_load(succeeds("recipes", "show", "bidiffsr_x4", "--full"))
    assert (full["scale"], full["model"]["base_channels"]) == (4, 64)
    assert yaml.safe_load(succeeds("recipes", "show", "bidiffsr_x4", "seed=7"))["seed"] == 7
    mine = tmp_path / "mine.yaml"
    succeeds("recipes", "cp", "demo", mine)
    assert "already exists" in fails("recipes", "cp", "demo", mine)
    succeeds("recipes", "cp", "demo", mine, "--force")
    assert succeeds("recipes", "validate", mine, "seed=3") == f"{mine}: valid\n"


def test_validate_lists_every_error_at_once() -> None:
    message = fails("recipes", "validate", "demo", "learning_rate=-1", "sed=3", lines=9)
    for text in ("has 2 errors", "learning_rate: got -1", "Did you mean 'seed'?"):
        assert text in message
    assert "Did you mean 'groups'?" in fails("recipes", "validate", "demo", "method.grups=3")
