"""The folders of pipelines: read with errors of this package, and written whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin

import binarize.models.unet  # noqa: F401  # diffusers takes a network's class from modules that are imported only
from binarize.errors import BinarizeError, one_line
from binarize.files import update_folder
from binarize.json_files import check_keys, read_json
from binarize.models.sampling import FAILURES, parameters, read_scheduler

_ADDED = ("conversion", "quantization_config")  # keys in a network's config.json that are no arguments of its class


@contextmanager
def reading(kind: str, known: Collection[str], folder: Path, options: dict[str, Any]) -> Iterator[None]:
    """Add the scheduler of a pipeline's folder to the options of ``from_pretrained``, which the body calls.

    ``kind`` is the name of the pipeline's class, and ``known`` are the names of its arguments. The keys of the
    configurations are checked, since diffusers ignores unknown ones. What diffusers raises for a folder of this machine
    becomes a BinarizeError.
    """
    is_here = (folder / "model_index.json").is_file()
    if is_here:
        _check_keys(kind, known, folder)
    if is_here and "scheduler" not in options and (scheduler := read_scheduler(folder)) is not None:
        options["scheduler"] = scheduler
    try:
        yield
    except (*FAILURES, OSError) as error:
        if isinstance(error, BinarizeError) or not is_here:
            raise
        raise BinarizeError(f"{folder}: cannot be read as a pipeline: {one_line(error)}") from error


def save_whole(
    save: Callable[..., Any], folder: str | PathLike[str], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Call diffusers' ``save_pretrained(folder, *args, **options)`` by `update_folder`."""
    if options.get("push_to_hub"):
        options.setdefault("repo_id", Path(folder).name)
    update_folder(folder, lambda temporary: save(str(temporary), *args, **options))


def check_network_keys(kind: type, config: Mapping[str, Any], path: Path) -> None:
    """Check the keys in the configuration of a network of a class, read from a path; see `check_keys`."""
    check_keys(config, str(path), parameters(kind), _ADDED)


def _check_keys(kind: str, known: Collection[str], folder: Path) -> None:
    index = read_json(folder / "model_index.json")
    # A pipeline of another class may be loaded; its own settings have no effect.
    if index.get("_class_name") == kind:
        check_keys(index, str(folder / "model_index.json"), known)
    path, entry = folder / "unet" / "config.json", index.get("unet")
    module, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    network = getattr(sys.modules.get(str(module)), str(name), None)  # nothing is imported
    if isinstance(network, type) and issubclass(network, ConfigMixin) and path.is_file():
        check_network_keys(network, read_json(path), path)
