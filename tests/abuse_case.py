"""Commands in processes forked after the imports, with broken streams and little memory, and what must hold of them."""

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cli_case import contents

from binarize.cli import app

SECONDS, BYTES = 60, 2 * 10**9
ABUSE = int(os.environ.get("BINARIZE_ABUSE", "0"))
"""How many mutations a test makes of each of its inputs, times the test's own weight; 0 for a sample of all cases."""


def amount(weight: float = 1.0) -> int:
    """Return how many mutations a test makes."""
    return max(2, round((ABUSE or 3) * weight))


def sampled(cases: Sequence[Any]) -> Sequence[Any]:
    """Return all cases of a loop, or every fifth for a sample."""
    return cases if ABUSE else cases[::5]


@dataclass(frozen=True)
class Result:
    """How a process ended."""

    status: int  # negative: the number of the signal that ended it
    out: str
    err: str
    seconds: float
    peak: int  # bytes


def forked(call: Callable[[], Any], *, stdout: str = "file", stderr: str = "file", memory: int | None = None) -> Result:
    """Run a function in a forked process and wait for it.

    `stdout` and `stderr` are "file", which is returned, "closed", "full", or "broken", a pipe that nobody reads.
    `memory` limits what the process may allocate beyond the present, in bytes.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started, child = time.monotonic(), os.fork()
        if child == 0:
            status = 70
            try:
                _connect(1, stdout, out.fileno())
                _connect(2, stderr, err.fileno())
                signal.alarm(SECONDS)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                torch.set_num_threads(1)
                if memory is not None:
                    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
                call()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    if stream is not None:
                        stream.flush()
                os._exit(status)
        _, code, usage = os.wait4(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Result(os.waitstatus_to_exitcode(code), *texts, time.monotonic() - started, peak)


def _connect(number: int, kind: str, file: int) -> None:
    name = {1: "stdout", 2: "stderr"}[number]
    if kind == "closed":
        os.close(number)
        setattr(sys, name, None)
        return
    if kind == "full":
        file = os.open("/dev/full", os.O_WRONLY)
    elif kind == "broken":
        reader, file = os.pipe()
        os.close(reader)
    os.dup2(file, number)
    setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def command(*args: str | Path, **options: Any) -> Result:
    """Run the command line in a forked process; see `forked`."""
    return forked(lambda: app([str(arg) for arg in args], prog_name="binarize"), **options)


def assert_refused(args: Sequence[str | Path], folder: Path, words: str = "", **options: Any) -> Result:
    """Check that a command ends with one line of error, within bounds, and changes nothing in a folder."""
    before = contents(folder)
    result = command(*args, **options)
    assert result.status in (1, 2), result
    assert result.err.startswith("error: "), result
    assert result.err.count("\n") == 1, result
    assert len(result.err) < 2500, result
    assert words in result.err, result
    assert contents(folder) == before, result
    assert_bounded(result)
    return result


def assert_bounded(result: Result) -> None:
    """Check that a process took little time and memory and showed no traceback."""
    assert "Traceback" not in result.out + result.err, result
    assert result.seconds < SECONDS, result
    assert result.peak < BYTES, result
