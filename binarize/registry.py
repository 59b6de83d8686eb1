"""A registry of named objects: methods, their parts and hosts."""

import importlib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from binarize.errors import BinarizeError, did_you_mean

T = TypeVar("T")
IMPORT_FIRST = (
    " One of your own must be imported first: by `binarize --plugin FILE ...`, a recipe's plugins, or Python."
)


class Registry(Generic[T]):
    """A mapping from name to object whose errors name the ``kind`` of object, the nearest name and a ``fix``.

    ``built_in`` is the package whose import registers the toolkit's own objects; the first use imports it.
    """

    def __init__(self, kind: str, built_in: str | None = None, fix: str = "") -> None:
        self.kind, self.fix = kind, fix
        self._registered: dict[str, T] = {}
        self._built_in = built_in

    @property
    def _items(self) -> dict[str, T]:
        if self._built_in is not None:
            importlib.import_module(self._built_in)  # waits for another thread's import
        return self._registered

    def register(self, name: str, *, replace: bool = False) -> Callable[[T], T]:
        """Return a decorator that registers an object under ``name``, or ``replace`` the registered one."""

        def add(item: T) -> T:
            if name in self._items and not replace:
                raise BinarizeError(
                    f"{self.kind} {name!r} is already registered as {self._items[name]!r}; "
                    "choose another name, or pass replace=True to take it over."
                )
            self._items[name] = item
            return item

        return add

    def newest_first(self) -> list[T]:
        """Return the objects, the last registered one first."""
        return list(reversed(self._items.values()))

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise BinarizeError(
                f"unknown {self.kind} {name!r}; registered: {', '.join(sorted(self._items)) or 'none'}."
                + did_you_mean(name, self._items)
                + self.fix
            )
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))
