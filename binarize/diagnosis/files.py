"""Whether the configuration of a saved network and its weights belong together, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from binarize.errors import BinarizeError
from binarize.packed.files import is_packed_file, read_config

_SHOWN = 6


def misfits(folder: Path) -> str | None:
    """Say what of a network's folder does not fit; None where all does, or the files cannot be compared.

    Args:
        folder: Holds ``config.json`` and ``*.safetensors``.
    """
    files = sorted(folder.glob("*.safetensors"))
    config = _config(folder / "config.json")
    if config is None or not files:
        return None
    packed = next(filter(is_packed_file, files), None)
    if packed is not None:
        return _disagreement(config, read_config(packed))
    held: dict[str, tuple[int, ...]] = {}
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                held |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    from binarize.models import SRUNet

    try:
        with torch.device("meta"):
            network = SRUNet.from_config(config)
    except BinarizeError as error:
        return f"unet/config.json builds no network: {error}"
    except (TypeError, ValueError, KeyError, RuntimeError):
        return None
    needed = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [name for name in needed if name not in held]
    unexpected = [name for name in held if name not in needed]
    wrong = [
        f"{name} is {held[name]} in the file and {needed[name]} by the configuration"
        for name in held
        if name in needed and held[name] != needed[name]
    ]
    kinds = (
        ("missing from the file", missing),
        ("not known to the configuration", unexpected),
        ("of another shape", wrong),
    )
    told = [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names]
    return f"{'; '.join(told)}.{_hint(config, held, missing, unexpected)}" if told else None


def _disagreement(config: dict[str, Any], packed: dict[str, Any]) -> str | None:
    """Say where ``config.json`` differs from the configuration in a packed file, which is the one that counts."""
    keys = sorted(key for key in config.keys() | packed.keys() if not key.startswith("_"))
    told = [
        f"{key} is {config.get(key)!r} there, {packed.get(key)!r} in the file"
        for key in keys
        if config.get(key) != packed.get(key)
    ]
    if not told:
        return None
    return f"unet/config.json is not the one that is inside the packed file, which counts: {_some(told)}."


def _hint(config: dict[str, Any], held: dict[str, tuple[int, ...]], missing: list[str], unexpected: list[str]) -> str:
    """Return what the tensors' names and shapes give away."""
    first = held.get("conv_in.weight", ())
    if first and first[0] != config.get("base_channels", first[0]):
        return f" The weights are of a network with base_channels {first[0]}."
    parts = (".pre.", ".post.", ".activation.")
    if config.get("conversion") is None and any(part in name for name in unexpected for part in parts):
        return " The weights are of a converted network, and the configuration has no conversion."
    if config.get("conversion") is not None and any(part in name for name in missing for part in parts):
        return " The configuration has a conversion, and the weights look like those of another one, or of none."
    return ""


def _config(path: Path) -> dict[str, Any] | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and config.get("_class_name") == "SRUNet" else None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
