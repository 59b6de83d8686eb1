"""The record of its conversion that a converted model carries, and what can be asked of it."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from binarize.conversion.report import ConversionReport
from binarize.errors import BinarizeError
from binarize.methods import Method
from binarize.packed.files import PACKED_FORMAT
from binarize.timestep import TimestepContext

RECORD = "_binarize_conversion"
FORMATS = (1, 2)  # 1: the rules of 0.1 select the layers; 2: the names of the binary layers are recorded


@dataclass
class Conversion:
    """The resolved arguments of `convert` and its results; a predicate in ``keep`` becomes the names it selected.

    ``pinned`` are the names of the binary layers if the rules of 0.1 would select other ones: so a saved model does not
    depend on the rules of the version that loads it.
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
        return {**config, "packed": PACKED_FORMAT} if self.packed else config


def conversion(model: nn.Module) -> Conversion:
    """Return the record of a model's conversion."""
    if not is_converted(model):
        raise BinarizeError(f"this {type(model).__name__} is not converted; call binarize.convert first.")
    return cast(Conversion, getattr(model, RECORD))


def is_converted(model: nn.Module) -> bool:
    """Return True if the model itself carries the record of a conversion."""
    return hasattr(model, RECORD)


def record_config(model: nn.Module, record: Conversion | None) -> None:
    """Store a conversion in the configuration of a host whose constructor has an argument for it (SRUNet)."""
    if not hasattr(model, "register_to_config") or "conversion" not in inspect.signature(type(model)).parameters:
        return
    try:
        config = None if record is None else record.to_config()
    except BinarizeError as error:
        config = {"unsaveable": str(error)}
    cast(Any, model).register_to_config(conversion=config)


def report(model: nn.Module) -> ConversionReport:
    """Return what the conversion did to each module, and why."""
    return conversion(model).report


def timesteps(model: nn.Module, timestep: Tensor | float | int) -> AbstractContextManager[None]:
    """Return a context manager that sets the timestep, ``(B,)`` or scalar, so that parts of a model can run alone."""
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
