"""Files that are either completely written or not there."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from binarize import files
from binarize.errors import BinarizeError, one_line
from binarize.files import update_folder, write_atomic, write_text_atomic


@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt(), OSError(28, "No space left\non it")])
def test_a_failed_write_leaves_the_old_file(failure: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(temporary: Path) -> None:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".bin")
        temporary.write_bytes(b"half")
        raise failure

    with pytest.raises(BinarizeError if isinstance(failure, OSError) else type(failure)) as caught:
        write_atomic(path, write, force=True)
    if isinstance(failure, OSError):
        assert "a.bin: cannot be written: [Errno 28] No space left on it" in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]
    assert path.read_bytes() == b"old"


def test_a_reader_never_sees_a_half_written_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"0" * 100_000)
    seen: set[int] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            content = path.read_bytes()
            seen.add(len(content) if len(set(content)) == 1 else -1)

    reader = threading.Thread(target=read)
    reader.start()
    for digit in b"123456789":
        write_atomic(path, lambda temporary, digit=digit: temporary.write_bytes(bytes([digit]) * 100_000), force=True)
    done.set()
    reader.join()
    assert seen == {100_000}


def test_text_is_utf8_and_replaces_by_default(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert write_text_atomic(path, "old") == path
    assert write_text_atomic(path, "1 \u00d7 1\n").read_bytes() == b"1 \xc3\x97 1\n"
    for target, message in (
        (path, r"a\.txt: already exists; give another name, or force to replace it"),
        (tmp_path, "is a folder; give the name of a file"),
        (tmp_path / "missing" / "a.txt", "missing does not exist; create it first"),
    ):
        with pytest.raises(BinarizeError, match=message):
            write_text_atomic(target, "new", force=False)


def test_an_error_becomes_one_line() -> None:
    assert one_line(OSError("first\n  second")) == "first second"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("word " * 100), limit=9) == "word word"


SHARDS = {f"model-0000{n}-of-00002.safetensors": "old" for n in (1, 2)} | {"model.safetensors.index.json": "{}"}


def save(text: str = "new") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "unet").mkdir()
        (folder / "unet" / "model.safetensors").write_text(text)
        (folder / "config.json").write_text("{}")

    return write


def old_model(folder: Path) -> Path:
    (folder / "unet").mkdir(parents=True)
    for name, text in SHARDS.items():
        (folder / "unet" / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


SAVED = {"unet/model.safetensors": "new", "config.json": "{}"}


@pytest.mark.parametrize("others", [{}, {"README.md": "card", ".git/objects/ab": "git"}])
def test_a_folder_keeps_other_files_and_loses_old_shards(others: dict[str, str], tmp_path: Path) -> None:
    target = old_model(tmp_path / "model")
    for name, text in others.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
        (target / name).chmod(0o444)
    update_folder(target, save())
    assert contents(target) == SAVED | others
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_working_folder_gets_the_new_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old_model(tmp_path / "model"))
    update_folder(".", save())
    assert contents(tmp_path / "model") == SAVED


def test_mounted_folders_and_what_others_write_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = old_model(tmp_path / "model")
    (target / "data").mkdir()
    (target / "data" / "precious.json").write_text("1")
    inode = (target / "data").stat().st_ino
    monkeypatch.setattr(files.os.path, "ismount", lambda path: Path(path).name == "data")
    flush = files._flush

    def flush_meanwhile(folder: Path) -> None:
        (target / "notes.txt").write_text("by another process")
        flush(folder)

    monkeypatch.setattr(files, "_flush", flush_meanwhile)
    update_folder(target, save())
    assert contents(target) == SAVED | {"data/precious.json": "1", "notes.txt": "by another process"}
    assert (target / "data").stat().st_ino == inode


def test_a_file_that_appears_while_a_folder_is_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, flush = old_model(tmp_path / "model"), files._flush

    def flush_meanwhile(folder: Path) -> None:
        (target / "notes.txt").write_text("by another process")
        flush(folder)

    monkeypatch.setattr(files, "_flush", flush_meanwhile)
    update_folder(target, save())
    assert contents(target) == SAVED | {"notes.txt": "by another process"}


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="links")
def test_links_stay_links(tmp_path: Path) -> None:
    target = old_model(tmp_path / "model")
    (target / "dangling").symlink_to("nowhere")
    update_folder(target, save())
    assert (target / "dangling").readlink() == Path("nowhere")
    assert contents(target) == SAVED


def test_a_parent_that_cannot_be_written_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = old_model(tmp_path / "model")
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != tmp_path)
    update_folder(target, save())
    assert contents(target) == SAVED
