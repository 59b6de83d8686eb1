"""Files that are either completely written or not there."""

import threading
from pathlib import Path

import pytest

from binarize.errors import BinarizeError, one_line
from binarize.files import write_atomic, write_text_atomic


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
