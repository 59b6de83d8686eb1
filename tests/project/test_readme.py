"""The snippets, commands and links of the README and the documentation."""

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

from binarize.cli import app
from binarize.models import SRUNet, SuperResolutionPipeline
from binarize.recipes import (
    DegradationStep,
    DistillationSection,
    GenerationRecipe,
    ModelSection,
    NetworkSection,
    PerceptualSection,
    ProgressiveSection,
    Recipe,
    SamplerSection,
    SchedulerSection,
)

ROOT = Path(__file__).resolve().parents[2]
# The tests of each topic run the other pages.
TOPICS = ("data", "inspect", "pack", "recipes", "save-and-load", "train-your-own", "upscale")
PAGES = ("README", "docs/index", *(f"docs/howto/{topic}" for topic in TOPICS))
WRITTEN = {"docs/howto/inspect": "fusion.png", "docs/howto/upscale": "large.png"}
EVERY_PAGE = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def snippets(page: str) -> str:
    found = re.findall(r"```python\n(.*?)```", read(page), re.DOTALL)
    assert found
    return "\n".join(found)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the images that snippets read."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    for name, side in (("small.png", 8), ("photo.png", 64), ("DIV2K_train_HR/0001.png", 256), ("Set5/HR/a.png", 24)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[:side, :side]).save(path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page: str, folder: Path) -> None:
    namespace: dict[str, object] = {"__name__": "snippets"}
    exec(compile(snippets(f"{page}.md"), page, "exec"), namespace)
    assert (folder / WRITTEN.get(page, "")).exists()
    if page == "README":
        assert namespace["large"].size == (16, 16)


def test_the_snippet_on_evaluation_runs(folder: Path) -> None:
    unet = SRUNet(base_channels=8, channel_mults=(1, 2), res_blocks=1, norm_groups=4)
    SuperResolutionPipeline(unet, scale=4, num_inference_steps=1).save_pretrained("my-model")
    code = snippets("docs/howto/evaluate.md").replace("scale=4)", "scale=4, lpips=None)")
    exec(compile(code, "evaluate", "exec"), {})
    assert (folder / "results" / "evaluation.csv").is_file()


def test_the_tutorial_runs(folder: Path) -> None:
    code = snippets("docs/tutorial.md")
    assert '"max_train_steps=600"' in code
    exec(compile(code.replace('"max_train_steps=600"', '"max_train_steps=2"'), "tutorial", "exec"), {})
    with Image.open("large.png") as large:
        assert large.size == (128, 128)
    files = [Path(path).rglob("*.safetensors") for path in ("packed", "runs/first/model")]
    packed, latent = (sum(file.stat().st_size for file in each) for each in files)
    assert 2 * packed < latent


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_commands_that_pages_name_exist(page: str) -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"(?:^\$ |`)binarize ([a-z][a-z-]*)", read(page), re.MULTILINE)) <= commands


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])  # mkdocs checks those inside docs/
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", read(page))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_pages_name_exist(page: str) -> None:
    named = set(re.findall(r"`([a-z]\w*(?:/\w+)*(?:/|\.py|\.yaml))`", read(page))) - {"binarize/methods/_name.py"}
    assert len(named) > 5
    folders = (ROOT, ROOT / "binarize")
    assert sorted(name for name in named if not any((folder / name).exists() for folder in folders)) == []


def test_every_recipe_key_is_described() -> None:  # mkdocs generates the page of the keys from the descriptions
    sections = [Recipe, ModelSection, SchedulerSection, DistillationSection, ProgressiveSection, DegradationStep]
    sections += [PerceptualSection, GenerationRecipe, NetworkSection, SamplerSection]
    sections += [get_args(field.annotation)[0] for field in DegradationStep.model_fields.values()]
    fields = {f"{s.__name__}.{name}": field for s in sections for name, field in s.model_fields.items()}
    assert [name for name, field in fields.items() if not field.description] == []
