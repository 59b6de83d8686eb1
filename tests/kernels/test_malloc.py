"""Settings of the C library's heap, each in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc"),
]

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


KEPT = """
import ctypes, sys, torch
from binarize.layers import BinaryConv2d
from binarize.packed import PackedConv2d
from binarize.kernels.malloc import keep_large_blocks_apart
class Info(ctypes.Structure):  # mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c hblkhd d e f g h".split()]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
for call in sys.argv[1:]:
    if call == "apart":
        keep_large_blocks_apart()
    else:
        PackedConv2d(BinaryConv2d(32, 32, 3, method="bnn").eval())(torch.randn(1, 32, 8, 8))
before = info().arena
blocks = [torch.empty(2 * 2**20, dtype=torch.uint8) for _ in range(60)]
del blocks
print(info().arena - before > 60 * 2**20)
"""


@pytest.mark.parametrize(
    ("calls", "user_set", "kept"),
    [
        (["packed"], {}, True),
        ([], {}, False),
        (["packed"], {"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        (["apart", "packed"], {}, False),
        (["packed", "apart"], {}, False),
    ],
)
def test_a_packed_layer_keeps_freed_memory(calls: list[str], user_set: dict[str, str], kept: bool) -> None:
    assert printed(KEPT, user_set, *calls) == [str(kept)]


def printed(code: str, user_set: dict[str, str], *arguments: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | user_set
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
