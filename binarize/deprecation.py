"""Old public names, which keep working with a DeprecationWarning."""

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def renamed(
    module: str, names: Mapping[str, str], otherwise: Callable[[str], Any] | None = None
) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that resolves old names.

    ``names`` maps each to the new one, ``"name"`` in the same module or ``"package.module:name"`` in another. Names
    that it does not have are resolved by ``otherwise``.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            if otherwise is not None:
                return otherwise(name)
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        where, _, new = names[name].rpartition(":")
        where = where or module
        warnings.warn(f"{module}.{name} is now {where}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(where), new)

    return __getattr__


def renamed_argument(old: str, new: str) -> Callable[[FunctionT], FunctionT]:
    """Return a decorator that passes the keyword argument ``old`` on as ``new``."""

    def decorate(function: FunctionT) -> FunctionT:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if old in options:
                warnings.warn(f"{function.__qualname__}({old}=) is now {new}=", DeprecationWarning, stacklevel=2)
                options[new] = options.pop(old)
            return function(*args, **options)

        return call  # type: ignore[return-value]

    return decorate
