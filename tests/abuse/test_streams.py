"""Streams that are closed, full, broken or of another encoding end no command and lose no result."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from abuse_case import assert_bounded, assert_refused, command, forked
from cli_case import make_image, raising, run
from PIL import Image

from binarize.cli import app
from binarize.cli.streams import SafeStream, echo, printable
from binarize.errors import BinarizeError

STREAMS = ["file", "closed", "broken", pytest.param("full", marks=pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full"))]  # fmt: skip


@pytest.mark.parametrize("stderr", STREAMS)
@pytest.mark.parametrize("stdout", STREAMS)
@pytest.mark.parametrize("args", [("methods",), ("--version",), ("methods", "bidiffsr"), ("recipes", "--help")])
def test_what_is_printed_ends_no_command(args: tuple[str, ...], stdout: str, stderr: str) -> None:
    result = command(*args, stdout=stdout, stderr=stderr)
    assert result.status == (1 if stdout == "full" else 0)
    assert (result.out != "") == (stdout == "file")
    assert result.err == ("" if stdout != "full" or stderr != "file" else
        "error: the output could not be printed: [Errno 28] No space left on device\n")  # fmt: skip


@pytest.mark.parametrize("stderr", STREAMS)
@pytest.mark.parametrize("args", [("methods", "none"), ("upscale",), ("summary", "none.pth"), ("--nonsense",), ()])
def test_an_error_keeps_its_status(args: tuple[str, ...], stderr: str) -> None:
    status = command(*args).status
    assert status in (1, 2)
    assert command(*args, stdout="broken", stderr=stderr).status == status


@pytest.mark.parametrize(("stdout", "stderr"), [("closed", "closed"), ("broken", "broken"), ("full", "full")])
def test_an_image_is_made_wherever_output_goes(model, small, tmp_path, stdout, stderr):
    (tmp_path / "out").mkdir()
    given = ("upscale", small, tmp_path / "out" / "a.png", "--model", model, "--steps", "1")
    result = command(*given, stdout=stdout, stderr=stderr)
    assert result.status == (1 if stdout == "full" else 0)
    with Image.open(tmp_path / "out" / "a.png") as large:
        large.load()
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.abuse
def test_names_reach_the_terminal_as_text(model: Path, tmp_path: Path) -> None:
    for number, name in enumerate(["a\033[31mb", "\u202egnp", "caf\u00e9", "line\nend", os.fsdecode(b"\xff")]):
        source = tmp_path / f"{name}.png"
        make_image(6, 6).save(source)
        options = ("--model", model, "--steps", "1")
        result = forked(lambda given=("upscale", source, tmp_path / f"{number}.png", *options):
            app([str(arg) for arg in given]))  # fmt: skip
        assert (result.status, (tmp_path / f"{number}.png").is_file()) == (0, True), result
        assert result.err.replace("\n", "").isprintable()
        assert_bounded(result)


def test_a_stream_of_another_encoding() -> None:
    for encoding, expected in (("ascii", r"caf\xe9 \u202e"), ("cp1252", "caf\u00e9 \\u202e"), ("utf-8", None)):
        buffer = io.BytesIO()
        stream = SafeStream(io.TextIOWrapper(buffer, encoding=encoding))
        assert stream.write("caf\u00e9 \u202e") == 6
        stream.flush()
        assert buffer.getvalue().decode(encoding) == ("caf\u00e9 \u202e" if expected is None else expected)
        assert stream.failure is None
    assert printable("a\tb\nc\x00\ud800") == "a\tb\nc\\x00\\ud800"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "f"), "f: No space left on device; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), "f: Permission denied; check the permissions"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried 9 GiB"), "not enough memory (CUDA out of memory. Tried"),
        (UnicodeEncodeError("ascii", "\u00e9", 0, 1, "no"), "unexpected UnicodeEncodeError"),
        (RecursionError("deep"), "unexpected RecursionError: deep (a bug in binarize"),
        (KeyError("x"), "unexpected KeyError: 'x'"),
        (ZeroDivisionError(), "unexpected ZeroDivisionError: ZeroDivisionError"),
        (AssertionError("two\nlines"), "unexpected AssertionError: two lines"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "[Errno 32] Broken pipe"),
        (BinarizeError("w" * 10_000), "w ... w"),
        (BinarizeError("\033[2Jgone"), r"error: \x1b[2Jgone"),
        (GeneratorExit("odd"), "unexpected GeneratorExit"),
    ],
)
def test_any_exception_is_one_line(monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str) -> None:
    monkeypatch.setattr("binarize.methods.list_methods", raising(error))
    result = run("methods")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr) < 2100
    debugged = run("--debug", "methods").stderr
    assert "Traceback (most recent call last)" in debugged
    assert debugged.endswith(result.stderr)


def test_a_wrong_command_line_has_no_traceback() -> None:
    for args in (["--debug"], ["--debug", "nonsense"], ["--debug", "upscale", "--steps", "x"]):
        result = run(*args)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("code", ["1/0", "def (", "raise SystemExit(3)", "raise MemoryError", "def f(): f()\nf()"])
def test_a_plugin_that_breaks_is_one_error(code: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    assert_refused(["--plugin", tmp_path / "mine.py", "methods"], tmp_path, "cannot import")


def test_a_long_message_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("binarize.methods.list_methods", raising(BinarizeError("\n".join(map(str, range(5000))))))
    assert run("methods").stderr.splitlines()[-2:] == ["8", "... and 4991 more lines"]


@pytest.mark.parametrize("args", ["summary|a\nb", "upscale|a\nb.png", "evaluate|a\nb|-d|c", "recipes|show|x\n\ny.yaml"])
def test_a_name_with_line_ends_is_one_line(args: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(args.split("|"), tmp_path, r"\n")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (SystemExit(3), 3), (SystemExit("x"), 1)])
def test_other_ends(monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int) -> None:
    monkeypatch.setattr("binarize.methods.list_methods", raising(error))
    assert run("methods").exit_code == status


@pytest.mark.parametrize("args", ["upscale|", "upscale||o.png", "summary|", "pack|a|", "train|demo|", "evaluate|x|-d|"])
def test_an_empty_argument_is_refused(args: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(args.split("|"), tmp_path, "an argument is empty")


def test_the_streams_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit):
        app(["--version"])
    assert (sys.stdout, sys.stderr) == before
    echo("a", err=True)
    assert capsys.readouterr().err == "a\n"
