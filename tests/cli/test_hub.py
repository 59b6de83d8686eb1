"""Models on the Hugging Face hub, with a hub that is replaced: names, revisions, and answers that do not come."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from cli_case import contents, fails, raising, succeeds
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from binarize.models import hub

pytestmark = pytest.mark.slow


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, model: Path) -> SimpleNamespace:
    """A hub whose one repository is the folder around the model."""
    root = model.parent
    files = [SimpleNamespace(rfilename=str(p.relative_to(root)), size=p.stat().st_size) for p in root.rglob("*.*")]
    replaced = SimpleNamespace(
        model_info=Mock(return_value=SimpleNamespace(sha="c0ffee", siblings=files)),
        hf_hub_download=Mock(side_effect=lambda repo, name, **_: str(root / name)),
        snapshot_download=raising(LocalEntryNotFoundError("offline")),
    )
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", replaced.model_info)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", getattr(replaced, name))
    return replaced


def test_a_model_is_downloaded(fake: Any, model: Path, small: Path, tmp_path: Path) -> None:
    for name, given in (("a.png", f"someone/models/{model.name}@v1.0"), ("b.png", model)):
        succeeds("upscale", small, tmp_path / name, "--model", given, "--steps", "1")
    assert fake.model_info.call_args.args[-1] == "someone/models"
    assert fake.model_info.call_args.kwargs["revision"] == "v1.0"
    names = {call.args[1] for call in fake.hf_hub_download.call_args_list}
    assert {f"{model.name}/model_index.json", f"{model.name}/unet/config.json"} <= names
    assert all(call.kwargs["revision"] == "c0ffee" for call in fake.hf_hub_download.call_args_list)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "holds no *.json or *.safetensors" in fails("upscale", small, tmp_path / "c.png", "--model", "some/one/sub")


@pytest.mark.parametrize("name", ["a/b@main", "a/b/c@refs/pr/1", "a/b@0123abc", "a/b"])
def test_revisions(fake: Any, small: Path, tmp_path: Path, name: str) -> None:
    fake.model_info.side_effect = RevisionNotFoundError("404", response=Mock())
    revision = name.partition("@")[2] or "main"
    assert f"a/b has no revision {revision}." in fails("upscale", small, tmp_path / "a.png", "--model", name)
    assert fake.model_info.call_args.kwargs["revision"] == (name.partition("@")[2] or None)


def test_a_revision_is_an_option(fake: Any, model: Path, photos: Path, small: Path, tmp_path: Path) -> None:
    name = f"someone/models/{model.name}"
    succeeds("upscale", small, tmp_path / "a.png", "--model", name, "--steps", "1", "--revision", "v1.0")
    assert fake.model_info.call_args.kwargs["revision"] == "v1.0"
    before = contents(tmp_path)
    for given, words in (
        (("--model", model), "is on this machine; leave the revision out."),
        ((), "is on this machine"),
        (("--model", f"{name}@v1"), "has a revision; give one of them."),
        (("--model", "nowhere"), "needs a model on the Hugging Face hub"),
        (("--model", "nowhere.pth"), "needs a model on the Hugging Face hub"),
    ):
        assert words in fails("upscale", small, tmp_path / "b.png", *given, "--revision", "main")
    for revision in ("a b", "x" * 5000, "@", "a@b"):
        message = fails("upscale", small, tmp_path / "b.png", "--model", name, "--revision", revision)
        assert "needs a model on the Hugging Face hub" in message
        assert len(message) < 300
    fake.model_info.side_effect = RevisionNotFoundError("404", response=Mock())
    for command in (
        ("upscale", small, tmp_path / "b.png", "--model", name),
        ("evaluate", name, "--data", photos),
        ("summary", name),
        ("pack", name, tmp_path / "packed"),
        ("doctor", name),
        ("export", name, tmp_path / "b.onnx"),
        ("generate", tmp_path / "b.png", "--model", name),
    ):
        assert "has no revision refs/pr/2." in fails(*command, "--revision", "refs/pr/2")
    assert contents(tmp_path) == before


def test_an_earlier_download_does_offline(fake: Any, model: Path, small: Path, tmp_path: Path) -> None:
    fake.model_info.side_effect = OSError("no network")
    fake.snapshot_download.side_effect = lambda repo, **_: str(model.parent)
    succeeds("upscale", small, tmp_path / "a.png", "--model", f"a/b/{model.name}", "--steps", "1")
    fake.hf_hub_download.assert_not_called()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError("404", response=Mock()), "no repository a/b on the Hugging Face hub"),
        (HFValidationError("odd"), "no repository a/b"),
        (OSError("no network"), "hub cannot be reached, and a/b was not downloaded"),
        (ValueError("not JSON"), "hub cannot be reached, and a/b was not downloaded"),
    ],
)
def test_errors_of_the_hub(fake: Any, small: Path, tmp_path: Path, error: Exception, message: str) -> None:
    fake.model_info.side_effect = error
    before = contents(tmp_path)
    assert message in fails("upscale", small, tmp_path / "a.png", "--model", "a/b")
    fake.model_info.side_effect, fake.hf_hub_download.side_effect = None, OSError("disk\nfull")
    fake.model_info.return_value.siblings[:] = [SimpleNamespace(rfilename="a.json", size=None)]
    words = "cannot be downloaded from the Hugging Face hub: disk full"
    assert words in fails("upscale", small, tmp_path / "a.png", "--model", "a/b")
    fake.model_info.return_value.siblings[:] = [SimpleNamespace(rfilename="a.json", size=2**40)]
    assert "have 1,099,511,627,776 bytes; at most" in fails("upscale", small, tmp_path / "a.png", "--model", "a/b")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("step", ["model_info", "hf_hub_download"])
def test_a_hub_that_does_not_answer(fake: Any, small: Path, tmp_path: Path, monkeypatch, step: str) -> None:
    monkeypatch.setattr(hub, "_ANSWER", 0.5)
    monkeypatch.setattr(hub, "_SLOWEST", 1e12)
    monkeypatch.setattr(f"huggingface_hub.{'HfApi.' * (step == 'model_info')}{step}", lambda *_, **__: time.sleep(20))
    fake.model_info.return_value.siblings[:] = [SimpleNamespace(rfilename="a.json", size=10)]
    started = time.monotonic()
    message = fails("upscale", small, tmp_path / "a.png", "--model", "a/b")
    assert "error: a/b: the Hugging Face hub did not finish within" in message
    assert time.monotonic() - started < 10


def test_an_answer_that_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([8e9, 7.5e9, 6e9])
    monkeypatch.setattr(hub, "available_memory", lambda: next(free))
    with pytest.raises(ValueError, match="fills the memory"):
        hub._within(20, lambda: time.sleep(10))


@pytest.mark.parametrize(
    "name",
    ["{here}/missing", "runs/missing", "one", "some/BI-DiffSR_x2.pth", "a/b/x.safetensors", "a/b@", "a@b", "@a/b"],
)
def test_paths_that_are_not_looked_up_there(fake, small, tmp_path, monkeypatch, name):
    fake.model_info.side_effect = AssertionError("asked the hub")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    given = name.format(here=tmp_path)
    assert "no such file or folder" in fails("upscale", small, tmp_path / "large.png", "--model", given)
    fake.model_info.assert_not_called()
