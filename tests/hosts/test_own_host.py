"""Hosts and methods that a user registers, and the how-to pages about them."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import binarize
from binarize import BinarizeError
from binarize.hosts import Edit, Host
from binarize.layers import CPDown
from binarize.methods import Method

pytestmark = pytest.mark.usefixtures("registries")


class HalvingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 16, 4, stride=2, padding=1)
        self.precious = nn.Conv2d(16, 16, 3, padding=1)
        self.tail = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.tail(self.precious(self.body(self.head(x))))
        return out


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
            return {**super().full_precision(model, method), "precious": "kept by its authors"}

    assert "halving" in binarize.list_hosts()
    model = HalvingNet()
    binarize.convert(model, "bidiffsr")
    report = binarize.report(model)
    assert (report.host, [row.name for row in report.new]) == ("halving", ["body"])
    kept = {row.name: row.detail for row in report.kept}
    assert kept == {"head": "first convolution", "precious": "kept by its authors", "tail": "last convolution"}
    assert model.body.convs[0].pre.context.num_train_timesteps == 300  # type: ignore[union-attr, index]
    assert model(torch.randn(2, 3, 8, 8), torch.tensor([1, 299])).shape == (2, 3, 4, 4)
    HalvingHost.full_precision = lambda *_: {"precius": "a typo"}  # type: ignore[method-assign, assignment, misc]
    untouched = HalvingNet()
    with pytest.raises(BinarizeError, match=r"keeps modules that HalvingNet does not have: \['precius'\]"):
        binarize.convert(untouched, "bidiffsr")
    assert type(untouched.body) is nn.Conv2d
    with pytest.raises(BinarizeError, match="host 'halving' is already registered"):
        binarize.register_host("halving")(HalvingHost)
    with pytest.raises(BinarizeError, match=r"must be a class derived from binarize\.hosts\.Host"):
        binarize.register_host("nonsense")(HalvingNet)  # type: ignore[type-var]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["convert", "hosts"])
def test_the_how_to_runs_as_it_stands(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "howto" / f"{page}.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    exec(compile(code, f"{page}.md", "exec"), {"__name__": "how_to"})
