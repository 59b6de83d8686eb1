"""What the report's first line says of all parameters."""

import time

import pytest
import torch
from hosts_zoo import HOSTS, built, unet2d_condition
from torch import nn

import binarize


def first_line(report: binarize.conversion.report.ConversionReport) -> str:
    return str(report).splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, host in HOSTS.items() if host.library == "torch"])
def test_the_first_line_gives_the_binary_share_of_all_parameters(name: str) -> None:
    host, model = built(name)
    method = {"name": "bidiffsr", "groups": 1}
    planned = binarize.plan(model, method, **host.options)
    names = {row.name for row in planned.replaced}
    floats = binarize.plan(model, method, structure="keep", **host.options)
    assert floats.parameters == sum(p.numel() for p in model.parameters())
    binarize.convert(model, method, **host.options)
    weights = {id(m.weight): m.weight for n, m in model.named_modules() if n in names}
    binary = sum(weight.numel() for weight in weights.values())  # type: ignore[union-attr, misc]
    assert planned.binary_parameters == binary
    assert planned.parameter_share == binary / planned.parameters < planned.binary_share
    assert f"({100 * planned.parameter_share:.1f}% of all parameters)" in first_line(planned)
    assert binarize.report(model) == planned
    assert planned.to_dict()["binary_parameters"] == binary


def test_the_first_line_names_the_option_that_reaches_linear_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(32, 32), nn.Linear(32, 32))
    narrow, wide = binarize.plan(model, "bnn"), binarize.plan(model, "bnn", linear=True)
    assert first_line(narrow).endswith(f"linear=True would make {100 * wide.parameter_share:.1f}% binary")
    assert wide.parameter_share > 0.4 > narrow.parameter_share
    for quiet in (wide, binarize.plan(model[:2].append(nn.Conv2d(16, 3, 1)), "bnn")):
        assert "linear=True" not in first_line(quiet)


def test_a_shared_weight_counts_once_among_all_parameters() -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)))
    model[2].weight = model[1].weight
    report = binarize.plan(model, "bnn")
    assert (report.binary_parameters, report.parameters) == (4 * 4 * 9, 3 * 4 * 4 * 9 + 4 * 4)
    assert len(report.replaced) == 2


def test_stable_diffusion_at_real_size_is_reported_in_seconds() -> None:
    """Its convolutions without the attention's hold 65% of all parameters, and feed-forward layers another 17%."""
    with torch.device("meta"):
        model = unet2d_condition((320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768)
    start = time.monotonic()
    report = binarize.plan(model, "bidiffsr", structure="keep")
    line = first_line(report)
    assert time.monotonic() - start < 20
    assert report.parameters == 859_520_964
    assert "(65.6% of all parameters)" in line
    assert line.endswith("linear=True would make 82.9% binary")
