"""Running the command line in this process, and small images and models to run it on."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from binarize.cli import app
from binarize.models import OFFICIAL_CONFIG

FIXTURES = Path(__file__).parent / "fixtures"
NETWORK: dict[str, Any] = {"base_channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 4}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def succeeds(*args: str | Path) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def fails(*args: str | Path, lines: int = 1) -> str:
    """Run a command that must print an error of at most so many lines, and return it."""
    result = run(*args)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert 1 <= result.stderr.count("\n") <= lines
    return str(result.stderr)


def raising(error: BaseException) -> Mock:
    return Mock(side_effect=error)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def make_image(height: int, width: int, seed: int = 0) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def official_checkpoint() -> tuple[Path, list[str]]:
    """Return a small checkpoint in the released format, and its configuration as command-line arguments."""
    path = FIXTURES / "small.pth"
    if not path.is_file():
        pytest.skip("needs the small checkpoint in the released format")
    with safe_open(FIXTURES / "small.safetensors", "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"]) if "config" in metadata else {k: json.loads(v) for k, v in metadata.items()}
    return path, [f"{key}={json.dumps(value)}" for key, value in config.items() if key in OFFICIAL_CONFIG]
