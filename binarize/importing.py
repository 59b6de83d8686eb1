"""Lazy and blocked imports, and actions that run after an import."""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def exports(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__``, which imports the module of a name, or a submodule, when it is first used.

    `names` maps modules inside the package to the public names that they define.
    """
    module_of = {name: module for module, inside in names.items() for name in inside}

    def __getattr__(name: str) -> Any:
        if name in module_of:
            value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
            setattr(sys.modules[package], name, value)  # the next access does not come here
            return value
        if name[0] != "_" and find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


@contextmanager
def absent(name: str) -> Iterator[None]:
    """Make imports of a module fail inside the context, in all threads, unless it is imported already.

    A library that treats the module as optional is then imported without it, and stays without it.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # as Python documents
    try:
        yield
    finally:
        if sys.modules.get(name, name) is None:
            del sys.modules[name]


def after_import(name: str, action: Callable[[], object]) -> None:
    """Call ``action`` after the module ``name`` has been imported; at once if it is imported already."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watcher(name, action))


class _Watcher(MetaPathFinder):
    """Finds one module as the other finders do, and has its loader call an action at the end."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self._name, self._action = name, action

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return None for every module but one."""
        if name != self._name:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                self._action()

            loader.exec_module = exec_module
        return spec
