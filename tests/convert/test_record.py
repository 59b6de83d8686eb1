"""A saved model keeps its selection whatever the rules of the version that loads it are, 0.1's included."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from errors_case import assert_error
from hosts_zoo import unet2d
from torch import Tensor, nn

import binarize
from binarize.hosts import Host
from binarize.methods import Method
from binarize.models import SRUNet


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(8, 16))
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = x + self.conv(x) * self.mlp(emb)[:, :, None, None]
        return out


class Net(nn.Module):
    """Registers its output layer first; has a time MLP in a block, and a feed-forward layer below `attentions`."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out, self.proj_in = nn.Conv2d(16, 3, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.time_mlp = nn.Linear(1, 8)
        self.block = Block()
        self.attentions = nn.ModuleList([nn.ModuleDict({"ff": nn.Linear(16, 16), "to_q": nn.Linear(16, 16)})])
        self.last = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        emb = self.time_mlp(time.reshape(-1, 1).expand(x.shape[0], 1).to(x.dtype) / 1000)
        x = self.last(self.block(self.proj_in(x), emb))
        x = self.attentions[0]["ff"](x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[index]
        out: Tensor = self.proj_out(x)
        return out


BINARY_IN_0_1 = ["proj_in", "block.mlp.1", "block.conv"]  # and `last` was kept, as the last one registered
BINARY = ["block.conv", "attentions.0.ff", "last"]


def binary_names(model: nn.Module) -> list[str]:
    return [row.name for row in binarize.report(model).replaced]


def recorded(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["conversion"]
    return config


def test_a_model_of_0_1_loads_with_the_layers_that_0_1_made_binary(tmp_path: Path) -> None:
    """The record of 0.1 names no layers. Its rules, by hand: first and last registered, names of embeddings."""
    model = Net()
    keep = ["proj_out", "last", "attentions"]
    overrides: dict[str, Any] = {"proj_in": {}, "block.mlp.1": {}}
    binarize.convert(model, "reactnet", keep=keep, overrides=overrides, linear=True)
    assert binary_names(model) == BINARY_IN_0_1
    binarize.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["conversion"] |= {"format": 1, "keep": [], "overrides": {}}
    config["conversion"].pop("binary", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = binarize.load(tmp_path, model=Net())
    assert binary_names(again) == BINARY_IN_0_1
    kept = {row.name: row.detail for row in binarize.report(again).kept}
    assert kept["proj_out"] == "last convolution"
    assert kept["last"] == "full precision in the saved model"
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        assert torch.equal(again(x, t), model.eval()(x, t))
    binarize.save(again, tmp_path / "again")
    assert recorded(tmp_path / "again")["format"] == 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_selection_that_0_1_would_not_make_is_recorded(tmp_path: Path, packed: bool) -> None:
    model = binarize.convert(Net(), {"name": "bidiffsr", "groups": 2}, linear=True, overrides={"last": {"groups": 3}})
    assert binary_names(model) == BINARY
    model.eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        expected = model(x, t)
    binarize.save(binarize.pack(model) if packed else model, tmp_path)
    if not packed:
        assert (recorded(tmp_path)["format"], recorded(tmp_path)["binary"]) == (2, BINARY)
    again = binarize.load(tmp_path, model=Net())
    assert binary_names(again) == BINARY
    with torch.no_grad():
        torch.testing.assert_close(again(x, t), expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("registries")
def test_the_record_decides_where_a_host_has_changed(tmp_path: Path) -> None:
    model = binarize.convert(Net(), "bnn")
    binarize.save(model, tmp_path)

    @binarize.register_host("net")
    class NetHost(Host):
        @classmethod
        def matches(cls, model: nn.Module) -> bool:
            return isinstance(model, Net)

        def full_precision(self, model: nn.Module, method: Method) -> dict[str, str]:
            return {**super().full_precision(model, method), "block.conv": "kept from now on"}

    assert "block.conv" not in binary_names(binarize.convert(Net(), "bnn"))
    assert binary_names(binarize.load(tmp_path, model=Net())) == binary_names(model) == ["block.conv", "last"]
    config = json.loads((tmp_path / "config.json").read_text())
    config["conversion"]["format"] = 1  # for 0.1, a host of one's own adds to the rules of 0.1
    del config["conversion"]["binary"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    then = binarize.convert(Net(), "bnn", keep=["proj_out", "last", "block"], overrides={"proj_in": {}})
    binarize.save(then, tmp_path / "then")
    (tmp_path / "then" / "model.safetensors").replace(tmp_path / "model.safetensors")
    assert binary_names(binarize.load(tmp_path, model=Net())) == ["proj_in"]


def test_hosts_whose_selection_has_not_changed_keep_the_format_of_0_1() -> None:
    srunet = SRUNet(base_channels=16, channel_mults=(1, 2), res_blocks=1, norm_groups=8)
    for model in (srunet, unet2d((8, 16), (1,))):
        for method, linear in (("bidiffsr", False), ("reactnet", True)):
            twin = type(model).from_config(model.config)  # type: ignore[attr-defined]
            binarize.convert(twin, method, linear=linear)
            config = binarize.conversion.record.conversion(twin).to_config()
            assert config["format"] == 1
            assert "binary" not in config


def test_a_recorded_layer_without_a_binary_form_is_refused(tmp_path: Path) -> None:
    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    binarize.save(binarize.convert(Net(), "bnn"), tmp_path)
    other = Net()
    other.last = Own(16, 16, 3, padding=1)
    message = r"'last' is binary in the saved model, but here: Own has a forward of its own"
    assert_error(message, lambda: binarize.load(tmp_path, model=other))
