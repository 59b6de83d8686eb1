"""binarize: make diffusion models 1-bit.

``binarize.convert(unet, method="bidiffsr")`` replaces the convolutions of a diffusion U-Net by binary ones;
``binarize.summary`` counts what is left, ``binarize.build`` makes a network from a recipe.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from binarize import hosts, layers, methods, packed
from binarize.conditioning import Timestep
from binarize.conversion.convert import convert, plan, revert
from binarize.conversion.export import binary_state, param_groups
from binarize.conversion.memory import memory_mode
from binarize.conversion.packing import is_packed, pack, unpack
from binarize.conversion.record import checkpoint_context, report, timesteps
from binarize.conversion.report import ConversionReport
from binarize.conversion.summary import Summary, summary
from binarize.errors import BinarizeError
from binarize.hosts import list_hosts, register_host
from binarize.importing import after_import
from binarize.layers import list_parts, register_layer, register_part, training_step
from binarize.methods import Method, get_method, list_methods, register_method

if TYPE_CHECKING:
    from binarize import diagnosis, evaluation, imaging, inspect, models, recipes, training
    from binarize.diagnosis import doctor
    from binarize.quantizer import BinarizeConfig
    from binarize.recipes.build import build
    from binarize.serialization import load, save
    from binarize.studies.ablation import ablate

__version__ = "0.1.0"

# Names whose modules import diffusers, pydantic or an imaging library: imported at first use.
_SUBMODULES = ("diagnosis", "evaluation", "imaging", "inspect", "models", "recipes", "training")
_LAZY = {
    "BinarizeConfig": "binarize.quantizer",
    "ablate": "binarize.studies.ablation",
    "build": "binarize.recipes.build",
    "doctor": "binarize.diagnosis",
    "load": "binarize.serialization",
    "save": "binarize.serialization",
}

__all__ = ["BinarizeError", "ConversionReport", "Summary", "convert", "plan", "report", "revert", "summary"]
__all__ += [
    "BinarizeConfig",
    "ablate",
    "binary_state",
    "build",
    "doctor",
    "is_packed",
    "load",
    "pack",
    "save",
    "unpack",
]
__all__ += ["checkpoint_context", "memory_mode", "param_groups", "timesteps", "training_step"]
__all__ += ["Timestep"]
__all__ += ["Method", "get_method", "list_methods", "list_parts", "register_method", "register_part"]
__all__ += ["hosts", "layers", "list_hosts", "methods", "packed", "register_host", "register_layer"]
__all__ += ["diagnosis", "evaluation", "imaging", "inspect", "models", "recipes", "training"]


def _register_with_diffusers() -> None:
    with suppress(ImportError, AttributeError):  # a version without quantization methods: save_pretrained says so
        importlib.import_module("binarize.quantizer")


# After `import binarize`, diffusers' from_pretrained loads converted models. Importing diffusers here would take longer
# than all of binarize, and many programs do without it; so this waits until the program has imported its models.
after_import("diffusers.models.modeling_utils", _register_with_diffusers)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"binarize.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'binarize' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
