"""Repeat a recorded conversion, and write a packed model as a folder: what saving and loading need of a network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from binarize.conditioning import BY_STEPS
from binarize.conversion.convert import repeat
from binarize.conversion.packing import pack
from binarize.conversion.record import FORMATS, conversion, is_converted
from binarize.errors import BinarizeError
from binarize.files import update_folder, write_text_atomic
from binarize.hosts import find_host
from binarize.modules import refuse_sharded
from binarize.packed.files import READABLE_FORMATS, write_packed
from binarize.trust import named_by_a_file

CONFIG = "config.json"
_KEYS = {"method", "structure", "keep", "overrides", "linear", "num_train_timesteps", "timestep"}


def apply_conversion(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Convert ``model`` as a recorded conversion says, and pack it if the record says so."""
    options = dict(config)
    packed, version = options.pop("packed", None), options.pop("format", None)
    if packed not in (None, *READABLE_FORMATS):
        raise BinarizeError(f"the model has packed format {packed!r}; this version of binarize reads 1 to 3.")
    full_precision = options.pop("full_precision", "float")
    if full_precision not in (("float", "int8") if packed is not None else ("float",)):
        allowed = "int8 with packed, or no such key"
        raise BinarizeError(f"the conversion has full_precision {full_precision!r:.40}; allowed: {allowed}.")
    if "unsaveable" in options:
        raise BinarizeError(f"this conversion was not saveable: {options['unsaveable']}")
    if version not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise BinarizeError(f"the conversion has format {version!r}; this version of binarize reads formats {known}.")
    binary = options.pop("binary", None) if version == FORMATS[1] else None
    if version == FORMATS[1] and not (isinstance(binary, list) and all(isinstance(name, str) for name in binary)):
        raise BinarizeError(f"the conversion must list the names of its binary layers; got {binary!r}.")
    unknown = sorted(set(options) - _KEYS)
    if unknown or "method" not in options:
        raise BinarizeError(f"the conversion has unknown or missing keys: {', '.join(unknown) or 'method'}.")
    options.setdefault("timestep", BY_STEPS)  # the default for a name may have changed since
    with named_by_a_file():
        repeat(model, options.pop("method"), binary, **options)
    if packed is not None:
        pack(model, full_precision=full_precision)


def check_saveable(model: nn.Module) -> None:
    """Raise BinarizeError if files could not bring a model back: with its conversion, or without a conversion of it."""
    kind = type(model).__name__
    refuse_sharded(model, "save")
    if is_converted(model):
        conversion(model).to_config()
        for name, module in model.named_modules():
            if any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__):
                raise BinarizeError(
                    f"save: {name!r} has a PEFT adapter, which changes the names of its weights; save it with "
                    "save_lora_adapter(folder), take it out with unload_lora(), and then save the network."
                )
        return
    if part := next((name for name, module in model.named_modules() if is_converted(module)), None):
        raise BinarizeError(
            f"save: only {part!r} of this {kind} is converted, and no file would say so; convert the whole {kind}, "
            f"with keep for the rest, or save its state_dict()."
        )
    if find_host(model).rewired(model):
        raise BinarizeError(
            f"save: this {kind} was converted and reverted, and keeps blocks that its class cannot build; save its "
            "state_dict(), or convert it again."
        )


def write_packed_folder(
    model: nn.Module, folder: Path, weights: str, text: str, config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write a packed model's weights and its ``config.json`` into a folder, which holds both or what it held before.

    ``weights`` names its file. ``text`` is the content of ``config.json``; the weights' file stores ``config``.
    """

    def write(temporary: Path) -> None:
        write_packed(model, temporary / weights, config, dtype)
        write_text_atomic(temporary / CONFIG, text)

    update_folder(folder, write)
