"""Models on the Hugging Face hub, downloaded within bounds of time, size and memory."""

from __future__ import annotations

import fnmatch
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from binarize.errors import BinarizeError, one_line
from binarize.imaging.limits import available_memory

_FILES = ("*.json", "*.safetensors")
_ANSWER = 30.0  # seconds until the hub has answered
_SLOWEST = 50e3  # bytes per second
_LARGEST = 4 * 2**30  # bytes of a model
_MOST_MEMORY = 2**30  # bytes that an answer may fill
T = TypeVar("T")


def download(name: str, allowed: str) -> Path:
    """Return the folder of ``user/repository``, ``user/repository/folder`` or either with ``@revision``.

    JSON and safetensors files are downloaded once. A revision is a branch, a tag or a commit, by default "main".
    `allowed` says in errors what a model may be.
    """
    where, _, revision = name.partition("@")
    user, repository, *inside = where.split("/")
    repo, folder = f"{user}/{repository}", "/".join(inside)
    try:
        found = _fetch(repo, folder, revision or None)
    except BinarizeError as error:
        raise BinarizeError(f"{name}: {error}") from error
    except RevisionNotFoundError as error:
        raise BinarizeError(f"{name}: the repository {repo} has no revision {revision or 'main'}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        what = f"no such file or folder, and no repository {repo} on the Hugging Face hub (or it needs `hf auth login`)"
        raise BinarizeError(f"{name}: {what}; give {allowed}.") from error
    except LocalEntryNotFoundError as error:
        what = f"no such file or folder, the Hugging Face hub cannot be reached, and {repo} was not downloaded before"
        raise BinarizeError(f"{name}: {what}; go online, or give the path of a model.") from error
    except Exception as error:  # the hub's client and the libraries below it raise many kinds
        raise BinarizeError(f"{name}: cannot be downloaded from the Hugging Face hub: {one_line(error)}") from error
    if not (found / folder).is_dir():
        raise BinarizeError(f"{name}: the repository {repo} on the Hugging Face hub has no folder {folder}.")
    return found / folder


def _fetch(repo: str, folder: str, revision: str | None) -> Path:
    """Download what is missing, and return the local copy of the repository."""
    try:
        info = _within(
            _ANSWER,
            lambda: huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=10),
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise
    except Exception as error:  # offline: an earlier download does
        try:
            return Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise (error if isinstance(error, BinarizeError) else LocalEntryNotFoundError(one_line(error))) from error
    patterns = [f"{folder}/{kind}" if folder else kind for kind in _FILES]
    files = [file for file in info.siblings or () if any(fnmatch.fnmatch(file.rfilename, each) for each in patterns)]
    size = sum(file.size or 0 for file in files)
    if size > _LARGEST:
        raise BinarizeError(f"its files have {size:,} bytes; at most {_LARGEST:,} are downloaded. Use `hf download`.")
    if not files:
        raise BinarizeError(f"holds no {' or '.join(_FILES)} files there on the Hugging Face hub.")

    def get_all() -> Path:
        for file in files:
            path = huggingface_hub.hf_hub_download(repo, file.rfilename, revision=info.sha, etag_timeout=10)
        return Path(path).parents[len(Path(files[-1].rfilename).parts) - 1]

    return _within(_ANSWER + size / _SLOWEST, get_all)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a function returns, or raise BinarizeError after so many seconds or when it fills the memory."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # which does not keep the program from ending
    free, until = available_memory(), time.monotonic() + seconds
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        if thread.is_alive() and time.monotonic() > until:
            raise BinarizeError(f"the Hugging Face hub did not finish within {seconds:.0f} s; try again later.")
        if thread.is_alive() and free - available_memory() > _MOST_MEMORY:
            raise BinarizeError("the answer of the Hugging Face hub fills the memory; it is not the hub.")
    if errors:
        raise errors[0]
    return results[0]
