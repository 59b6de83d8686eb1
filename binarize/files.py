"""Files and folders that are either completely written or not there."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from binarize.errors import BinarizeError, one_line


def write_atomic(path: str | os.PathLike[str], write_fn: Callable[[Path], object], *, force: bool = False) -> Path:
    """Write a file so that `path` holds either all of it or what was there before.

    `write_fn` is called with a temporary path of the same suffix in the same folder, which must exist. The file is then
    flushed to the disk and renamed; `force` replaces an existing one, whose permissions are kept. A link stays, and the
    file that it leads to is replaced. If anything fails, including by Ctrl-C, the temporary file is removed. An OSError
    becomes a BinarizeError.
    """
    path = followed(Path(path))
    if not path.parent.is_dir():
        raise BinarizeError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise BinarizeError(f"{path}: is a folder; give the name of a file")
    if path.exists() and not force:
        raise BinarizeError(f"{path}: already exists; give another name, or force to replace it")
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp{path.suffix}")  # short, however long the name is
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


def replace_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Write a folder so that ``target`` is the old one, absent for one rename, or the complete new one.

    `write` is called with an empty temporary folder beside the target, which is then flushed to disk and renamed. If
    anything fails, including Ctrl-C, the old folder stays and the temporary folder is removed.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    aside = temporary.with_suffix(".old")
    try:
        temporary.mkdir()
        write(temporary)
        _flush(temporary)
        if target.exists():
            os.rename(target, aside)
        os.rename(temporary, target)
        _flush_entry(target.parent)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _flush(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb+") as file:
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
