"""Digests of the files that this package writes, so that a flipped bit is an error and not another model.

A safetensors file has the SHA-256 of all its bytes in its own header, a folder of other files a ``SHA256SUMS`` as
``sha256sum`` writes it, and a torch file the CRC-32 of its zip members. Files of other programs need none of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from binarize.errors import BinarizeError, one_line
from binarize.files import write_atomic

KEY = "binarize_sha256"
"""The metadata key of the digest: SHA-256 of the whole file, with these 64 digits as zeros."""
SUMS = "SHA256SUMS"
_ZEROS = "0" * 64
_CHUNK = 1 << 20
_SUM = re.compile(r"([0-9a-f]{64})  (\S+)")
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, EOFError, RuntimeError, LookupError)


def sealed_header(metadata: Mapping[str, str], tensors: Mapping[str, Any], data: Iterable[bytes | memoryview]) -> bytes:
    """Return the beginning of a safetensors file, with the digest of the file that it and ``data`` make.

    ``tensors`` are the header's entries. The same arguments give the same bytes.
    """
    header = {"__metadata__": {**metadata, KEY: _ZEROS}, **tensors}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(start)
    for chunk in data:
        digest.update(chunk)
    before, _, after = start.partition(f'"{KEY}":"{_ZEROS}"'.encode())
    return before + f'"{KEY}":"{digest.hexdigest()}"'.encode() + after


def seal(path: Path) -> None:
    """Give a safetensors file its digest. It is replaced in one step; the tensors are not read into memory."""
    with path.open("rb") as file:
        header = json.loads(file.read(header_size(file.read(8))))
        metadata = dict(sorted(header.pop("__metadata__", {}).items()))
        first = file.tell()
        start = sealed_header(metadata, header, chunks(file))

    def write(temporary: Path) -> None:
        with path.open("rb") as source, temporary.open("wb") as target:
            source.seek(first)
            target.write(start)
            target.writelines(chunks(source))

    write_atomic(path, write, force=True)


def check_sealed(path: Path, metadata: Mapping[str, str]) -> bool:
    """Compare a safetensors file, whose header is valid and has these metadata, with its digest, if it has one.

    Returns whether it has one; raises BinarizeError if the file differs from it.
    """
    expected = metadata.get(KEY)
    if expected is None:
        return False
    with path.open("rb") as file:
        start = file.read(8)
        header = file.read(header_size(start))
        digest = hashlib.sha256(start + header.replace(expected.encode(), _ZEROS.encode(), 1))
        for chunk in chunks(file):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise damaged(path, "the digest in its header")
    return True


@contextmanager
def meanwhile(check: Callable[[], object]) -> Iterator[None]:
    """Run a check in a thread while the body reads the same files; its error takes the place of the body's."""
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check)
        try:
            yield
        finally:
            checked.result()


def check_torch_file(path: Path) -> None:
    """Compare a torch file with the CRC-32 of its parts, which ``torch.load`` ignores; older formats have none."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise BinarizeError(f"{path}: has compressed parts, which torch.save does not write.")
            bad = parts.testzip()
    except _BAD_ZIP as error:
        if isinstance(error, BinarizeError):
            raise
        raise BinarizeError(f"{path}: is damaged: {one_line(error)}; copy or download it again.") from error
    if bad is not None:
        raise damaged(path, f"the checksum of its part {bad!r}")


def load_torch_file(path: Path, *, checked: bool = False) -> Any:
    """Return what a torch file holds, on the CPU, after `check_torch_file` unless it was ``checked`` otherwise.

    It runs no code. ``torch.load`` raises many kinds of exceptions for damaged files.
    """
    if not checked:
        check_torch_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch asks for reports of pickles that it did not write
        import torch

        return torch.load(path, map_location="cpu", weights_only=True)


def write_sums(folder: Path) -> None:
    """Write the digests of a folder's files, to be checked by `check_sums` or ``sha256sum -c``."""
    lines = [f"{file_digest(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.is_file()]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def check_sums(folder: Path, needed: Iterable[str]) -> bool:
    """Compare a folder's files with their digests, if it has them; ``needed`` are files that must have one.

    Returns whether it has them; raises BinarizeError if a file differs, is missing, or has no digest.
    """
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError) as error:
        raise BinarizeError(f"{folder / SUMS}: cannot be read: {one_line(error)}") from error
    matches = [_SUM.fullmatch(line) for line in text.splitlines()]
    sums = {match[2]: match[1] for match in matches if match is not None}
    if None in matches or not sums.keys() >= set(needed):
        raise BinarizeError(f"{folder / SUMS}: is damaged; it must have the SHA-256 of {' and '.join(needed)}.")
    for name, expected in sums.items():
        path = folder / Path(name).name
        if not path.is_file() or file_digest(path) != expected:
            raise damaged(path, f"its digest in {SUMS}")
    return True


def damaged(path: Path, what: str) -> BinarizeError:
    """Return the error for a file whose content does not have a digest."""
    return BinarizeError(f"{path}: is damaged: its content does not have {what}; copy or download it again.")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in chunks(file):
            digest.update(chunk)
    return digest.hexdigest()


def chunks(file: Any) -> Iterator[bytes]:
    """Yield the rest of a file that is open for reading bytes."""
    return iter(lambda: file.read(_CHUNK), b"")


def header_size(start: bytes | memoryview) -> int:
    """Return the size of a safetensors file's header from its first eight bytes."""
    return int(struct.unpack("<Q", start)[0])
