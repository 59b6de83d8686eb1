"""Saving and loading converted models.

A folder holds ``config.json``, which says what the host is and how it was converted, and ``model.safetensors``. SRUNet
has all of that in diffusers' own format; `save` and `load` do the same for hosts of other libraries. `load` also reads
what ``save_pretrained`` of a converted diffusers model wrote, see `binarize.quantizer`.
"""

import copy
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from binarize.conversion.apply import CONFIG, apply_conversion, check_saveable, write_packed_folder
from binarize.conversion.record import QUANT_METHOD, QUANTIZATION, conversion
from binarize.digests import check_sealed, meanwhile, seal
from binarize.errors import BinarizeError, one_line
from binarize.files import update_folder, write_text_atomic
from binarize.json_files import read_json
from binarize.models.saving import check_network_keys
from binarize.models.unet import SRUNet
from binarize.modules import aligned, meta_copy, unwrap, update_config
from binarize.packed.files import WEIGHTS as SRUNET_WEIGHTS
from binarize.packed.files import check_same_config, count_tensors, read_config, read_packed

WEIGHTS = "model.safetensors"

# Exceptions of readers, and of constructors for a configuration with unexpected values.
_UNEXPECTED = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError, OSError)
# Networks have one to three modules per tensor: layers, their parts, and the containers around them.
_MODULES_PER_TENSOR = 10


def save(model: nn.Module, folder: str | PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
    """Save a converted or packed model so that `load` can rebuild it, and return the folder.

    Files of an earlier save in the same folder are replaced atomically.

    Args:
        model: A converted model: SRUNet, a diffusers model, or any other nn.Module (for which `load` then needs an
            unconverted instance). It may be compiled or wrapped for data parallelism.
        folder: The folder; it is created.
        dtype: Dtype of a packed model's full-precision tensors in the file, such as torch.float16; by default the
            dtype that they have. `load` returns half precision as float32.

    Raises:
        BinarizeError: If the model is not converted, a part of its method cannot be named in a file, the model is
            sharded or has adapters, or a dtype is given for a model that is not packed or is too small for one of its
            values.
    """
    model = unwrap(model)
    record = conversion(model)
    config = record.to_config()
    check_saveable(model)
    if dtype is not None and not record.packed:
        raise BinarizeError("save: dtype is for packed models; call binarize.pack(model) first, or model.to(dtype).")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise BinarizeError(f"save: {folder} is a file; give a folder.")
    if isinstance(model, SRUNet):
        name, text = SRUNET_WEIGHTS, model.to_json_string()
    else:
        described = {"binarize_format": 1, "host": _describe_host(model), "conversion": config}
        name, text = WEIGHTS, json.dumps(described, indent=2) + "\n"
    if record.packed:
        write_packed_folder(model, folder, name, text, json.loads(text), dtype)
    elif isinstance(model, SRUNet):
        model.save_pretrained(folder)
    else:

        def write(temporary: Path) -> None:
            save_model(model, str(temporary / WEIGHTS))
            seal(temporary / WEIGHTS)
            write_text_atomic(temporary / CONFIG, text)

        update_folder(folder, write)
    return folder


def load(folder: str | PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Rebuild a model that `save` (or ``save_pretrained``) wrote, with its weights and in eval mode.

    Args:
        folder: The folder, or a packed model's ``model.safetensors`` alone.
        model: An unconverted instance of the host, needed for hosts that are neither SRUNet nor diffusers models; it
            is converted in place and returned.

    Raises:
        BinarizeError: If files are missing or broken, or do not fit the host.
    """
    folder = Path(folder)
    if folder.is_file():
        config, weights, where = read_config(folder), folder, folder
    else:
        config, weights, where = _read_config(folder), folder / WEIGHTS, folder / CONFIG
    name, quantization = config.get("_class_name"), config.get(QUANTIZATION)
    if name == "SRUNet" or (isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD):
        if model is not None:
            raise BinarizeError(f"load: {folder} holds an {name}, which is rebuilt from its files; leave model out.")
        cls = SRUNet if name == "SRUNet" else _diffusers_class(name, f"load it with {name}.from_pretrained", folder)
        check_network_keys(cls, config, where)
        with _errors(f"{folder} does not hold a readable {name}"):
            return cast(nn.Module, cls.from_pretrained(folder))
    if config.get("binarize_format") != 1:
        version = config.get("binarize_format")
        raise BinarizeError(f"load: {where} has binarize_format {version!r}; this version reads 1.")
    missing = [key for key in ("host", "conversion") if not isinstance(config.get(key), dict)]
    if missing:
        raise BinarizeError(f"load: {where} has no {' and no '.join(missing)}; it is not what save wrote.")
    if "packed" in config["conversion"]:
        if where != weights:
            check_same_config(config, weights)
        return _load_packed(config, weights, model)
    with _errors(f"{weights} cannot be read"):
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
        with meanwhile(lambda: check_sealed(weights, metadata)):
            state = load_file(weights)
    host = _build_host(config["host"], folder) if model is None else model
    twin = meta_copy(host)  # finds a mismatch before the caller's instance is changed
    with _building(where), torch.device("meta"):
        apply_conversion(twin, config["conversion"])
    _check_fit(twin, state, folder / WEIGHTS)
    apply_conversion(host, config["conversion"])
    tensors = host.state_dict(keep_vars=True)
    for name, value in state.items():  # each in the dtype that it was saved in
        tensors[name].data = aligned(value).to(tensors[name].device)
    return host.eval()


def _load_packed(config: Mapping[str, Any], path: Path, model: nn.Module | None) -> nn.Module:
    if model is not None:
        twin = meta_copy(model)  # finds a mismatch before the caller's instance is changed
    most = _MODULES_PER_TENSOR * (100 + count_tensors(path))
    with _building(path), _at_most(most, path), torch.device("meta"):
        if model is None:
            twin = _build_host(config["host"], path)
        apply_conversion(twin, config["conversion"])

    def unsaved() -> dict[str, Tensor]:
        host = _build_host(config["host"], path) if model is None else model
        return dict(host.named_buffers(remove_duplicate=False))

    read_packed(twin, path, unsaved=unsaved)
    if model is None:
        return twin
    apply_conversion(model, config["conversion"])
    model.load_state_dict(twin.state_dict(keep_vars=True), strict=True, assign=True)
    return model.eval()


@contextmanager
def _errors(problem: str) -> Iterator[None]:
    """Turn any exception of a constructor or a reader into a BinarizeError that begins with the problem."""
    try:
        yield
    except BinarizeError:
        raise
    except (*_UNEXPECTED, SafetensorError) as error:
        raise BinarizeError(f"load: {problem}: {one_line(error)}") from error


def _building(path: Path) -> AbstractContextManager[None]:
    return _errors(f"{path}: its configuration builds no network")


@contextmanager
def _at_most(modules: int, path: Path) -> Iterator[None]:
    """Raise BinarizeError once a network has more modules than its file can have weights for."""
    thread, left = threading.get_ident(), modules

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal left
        left -= threading.get_ident() == thread
        if left < 0:
            raise BinarizeError(f"load: {path}: its configuration has more layers than the file has weights for.")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_fit(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raise BinarizeError unless a state dict fits the model; tied tensors are stored under one of their names."""
    expected = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        names.setdefault(id(tensor), []).append(name)
    missing = [aliases[0] for aliases in names.values() if not any(name in state for name in aliases)]
    unexpected = [name for name in state if name not in expected]
    wrong = [name for name in state if name in expected and state[name].shape != expected[name].shape]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
    if problems := "; ".join(f"{len(found)} {kind}, such as {found[0]}" for kind, found in kinds if found):
        raise BinarizeError(f"load: {path} does not fit the host: {problems}.")


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise BinarizeError(f"load: {folder} has no {CONFIG}; give a folder that binarize.save wrote.")
    return read_json(folder / CONFIG)


def _describe_host(model: nn.Module) -> dict[str, Any]:
    cls = type(model)
    if cls.__module__.startswith("diffusers.") and hasattr(model, "config"):
        plain = copy.copy(model)  # the conversion has its own place in the file
        update_config(plain, {}, remove=QUANTIZATION)
        return {"library": "diffusers", "class": cls.__name__, "config": json.loads(plain.to_json_string())}  # type: ignore[operator]
    return {"library": None, "class": f"{cls.__module__}.{cls.__qualname__}"}


def _build_host(described: Mapping[str, Any], folder: Path) -> nn.Module:
    if described.get("library") != "diffusers":
        raise BinarizeError(
            f"load: {folder} holds a {described.get('class')}, which only its own code can build; "
            "pass an unconverted instance: binarize.load(folder, model=...)."
        )
    cls = _diffusers_class(described.get("class"), "pass model=", folder)
    options = described.get("config")
    if not isinstance(options, dict):
        raise BinarizeError(f"load: {folder} has no configuration of its {cls.__name__}; got {options!r}.")
    built: nn.Module = cls.from_config(options)
    return built


def _diffusers_class(name: Any, instead: str, folder: Path) -> Any:
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise BinarizeError(f"load: {folder} names {name!r}, which is not a diffusers model; {instead}.")
    return cls
