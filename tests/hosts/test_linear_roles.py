"""Roles where arguments of the forward are unknown, and in networks of linear layers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from errors_case import assert_error
from torch import Tensor, nn
from zoo.parts import sinusoid

import binarize
from binarize.conversion.record import conversion
from binarize.hosts import Host, find_host
from binarize.hosts.roles import find_roles


def conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


def kept_as(model: nn.Module, reason: str) -> set[str]:
    return {row.name for row in binarize.plan(model, "bnn", linear=True).kept if reason in row.detail}


class Conditioned(nn.Module):
    """Layers read two arguments that nothing tells: features of half the size, and a vector beside the time's."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.pooled = nn.Linear(8, 16), nn.Linear(5, 16)
        self.enter, self.guide, self.body, self.leave = conv(3, 16), conv(12, 16), conv(16, 16), conv(16, 3)

    def forward(self, x: Tensor, time: Tensor, features: Tensor, vector: Tensor) -> Tensor:
        t = self.mlp(sinusoid(time, 8)) + self.pooled(vector)
        h = self.enter(x) + F.interpolate(self.guide(features), scale_factor=2.0) + t[:, :, None, None]
        out: Tensor = self.leave(self.body(h))
        return out


def test_arguments_that_nothing_tells_are_made_up_where_layers_read_them() -> None:
    roles = find_host(Conditioned()).roles(Conditioned())
    assert (roles.by, set(roles.inputs), set(roles.outputs)) == ("forward", {"enter", "guide"}, {"leave"})
    assert kept_as(Conditioned(), "time or class embedding") == {"mlp", "pooled"}
    assert not any("no forward" in note for note in binarize.plan(Conditioned(), "bnn", linear=True).notes)
    features, vector, image = torch.zeros(1, 12, 4, 4), torch.zeros(1, 5), torch.zeros(1, 3, 8, 8)
    inputs = (image, torch.ones(1), None, vector)
    message = "Conditioned cannot run on example_inputs"
    assert_error(message, binarize.convert, Conditioned(), "bnn", example_inputs=inputs)
    inputs = (image, torch.ones(1), features, vector)  # type: ignore[assignment]
    assert find_host(Conditioned()).roles(Conditioned()) == find_roles(Conditioned(), inputs)


class Tokens(nn.Module):
    """Has linear layers only, registers its ends in the middle, and needs an argument that nothing tells."""

    in_channels, patch_size = 4, 2

    def __init__(self) -> None:
        super().__init__()
        self.text, self.proj_out, self.x_embedder = nn.Linear(9, 24), nn.Linear(24, 16), nn.Linear(4, 24)
        self.body = nn.Linear(24, 24)

    def forward(self, x: Tensor, time: Tensor, context: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.proj_out(self.body(self.x_embedder(x) + self.text(context["text"])))
        return out


def test_linear_layers_that_read_or_give_an_image_are_found_by_configured_widths() -> None:
    assert kept_as(Tokens(), "first layer") == {"x_embedder"}
    assert kept_as(Tokens(), "last layer") == {"proj_out"}
    report = binarize.plan(Tokens(), "bnn", linear=True)
    assert [note for note in report.notes if "no forward showed which linear layers process the timestep" in note]


class Unusual(nn.Module):
    """The timestep is an argument whose name is in use nowhere, and by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.enter, self.body, self.leave = nn.Linear(8, 16), conv(3, 16), conv(16, 16), conv(16, 3)

    def forward(self, x: Tensor, *, when: Tensor) -> Tensor:
        out: Tensor = self.leave(self.body(self.enter(x) + self.emb(sinusoid(when, 8))[:, :, None, None]))
        return out


NAMES: list[Any] = ["when", binarize.Timestep("when", "steps"), {"argument": "when"}]


@pytest.mark.parametrize("told", NAMES, ids=str)
def test_a_timestep_of_an_unusual_name_is_passed_to_the_forward_that_finds_roles(told: Any) -> None:
    plan = binarize.plan(Unusual(), "bidiffsr", linear=True, timestep=told)
    assert {row.name for row in plan.kept if "time or class embedding" in row.detail} == {"emb"}
    assert not any("no forward" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("given", "kind", "note"), [(None, "steps", "'when' is taken for steps"), ("sigma", "sigma", "host takes noise")]
)
def test_a_host_may_say_where_the_timestep_is_and_not_what(given: Any, kind: str, note: str, registries: None) -> None:
    @binarize.register_host("unusual")
    class UnusualHost(Host):
        @classmethod
        def matches(cls, model: nn.Module) -> bool:
            return isinstance(model, Unusual)

        def timestep(self, model: nn.Module) -> binarize.Timestep:
            return binarize.Timestep("when", given)

    model = Unusual()
    plan = binarize.plan(model, "bidiffsr", linear=True)
    assert {row.name for row in plan.kept if "time or class embedding" in row.detail} == {"emb"}
    assert any(note in each for each in plan.notes), plan.notes
    binarize.convert(model, "bidiffsr")
    context = conversion(model).context
    assert context is not None
    assert context.timestep == binarize.Timestep("when", kind)


def test_a_host_that_names_an_argument_takes_what_its_name_implies(registries: None) -> None:
    @binarize.register_host("noisy")
    class Noisy(Host):
        def timestep(self, model: nn.Module) -> binarize.Timestep:
            return binarize.Timestep("sigma")

    class Sigma(Unusual):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, when=sigma)

    model = binarize.convert(Sigma(), "bidiffsr")
    assert conversion(model).context.timestep == binarize.Timestep("sigma", "sigma")
