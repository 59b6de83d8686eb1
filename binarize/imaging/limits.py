"""Checks of sizes before any work: pixels that a file may ask for, and memory that is free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from binarize.errors import BinarizeError

PIXELS_PER_BYTE = 100
"""More pixels per byte of a file are taken for a damaged or hostile header. Photos have about 4, screenshots 40."""


def check_pixels(path: str | os.PathLike[str], what: str, pixels: int, most: int | None, least: int, fix: str) -> None:
    """Check that an image read from, or made of, a file has at most `most` pixels.

    If `most` is None, that is 100 pixels for each byte of the file, but not less than `least`.
    """
    allowed = max(least, PIXELS_PER_BYTE * os.path.getsize(path)) if most is None else most
    if pixels > allowed:
        why = f"more than the {allowed:,} pixels allowed" + (" for a file of this size" if most is None else "")
        raise BinarizeError(f"{path}: {what} is {why}; {fix}")


def check_memory(needed: float, what: str, fix: str) -> None:
    """Check that the memory that a piece of work needs, in bytes, is free on this machine and for this process."""
    free = available_memory()
    if needed > free:
        raise BinarizeError(f"{what} needs about {_shown(needed)} of memory, {_shown(free)} are free; {fix}")


def available_memory() -> float:
    """Return the bytes that this process can still allocate, infinity where no limit is known."""
    return max(0.0, min(_limits(), default=float("inf")))


def _limits() -> Iterator[float]:
    with suppress(OSError, ValueError, IndexError):  # not Linux, or not readable
        fields = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
        if "MemAvailable" in fields:
            yield 1024.0 * int(fields["MemAvailable"])
    with suppress(OSError, ValueError):  # a container; "max" is no number
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield float(limit - int(used.get("anon", "0")))
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        page, sizes = resource.getpagesize(), Path("/proc/self/statm").read_text().split()
        for kind, field in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
            soft = resource.getrlimit(kind)[0]
            if soft != resource.RLIM_INFINITY:
                yield float(soft - page * int(sizes[field]))
    with suppress(AttributeError, OSError, ValueError):
        yield float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")


def _shown(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
