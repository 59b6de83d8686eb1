"""Variables of the environment that are odd, read-only places, and Ctrl-C while libraries are imported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from abuse_case import SECONDS, command

# Variables that are read when they are needed.
LATE = {
    "COLUMNS": ["", "0", "-1", "x", "1", "9" * 20],
    "LINES": ["0", "x"],
    "TERM": ["", "dumb", "x"],
    "NO_COLOR": ["1"],
    "TMPDIR": ["/nowhere", "/dev/null", ""],
    "HOME": ["/nowhere", "/dev/null", ""],
    "HF_HOME": ["/nowhere", "/dev/null"],
    "XDG_CACHE_HOME": ["/nowhere", "/dev/null"],
    "RANK": ["1", "x", "-1", ""],
    "WORLD_SIZE": ["2", "x", "0", ""],
    "LOCAL_RANK": ["1", "x"],
    "CUDA_VISIBLE_DEVICES": ["", "7", "x"],
    "OMP_NUM_THREADS": ["0", "x"],
    "TZ": ["x/y"],
}
# Variables that are read once per process, most of them by libraries that are imported.
EARLY = {
    "BINARIZE_BACKEND": ["", "x", "torch", "\033[31m", "9" * 5000],
    "NUMBA_NUM_THREADS": ["0", "x"],
    "NUMBA_CPU_FEATURES": ["x"],
    "NUMBA_DISABLE_JIT": ["x", "1"],
    "OMP_NUM_THREADS": ["x"],
    "NUMBA_CACHE_DIR": ["/dev/null"],
    "PYTHONIOENCODING": ["ascii"],
    "LC_ALL": ["x"],
    "HF_HUB_OFFLINE": ["x"],
}
CASES = [(name, value) for name, values in LATE.items() for value in values]
SLOW_CASES = [(name, value) for name, values in EARLY.items() for value in values]


def assert_made_or_refused(status: int, out: str, err: str, target: Path) -> None:
    assert "Traceback" not in out + err, err
    if status == 0:
        assert target.stat().st_size > 0
    else:
        assert status in (1, 2), (status, err)
        assert err.splitlines()[-1].startswith("error: "), err
        assert len(err.splitlines()) <= 2, err
        assert not target.exists()


@pytest.mark.parametrize(("name", "value"), CASES)
def test_variables(name: str, value: str, packed: Path, small: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    result = command("upscale", small, tmp_path / "a.png", "--model", packed, "--steps", "1")
    assert_made_or_refused(result.status, result.out, result.err, tmp_path / "a.png")


@pytest.mark.abuse
@pytest.mark.parametrize(("name", "value"), SLOW_CASES)
def test_variables_of_a_new_process(name: str, value: str, packed: Path, small: Path, tmp_path: Path) -> None:
    target = tmp_path / "caf\u00e9.png"
    args = [sys.executable, "-m", "binarize", "upscale", small, target, "--model", packed, "--steps", "1"]
    done = subprocess.run(args, capture_output=True, env={**os.environ, name: value}, timeout=SECONDS)
    encoding = value if name == "PYTHONIOENCODING" else "utf-8"
    assert_made_or_refused(done.returncode, *(text.decode(encoding) for text in (done.stdout, done.stderr)), target)


SCRIPT = "import sys; sys.argv[0] = 'binarize'; from _binarize_program import main; main()"
PROGRAMS = {"script": ["-c", SCRIPT], "module": ["-m", "binarize"], "cli": ["-m", "binarize.cli"]}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("seconds", [0.0, 0.5, 2.0])
def test_ctrl_c_while_libraries_are_imported(seconds: float, program: str) -> None:
    args = [sys.executable, "-X", "importtime", *PROGRAMS[program], "methods"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        while not running.stderr.readline().endswith(" _binarize_program\n"):
            assert running.poll() is None
        time.sleep(seconds + 0.02)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=SECONDS)
    assert "Traceback" not in err
    if running.returncode == 0:  # it had ended before
        assert "bidiffsr" in out
    else:
        assert running.returncode == 130
        assert err.endswith("error: interrupted\n")


IN_ATEXIT = """
import atexit, os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
register = atexit.register
def register_twice(*args):  # what is registered later is called earlier
    register(*args)
    register(os.kill, os.getpid(), signal.SIGINT)
atexit.register = register_twice
"""
WHILE_MODULES_ARE_FREED = """
import os, signal
class Last:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
        kill(process, number)
last = Last()
"""


@pytest.mark.parametrize(
    ("interrupt", "ends"), [(IN_ATEXIT, (130, "error: interrupted\n")), (WHILE_MODULES_ARE_FREED, (0, ""))]
)
def test_ctrl_c_while_python_ends(interrupt: str, ends: tuple[int, str]) -> None:
    args = [sys.executable, "-c", interrupt + SCRIPT, "--version"]
    done = subprocess.run(args, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == ends
    assert done.stdout.startswith("binarize ")
