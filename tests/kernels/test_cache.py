"""The cache of compiled kernels: a damaged entry is compiled again, and a full disk stops nothing."""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from errors_case import assert_error
from numba import njit

from binarize.kernels import backends
from binarize.kernels.cpu.cache import cache_of

SOURCE = """
def plus(x, y):
    return x + y
"""


@pytest.fixture
def function(tmp_path: Path) -> Any:
    """A function of a file of its own, and so with a cache of its own."""
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    names: dict[str, Any] = {}
    exec(compile(SOURCE, str(path), "exec"), names)
    return names["plus"]


def compiled(function: Any) -> Any:
    loop = njit(function)
    loop._cache = cache_of(function)
    return loop


def files(folder: Path) -> Iterator[Path]:
    return (folder / "__pycache__").glob("*.nb?")


def damages(content: bytes) -> list[bytes]:
    middle = len(content) // 2
    flipped = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in (0, 3, 40, middle)]
    return [b"", content[:10], content[:middle], content[:-1], b"\0" * len(content), content + b"x", *flipped]


def test_a_second_process_finds_what_the_first_compiled(function: Any, tmp_path: Path) -> None:
    assert compiled(function)(1, 2) == 3
    again = compiled(function)
    assert again(3, 4) == 7
    assert sum(again._cache_hits.values()) == 1
    assert len(list(files(tmp_path))) == 2


@pytest.mark.slow
def test_a_damaged_entry_is_compiled_again_and_replaced(function: Any, tmp_path: Path) -> None:
    assert compiled(function)(1, 2) == 3
    for path in list(files(tmp_path)):
        whole = path.read_bytes()
        for damage in damages(whole):
            path.write_bytes(damage)
            healed = compiled(function)
            assert healed(5, 6) == 11
            assert path.suffix == ".nbi" or sum(healed._cache_hits.values()) == 0
            last = compiled(function)
            assert (last(7, 8), sum(last._cache_hits.values())) == (15, 1)


def test_an_entry_of_another_signature_is_not_run(function: Any, tmp_path: Path) -> None:
    """A process that was killed between writing the index and the code leaves the index with an older file's name."""
    assert compiled(function)(1.5, 2.0) == 3.5
    (data,) = (tmp_path / "__pycache__").glob("*.nbc")
    floats = data.read_bytes()
    (index,) = (tmp_path / "__pycache__").glob("*.nbi")
    index.unlink()
    assert compiled(function)(1, 2) == 3
    data.write_bytes(floats)  # sound, but of other types
    assert compiled(function)(1, 2) == 3


@pytest.mark.parametrize("call", [os.replace, open])
def test_a_full_disk_does_not_stop_the_kernels(call: Any, function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    if call is open:
        monkeypatch.setattr(caching, "open", full, raising=False)
    else:
        monkeypatch.setattr(caching.os, "replace", full)
    assert compiled(function)(1, 2) == 3


WRONG = {
    "NUM_THREADS": ["0", "two", "-1", "1.5", "", "9" * 5000],
    "CPU_FEATURES": ["avx2", "+avx2,,"],
    "DISABLE_JIT": ["1", ""],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_variable_of_numba_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"NUMBA_{name}", value)
    assert_error(re.escape(f"NUMBA_{name}='{value[:9]}"), backends._check_numba_environment)


FORK = """
    import os, sys
    import torch, binarize
    from binarize.kernels.cpu import threads

    def work():
        x = torch.randn(64, 16, 64, 64)
        return float((x @ x.transpose(2, 3)).exp().sum())

    torch.set_num_threads(2)
    work()
    child = os.fork()
    if child == 0:
        work()
        os._exit(0 if torch.get_num_threads() == 1 == threads.count() else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.get_num_threads())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_computes_with_one_thread() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", textwrap.dedent(FORK)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0 2\n", done.stderr
