"""The page on methods of one's own: its files are written, its snippets run, its numbers true."""

import re
import sys
from pathlib import Path

import pytest
import torch

import binarize
from binarize.models import SRUNet
from binarize.recipes import validate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "own-method.md"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(registries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A working folder from which modules can be imported, and which leaves no module and no name behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if name in ("my_method", "soft_method") or name.startswith("binarize_plugin_"):
            del sys.modules[name]


def test_every_block_of_the_page_runs_in_order(folder: Path):
    namespace: dict[str, object] = {}
    ran = 0
    for language, title, text in BLOCK.findall(PAGE.read_text()):
        if title:
            (folder / title).write_text(text)
        elif language == "python":
            exec(compile(text, str(PAGE), "exec"), namespace)
            ran += 1
        else:
            assert language == "console"
    assert ran == 4
    assert validate("mine.yaml").method.name == "mine"

    assert len([line for line in (folder / "my_method.py").read_text().splitlines() if line.strip()]) <= 30

    unet = namespace["unet"].eval()
    unet.save_pretrained(folder / "saved")
    again = SRUNet.from_pretrained(folder / "saved")
    x, t = torch.rand(2, 3, 16, 16), torch.tensor([3, 1990])
    torch.testing.assert_close(again(x, t, x).sample, unet(x, t, x).sample, rtol=0, atol=0)
    assert binarize.summary(unet, (x[:1], 3, x[:1])).macs_by_bits[1] > 0


def test_a_method_that_no_file_registers_is_unknown(folder: Path):
    (folder / "mine.yaml").write_text("base: bidiffsr_x2\nmethod: mine\n")
    with pytest.raises(binarize.BinarizeError, match="unknown method 'mine'; registered: bbcu, "):
        binarize.build("mine.yaml")
