"""Code that a recipe names: modules and .py files of methods and networks."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from binarize.errors import BinarizeError
from binarize.trust import check_trusted


def import_plugins(plugins: Sequence[str]) -> None:
    """Import a recipe's plugins (dotted names or .py files), once per process, so that their methods exist."""
    for plugin in plugins:
        import_code(plugin, "plugins", f"the plugin {plugin!r}")


def import_code(name: str, key: str, what: str) -> ModuleType:
    """Return the module of a dotted name or .py file, imported once per process.

    ``key`` is the recipe's key for error messages, and ``what`` describes the code that would run.
    """
    is_file = name.endswith(".py")
    module_name = _module_name(name) if is_file else name
    if module_name not in sys.modules:
        check_trusted(what)
        try:
            if is_file:
                _import_file(name, key)
            else:
                importlib.import_module(name)
        except BinarizeError:
            raise
        except (Exception, SystemExit) as error:  # a user's file can raise anything
            hint = "" if is_file else " Name a file of your own by its path, ending in .py."
            raise BinarizeError(f"{key}: cannot import {name!r}: {type(error).__name__}: {error}.{hint}") from error
    return sys.modules[module_name]


def _import_file(name: str, key: str) -> None:
    path = Path(name).resolve()
    if not path.is_file():
        raise BinarizeError(f"{key}: there is no file {name!r}; paths are relative to the recipe's folder.")
    module_name = _module_name(name)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise


def _module_name(name: str) -> str:
    path = Path(name).resolve()
    return f"binarize_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
