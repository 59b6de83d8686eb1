"""What the report's first line says of all parameters."""

import pytest
from hosts_zoo import HOSTS, built
from torch import nn

import binarize


def first_line(report: binarize.conversion.report.ConversionReport) -> str:
    return str(report).splitlines()[0]


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
