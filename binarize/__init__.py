"""binarize: make diffusion models 1-bit.

``binarize.convert(unet, method="bidiffsr")`` replaces the convolutions of a diffusion U-Net by binary ones;
``binarize.summary`` counts what is left, ``binarize.build`` makes a network from a recipe.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import TYPE_CHECKING

from binarize.errors import BinarizeError
from binarize.importing import after_import, exports

if TYPE_CHECKING:
    from binarize import (
        diagnosis,
        evaluation,
        hosts,
        imaging,
        inspect,
        layers,
        methods,
        models,
        packed,
        recipes,
        training,
    )
    from binarize.conditioning import Timestep
    from binarize.conversion.convert import convert, plan, revert
    from binarize.conversion.export import binary_state, param_groups
    from binarize.conversion.memory import memory_mode
    from binarize.conversion.packing import is_packed, pack, unpack
    from binarize.conversion.record import checkpoint_context, report, timesteps
    from binarize.conversion.report import ConversionReport
    from binarize.conversion.summary import Summary, summary
    from binarize.diagnosis import doctor
    from binarize.hosts import list_hosts, register_host
    from binarize.layers import calibrate, list_parts, register_layer, register_part, training_step
    from binarize.methods import Method, get_method, list_methods, register_method
    from binarize.onnx.export import export_onnx
    from binarize.quantizer import BinarizeConfig
    from binarize.recipes.building import build
    from binarize.serialization import load, save
    from binarize.studies.ablation import ablate

__version__ = "0.1.0"

# Importing PyTorch takes a second, diffusers another: modules are imported when one of their names is first used.
_NAMES = {
    "conditioning": ("Timestep",),
    "conversion.convert": ("convert", "plan", "revert"),
    "conversion.export": ("binary_state", "param_groups"),
    "conversion.memory": ("memory_mode",),
    "conversion.packing": ("is_packed", "pack", "unpack"),
    "conversion.record": ("checkpoint_context", "report", "timesteps"),
    "conversion.report": ("ConversionReport",),
    "conversion.summary": ("Summary", "summary"),
    "diagnosis": ("doctor",),
    "hosts": ("list_hosts", "register_host"),
    "layers": ("calibrate", "list_parts", "register_layer", "register_part", "training_step"),
    "methods": ("Method", "get_method", "list_methods", "register_method"),
    "quantizer": ("BinarizeConfig",),
    "onnx.export": ("export_onnx",),
    "recipes.building": ("build",),
    "serialization": ("load", "save"),
    "studies.ablation": ("ablate",),
}

__all__ = ["BinarizeError", "ConversionReport", "Summary", "convert", "plan", "report", "revert", "summary"]
__all__ += ["BinarizeConfig", "ablate", "binary_state", "build", "doctor", "is_packed", "load", "pack", "save"]
__all__ += ["Timestep", "calibrate", "checkpoint_context", "memory_mode", "param_groups", "timesteps"]
__all__ += ["export_onnx", "training_step", "unpack"]
__all__ += ["Method", "get_method", "list_methods", "list_parts", "register_method", "register_part"]
__all__ += ["list_hosts", "register_host", "register_layer"]
__all__ += ["diagnosis", "evaluation", "hosts", "imaging", "inspect", "layers", "methods", "models", "packed"]
__all__ += ["recipes", "training"]


def _register_with_diffusers() -> None:
    with suppress(ImportError, AttributeError):  # a version without quantization methods: save_pretrained says so
        importlib.import_module("binarize.quantizer")


# After `import binarize`, diffusers' from_pretrained loads converted models.
after_import("diffusers.models.modeling_utils", _register_with_diffusers)


__getattr__ = exports(__name__, _NAMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
