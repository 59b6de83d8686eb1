"""The synthetic training pictures are a function of the seed, and can be trained on."""

import runpy
import sys
from pathlib import Path

import pytest
from cli_case import contents
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "synthetic_pictures.py"


def test_synthetic_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(name: str, *options: str) -> dict[str, bytes | None]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / name), "--size", "400", *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return contents(tmp_path / name)

    four = draw("a", "--count", "4")
    assert list(four) == ["gradients_003.png", "interface_001.png", "line_art_002.png", "text_000.png"]
    assert draw("b", "--count", "1") == {"text_000.png": four["text_000.png"]}
    assert draw("c", "--count", "1", "--seed", "1") != {"text_000.png": four["text_000.png"]}
    for path in (tmp_path / "a").iterdir():
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("RGB", (400, 400))
            assert len(image.getcolors(400 * 400)) > 10
