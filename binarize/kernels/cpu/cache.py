"""Numba's cache of compiled code, with a digest in every file: a damaged entry is compiled again, not run."""

from __future__ import annotations

import hashlib
import logging
import pickle
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache

_DIGEST_SIZE = 32
_log = logging.getLogger("binarize")


class _CheckedFile(IndexDataCacheFile):
    """The index and the data files of one function. An entry also names the source and the signature that it is of."""

    def load(self, key: Any) -> Any:
        try:
            found = super().load(key)
            return found[2] if found is not None and found[:2] == (self._source_stamp, key) else None
        except Exception as error:  # unpickling raises any type
            _log.info("A compiled kernel in %s is damaged (%s), and is compiled again.", self._cache_path, error)
            return None

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (self._source_stamp, key, data))

    def _load_index(self) -> Any:
        try:
            with open(self._index_path, "rb") as file:
                version, content = pickle.load(file), file.read()  # nosec B301
            stamp, names = pickle.loads(_verified(content))  # nosec B301
        except Exception:
            return {}
        return dict(names) if (version, stamp) == (self._version, self._source_stamp) else {}

    def _load_data(self, name: str) -> Any:
        with open(self._data_path(name), "rb") as file:
            return pickle.loads(_verified(file.read()))  # nosec B301

    def _dump(self, obj: Any) -> bytes:
        content: bytes = super()._dump(obj)
        return hashlib.sha256(content).digest() + content


class _CheckedCache(FunctionCache):
    def __init__(self, function: Any) -> None:
        super().__init__(function)
        file: Any = vars(self)["_cache_file"]
        base = file._index_name.removesuffix(".nbi")
        self._cache_file = _CheckedFile(self._cache_path, base, file._source_stamp)

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:  # a full disk, or a folder that is gone
            _log.info("Compiled kernels cannot be kept in %s: %s.", self._cache_path, error)


def cache_of(function: Any) -> Any:
    """Return the cache of a function's compiled code, or one that keeps nothing where there is no folder for it."""
    try:
        return _CheckedCache(function)
    except OSError:
        return NullCache()
    except RuntimeError as error:  # neither the package's folder nor the user's can be written
        if "cache" not in str(error):
            raise
        return NullCache()


def _verified(content: bytes) -> bytes:
    digest, rest = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
    if hashlib.sha256(rest).digest() != digest:
        raise ValueError("its digest differs")
    return rest
