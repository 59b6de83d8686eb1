"""Modules that cannot be imported, and actions that wait for one."""

import importlib
import sys

import pytest

from binarize.importing import absent, after_import


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "late_library").mkdir()
    (tmp_path / "late_library" / "__init__.py").touch()
    (tmp_path / "late_library" / "part.py").write_text("loaded = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield "late_library.part"
    assert sys.meta_path == finders  # nothing is left
    for name in ("late_library.part", "late_library"):
        sys.modules.pop(name, None)


def test_the_action_follows_the_import(library):
    seen = []
    after_import(library, lambda: seen.append(sys.modules[library].loaded))
    importlib.import_module("late_library")
    assert seen == []
    importlib.import_module(library)
    assert seen == [True]
    after_import(library, lambda: seen.append("at once"))
    assert seen == [True, "at once"]


def test_a_failed_import_is_tried_again(library, tmp_path):
    seen = []
    after_import(library, lambda: seen.append(True))
    part = tmp_path / "late_library" / "part.py"
    part.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(library)
    assert seen == []
    part.write_text("loaded = True\n")
    importlib.import_module(library)
    assert seen == [True]


def test_an_absent_module_cannot_be_imported(library):
    with absent(library), pytest.raises(ModuleNotFoundError, match=r"late_library\.part"):
        importlib.import_module(library)
    assert importlib.import_module(library).loaded
    with absent(library):  # too late
        assert importlib.import_module(library).loaded
