"""The record of its conversion that a converted model carries, and what can be asked of it."""

import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from binarize.conditioning import BY_STEPS
from binarize.conversion.report import ConversionReport
from binarize.errors import BinarizeError
from binarize.methods import Method
from binarize.modules import unwrap, update_config
from binarize.packed.files import INT8_FORMAT, PACKED_FORMAT
from binarize.timestep import TimestepContext

FullPrecision = Literal["float", "int8"]
RECORD = "_binarize_conversion"
FORMATS = (1, 2)  # 1: the rules of 0.1 select the layers; 2: the names of the binary layers are recorded
# diffusers' key for a model that is not plain, in its configuration and in config.json. The name of the method is what
# diffusers prints where it is unknown, that is where binarize was not imported.
QUANTIZATION = "quantization_config"
QUANT_METHOD = "binarize (pip install binarize-diffusion, and `import binarize` before loading)"


@dataclass
class Conversion:
    """The resolved arguments of `convert` and its results; a predicate in ``keep`` becomes the names it selected.

    ``full_precision`` is as in `binarize.pack`. ``pinned`` are the names of the binary layers if the rules of 0.1 would
    select other ones: so a saved model does not depend on the rules of the version that loads it.
    """

    method: Method
    structure: str
    keep: list[str]
    overrides: dict[str, Method | None]
    linear: bool | list[str]
    num_train_timesteps: int | None
    report: ConversionReport
    context: TimestepContext | None = None
    packed: bool = False
    full_precision: FullPrecision = "float"
    pinned: list[str] | None = None

    def to_config(self) -> dict[str, Any]:
        """Return the arguments with which `convert` repeats this conversion, as plain JSON types."""
        config = {
            "format": FORMATS[0] if self.pinned is None else FORMATS[1],
            "method": self.method.to_config(),
            "structure": self.structure,
            "keep": list(self.keep),
            "overrides": {k: None if v is None else v.to_config() for k, v in self.overrides.items()},
            "linear": self.linear,
            "num_train_timesteps": self.num_train_timesteps,
        }
        if self.pinned is not None:
            config["binary"] = list(self.pinned)
        if self.context is not None and self.context.timestep != BY_STEPS:
            config["timestep"] = self.context.timestep.to_config()
        if self.full_precision == "int8":
            return {**config, "packed": INT8_FORMAT, "full_precision": "int8"}
        return {**config, "packed": PACKED_FORMAT} if self.packed else config


def conversion(model: nn.Module) -> Conversion:
    """Return the record of a model's conversion; the model may be compiled or wrapped for data parallelism."""
    model = unwrap(model)
    if not is_converted(model):
        raise BinarizeError(f"this {type(model).__name__} is not converted; call binarize.convert first.")
    return cast(Conversion, getattr(model, RECORD))


def is_converted(model: nn.Module) -> bool:
    """Return True if the model itself carries the record of a conversion."""
    return hasattr(unwrap(model), RECORD)


def record_config(model: nn.Module, record: Conversion | None) -> None:
    """Store a conversion in the configuration of a diffusers model, or remove it.

    With it, ``save_pretrained`` describes the network that there is, and ``from_config`` builds it again.
    """
    model = unwrap(model)
    if not is_diffusers_model(model):
        return
    values: dict[str, Any] = {"conversion": None if record is None else recorded_conversion(record)}
    if "conversion" not in inspect.signature(type(model)).parameters:  # SRUNet's constructor has it
        registered = QUANT_METHOD in getattr(sys.modules.get("diffusers.quantizers.auto"), "AUTO_QUANTIZER_MAPPING", ())
        described = {"quant_method": QUANT_METHOD, **values} if registered else _Unregistered()
        values = {} if record is None else {QUANTIZATION: described}
    update_config(model, values, remove=QUANTIZATION)


def recorded_conversion(record: Conversion) -> dict[str, Any]:
    """Return the arguments of a conversion as plain JSON types, or the reason why a file cannot hold them."""
    try:
        return record.to_config()
    except BinarizeError as error:
        return {"unsaveable": str(error)}


class _Unregistered:
    """In the configuration of a model that this version of diffusers could not load; diffusers calls `to_dict`."""

    def to_dict(self) -> dict[str, Any]:
        raise BinarizeError(
            "save_pretrained: this version of diffusers has no quantization methods that binarize could add to, so it "
            "would load another network; call binarize.save(model, folder), and binarize.load(folder) later."
        )


def is_diffusers_model(model: nn.Module) -> bool:
    """Return True if a model has a configuration of diffusers; the check by name does not import diffusers."""
    bases = type(model).__mro__
    ours = any(c.__name__ == "ModelMixin" and c.__module__.startswith("diffusers.") for c in bases)
    return ours and hasattr(model, "register_to_config")


def report(model: nn.Module) -> ConversionReport:
    """Return what the conversion did to each module, and why."""
    return conversion(model).report


def timesteps(model: nn.Module, timestep: Tensor | float | int) -> AbstractContextManager[None]:
    """Return a context manager that sets the timestep, ``(B,)`` or scalar, so that parts of a model can run alone.

    It is also for checkpointing that recomputes layers in the backward pass without our knowledge, such as
    guided-diffusion's or ``torch.utils.checkpoint(..., use_reentrant=True)``, if the loss comes from one forward pass:
    ``with binarize.timesteps(model, t): loss.backward()``.
    """
    context = conversion(model).context
    return nullcontext() if context is None else context.using(timestep)


def checkpoint_context(
    model: nn.Module,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Return the ``context_fn`` for your own torch.utils.checkpoint calls inside a converted model.

    The backward pass recomputes activations after the forward pass has cleared the timestep; this restores it. Models
    whose checkpointing is enabled through diffusers do not need it.
    """
    context = conversion(model).context
    if context is None:
        return lambda: (nullcontext(), nullcontext())
    return context.checkpoint_context
