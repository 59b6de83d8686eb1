"""Files and folders that are either completely written or not there."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path

from binarize.errors import BinarizeError, one_line

_MARK = ".binarize-"
_LEFTOVER = re.compile(r"(\.(?P<name>.+))?\.binarize-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{6}\.(tmp.*|old)")
_WEIGHTS = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?\.(safetensors|bin)(?:\.index(\..+)?\.json)?")  # diffusers' names
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
_RENAME_SWAP = 2  # of macOS's renamex_np


def read_text(path: Path, most: int) -> str:
    """Return a text file of at most ``most`` bytes in UTF-8; a pipe or a device is an error and is not opened."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BinarizeError(f"{path}: is not a file; a folder, a pipe or a device cannot be read here")
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise BinarizeError(f"{path}: is larger than {most} bytes, the most for a file of this kind")
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise BinarizeError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BinarizeError(f"{path}: cannot be read as text: {one_line(error)}") from error


def write_atomic(path: str | os.PathLike[str], write_fn: Callable[[Path], object], *, force: bool = False) -> Path:
    """Write a file so that `path` holds either all of it or what was there before.

    `write_fn` is called with a temporary path of the same suffix in the same folder, which must exist. The file is then
    flushed to the disk and renamed; `force` replaces an existing one, whose permissions are kept. A link stays, and the
    file that it leads to is replaced. If anything fails, including by Ctrl-C, the temporary file is removed. An OSError
    becomes a BinarizeError.
    """
    path = followed(Path(path))
    check_new_file(path, force=force)
    _tidy_once(path.parent, os.getpid())
    temporary = _temporary(path.parent, f".tmp{path.suffix}")
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    try:
        if mode is not None:  # before there is content that others must not read
            temporary.touch(exist_ok=False)
            temporary.chmod(mode | stat.S_IRUSR | stat.S_IWUSR)
        write_fn(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, path)
    except OSError as error:
        raise BinarizeError(f"{path}: cannot be written: {one_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_new_file(path: Path, *, force: bool) -> None:
    """Check that a file can be written without replacing another, unless by `force`."""
    if not path.parent.is_dir():
        raise BinarizeError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise BinarizeError(f"{path}: is a folder; give the name of a file")
    if path.exists() and not force:
        raise BinarizeError(f"{path}: already exists; give another name, or force to replace it")


def followed(path: Path) -> Path:
    """Return the file that a link leads to, or the path itself; raise BinarizeError for a pipe, device or dead end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            raise BinarizeError(f"{path}: is a link that leads to no file; remove it, or give another name") from error
        return path
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BinarizeError(f"{path}: is a pipe or a device; give the name of a file")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def write_text_atomic(path: str | os.PathLike[str], text: str, *, force: bool = True) -> Path:
    r"""Write text as UTF-8 with "\n" line ends by `write_atomic`, by default replacing an existing file."""
    return write_atomic(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"), force=force)


def replace_folder(target: Path, write: Callable[[Path], object], *, keep_others: bool = False) -> None:
    """Write a folder so that ``target`` is always either the old one or the complete new one.

    `write` is called with an empty temporary folder beside the target, which is then flushed to disk and takes the
    target's name. (Where the system cannot exchange two folders, the target is absent between two renames.) If anything
    fails, including Ctrl-C, the old folder stays and the temporary folder is removed. `tidy` is called first. With
    ``keep_others``, files of the old folder that were not written are linked into the new one.
    """
    tidy(target.parent)
    temporary = _temporary(target.parent, ".tmp")
    aside = target.with_name(f".{target.name}{temporary.stem}.old")
    try:
        temporary.mkdir()
        write(temporary)
        if target.is_dir():
            shutil.copymode(target, temporary)
            if keep_others:
                _keep_others(target, temporary)
        _flush(temporary)
        if not target.exists():
            os.rename(temporary, target)
        elif not _exchange(temporary, target):
            os.rename(target, aside)
            os.rename(temporary, target)
        for old in (temporary, aside):
            if keep_others and old.exists():  # files that appeared meanwhile
                _keep_others(old, target)
        _flush_entry(target.parent)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def update_folder(target: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Write files into a folder and keep its other files.

    The folder is replaced by `replace_folder`. It is written file by file instead, each in one step, if it holds links
    or mounted folders, is a mount point, contains the working folder, or has a parent that cannot be written. Shards
    and their index of an earlier save of the same weights are removed. An OSError becomes a BinarizeError.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise BinarizeError(f"{target}: is a file; give a folder")

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not _may_exchange(target):
            _write_each(target, write)
        else:
            replace_folder(target, write, keep_others=True)
    except OSError as error:
        raise BinarizeError(f"{target}: cannot be written: {one_line(error)}") from error


def _may_exchange(target: Path) -> bool:
    """Return whether a folder can be replaced by another, to which its other files are linked."""
    if os.path.ismount(target) or Path.cwd().is_relative_to(target) or not os.access(target.parent, os.W_OK | os.X_OK):
        return False
    return not any(path.is_symlink() or (path.is_dir() and os.path.ismount(path)) for path in target.rglob("*"))


def _write_each(target: Path, write: Callable[[Path], object]) -> None:
    tidy(target)
    temporary = _temporary(target, ".tmp")
    try:
        temporary.mkdir()
        write(temporary)
        _flush(temporary)
        written = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
        weights = {(path.parent, _weights(path.name)) for path in written} - {(path.parent, None) for path in written}
        for path in written:
            there = target / path
            there.parent.mkdir(parents=True, exist_ok=True)
            if there.is_file():
                shutil.copymode(there, temporary / path)
            os.replace(temporary / path, there)
        for parent in {path.parent for path in written}:
            for path in (target / parent).iterdir():
                if parent / path.name not in written and (parent, _weights(path.name)) in weights:
                    path.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _keep_others(old: Path, new: Path) -> None:
    """Link what a folder holds, and another does not, into the other; a file that both hold keeps its permissions."""
    written = {_weights(path.name) for path in new.iterdir()} - {None}
    for path in old.iterdir():
        there = new / path.name
        if path.is_dir() and not path.is_symlink():
            if there.is_dir():
                _keep_others(path, there)
            else:
                shutil.copytree(path, there, symlinks=True, copy_function=_link)
        elif there.exists():
            shutil.copymode(path, there)
        elif _weights(path.name) not in written:
            _link(path, there)


def _weights(name: str) -> tuple[str, ...] | None:
    """Return what a file of weights, its shards and their index have in common; None for other files."""
    match = _WEIGHTS.fullmatch(name)
    return None if match is None else (match[1] + (match[3] or ""), match[2])


def _link(path: str | Path, there: str | Path) -> None:
    try:
        os.link(path, there, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(path, there, follow_symlinks=False)


def remove_folder(path: Path) -> None:
    """Remove a folder, which is renamed first, so that an interrupted removal leaves no part of it under its name."""
    removed = _temporary(path.parent, ".tmp")
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove what killed processes of this machine left in a folder, and undo their unfinished replacements."""
    for path in folder.glob(f".*{_MARK[1:]}*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or match["host"] != _host() or is_alive(int(match["pid"])):
            continue
        with suppress(OSError):
            if path.suffix == ".old" and match["name"] and not (target := path.with_name(match["name"])).exists():
                path.rename(target)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@lru_cache(maxsize=64)
def _tidy_once(folder: Path, process: int) -> None:
    tidy(folder)


def _temporary(folder: Path, suffix: str) -> Path:
    """Return a new hidden name that says which process made it; its length does not depend on the target's."""
    return folder / f"{_MARK}{_host()}-{os.getpid()}-{secrets.token_hex(3)}{suffix}"


@cache
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine has not ended, or cannot be known to have."""
    if pid == os.getpid():
        return True
    if os.name == "nt":  # where os.kill ends a process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step, and return whether the system can."""
    try:
        system = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            return system.renamex_np(*names, _RENAME_SWAP) == 0
        return system.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
    except (AttributeError, OSError, TypeError):  # an older system, or Windows
        return False


def _flush(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(PermissionError), open(os.path.join(root, name), "rb+" if os.name == "nt" else "rb") as file:
                os.fsync(file.fileno())
        _flush_entry(Path(root))


def _flush_entry(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
