"""A recipe or study from elsewhere runs no code: not its plugins, and no function that it names as a part."""

from pathlib import Path

import pytest
from cli_case import fails, run, succeeds

from binarize.errors import BinarizeError
from binarize.recipes import Recipe, build_model

RECIPE = "base: demo\nresolution: 16\ntrain_data_dir: {images}\noutput_dir: {out}\n"
STUDY = (
    "base: demo\nseeds: [0]\noutput_dir: {out}\nevaluation: {{data_dir: {images}, lpips: null}}\n"
    "cells:\n- {{name: a, overrides: {{{own}}}}}\n"
)
CODE = {
    "file": "plugins: [evil.py]",
    "module": "plugins: [evil_module]",
    "part of a module": "method: {{name: bidiffsr, activation: 'evil_module:part'}}",
    "part with options": "method: {{name: bidiffsr, post: {{name: 'evil_module:part', x: 1}}}}",
    "function of the library": "method: {{name: bidiffsr, pre: 'os:system'}}",
    "function of torch": "method: {{name: bidiffsr, weight: 'torch:load'}}",
}
COMMANDS = ("recipes validate {file}", "summary {file}", "train {file}")


@pytest.fixture
def stranger(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder beside the working folder, with code that leaves a mark when it runs."""
    folder, work = tmp_path / "stranger", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    for name in ("evil.py", "evil_module.py"):
        (folder / name).write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(work)
    return folder


def write(folder: Path, code: str, photos: Path, base: str | None = None) -> Path:
    file = folder / "mine.yaml"
    text = RECIPE.format(images=photos, out=folder / "run") + CODE[code].replace("{{", "{").replace("}}", "}") + "\n"
    file.write_text(text if base is None else text.replace("base: demo", f"base: {base}"))
    return file


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("code", CODE)
def test_no_code_of_a_strangers_recipe_runs(stranger: Path, photos: Path, code: str, command: str) -> None:
    file = write(stranger, code, photos)
    message = fails(*command.format(file=file).split())
    assert "the recipe would run code: " in message
    assert message.endswith("Read that code, then add --trust to run it.\n")
    assert not (stranger.parent / "mark").exists()
    assert not (stranger / "run").exists()


@pytest.mark.parametrize("code", CODE)
def test_inspecting_runs_no_code_of_ones_own_either(stranger: Path, photos: Path, code: str) -> None:
    file = write(Path.cwd(), code, photos)
    for command in ("recipes validate", "summary"):
        assert "add --trust" in fails(*command.split(), file)
    succeeds("recipes", "show", file, "--full")
    assert not (stranger.parent / "mark").exists()


def test_a_base_or_a_link_elsewhere_is_a_strangers(stranger: Path, photos: Path) -> None:
    write(stranger, "file", photos)
    (Path.cwd() / "own.yaml").write_text(f"base: {stranger / 'mine.yaml'}\noutput_dir: run\n")
    (Path.cwd() / "link.yaml").symlink_to(stranger / "mine.yaml")
    for name in ("own.yaml", "link.yaml"):
        assert "add --trust" in fails("train", name)
    assert not (stranger.parent / "mark").exists()


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_no_code_of_a_strangers_study_runs(stranger: Path, photos: Path, options: list[str]) -> None:
    study = stranger / "study.yaml"
    study.write_text(STUDY.format(images=photos, out=stranger / "out", own="plugins: [evil.py]"))
    result = run("ablate", study, f"train_data_dir={photos}", "resolution=16", *options)
    assert (result.exit_code, "would run code" in result.stderr) == (1, True), result.output
    assert not (stranger.parent / "mark").exists()


def test_trusted_code_runs(stranger: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = stranger.parent / "mark"
    succeeds("recipes", "validate", write(stranger, "file", photos), "--trust")
    assert mark.exists()
    mark.unlink()

    def train(recipe: Recipe, force: bool) -> None:
        build_model(recipe)
        raise BinarizeError("built")

    monkeypatch.setattr("binarize.training.loop.train", train)
    own = Path.cwd() / "mine"
    own.mkdir()
    (own / "evil.py").write_text((stranger / "evil.py").read_text())
    assert fails("train", write(own, "file", photos)) == "error: built\n"
    assert mark.exists()
