"""Settings of the C library's heap."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from binarize.kernels import malloc
from binarize.layers import BinaryConv2d
from binarize.packed import PackedConv2d

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")

APART = """
import ctypes, torch
from binarize.kernels.malloc import keep_large_blocks_apart
class Info(ctypes.Structure):  # mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
print(keep_large_blocks_apart())
for _ in range(3):
    before = info().hblkhd
    block = torch.empty(5 * 2**20, dtype=torch.uint8)
    print(info().hblkhd - before >= 5 * 2**20)
    del block
"""


@pytest.mark.parametrize("user_set", [{}, {"MALLOC_MMAP_THRESHOLD_": "33554432"}])
def test_large_blocks_come_from_mmap_unless_the_user_set_a_threshold(user_set: dict[str, str]) -> None:
    assert printed(APART, user_set) == [str(not user_set)] * 4


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """What is set in the place of the C library, from the state of a new process."""
    made: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda option, value: made.append((option, value)) or 1)
    monkeypatch.setattr(malloc, "ctypes", SimpleNamespace(CDLL=lambda name: library))
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    functions = malloc.keep_freed_memory, malloc.keep_large_blocks_apart
    for function in functions:
        function.cache_clear()
    yield made
    for function in functions:
        function.cache_clear()


TRIM, MMAP = -1, -3  # of malloc.h


def run_packed_layer() -> None:
    PackedConv2d(BinaryConv2d(32, 32, 3, method="bnn").eval())(torch.randn(1, 32, 8, 8))


def test_packed_layers_keep_freed_memory(settings: list[tuple[int, int]]) -> None:
    run_packed_layer()
    run_packed_layer()
    assert settings == [(MMAP, 32 * 2**20), (TRIM, 256 * 2**20)]
    malloc.keep_large_blocks_apart()
    assert settings[2:] == [(MMAP, 4 * 2**20), (TRIM, 8 * 2**20)]


def test_large_blocks_that_are_apart_stay_so(settings: list[tuple[int, int]]) -> None:
    malloc.keep_large_blocks_apart()
    run_packed_layer()
    assert settings == [(MMAP, 4 * 2**20)]


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072")]
)
def test_what_a_user_has_set_stays(
    settings: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    run_packed_layer()
    assert settings == []


def printed(code: str, user_set: dict[str, str]) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | user_set
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
