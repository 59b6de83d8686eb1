"""Locks: one writer at a time, stale locks are recognised, and a lock of another machine is watched."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from errors_case import assert_error

from binarize import locks
from binarize.errors import BinarizeError
from binarize.locks import LOCK, locked


def hold(folder: Path) -> None:
    with locked(folder):
        assert json.loads((folder / LOCK).read_text())["process"] == os.getpid()
    assert not (folder / LOCK).exists()


def leave(folder: Path, **changes: Any) -> None:
    own = {"host": socket.gethostname(), "process": os.getpid(), "started": locks.start_ticks(os.getpid())}
    (folder / LOCK).write_text(json.dumps({**own, **changes}))


@pytest.fixture
def ended() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_is_held_and_given_back(tmp_path: Path) -> None:
    with locked(tmp_path):
        content = json.loads((tmp_path / LOCK).read_text())
        assert (content["host"], content["process"]) == (socket.gethostname(), os.getpid())
        assert_error(rf"process {os.getpid()} on .* is writing into it.*output_dir", hold, tmp_path)
    assert not list(tmp_path.iterdir())
    hold(tmp_path)
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_only_one_of_many_gets_it(tmp_path: Path) -> None:
    start, outcomes, end = threading.Barrier(8), [], time.monotonic() + 60

    def try_once() -> None:
        start.wait()
        try:
            with locked(tmp_path):
                outcomes.append(True)
                while len(outcomes) < 8 and time.monotonic() < end:
                    time.sleep(0.01)
        except BinarizeError:
            outcomes.append(False)

    threads = [threading.Thread(target=try_once) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]


def test_a_killed_process_and_a_broken_file_hold_nothing(tmp_path: Path, ended: int) -> None:
    leave(tmp_path, process=ended)
    hold(tmp_path)
    for text in ("", "{", "[]", "{" * 500, "\xff"):
        (tmp_path / LOCK).write_text(text)
        hold(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs the time when a process started")
def test_a_number_that_another_process_has_got_since_holds_nothing(tmp_path: Path) -> None:
    leave(tmp_path, started=1)
    hold(tmp_path)


def test_a_lock_of_another_machine_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: int) -> None:
    monkeypatch.setattr(locks, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
    leave(tmp_path, host="elsewhere", process=ended)
    hold(tmp_path)  # nothing touches it
    leave(tmp_path, host="elsewhere", process=ended)
    stop = threading.Event()
    owner = threading.Thread(target=locks._beat, args=(tmp_path / LOCK, stop))
    owner.start()
    try:
        assert_error(rf"process {ended} on elsewhere is writing into it", hold, tmp_path)
    finally:
        stop.set()
        owner.join()


def test_the_owner_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK, (1, 1))
        end = time.monotonic() + 20
        while (tmp_path / LOCK).stat().st_mtime < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
