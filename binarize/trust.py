"""Whether names that a model's file or a recipe gives may run code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Literal

from binarize.errors import BinarizeError

_NAMED_BY: ContextVar[Literal["model", "recipe"] | None] = ContextVar("_NAMED_BY", default=None)


def named_by_a_file() -> AbstractContextManager[None]:
    """Treat names of parts as untrusted, since they come from a file: import nothing and call no function."""
    return _named_by("model")


def named_by_a_recipe() -> AbstractContextManager[None]:
    """Treat names of parts and plugins as untrusted, since they come from a recipe: run no code."""
    return _named_by("recipe")


@contextmanager
def _named_by(source: Literal["model", "recipe"]) -> Iterator[None]:
    token = _NAMED_BY.set(source)
    try:
        yield
    finally:
        _NAMED_BY.reset(token)


def check_trusted(what: str) -> None:
    """Raise BinarizeError within `named_by_a_recipe`; `what` is the code that would run."""
    if _NAMED_BY.get() == "recipe":
        raise BinarizeError(f"the recipe would run code: {what}. Read that code, then add --trust to run it.")


def is_named_by_a_file() -> bool:
    """Return whether names are untrusted now, see `named_by_a_file`."""
    return _NAMED_BY.get() is not None
