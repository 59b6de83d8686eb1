"""A lock on a folder: one process at a time writes into it, on this machine or on another that shares it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from binarize.errors import BinarizeError
from binarize.files import is_alive, write_text_atomic
from binarize.json_files import read_json

LOCK = "run.lock"
BEAT_SECONDS, STALE_SECONDS = 5.0, 20.0
"""How often the owner touches its lock, and how long one of another machine must be still to count as left behind."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which exists.

    The file ``run.lock`` in it names the machine and the process. A lock whose process has ended is replaced: on this
    machine at once, on another one after `STALE_SECONDS` without a sign of life.

    Raises:
        BinarizeError: If another process holds it.
    """
    path = folder / LOCK
    with _one_at_a_time(folder):
        _check_free(path)
        own = {"host": socket.gethostname(), "process": os.getpid(), "started": start_ticks(os.getpid())}
        write_text_atomic(path, json.dumps(own) + "\n")
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, ended), name="binarize-lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        with suppress(BinarizeError):
            if read_json(path) == own:
                path.unlink(missing_ok=True)


def _check_free(path: Path) -> None:
    try:
        held = read_json(path)
    except BinarizeError:  # there is none, or a killed machine left an empty file
        return
    host, process = held.get("host"), held.get("process")
    if host == socket.gethostname() and isinstance(process, int):
        if not is_alive(process) or start_ticks(process) != held.get("started"):
            return
    elif not _is_touched(path):
        return
    raise BinarizeError(
        f"{path.parent}: process {process} on {host!s:.80} is writing into it. Wait for its end, or give this run "
        f"another output_dir. If there is no such process, remove {path}."
    )


def _is_touched(path: Path) -> bool:
    """Return whether the owner of a lock on another machine touches it within some seconds."""
    with suppress(FileNotFoundError):
        before, end = path.stat().st_mtime_ns, time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE_SECONDS / 4))
            if path.stat().st_mtime_ns != before:
                return True
    return False


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)


def start_ticks(process: int) -> int | None:
    """Return when a process started, in clock ticks since the system did, or None where the system does not say it.

    Numbers of processes are used again; with this, they name one.
    """
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process of this machine at a time look at a folder's lock and replace it, where the system can."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):  # file systems without such locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
