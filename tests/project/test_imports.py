"""No file of the package imports itself through others, not even by an import inside a function."""

import graphlib
import re
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[2]
# `importlib.import_module("binarize.kernels")` is an import that grimp does not see.
BY_NAME = re.compile(r"""import_module\(\s*["'](binarize[\w.]*)["']""")


def imported_modules() -> dict[str, set[str]]:
    """Return the modules that each module imports. Imports under ``if TYPE_CHECKING`` do not count."""
    graph = grimp.build_graph("binarize", exclude_type_checking_imports=True, cache_dir=None)
    imports = {}
    for name in graph.modules:
        path = ROOT.joinpath(*name.split("."))
        source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
        imports[name] = graph.find_modules_directly_imported_by(name) | set(BY_NAME.findall(source))
    return imports


def test_no_cycle_between_files() -> None:
    modules = imported_modules()
    folders = {name.split(".")[1] for name in modules if name.count(".") > 1}
    assert {"kernels", "layers", "models", "recipes"} <= folders  # models and recipes are symbolic links
    try:
        graphlib.TopologicalSorter(modules).prepare()
    except graphlib.CycleError as error:
        raise AssertionError("import cycle: " + " <- ".join(error.args[1])) from None
