"""The snippets of the pages that nobody else's tests run, and what those pages say about the commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.main import get_command

from binarize.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/index.md", "docs/howto/save-and-load.md", "docs/howto/pack.md")
EVERY_PAGE = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "teal").save("small.png")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    namespace: dict[str, object] = {"__name__": "readme"}
    with torch.no_grad():
        exec(compile("\n".join(snippets), page, "exec"), namespace)
    if page == "README.md":
        large = namespace["large"]
        assert isinstance(large, Image.Image)
        assert large.size == (16, 16)


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))]
)
def test_commands_that_pages_name_exist(page: str) -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    named = re.findall(r"(?:^\$ |`)binarize ([a-z][a-z-]*)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= commands


def test_links_of_the_readme_lead_somewhere() -> None:  # those inside docs/ are checked by mkdocs
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
