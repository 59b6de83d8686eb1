"""The installed package is cheap to import, complete and typed. The repository names no machine and no registry."""

import importlib.metadata
import importlib.resources
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import binarize

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"PIL", "diffusers", "lpips", "matplotlib", "numba", "numpy", "skimage", "timm", "torch", "yaml"}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("what", ["import binarize", "from binarize.cli import app; app(['upscale', '--help'])"])
def test_what_starts_at_once_imports_nothing_heavy(what: str) -> None:
    script = f"import sys, atexit; atexit.register(lambda: print('LOADED', *sys.modules)); {what}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.partition("LOADED")[2].split()}
    assert "binarize" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.slow
def test_submodules_and_methods_are_found_when_they_are_first_used() -> None:
    script = """
import threading, binarize
from binarize.layers.method import METHODS
found = []
threads = [threading.Thread(target=lambda: found.append(METHODS["reactnet"].name)) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(*found, binarize.kernels.backends.current(), binarize.conversion.__name__, hasattr(binarize, "nothing"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["reactnet"] * 4 + ["auto", "binarize.conversion", "False"]


def test_version_and_types(pyproject: dict[str, Any]) -> None:
    versions = {binarize.__version__, importlib.metadata.version("binarize-diffusion")}
    assert versions == {pyproject["project"]["version"]}
    assert importlib.resources.files("binarize").joinpath("py.typed").is_file()


def test_every_public_name_resolves_is_listed_once_and_hides_no_module() -> None:
    assert len(set(binarize.__all__)) == len(binarize.__all__)
    assert [name for name in binarize.__all__ if not hasattr(binarize, name)] == []
    assert set(binarize.__all__) <= set(dir(binarize))
    # If `binarize/convert.py` defined `convert`, the name `binarize.convert` would mean either of them.
    modules = {module.name for module in pkgutil.iter_modules(binarize.__path__)}
    hidden = [name for name in binarize.__all__ if name in modules and not inspect.ismodule(getattr(binarize, name))]
    assert hidden == []


def test_every_package_on_disk_is_installed(pyproject: dict[str, Any]) -> None:
    found = set()
    for package, folder in pyproject["tool"]["setuptools"]["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder)
            if package == "binarize" and inside.parts[:1] in {("models",), ("recipes",)}:
                continue  # symbolic links to the folders models and recipes
            found.add(".".join([package, *inside.parts]))
    assert sorted(pyproject["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_data_file_is_installed(pyproject: dict[str, Any]) -> None:
    folders = pyproject["tool"]["setuptools"]["package-dir"]
    packed = set()
    for package, patterns in pyproject["tool"]["setuptools"]["package-data"].items():
        base = max((name for name in folders if package == name or package.startswith(f"{name}.")), key=len)
        folder = ROOT.joinpath(folders[base], *package.removeprefix(base).split("."))
        for pattern in patterns:
            packed |= set(folder.glob(pattern))
    on_disk = set((ROOT / "recipes").rglob("*.yaml")) | {ROOT / "binarize" / "py.typed"}
    on_disk |= {ROOT / "binarize" / "diagnosis" / "picture.png"} | set(shipped_files(ROOT))
    page = set((ROOT / "binarize" / "web" / "page").rglob("*"))  # exists after `make web`
    assert page <= packed
    packed -= page
    assert packed == on_disk


def shipped_files(root: Path) -> list[Path]:
    """Return all files of the trained models below ``root``, except Python files."""
    files = (path for path in (root / "models" / "pretrained").rglob("*") if path.is_file())
    return [path for path in files if path.suffix not in (".py", ".pyc")]


@pytest.mark.slow
def test_the_wheel_contains_every_file_of_the_trained_models(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("binarize", "models", "recipes"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    # Add the files of a saved pipeline, so that the test does not depend on the models in the repository.
    for name in ("README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
        path = tree / "models" / "pretrained" / "x64" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tree / "models" / "pretrained" / "x64" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    program = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    built = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=tree, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert len(shipped_files(tree)) >= 5
    for path in shipped_files(tree):
        assert contents["binarize/models/" + path.relative_to(tree / "models").as_posix()] == path.read_bytes()
    assert "binarize/diagnosis/picture.png" in contents


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("an absolute path", r"(?<![\w.~$})])/(?:work|root|tmp|opt|home)/"),
        ("the address of a package registry", r"\b(?:pypi|pythonhosted|npmjs|anaconda)\.(?:org|com)|download\.pytorch"),
    ],
)
def test_tracked_files_do_not_contain(what: str, pattern: str) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    texts = {path: content.decode() for path in paths if b"\0" not in (content := path.read_bytes())}
    assert texts
    hits = [f"{path}: {match.group()}" for path, text in texts.items() for match in re.finditer(pattern, text)]
    assert hits == [], f"{what} is in a tracked file"
