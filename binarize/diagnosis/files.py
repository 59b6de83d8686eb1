"""Whether the configuration of a saved network fits its weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from binarize.errors import BinarizeError
from binarize.json_files import read_json
from binarize.models.unet import SRUNet
from binarize.packed.files import config_differences, is_packed_file, read_config

_SHOWN = 6


def find_mismatch(folder: Path) -> str | None:
    """Describe how a network's weights differ from its configuration; None if they fit or cannot be compared."""
    files = sorted(folder.glob("*.safetensors"))
    config = _srunet_config(folder / "config.json")
    if config is None or not files:
        return None
    packed = next(filter(is_packed_file, files), None)
    if packed is not None:
        return _compare_configs(config, read_config(packed))
    held: dict[str, tuple[int, ...]] = {}
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                held |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"):
            state = SRUNet.from_config(config).state_dict()
    except BinarizeError as error:
        return f"unet/config.json builds no network: {error}"
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, RuntimeError):
        return None
    needed = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing = [name for name in needed if name not in held]
    unexpected = [name for name in held if name not in needed]
    differing = [name for name, shape in held.items() if shape != needed.get(name, shape)]
    wrong = [f"{name} is {held[name]} in the file and {needed[name]} by the configuration" for name in differing]
    kinds = (
        (missing, "missing from the file"),
        (unexpected, "not known to the configuration"),
        (wrong, "of another shape"),
    )
    found = [f"{len(names)} {kind}: {_first(names)}" for names, kind in kinds if names]
    return f"{'; '.join(found)}.{_hint(config, held, missing, unexpected)}" if found else None


def _compare_configs(config: Mapping[str, Any], packed: Mapping[str, Any]) -> str | None:
    found = config_differences(config, packed)
    if not found:
        return None
    return f"unet/config.json differs from the configuration in the packed file, which is used: {_first(found)}."


def _hint(
    config: Mapping[str, Any], held: Mapping[str, tuple[int, ...]], missing: Sequence[str], unexpected: Sequence[str]
) -> str:
    """Return what the tensors' names and shapes reveal."""
    first = held.get("conv_in.weight", ())
    if first and first[0] != config.get("base_channels", first[0]):
        return f" The weights are of a network with base_channels {first[0]}."
    converted = config.get("conversion") is not None
    parts = (".pre.", ".post.", ".activation.")
    if not any(part in name for name in (missing if converted else unexpected) for part in parts):
        return ""
    if converted:
        return " The configuration has a conversion, and the weights are of another one or of none."
    return " The weights are of a converted network, and the configuration has no conversion."


def _srunet_config(path: Path) -> dict[str, Any] | None:
    try:
        config = read_json(path)
    except BinarizeError:
        return None
    return config if config.get("_class_name") == "SRUNet" else None


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
