"""The digests by which a resumed run knows its training images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from binarize.errors import BinarizeError
from binarize.imaging import ImagePairs

_EDGE = 1 << 16


def image_digests(pairs: ImagePairs) -> dict[str, str]:
    """Return the name of each file of the pairs -> its digest, see `file_digests`."""
    named = {files.hr.name: files.hr for files in pairs.files}
    named |= {f"lr/{files.lr.name}": files.lr for files in pairs.files if files.lr is not None}
    return file_digests(named)


def file_digests(named: Mapping[str, Path]) -> dict[str, str]:
    """Return the name of each file -> a digest of its size and of its first and last 64 KiB.

    That is the whole of a small file; a larger PNG ends with the checksum of its pixels.
    """
    return {name: _digest(path) for name, path in named.items()}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for start in sorted({0, max(0, size - _EDGE)}):
                file.seek(start)
                digest.update(file.read(_EDGE))
    except OSError as error:
        raise BinarizeError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]
